"""The demo's course: image, daemon, guests, snapshot under load, backup, proof; everything gone at the end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack

import numpy

import fastcbw
from fastcbw.cli import demo_image
from fastcbw.cli.demo_guest import Diary
from fastcbw.cli.demo_proof import Instant, digests, prove
from fastcbw.disk import open as open_disk
from fastcbw.errors import Error
from fastcbw.export.nbd.client import Client
from fastcbw.qmp.daemon import Daemon
from fastcbw.units import format_size

GUESTS = 3
#: Requests per second of each guest, two thirds of them writes.
RATE = 700
#: Share of the time before the snapshot.
IDLE_SHARE = 0.4
WARM_UP_SECONDS = 0.3
START_SECONDS_LIMIT = 30
STOP_SECONDS_LIMIT = 30
READ_BYTES = 4 << 20
DIARY_SPARE = 1000


class Guests:
    """The guest processes and their diaries."""

    def __init__(self, folder: str, socket: str, export: str, blocks: list[int], seconds: float):
        self.diaries: list[Diary] = []
        self._processes: list[subprocess.Popen] = []
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(
            [os.path.dirname(os.path.dirname(os.path.abspath(fastcbw.__file__))), os.environ.get("PYTHONPATH", "")])}
        capacity = int(RATE * (seconds + START_SECONDS_LIMIT) * 2) + DIARY_SPARE
        for number in range(GUESTS):
            path = os.path.join(folder, f"diary{number}")
            self.diaries.append(Diary(path, capacity))
            with open(os.path.join(folder, f"blocks{number}"), "x") as file:
                file.writelines(f"{block}\n" for block in blocks[number::GUESTS])
            self._processes.append(subprocess.Popen(
                # -P: a folder fastcbw/ where the command is run, a checkout not built, is not the package.
                [sys.executable, "-P", "-m", "fastcbw.cli.demo_guest", path, socket, export, file.name, str(RATE),
                 str(number), str(number)],
                env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                start_new_session=True))  # Ctrl-C is for us: we end them

    def check(self) -> None:
        """Raise with its words when a guest has ended by itself."""
        for process in self._processes:
            if process.poll() is not None:
                words = process.stderr.read().strip().rpartition("\n")[2]
                raise Error(f"guest: ended with status {process.returncode}: {words or 'without a word'}")

    def wait(self, seconds: float) -> None:
        """Let the load run for SECONDS."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, 0.1))

    def wait_until_running(self) -> None:
        end = time.monotonic() + START_SECONDS_LIMIT
        while not all(diary.entries for diary in self.diaries):
            if time.monotonic() > end:
                raise Error(f"guest: has not begun within {START_SECONDS_LIMIT} seconds")
            self.wait(0.05)

    def stop(self) -> None:
        """Let each finish its request, and wait for its end."""
        for diary in self.diaries:
            diary.stop = 1
        for process in self._processes:
            process.wait(STOP_SECONDS_LIMIT)
            if process.returncode:
                self.check()

    def kill(self) -> None:
        """End them, whatever they do."""
        for process in self._processes:
            process.kill()
            process.wait()
            process.stderr.close()
        for diary in self.diaries:
            diary.close()


def run_demo(size: int, seconds: float, say: Callable[[str], None]) -> dict:
    """Run the demo on a disk of SIZE bytes with SECONDS of load and return the report, fit for JSON.

    say: called with each line for people. Raises fastcbw.Error or OSError when it cannot be shown; whatever it made is
    removed, also after Ctrl-C.
    """
    for tool in ("mkfs.ext4", "debugfs", "e2fsck"):
        demo_image.find_tool(tool)
    folder = tempfile.mkdtemp(prefix="fastcbw-demo-")
    stack = ExitStack()
    try:
        needed = size * demo_image.FILL_PERCENT // 100 * 2 + size // 8
        room = shutil.disk_usage(folder).free
        if room < needed:
            raise Error(f"{os.path.dirname(folder)}: has room for {format_size(room)}, the demo needs "
                        f"{format_size(needed)} (make room, set TMPDIR, or give a smaller --size)")
        return _run(folder, size, seconds, say, stack)
    finally:
        signals = [(number, signal.signal(number, signal.SIG_IGN)) for number in (signal.SIGINT, signal.SIGTERM)]
        try:
            stack.close()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            for number, handler in signals:
                signal.signal(number, handler)


