"""The backup job of the old scheme: the guest's writes copy what they overwrite to the target, this job the rest, in ascending order."""

from __future__ import annotations

import threading

from fastcbw.cbw.notifier import WriteNotifier
from fastcbw.cbw.pace import Pace
from fastcbw.errors import JobCancelled, JobFailed
from fastcbw.jobs.paced import PacedJob
from fastcbw.jobs.pacing import check_workers
from fastcbw.units import parse_size

CHUNK_MAX = 1 << 20


class WriteNotifierJob(PacedJob):
    """Copy the disk below NOTIFIER to its target, as it is now, or was at its begin().

    workers: 1 to 64 threads. rate: bytes a second for the job; what the guest copies is not limited. chunk: bytes that the job claims at
    once, a multiple of the cluster up to 1 MiB, default a cluster as in QEMU's old job: a guest write there waits for all of it.
    Raises ValueError, TypeError; then nothing has begun. At its end, whatever it is, nothing is intercepted any more.
    """

    def __init__(self, notifier: WriteNotifier, *, workers: int = 1, rate: int | str | None = None, chunk: int | str | None = None,
                 id: str | None = None) -> None:
        self.notifier = notifier
        self._chunk = notifier.cluster_size if chunk is None else parse_size(chunk, "chunk")
        if self._chunk % notifier.cluster_size or not 0 < self._chunk <= CHUNK_MAX:
            raise ValueError(f"chunk: {self._chunk} is no multiple of the cluster of {notifier.cluster_size} bytes, up to {CHUNK_MAX}")
        if notifier.is_ended:
            raise ValueError(f"{notifier.name}: the backup has ended (make another device)")
        super().__init__(id, rate)
        self.use_pace(Pace([(check_workers(workers), self._chunk)]))

    def start(self) -> WriteNotifierJob:
        """Begin; the point in time is now, unless the notifier has begun already."""
        if not self.notifier.has_begun:
            self.notifier.begin()
        super().start()
        return self

    def run(self) -> None:
        notifier = self.notifier
        threads = [threading.Thread(target=notifier.run, args=(self._pace, self._chunk, True), name=f"fastcbw-{self.id}-{i}", daemon=True)
                   for i in range(self._pace.workers_max)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if notifier.error is not None:
            raise JobFailed(f"backup: {notifier.error}")
        counters = notifier.counters()
        if not notifier.is_done:
            raise JobCancelled(f"backup: cancelled after {counters['done']} of {notifier.length} bytes")
        notifier.end()          # before the flush: the guest need not be told apart from now on
        notifier.target.flush()
        self.result = {"bytes": notifier.length, "data_bytes": counters["done"] - counters["zero"], "zero_bytes": counters["zero"],
                       "guest_bytes": counters["guest"], "verified": False, "seconds": self.elapsed()}

    def stop(self) -> None:
        self.notifier.end()

    def end(self) -> None:
        self.notifier.end()

    @property
    def progress(self) -> dict[str, float]:
        return self._describe_progress(self.notifier.counters()["done"], self.notifier.length)
