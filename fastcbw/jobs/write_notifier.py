"""The backup job of the old scheme: the guest's writes copy what they overwrite to the target, this job the rest, in ascending order."""

from __future__ import annotations

import threading
from typing import Any

from fastcbw.cbw.notifier import WriteNotifier
from fastcbw.cbw.pace import Pace
from fastcbw.errors import JobCancelled, JobFailed
from fastcbw.jobs.job import RUNNING, Job
from fastcbw.jobs.pacing import check_rate, check_workers
from fastcbw.units import parse_size

CHUNK_MAX = 1 << 20


class WriteNotifierJob(Job):
    """Copy the disk below NOTIFIER to its target, as it is now, or was at its begin().

    workers: 1 to 64 threads. rate: bytes a second for the job; what the guest copies is not limited. chunk: bytes that the job claims at
    once, a multiple of the cluster up to 1 MiB, default a cluster as in QEMU's old job: a guest write there waits for all of it.
    Raises ValueError, TypeError; then nothing has begun. At its end, whatever it is, nothing is intercepted any more.
    """

    def __init__(self, notifier: WriteNotifier, *, workers: int = 1, rate: int | str | None = None, chunk: int | str | None = None,
                 id: str | None = None) -> None:
        super().__init__(id)
        self.notifier = notifier
        check_workers(workers)
        self._rate = check_rate(rate)
        self._chunk = notifier.cluster_size if chunk is None else parse_size(chunk, "chunk")
        if self._chunk % notifier.cluster_size or not 0 < self._chunk <= CHUNK_MAX:
            raise ValueError(f"chunk: {self._chunk} is no multiple of the cluster of {notifier.cluster_size} bytes, up to {CHUNK_MAX}")
        if notifier.is_ended:
            raise ValueError(f"{notifier.name}: the backup has ended (make another device)")
        self._pace = Pace([(workers, self._chunk)])
        self._pace.set_rate(self._rate)
        self._paused = False

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

    def pause(self) -> None:
        """Begin nothing more until resume(). Guest writes go on copying what they overwrite. Pausing twice is no error."""
        self._paused = True
        self._pace.set_paused(True)

    def resume(self) -> None:
        """Go on."""
        self._paused = False
        self._pace.set_paused(False)

    @property
    def paused(self) -> bool:
        """Whether pause() holds it; one that has ended is not."""
        return self._paused and self.status == RUNNING

    @property
    def rate(self) -> int | None:
        """Bytes a second that the job may move, None for no limit; may be set at any time, as the keyword."""
        return self._rate or None

    @rate.setter
    def rate(self, rate: int | str | None) -> None:
        self._rate = check_rate(rate)
        self._pace.set_rate(self._rate)

    @property
    def pacing(self) -> dict[str, Any]:
        """rate, workers, in_flight as of a BackupJob; the guest's latency is nobody's aim here."""
        status = self._pace.status()
        return {"rate": self.rate, "guest_p99": None, "guest_p99_now": None, "workers": status["workers"], "in_flight": status["in_flight"]}

    @property
    def progress(self) -> dict[str, float]:
        done, elapsed = self.notifier.counters()["done"], self.elapsed()
        return {"done": done, "total": self.notifier.length, "bytes_per_s": int(done / elapsed) if elapsed else 0}
