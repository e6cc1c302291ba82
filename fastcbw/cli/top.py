"""``fastcbw top``: what a running daemon does right now, painted again every second."""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np

from fastcbw.cbw.latency import KINDS, LIMITS_NS, percentile_us
from fastcbw.cli.common import UsageError, add_json, add_qmp, connect, print_json, table_lines, until
from fastcbw.units import format_size

CLEAR_SCREEN, HOME, CLEAR_LINE, CLEAR_BELOW = "\x1b[2J", "\x1b[H", "\x1b[K", "\x1b[J"
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
PERCENTILES = (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999))


def add_parser(verbs) -> None:
    parser = verbs.add_parser("top", help="show live rates, tiers and guest latencies of a running daemon",
                              description="Rates and latencies are of the last interval. Guest writes are measured while this runs. Ends "
                                          "with Ctrl-C. With --json, or where the output is no terminal: one report after another.")
    parser.add_argument("--interval", type=_seconds, default=1.0, metavar="SECONDS", help="between two reports (default 1)")
    parser.add_argument("--once", action="store_true", help="one report, of one interval, then end")
    add_qmp(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.05 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0.05 to 3600")
    return seconds


def run(arguments: argparse.Namespace) -> int:
    if arguments.json and sys.stdout.closed:
        raise UsageError("--json: there is no standard output")
    screen = sys.stdout.isatty() and not arguments.json and not arguments.once
    with connect(arguments) as daemon:
        before = look(daemon)
        if screen:
            print(CLEAR_SCREEN + HIDE_CURSOR, end="")
        try:
            while True:
                time.sleep(arguments.interval)
                now = look(daemon)
                report = compare(before, now)
                before = now
                if arguments.json:
                    print_json(report)
                elif screen:
                    print(HOME + "".join(line + CLEAR_LINE + "\n" for line in lines(report)) + CLEAR_BELOW, end="", flush=True)
                else:
                    print("\n".join(lines(report)), flush=True)
                if arguments.once:
                    return 0
        finally:
            if screen:
                print(SHOW_CURSOR, end="", flush=True)


def look(daemon) -> dict:
    """Return what the daemon says now, with the time at which it said so."""
    status = daemon.status()
    return {"at": time.monotonic(), "status": status, "latencies": daemon.latencies()}


def compare(before: dict, now: dict) -> dict:
    """Return one report: the state of NOW, and rates and latencies of the interval since BEFORE."""
    seconds = max(now["at"] - before["at"], 1e-9)

    def rate(path: tuple, key: str) -> float:
        old, new = before["status"], now["status"]
        for step in path:
            old, new = (old or {}).get(step) or {}, new[step]
        return round(max(0, new.get(key, 0) - old.get(key, 0)) / seconds, 1)

    disks, snapshots = {}, {}
    for name, disk in now["status"]["disks"].items():
        guest = ("disks", name, "guest")
        disks[name] = {"length": disk["length"], "writes_per_s": rate(guest, "writes"), "bytes_per_s": rate(guest, "bytes"),
                       "preserving_per_s": rate(guest, "touches"), "waits_per_s": rate(guest, "waits"),
                       "latency_us": {kind: _percentiles(before, now, name, kind) for kind in KINDS}}
        for snapshot, facts in disk["snapshots"].items():
            of = ("disks", name, "snapshots", snapshot)
            snapshots[f"{name}@{snapshot}"] = {
                "state": facts.get("state"), "reason": facts.get("reason"), "preserved_bytes": facts.get("preserved_bytes", 0),
                "preserved_bytes_per_s": rate(of, "preserved_bytes"),
                **{key: facts.get(key, 0) for key in ("ram_bytes", "ram_limit", "disk_bytes", "disk_limit")},
                "seconds_to_full": facts.get("seconds_to_full")}
    exports = {}
    known = {export["name"]: export for export in (before["status"]["nbd"] or {"exports": []})["exports"]}
    for export in (now["status"]["nbd"] or {"exports": []})["exports"]:
        old = known.get(export["name"], {}).get("counters", {})
        counted = {key: round(max(0, export["counters"][key] - old.get(key, 0)) / seconds, 1) for key in
                   ("requests", "bytes_read", "bytes_written", "errors")}
        exports[export["name"]] = {"connections": export["connections"], **{f"{key}_per_s": value for key, value in counted.items()}}
    jobs = [{"id": job["id"], "status": job.get("outcome", job["status"]), "done": job["current-progress"], "total": job["total-progress"],
             "bytes_per_s": job["bytes-per-s"], "target": job["target"]} for job in now["status"]["jobs"]]
    return {"version": now["status"]["version"], "uptime_s": now["status"]["uptime_s"], "interval_s": round(seconds, 3),
            "disks": disks, "snapshots": snapshots, "exports": exports, "jobs": jobs}


def _percentiles(before: dict, now: dict, disk: str, kind: str) -> dict:
    new, old = now["latencies"].get(disk), before["latencies"].get(disk)
    counts = np.zeros(len(LIMITS_NS), np.int64)
    if new is not None:
        _add(counts, new[kind], 1)
        if old is not None and old["since"] == new["since"]:
            _add(counts, old[kind], -1)
    return {"count": int(counts.sum()), **{name: percentile_us(counts, fraction) for name, fraction in PERCENTILES}}


def _add(counts: np.ndarray, pairs: list, sign: int) -> None:
    for limit, count in pairs:
        counts[np.searchsorted(LIMITS_NS, limit)] += sign * count


def lines(report: dict) -> list[str]:
    """Return a report as lines of text."""
    out = [f"fastcbw {report['version']}, up {report['uptime_s']:.0f} s, last {report['interval_s']:.1f} s", ""]
    rows = []
    for name, disk in report["disks"].items():
        for kind, latency in disk["latency_us"].items():
            first = kind == KINDS[0]
            rows.append((name if first else "", f"{disk['writes_per_s']:.0f}/s" if first else "", f"{_size(disk['bytes_per_s'])}/s" if first else "",
                         kind, f"{latency['count'] / report['interval_s']:.0f}/s", *(_us(latency[name]) for name, _ in PERCENTILES)))
    out += table_lines(("DISK", "WRITES", "WRITTEN", "OF THESE", "RATE", *(name.upper() for name, _ in PERCENTILES)), rows)
    if report["snapshots"]:
        out += ["", *table_lines(("SNAPSHOT", "STATE", "PRESERVED", "RATE", "RAM", "DISK", "FULL IN"), [
            (name, snapshot["state"] or "", format_size(snapshot["preserved_bytes"]), f"{_size(snapshot['preserved_bytes_per_s'])}/s",
             _tier(snapshot["ram_bytes"], snapshot["ram_limit"]), _tier(snapshot["disk_bytes"], snapshot["disk_limit"]),
             until(snapshot["seconds_to_full"])) for name, snapshot in report["snapshots"].items()])]
    if report["exports"]:
        out += ["", *table_lines(("EXPORT", "CLIENTS", "REQUESTS", "READ", "WRITTEN", "ERRORS"), [
            (name, str(export["connections"]), f"{export['requests_per_s']:.0f}/s", f"{_size(export['bytes_read_per_s'])}/s",
             f"{_size(export['bytes_written_per_s'])}/s", f"{export['errors_per_s']:.0f}/s") for name, export in report["exports"].items()])]
    if report["jobs"]:
        out += ["", *table_lines(("JOB", "STATUS", "DONE", "RATE", "TARGET"), [
            (job["id"], job["status"], f"{_size(job['done'])} of {_size(job['total'])}", f"{_size(job['bytes_per_s'])}/s", job["target"])
            for job in report["jobs"]])]
    out += [f"{name}: {snapshot['reason']}" for name, snapshot in report["snapshots"].items() if snapshot["reason"]]
    return out


def _size(number: float) -> str:
    return format_size(int(number))


def _us(latency: float | None) -> str:
    return "-" if latency is None else f"{latency:.1f} us" if latency < 1000 else f"{latency / 1000:.1f} ms"


def _tier(used: int, limit: int) -> str:
    return "-" if not limit else f"{format_size(used)} of {format_size(limit)} ({used / limit:.0%})"
