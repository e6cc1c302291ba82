"""One cell: a disk, a guest's load on it, an instant at which a backup begins, and everything that is measured of it.

    load     ├── before ──┤│├───── during: until the backup has ended ─────┤── after ──┤
                           instant

At the instant the load's process is stopped, its last requests end, the disk's file is copied aside, the backup begins, and the load goes
on. So what the backup has to be is known exactly, whatever the scheme. Of a request that was under way then only the wait after the instant counts.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import traceback
from contextlib import ExitStack
from typing import Any

import numpy
from numpy.typing import NDArray

from fastcbw.compare import measures
from fastcbw.compare.loads import LOADS
from fastcbw.compare.loads.base import Load
from fastcbw.compare.memory import touch_memory
from fastcbw.compare.plan import Cell, Plan, reason_not_to_run
from fastcbw.compare.process import Process, Usage
from fastcbw.compare.results import steal
from fastcbw.compare.schemes import SCHEMES
from fastcbw.compare.schemes.base import Progress, Scheme, Setting
from fastcbw.compare.steal import Steal
from fastcbw.compare.targets import TARGETS
from fastcbw.compare.targets.base import Target
from fastcbw.compare.watchdog import Watchdog
from fastcbw.errors import Error

SAMPLE_S, FIRST_SAMPLE_S = 0.25, 0.1
PIECE = 8 << 20
SERVER_CPU, LOAD_CPU = 0, 1
#: The load has ended its requests when the server has done nothing for this long.
SILENCE_S = 0.02
#: What only a load moves: a block; without a write, after so many seconds.
BLOCK, READS_S = 4096, 2.0
#: How often a cell is begun when the guest was caught with a request half sent; how often it is measured when the host took too much meanwhile.
CAUGHT_MAX, NOISY_MAX = 3, 10


class Caught(Error):
    """The guest was stopped between the two halves of a request, and the server lets no backup begin before it has the other."""


def measure(cell: Cell, plan: Plan, folder: str) -> dict[str, Any]:
    """Measure CELL in a folder of its own below FOLDER, and return its record. What fails is in the record too."""
    record = {"scheme": cell.scheme, "load": cell.load, "target": cell.target, "repetition": cell.repetition}
    reason = reason_not_to_run(cell, plan.trace)
    if reason is not None:
        return record | {"status": "not installed", "why": reason}
    attempts: list[dict[str, Any]] = []
    caught = noisy = 0
    while True:
        found, was_caught = _attempt(cell, plan, folder)
        was_noisy = (steal(found) or 0) > plan.steal_max
        attempts.append(found)
        caught, noisy = caught + was_caught, noisy + was_noisy
        if not (was_caught or was_noisy) or caught == CAUGHT_MAX or noisy == NOISY_MAX:
            # One that measured something, and of those the one of which the host took least.
            best = min(attempts, key=lambda one: (one["status"] != "measured", steal(one)))
            return record | {"attempts": len(attempts)} | best


def _attempt(cell: Cell, plan: Plan, folder: str) -> tuple[dict[str, Any], bool]:
    """Return what is found, and whether the guest was caught, so that it is worth another attempt."""
    with ExitStack() as stack:
        own = tempfile.mkdtemp(prefix="cell-", dir=folder)
        stack.callback(shutil.rmtree, own, ignore_errors=True)
        run = _Run(cell, plan, own, stack)
        watchdog = stack.enter_context(Watchdog(plan.cell_s_max, run.processes))
        try:
            return {"status": "measured"} | run.run(), False
        except Exception as error:      # whatever it is: the other cells go on
            why = " ".join(str(error).split()) if isinstance(error, (Error, OSError)) else f"{type(error).__name__}: {error}"
            where = traceback.format_exception(error) + run.logs()
            if (found := watchdog.where()) is not None:
                why, where = f"given up after {watchdog.seconds:.0f} s: {found[0]}; {why}", found + where
            return {"status": "failed", "why": why, "where": where}, isinstance(error, Caught)


class _Run:
    def __init__(self, cell: Cell, plan: Plan, folder: str, stack: ExitStack):
        self.plan, self.stack = plan, stack
        server_cpu, load_cpu = (SERVER_CPU, LOAD_CPU) if plan.pinned else (None, None)
        self.image = os.path.join(folder, "disk.img")
        self.at_instant = os.path.join(folder, "instant.img")
        self.target: Target = TARGETS[cell.target](folder, plan.length, load_cpu)
        self.scheme: Scheme = SCHEMES[cell.scheme](Setting(self.image, plan.length, folder, server_cpu, plan.ram), self.target)
        self.load: Load = LOADS[cell.load]("", plan.length, folder, load_cpu, plan.warm_up_s + plan.before_s + plan.during_s_max + plan.after_s + 5,
                                           plan.trace)
        self.cpus = {server_cpu, load_cpu} if plan.pinned else os.sched_getaffinity(0)
        self.during_s_min = plan.during_s(cell)
        self.samples: list[dict[str, Any]] = []

    def processes(self) -> list[Process]:
        """Return those of this cell that were made until now."""
        return [process for process in (self.load.process, *self.scheme.clients, *self.scheme.processes, self.target.process) if process is not None]

    def logs(self) -> list[str]:
        """Return what each process said."""
        return [f"{process.name} said: {process.words_said(2000)}" for process in self.processes() if os.path.exists(process.log_path)]

    def run(self) -> dict[str, Any]:
        touch_memory(4 * self.plan.length)      # the disk, the same at the instant, the target, old data
        fill(self.image, self.plan.length)
        self.stack.callback(self.target.stop)
        self.target.start()
        self.stack.callback(self.scheme.stop)
        self.scheme.start()
        self.load.uri = self.scheme.uri
        self.stack.callback(self.load.stop)
        idle = self._moved()
        self.load.start()
        self._wait_for_requests(idle)
        self._sleep(self.plan.warm_up_s)
        begin = time.monotonic_ns()
        self._sleep(self.plan.before_s)

        paused = time.monotonic_ns()
        self.load.pause()
        self._wait_for_silence()
        shutil.copyfile(self.image, self.at_instant)
        used = (self.scheme.usage(), self.target.usage())
        instant = time.monotonic_ns()
        try:
            self.scheme.begin()
        except TimeoutError as error:
            raise Caught(f"no backup began while the guest was stopped: {error}") from error
        self.load.go_on()
        resumed = time.monotonic_ns()

        steal_meter = Steal(self.cpus)
        progress, ended, during_end = self._watch(instant)
        taken = steal_meter.share((time.monotonic_ns() - resumed) / 1e9)
        used = [difference(after, before) for after, before in zip((self.scheme.usage(), self.target.usage()), used)]
        self._sleep(self.plan.after_s)
        end = time.monotonic_ns()
        requests = measures.across_pause(self.load.finish(), paused, resumed)
        if not progress.ended:
            progress, ended = self._wait_for_end(instant)
        return {
            "steal": taken, "settings": self.scheme.settings, "load_settings": self.load.settings,
            "guest": {name: measures.summary(measures.between(requests, since, until), (until - since) / 1e9, self.load.rate)
                      for name, since, until in (("before", begin, paused), ("during", resumed, during_end), ("after", during_end, end))},
            "backup": self._backup(progress, ended, instant),
            "use": self._use(*used, measures.between(requests, resumed, during_end), progress.done),
            "curve": measures.curve(measures.between(requests, resumed, during_end)),
            "time": measures.over_time(requests, instant, begin, end),
            "tiers": {name: [sample[name] for sample in self.samples] for name in ("t_s", "ram", "disk", "done")},
            "pause_s": round((resumed - paused) / 1e9, 4), "backup_ends_s": round((during_end - instant) / 1e9, 3),
        }

    def _sleep(self, seconds: float) -> None:
        """Let the load run; Error when it has ended."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._check_load()
            time.sleep(min(left, 0.05))

    def _check_load(self) -> None:
        if not self.load.process.running():
            raise Error(f"load: ended early: {self.load.process.words_said()}")

    def _moved(self) -> tuple[int, int]:
        used = self.scheme.usage()
        return used.read_bytes, used.written_bytes

    def _wait_for_requests(self, idle: tuple[int, int]) -> None:
        """Return when the load has written a block, or has read for a while: a server that has been IDLE may read files of its own when it is connected to."""
        since = time.monotonic()
        while True:
            read, written = self._moved()
            if written - idle[1] >= BLOCK or (read - idle[0] >= BLOCK and time.monotonic() - since >= READS_S):
                return
            self._sleep(0.01)

    def _wait_for_silence(self) -> None:
        """Return when the server has nothing of the stopped load left to do: what it moves stands still, and none of its threads wants a processor,
        as one does that a request has woken up, however busy the machine is."""
        last, since = None, time.monotonic()
        while time.monotonic() - since < SILENCE_S:
            now = self._moved()
            if now != last or any(process.is_busy() for process in self.scheme.processes):
                last, since = now, time.monotonic()
            time.sleep(0.002)

    def _watch(self, instant: int) -> tuple[Progress, float, int]:
        """Sample until the backup has ended, and at least and at most as long as planned; return its progress, when it ended, and when `during` does."""
        progress, ended, due = Progress(), 0.0, 0.0
        while True:
            now_s = (time.monotonic_ns() - instant) / 1e9
            if not progress.ended or not self.scheme.backs_up:
                progress = self.scheme.progress()
                ended = (time.monotonic_ns() - instant) / 1e9
                if progress.ended or ended >= due:
                    self._sample(ended, progress)
                    due = min(ended + SAMPLE_S, max(2 * ended, FIRST_SAMPLE_S))     # what the questions cost is the server's time
            end = self.during_s_min if progress.ended else self.plan.during_s_max
            if now_s >= end:
                break
            now_s = (time.monotonic_ns() - instant) / 1e9
            if progress.ended and self.scheme.backs_up:
                self._sleep(end - now_s)
            else:
                self._check_load()
                self.scheme.wait_for_change(max(0.0, min(due, end) - now_s))
        last = ended if progress.ended and self.scheme.backs_up else now_s
        return progress, ended, instant + max(int(last * 1e9), 1)

    def _sample(self, t_s: float, progress: Progress) -> None:
        tiers = self.scheme.tiers()
        if self.scheme.backs_up:
            self.samples.append({"t_s": round(t_s, 3), "ram": tiers.ram, "disk": tiers.disk, "preserved": tiers.preserved,
                                 "done": progress.done, "resident": self.scheme.usage().resident_bytes})

    def _wait_for_end(self, instant: int) -> tuple[Progress, float]:
        """Wait for a backup that takes longer than the load was to run."""
        while True:
            progress = self.scheme.progress()
            now_s = (time.monotonic_ns() - instant) / 1e9
            if progress.ended or now_s > self.plan.backup_s_max:
                return progress, now_s
            time.sleep(SAMPLE_S)

    def _backup(self, progress: Progress, ended: float, instant: int) -> dict[str, Any] | None:
        if not self.scheme.backs_up:
            return None
        facts = {"seconds": round(ended, 3), "done_bytes": progress.done, "total_bytes": progress.total, "error": progress.error, "verified": None}
        if not progress.ended:
            return facts | {"error": f"not complete after {ended:.0f} s"}
        if progress.error is not None:
            return facts
        self.scheme.stop()
        self.target.stop()
        differs = first_difference(self.at_instant, self.target.path)
        return facts | {"verified": differs is None, "error": None if differs is None else f"differs from the disk at the instant, first at byte {differs}"}

    def _use(self, server: Usage, target: Usage, requests: NDArray, done: int) -> dict[str, Any]:
        """What it took while the backup ran, the target's server included, beside what the guest wrote and the backup has."""
        needed = int(requests["length"][requests["write"]].sum(dtype=numpy.int64)) + (self.plan.length if self.scheme.backs_up else 0)
        read, written = server.read_bytes, server.written_bytes + target.written_bytes
        if self.scheme.clients and self.target.process is None:
            written += done     # a client wrote the file; it has gone, and its counters with it
        return {"cpu_s": round(server.cpu_s, 2), "read_bytes": read, "written_bytes": written,
                "preserved_bytes": max((sample["preserved"] or 0 for sample in self.samples), default=0),
                "amplification": round((read + written) / needed, 2) if needed else None,
                "ram_tier_bytes_max": max((sample["ram"] for sample in self.samples), default=0),
                "disk_tier_bytes_max": max((sample["disk"] for sample in self.samples), default=0),
                "resident_bytes_max": max((sample["resident"] for sample in self.samples), default=0)}


def difference(after: Usage, before: Usage) -> Usage:
    return Usage(after.cpu_s - before.cpu_s, after.read_bytes - before.read_bytes, after.written_bytes - before.written_bytes,
                 after.resident_bytes, after.resident_bytes_max)


def fill(path: str, length: int) -> None:
    """Make a disk of LENGTH bytes that is neither zero nor compressible, so that nothing is skipped for being a hole."""
    piece = numpy.random.default_rng(length).bytes(min(PIECE, length))
    with open(path, "wb") as file:
        for offset in range(0, length, len(piece)):
            file.write((offset.to_bytes(8, "little") + piece[8:])[:length - offset])


def first_difference(path: str, other: str) -> int | None:
    """Return the offset of the first byte that differs between two files, or None."""
    if os.path.getsize(path) != os.path.getsize(other):
        return min(os.path.getsize(path), os.path.getsize(other))
    with open(path, "rb") as one, open(other, "rb") as two:
        offset = 0
        while piece := one.read(PIECE):
            against = two.read(PIECE)
            if piece != against:
                unequal = numpy.frombuffer(piece, numpy.uint8) != numpy.frombuffer(against, numpy.uint8)
                return offset + int(unequal.argmax())
            offset += len(piece)
    return None