def _run(folder: str, size: int, seconds: float, say: Callable[[str], None], stack: ExitStack) -> dict:
    image, target, socket = (os.path.join(folder, name) for name in ("disk.img", "backup.img", "nbd"))
    say(f"disk       ext4, {format_size(size)}, {demo_image.FILL_PERCENT} % of it files")
    demo_image.make_image(image, size, folder)
    blocks = sorted(demo_image.content_blocks(image) + demo_image.free_blocks(image))
    original = digests(image)

    daemon = stack.enter_context(Daemon())
    disk = open_disk(image, name="disk")
    daemon.add_disk(disk)
    daemon.listen_nbd(socket)
    guests = Guests(folder, socket, "disk", blocks, seconds)
    stack.callback(guests.kill)
    guests.wait_until_running()
    say(f"guest      {GUESTS} connections, {GUESTS * RATE} requests of 4 KiB a second, two thirds writes")
    guests.wait(WARM_UP_SECONDS)

    idle_begin = time.monotonic_ns()
    guests.wait(seconds * IDLE_SHARE)
    least = [diary.acknowledged for diary in guests.diaries]
    idle_end = time.monotonic_ns()
    snapshot = daemon.create_snapshot("demo", ["disk"])[0]
    most = [diary.issued for diary in guests.diaries]
    taken = time.monotonic_ns()
    record = daemon.start_backup("disk", target, snapshot="demo")
    record.thread.join()
    backup_end = time.monotonic_ns()
    if record.outcome != "completed":
        raise Error(f"backup: {record.error}")
    guests.check()
    same = _equals_export(target, socket, "disk@demo")
    guests.wait(seconds * (1 - IDLE_SHARE) - (time.monotonic_ns() - idle_end) / 1e9)
    same = same and _equals_export(target, socket, "disk@demo")
    load_end = time.monotonic_ns()
    facts = snapshot.status()
    guests.stop()
    say("proof      every byte of the backup, of the snapshot's export and of what the guest wrote")

    verdict = prove(target, original, guests.diaries, Instant(least, most))
    final = [diary.acknowledged for diary in guests.diaries]
    intact = prove(image, original, guests.diaries, Instant(final, final))
    clean = demo_image.is_clean(target)
    requests = numpy.concatenate([diary.requests() for diary in guests.diaries])
    idle = _latency(requests, idle_begin, idle_end)
    busy = _latency(requests, idle_end, backup_end)
    backup_seconds = (backup_end - taken) / 1e9
    report = {
        "verified": verdict.problem is None and intact.problem is None and same and clean,
        "problem": verdict.problem or (intact.problem and f"live disk: {intact.problem}"),
        "export_equals_backup": same,
        "filesystem_clean": clean,
        "disk_bytes": size,
        "backup_bytes": size,
        "backup_data_bytes": record.job.result["data_bytes"],
        "backup_seconds": round(backup_seconds, 3),
        "backup_bytes_per_s": int(size / backup_seconds),
        "snapshot_us": (taken - idle_end) // 1000,
        "guest_requests": len(requests),
        "guest_requests_per_s_idle": idle["per_s"],
        "guest_requests_per_s_backup": busy["per_s"],
        **{f"guest_{name}_us_idle": idle[name] for name in ("p50", "p99", "p999", "max")},
        **{f"guest_{name}_us_backup": busy[name] for name in ("p50", "p99", "p999", "max")},
        "guest_writes_at_instant": sum(verdict.cuts),
        "guest_blocks_at_instant": verdict.written_blocks,
        "guest_writes": sum(final),
        "load_seconds_after_snapshot": round((load_end - idle_end) / 1e9, 3),
        "preserved_bytes": facts["preserved_bytes"],
        "preserved_zero_bytes": facts["zero_clusters"] * facts["cluster_size"],
        "store_bytes": facts["ram_bytes"] + facts["disk_bytes"],
        "cluster_size": facts["cluster_size"],
    }
    _say_report(report, say)
    return report


def _equals_export(path: str, socket: str, export: str) -> bool:
    """Tell whether the file at PATH is what a client reads from EXPORT, byte for byte."""
    with open(path, "rb") as file, Client(socket, export) as client:
        for offset in range(0, client.length, READ_BYTES):
            length = min(READ_BYTES, client.length - offset)
            if file.read(length) != client.read(offset, length):
                return False
        return not file.read(1)


def _latency(requests: numpy.ndarray, begin: int, end: int) -> dict:
    """Return percentiles in microseconds, and the rate, of the requests that began from BEGIN to END."""
    chosen = requests[(requests["begun"] >= begin) & (requests["begun"] < end)]
    if not len(chosen):
        return dict.fromkeys(("p50", "p99", "p999", "max"), None) | {"per_s": 0}
    took = (chosen["ended"] - chosen["begun"]) / 1000
    found = {name: round(float(numpy.percentile(took, share)), 1) for name, share in (("p50", 50), ("p99", 99), ("p999", 99.9))}
    return found | {"max": round(float(took.max()), 1), "per_s": round(len(chosen) / (end - begin) * 1e9)}


def _say_report(report: dict, say: Callable[[str], None]) -> None:
    rate = format_size(report["backup_bytes_per_s"])
    say(f"snapshot   taken in {report['snapshot_us'] / 1000:.1f} ms under load")
    say(f"backup     {format_size(report['backup_bytes'])} ({format_size(report['backup_data_bytes'])} of data) in "
        f"{report['backup_seconds']:.2f} s, {rate}/s, while the guest went on")
    for name, when in (("idle", "before"), ("backup", "during")):
        p50, p99, p999 = (report[f"guest_{share}_us_{name}"] for share in ("p50", "p99", "p999"))
        say(f"guest      {when}: p50 {p50} us, p99 {p99} us, p99.9 {p999} us, {report[f'guest_requests_per_s_{name}']} requests/s")
    say(f"preserved  {format_size(report['preserved_bytes'])} of old data, {format_size(report['preserved_zero_bytes'])} of it "
        f"zeroes that cost nothing; {format_size(report['store_bytes'])} in the store")
    if report["verified"]:
        say(f"verified   the backup is bit-identical to the disk at the instant of the snapshot, after "
            f"{report['guest_writes_at_instant']} of {report['guest_writes']} writes; e2fsck finds it clean")
    else:
        reasons = [report["problem"]] if report["problem"] else []
        reasons += ["the snapshot's export differs from the backup"] * (not report["export_equals_backup"])
        reasons += ["e2fsck complains of the backup"] * (not report["filesystem_clean"])
        say(f"FAILED     {'; '.join(reasons)}")
