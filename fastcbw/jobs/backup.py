"""The backup job: copies a snapshot, or an image that nobody writes, to a target."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from fastcbw.block.device import BlockDevice
from fastcbw.block.nbd import NbdDevice
from fastcbw.cbw.copier import ORDERS, Copier
from fastcbw.errors import JobCancelled, JobFailed
from fastcbw.jobs.increment import IncrementTarget
from fastcbw.jobs.job import Job
from fastcbw.jobs.target import Target
from fastcbw.units import parse_size

WORKERS_NBD = 4             # to an NBD target: round trips overlap
WORKERS_LOCAL_MAX = 4       # to a file or device: half the processors, so that the guest has the others
WORKERS_MAX = 64
CHUNK_MIN = 4096
CHUNK_DEFAULT = 256 << 10   # as fast as larger ones on tmpfs, and a guest waits for less of it
CHUNK_MAX = 1 << 20

# Named in INTERFACE, not built yet.
_LATER = ("rate", "guest_p99", "consume", "resume", "format", "backing")
_ORDERS_LATER = ("disk-last", "disk-early", "zero-last", "hot-first")


class BackupJob(Job):
    """Copy SOURCE to TARGET, optionally verify it.

    source: a device whose content does not change (a snapshot).
    target: a path or a BlockDevice, see Target; of a snapshot of what a bitmap marks, see IncrementTarget. sources: what the target may not be.
    order: "sequential" or "ram-first". workers: 1 to 64 threads, each with one buffer; default: 4 to an NBD target, else half
        the processors, at most 4. in_flight: bytes of all buffers together (while verifying: twice that); default: 256 KiB
        for each worker. verify: read the target again and compare it with the source.
    on_release: called once when the job needs the source no more.

    Arguments are checked and the target is made here; start() begins to copy.
    """

    def __init__(
        self,
        source: BlockDevice,
        target: str | os.PathLike | BlockDevice,
        *,
        order: str = "sequential",
        workers: int | None = None,
        in_flight: int | str | None = None,
        verify: bool = False,
        force: bool = False,
        sources: list[str | int] = (),
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
        _check_order(order)
        if workers is not None:
            _check_workers(workers)
        limit = None if in_flight is None else parse_size(in_flight, "in_flight")
        if limit is not None:
            _chunk_for(limit, workers or 1)
        self.verify = verify
        self.source = source
        self.order = order
        self.phase = "copy"
        self._on_release = on_release
        # Of a snapshot that was made from a bitmap only what the bitmap marks exists: an increment.
        kind = Target if getattr(source, "bitmap", None) is None else IncrementTarget
        self._target = kind(target, source.length, sources=sources, force=force)
        self.workers = workers or _workers_for(self._target.device)
        if limit is None:
            self.chunk = CHUNK_DEFAULT
        else:
            self.workers = min(self.workers, limit // CHUNK_MIN)
            self.chunk = _chunk_for(limit, self.workers)
        self._copier = self._make_copier(comparing=False)
        self._verifier: Copier | None = None

    def _make_copier(self, comparing: bool) -> Copier:
        return Copier(self.source, self._target.device, chunk=self.chunk, order="sequential" if comparing else self.order,
                      target_is_zero=self._target.is_zero, comparing=comparing)

    def run(self) -> None:
        # A cancelled job removes what it wrote; a failed one leaves it, under the name that says so.
        try:
            self._run()
        except JobCancelled as error:
            if self._target.discard():
                raise
            raise JobCancelled(f"{error}; {self._target.leave()}") from None
        except Exception as error:
            raise JobFailed(f"{error}; {self._target.leave()}") from error

    def _run(self) -> None:
        self._work(self._copier, "backup")
        self._target.sync()
        if self.verify:
            self.phase = "verify"
            self._verifier = self._make_copier(comparing=True)
            if self.cancelled:
                self._verifier.cancel()
            self._work(self._verifier, "verify")
        counters = self._copier.counters()
        self._target.complete()
        self.result = {"bytes": self.source.length, "data_bytes": counters["data"], "zero_bytes": counters["zero"],
                       "verified": self.verify, "seconds": self.elapsed()}

    def _work(self, copier: Copier, what: str) -> None:
        threads = [threading.Thread(target=copier.run, args=(True,), name=f"fastcbw-{self.id}-{i}", daemon=True)
                   for i in range(self.workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if copier.error is not None:
            raise JobFailed(f"{what}: {copier.error}")
        if copier.is_cancelled:
            raise JobCancelled(f"{what}: cancelled after {copier.done} of {self.source.length} bytes")

    def stop(self) -> None:
        self._copier.cancel()
        if self._verifier is not None:
            self._verifier.cancel()

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
        elapsed = self.elapsed()
        return {"done": done, "total": total, "bytes_per_s": int(done / elapsed) if elapsed else 0}


def _check_order(order: str) -> None:
    for policy in str(order).split(","):
        if policy in _ORDERS_LATER:
            raise ValueError(f"order: {policy!r} is not built yet (there is {', '.join(ORDERS)})")
    if order not in ORDERS:
        raise ValueError(f"order: {order!r} is unknown (there is {', '.join(ORDERS)}, one of them)")


def _check_workers(workers: int) -> int:
    if isinstance(workers, bool) or not isinstance(workers, int):
        raise TypeError(f"workers: expected an int, got {type(workers).__name__}")
    if not 1 <= workers <= WORKERS_MAX:
        raise ValueError(f"workers: {workers} is not within 1 to {WORKERS_MAX}")
    return workers


def _workers_for(target: BlockDevice) -> int:
    if isinstance(target, NbdDevice):
        return WORKERS_NBD
    return max(1, min(WORKERS_LOCAL_MAX, (os.cpu_count() or 1) // 2))


def _chunk_for(in_flight: int, workers: int) -> int:
    """The largest chunk with which WORKERS keep at most IN_FLIGHT bytes in flight."""
    chunk = in_flight // workers // CHUNK_MIN * CHUNK_MIN
    if chunk < CHUNK_MIN:
        raise ValueError(f"in_flight: {in_flight} bytes are less than {CHUNK_MIN} for each of {workers} workers")
    return min(chunk, CHUNK_MAX)
