"""A backup with sync none: to the target goes, at its own offset, what the guest overwrites, and nothing else, until it is cancelled.

Old data is in the snapshot's store when the guest's write goes on, and in the target soon after: then it is dropped from the
store. So the guest does not wait for the target, as it does in QEMU, unless the store is full. A cancel copies what is in the store by
then, and ends the job.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from fastcbw.block.device import BlockDevice
from fastcbw.cbw.copier import Copier
from fastcbw.cbw.pace import Pace
from fastcbw.cbw.reader import SnapshotDevice
from fastcbw.errors import JobCancelled, JobFailed
from fastcbw.jobs.paced import PacedJob
from fastcbw.jobs.pacing import CHUNK_DEFAULT, TICK_S, check_workers

LOOK_S = 0.5        # how often it is asked whether the snapshot still lives


class PreserveJob(PacedJob):
    """Copy to TARGET what is preserved in SOURCE, a snapshot that nobody else reads.

    workers: 1 to 64 threads. rate: bytes a second. broken: tells why the snapshot can't be read any more, or None. on_release: called once
    when the job needs the source no more.
    """

    def __init__(self, source: SnapshotDevice, target: BlockDevice, *, broken: Callable[[], str | None], workers: int = 1,
                 rate: int | str | None = None, on_release: Callable[[], None] | None = None, id: str | None = None) -> None:
        super().__init__(id, rate)
        self.use_pace(Pace([(check_workers(workers), CHUNK_DEFAULT)]))
        self.source, self.target = source, target
        self._broken, self._on_release = broken, on_release
        self._copier = Copier(source, target, chunk=CHUNK_DEFAULT, watching=True, consuming=True, pace=self._pace)

    def run(self) -> None:
        threads = [threading.Thread(target=self._copier.run, args=(True,), name=f"fastcbw-{self.id}-{i}", daemon=True)
                   for i in range(self._pace.workers_max)]
        for thread in threads:
            thread.start()
        why = None
        look = time.monotonic() + LOOK_S
        for thread in threads:
            while thread.is_alive():
                thread.join(TICK_S)
                if why is None and time.monotonic() >= look:
                    look = time.monotonic() + LOOK_S
                    why = self._broken()
                    if why is not None:
                        self._copier.cancel()
        if self._copier.error is not None or why is not None:
            raise JobFailed(f"backup: {why or self._copier.error}; {self.target.name} is incomplete")
        self.target.flush()
        raise JobCancelled(f"backup: cancelled; what was overwritten until then is in {self.target.name}")

    def stop(self) -> None:
        self._pace.set_rate(0)      # nobody waits for the end at one byte a second
        self._pace.set_paused(False)
        self._copier.finish()

    def end(self) -> None:
        if self._on_release is not None:
            self._on_release()

    @property
    def progress(self) -> dict[str, float]:
        return self._describe_progress(self._copier.done, self.source.length)
