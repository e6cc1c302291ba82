"""The backup job: copies a snapshot, or an image that nobody writes, to a target."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from fastcbw.bitmaps.dirty import DirtyWords
from fastcbw.block.device import BlockDevice
from fastcbw.cbw.copier import Copier
from fastcbw.cbw.offload import offload_for
from fastcbw.cbw.policies import ORDER_DEFAULT, parse_order
from fastcbw.cbw.reader import SnapshotDevice
from fastcbw.errors import JobCancelled, JobFailed
from fastcbw.jobs.increment import IncrementTarget
from fastcbw.jobs.paced import PacedJob
from fastcbw.jobs.pacing import TICK_S, Governor, check_guest_p99, check_in_flight, check_rate, check_workers, make_pace
from fastcbw.jobs.target import Target, is_in_place

# Named in INTERFACE, not built yet.
_LATER = ("resume", "format", "backing")
COPIED_GRANULARITY = 4096


class BackupJob(PacedJob):
    """Copy SOURCE to TARGET, optionally verify it.

    source: a device whose content does not change (a snapshot).
    target: a path or a BlockDevice, see Target; of a snapshot of what a bitmap marks, see IncrementTarget. sources: what the target may not be.
    order: policies with commas, see docs/copy-order.md. workers: 1 to 64 threads, each with one buffer; default: as many as raise the throughput,
        up to 16, to a file up to half the processors and 4. in_flight: bytes of all buffers together (while verifying: twice
        that), a limit; default: 16 MiB; with workers, 256 KiB for each. rate: bytes a second, a limit. guest_p99: milliseconds, the
        guest's p99 write latency that the job slows down for. consume: what is in the target is dropped from the snapshot at once, not
        with verify; after a failure the rest is still there, and the same target can be given to another job. verify: read the target again and compare it with the source.
    tracks: keep what has got into the target, for left(). on_release: called once when the job needs the source no more.

    Arguments are checked and the target is made here; start() begins to copy.
    """

    def __init__(
        self,
        source: BlockDevice,
        target: str | os.PathLike | BlockDevice,
        *,
        order: str = ORDER_DEFAULT,
        workers: int | None = None,
        in_flight: int | str | None = None,
        rate: int | str | None = None,
        guest_p99: float | None = None,
        verify: bool = False,
        consume: bool = False,
        force: bool = False,
        sources: list[str | int] = (),
        tracks: bool = False,
        on_release: Callable[[], None] | None = None,
        id: str | None = None,
        **others: Any,
    ) -> None:
        super().__init__(id)
        for option, value in others.items():
            if option not in _LATER:
                raise TypeError(f"backup: unknown option {option!r}")
            if value not in (None, False):
                raise ValueError(f"{option}: {value!r}: this option is not built yet")
        parse_order(order)
        if workers is not None:
            check_workers(workers)
        limit = check_in_flight(in_flight, workers)
        self._rate = check_rate(rate)
        self.guest_p99 = check_guest_p99(guest_p99, source)
        self.verify = verify
        self.consume = consume
        _check_whole(source, target, verify, consume)
        self.source = source
        self.order = order
        self.phase = "copy"
        self._on_release = on_release
        self._copied = DirtyWords(source.length, COPIED_GRANULARITY) if tracks else None
        self._kept = False      # of a job that did not succeed: what it copied is there to stay
        # Of a snapshot that was made from a bitmap only what the bitmap marks exists: an increment.
        kind = Target if getattr(source, "bitmap", None) is None else IncrementTarget
        self._target = kind(target, source.length, sources=sources, force=force)
        self._workers, self._in_flight = workers, limit
        self._governor: Governor | None = None
        self._copier = self._make_copier(comparing=False)
        self._verifier: Copier | None = None

    def _make_copier(self, comparing: bool) -> Copier:
        pace = self.use_pace(make_pace(self._target.device, self._workers, self._in_flight))
        # A copy that is verified passes through here: what the kernel may have got wrong is not to be compared with itself. Two workers of
        # ours, on two processors, are faster than the kernel's copy, one of which a target does at a time.
        by_kernel = not self.verify and (self._workers is not None or pace.workers_max == 1)
        offload = offload_for(self.source, self._target.device) if by_kernel else None
        return Copier(self.source, self._target.device, chunk=pace.piece_max, order="sequential" if comparing else self.order,
                      target_is_zero=self._target.is_zero, comparing=comparing, consuming=self.consume, pace=pace, offload=offload,
                      copied=None if comparing else self._copied)

    def run(self) -> None:
        # A cancelled job removes what it wrote; a failed one leaves it, under the name that says so.
        try:
            self._run()
        except JobCancelled as error:
            kept = self._sync_what_is_there()
            if self._target.discard():
                raise
            self._kept = kept
            raise JobCancelled(f"{error}; {self._target.leave()}") from None
        except Exception as error:
            self._kept = self._sync_what_is_there()
            raise JobFailed(f"{error}; {self._target.leave()}") from error

    def _sync_what_is_there(self) -> bool:
        """Tell whether what was copied of a job that tracks is on stable storage; what did not compare is not looked at."""
        if self._copied is None or self.phase != "copy":
            return False
        try:
            self._target.sync()
        except OSError:
            return False
        return True

    def _run(self) -> None:
        self._work(self._copier, "backup")
        self._target.sync()
        if not self.consume and getattr(self.source, "discarded", 0):
            raise JobFailed("backup: parts of the snapshot were discarded meanwhile, by somebody else: the backup lacks them")
        if self.verify:
            self.phase = "verify"
            self._verifier = self._make_copier(comparing=True)
            if self.cancelled:
                self._verifier.cancel()
            self._work(self._verifier, "verify")
        counters = self._copier.counters()
        self._target.complete()
        self.result = {"bytes": self.source.length, "data_bytes": counters["data"], "zero_bytes": counters["zero"], "landed_bytes": counters["landed"],
                       "verified": self.verify, "seconds": self.elapsed()}

    def _work(self, copier: Copier, what: str) -> None:
        threads = [threading.Thread(target=copier.run, args=(True,), name=f"fastcbw-{self.id}-{i}", daemon=True)
                   for i in range(copier.pace.workers_max)]
        if isinstance(self.source, SnapshotDevice) and self.source.engine is not None:
            self._governor = Governor(copier.pace, self.source.engine.latency_meter(), lambda: copier.counters()["data"], self.guest_p99)
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(TICK_S)
                    if self._governor is not None and thread.is_alive():
                        self._governor.tick(time.monotonic())
        finally:
            if self._governor is not None:
                self._governor.close()
        if copier.error is not None:
            raise JobFailed(f"{what}: {copier.error}")
        if copier.is_cancelled:
            raise JobCancelled(f"{what}: cancelled after {copier.done} of {self.source.length} bytes")

    def left(self, wanted: DirtyWords) -> DirtyWords:
        """Return what of WANTED has not got into the target, of a job that tracks and has ended; all of it when the target can't say
        that what it was given is kept."""
        return wanted.without(self._copied) if self._kept else wanted

    def stop(self) -> None:
        self._copier.cancel()
        if self._verifier is not None:
            self._verifier.cancel()

    @property
    def pacing(self) -> dict[str, Any]:
        """As of every paced job, with the guest's latency."""
        governor = self._governor
        return super().pacing | {"guest_p99": self.guest_p99, "guest_p99_now": None if governor is None else governor.p99_ms}

    def end(self) -> None:
        if self._on_release is not None:
            self._on_release()

    @property
    def incomplete_name(self) -> str | None:
        """The file under which a failed job leaves what it wrote, or None."""
        return self._target.incomplete_name

    @property
    def progress(self) -> dict[str, float]:
        done = self._copier.done
        total = self.source.length
        if self.verify:
            total *= 2
            done += self._verifier.done if self._verifier is not None else 0
        return self._describe_progress(done, total)


def _check_whole(source: BlockDevice, target: str | os.PathLike | BlockDevice, verify: bool, consume: bool) -> None:
    if consume and verify:
        raise ValueError("consume: not with verify (what has been consumed cannot be compared)")
    if consume and not isinstance(source, SnapshotDevice):
        raise ValueError(f"consume: {source.name} is no snapshot")
    if not getattr(source, "discarded", 0):
        return
    if not consume:
        raise ValueError(f"{source.name}: parts of the snapshot were discarded, a backup would lack them (consume copies what is left)")
    if not is_in_place(target):
        raise ValueError(f"{source.name}: parts of the snapshot were discarded, and {os.fsdecode(target)} would be a new file without them "
                         "(what is left can complete the device or export that the rest went to)")
