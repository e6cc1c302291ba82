"""``fastcbw status``: what a running daemon knows of itself."""

from __future__ import annotations

import argparse

from fastcbw.cli.common import UsageError, add_json, add_qmp, connect, print_json, print_table, until
from fastcbw.units import format_size


def add_parser(verbs) -> None:
    parser = verbs.add_parser("status", help="show disks, snapshots, exports and jobs of a running daemon")
    parser.add_argument("--prometheus", action="store_true", help="print all counters in Prometheus' text format")
    add_qmp(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.prometheus and arguments.json:
        raise UsageError("--prometheus: has a format of its own (leave --json out)")
    with connect(arguments) as daemon:
        if arguments.prometheus:
            print(daemon.metrics(), end="")
            return 0
        status = daemon.status()
        snapshots = daemon.snapshots()
    if arguments.json:
        print_json(status)
        return 0
    print(f"fastcbw {status['version']}, process {status['pid']}, up {status['uptime_s']:.0f} s")
    if status["nbd"] is not None:
        print()
        print_table(("EXPORT", "URI"), [(export["name"], export["uri"]) for export in status["nbd"]["exports"]])
    if status["disks"]:
        print()
        print_table(("DISK", "LENGTH", "WRITES", "WRITTEN", "FIRST TOUCHES", "WAITS", "LONGEST"), [
            (name, format_size(disk["length"]), disk["guest"]["writes"], format_size(disk["guest"]["bytes"]),
             disk["guest"]["touches"], disk["guest"]["waits"], f"{disk['guest']['wait_us_max']} us")
            for name, disk in status["disks"].items()])
        for name, disk in status["disks"].items():
            for line in _savings((("copies by lazy discard", disk["guest"]["lazy_recorded"] - disk["guest"]["lazy_cancelled"]),
                                  ("disk reads by what is in RAM", disk["guest"]["ram_read_bytes"]))):
                print(f"{name}: {line}")
    if snapshots:
        print()
        print_table(("SNAPSHOT", "LENGTH", "STATE", "PRESERVED", "RAM", "OF", "DISK", "OF", "HOLDS"), [_row(found) for found in snapshots])
        for found in snapshots:
            for line in _remarks(found["status"]):
                print(f"{found['disk']}@{found['name']}: {line}")
    if status["jobs"]:
        print()
        print_table(("JOB", "STATUS", "SOURCE", "TARGET", "DONE", "RATE"), [
            (job["id"], job.get("outcome", job["status"]), f"{job['disk']}@{job['snapshot']}", job["target"],
             f"{format_size(job['current-progress'])} of {format_size(job['total-progress'])}",
             f"{format_size(int(job['bytes-per-s']))}/s") for job in status["jobs"]])
        for job in status["jobs"]:
            if job["status"] != "concluded" and job["guest-p99"] is not None:
                now = "no writes" if job["guest-p99-now"] is None else f"{job['guest-p99-now']:.3g} ms"
                print(f"{job['id']}: guest p99 {now}, target {job['guest-p99']} ms")
            if job.get("error"):
                print(f"{job['id']}: {job['error']}")
    if status["bound"]:
        print()
        for found in status["bound"]:
            for line in _bound(found):
                print(line)
    return 0


def _bound(found: dict) -> list[str]:
    """What a client has bound to its connection, or what could not be undone when that ended."""
    who = f"client {found['client']}" + ("" if found["pid"] is None else f" (process {found['pid']}, {found['command'] or 'gone'})")
    if found["connected"]:
        return [f"{who} holds {', '.join(row['what'] for row in found['holds'])}"]
    return [f"{who} has gone and left {row['what']}" + (f": {row['why']}" if "why" in row else "") for row in found["left-over"]]


def _remarks(kept: dict) -> list[str]:
    """What is to be said of a snapshot beside its row."""
    remarks = [kept["reason"]] if kept.get("reason") else []
    if kept.get("seconds_to_full") is not None:
        remarks.append(f"full in {until(kept['seconds_to_full'])} at the present rate")
    if "cluster_size" in kept:
        remarks += _savings((("room by zeroes", kept["zero_clusters"] * kept["cluster_size"]),
                             ("copies by copy-on-read", kept["copies_avoided"] * kept["cluster_size"]),
                             ("what its readers have done with", kept["discarded_bytes"])))
    if kept.get("disk_error"):
        remarks.append(f"the disk tier fails: {kept['disk_error']} (what was to go there stays in RAM, and is tried again)")
    if kept.get("refused_writes"):
        remarks.append(f"{kept['refused_writes']} guest writes failed for its sake, the last because: {kept['refused_reason']}")
    return remarks


def _savings(saved: tuple[tuple[str, int], ...]) -> list[str]:
    """One line of what features have saved, in bytes; none where they have saved nothing."""
    parts = [f"{format_size(number)} of {what}" for what, number in saved if number > 0]
    return [f"saved {', '.join(parts)}"] if parts else []


def _row(found: dict) -> tuple:
    kept = found["status"]
    return (f"{found['disk']}@{found['name']}", format_size(found["length"]), kept.get("state", ""),
            *(format_size(kept.get(key, 0)) for key in ("preserved_bytes", "ram_bytes", "ram_limit", "disk_bytes", "disk_limit")),
            kept.get("holds", 0))
