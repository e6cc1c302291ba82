"""The commit job: what an overlay has of its own goes into the image below it, while a guest writes the overlay.

    allocated in the overlay ─▶ bitmap ◀─ guest writes            each pass is an increment: a snapshot of what the bitmap marks,
                                  │                               copied into the base; what the guest writes meanwhile is
                                  ▼ pass, pass, pass … ready      the next pass

After every pass the base is what the overlay was at the instant of that pass. A job that has caught up is ready, and goes on with passes
until somebody completes it: then the guest is held, a last pass makes the two the same, and it writes the base from there on. During a pass the base is neither;
the overlay has everything all the time, so that a job that fails or is cancelled loses nothing.

Reading the overlay where it has nothing of its own reads the base, which is being written: never where that differs, since what is
written to the base lies in the overlay, and a piece that is wider than that carries what was read from the base itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from fastcbw.bitmaps.dirty import DirtyWords
from fastcbw.block.device import BlockDevice
from fastcbw.errors import Error, JobCancelled, JobFailed
from fastcbw.jobs.paced import PacedJob
from fastcbw.jobs.pacing import check_workers

if TYPE_CHECKING:
    from fastcbw.jobs.backup import BackupJob

READY_BYTES = 16 << 20      # a pass of no more than this can wait for the last one
LAST_SECONDS = 2.0          # so long clients may wait for the last passes
LOOK_S = 0.1                # how often a job that is ready looks for what the guest has written


class CommitJob(PacedJob):
    """Copy what DISK, an overlay, has of its own to BASE, and keep up with its guest until complete().

    allocated: asked, once the guest's writes are marked, for what lies in the overlay. on_ready: called once when the job has caught up.
    alone: a context for the last passes of complete(), in which nobody writes the disk; it raises Error where that can't be had, and when
    it is left without an error whoever wrote the disk writes the base. on_release: called at the end. base_name: for messages.
    rate, workers: of the passes.
    """

    def __init__(self, disk: Any, base: BlockDevice, allocated: Callable[[], DirtyWords], *, id: str, alone: Callable[[], AbstractContextManager[None]],
                 base_name: str | None = None, rate: int | str | None = None, workers: int | None = None,
                 on_ready: Callable[[], None] = lambda: None, on_release: Callable[[], None] = lambda: None) -> None:
        super().__init__(id, rate)
        self.disk, self.base = disk, base
        self._base_name = base_name or base.name
        self.on_ready = on_ready
        self._allocated, self._alone, self._on_release = allocated, alone, on_release
        self._workers = None if workers is None else check_workers(workers)
        self._changed = threading.Condition(self._lock)
        self._pass: BackupJob | None = None
        self._completing: str | None = None     # "alone": after last passes beside which nobody writes; "here": as it is
        self._verdict: BaseException | bool | None = None   # of the last complete(): True, or why not
        self._over = False                  # nobody answers complete() any more
        self._done = 0                      # bytes of passes that have ended
        self.is_ready = False
        self.pivoted = False                # whoever wrote the disk writes the base: the job completes, whatever comes
        self._late: tuple[BackupJob, Any] | None = None     # a last pass that took too long and is cancelled, and its snapshot
        self._owner = f"job '{id}'"
        self._bitmap = disk.add_bitmap(f"{id}.commit", granularity=READY_BYTES >> 8)
        self._bitmap.keep_for(self._owner)

    # -- the job's thread

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            with self._changed:
                self._verdict = self._verdict or error      # whoever waits in complete() learns why
                self._changed.notify_all()
            raise

    def _work(self) -> None:
        self._bitmap.mark_again(self._allocated(), self._owner)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.cancelled or not self._paused)
                completing = self._completing
            if self.cancelled:
                raise JobCancelled(f"commit: cancelled; {self._base_name} is incomplete, {self.disk.name} has everything")
            if completing == "here":
                self.base.flush()
                break
            if completing and self._end_alone():
                break
            if self._left():
                self._copy()
            if self._left() > READY_BYTES:
                continue
            if not self.is_ready:
                self.is_ready = True
                self.on_ready()
            with self._changed:
                self._changed.wait_for(lambda: self.cancelled or self._completing, LOOK_S)
        self.result = {"bytes": self.disk.length, "data_bytes": self._done, "seconds": self.elapsed()}

    def _end_alone(self) -> bool:
        """Do the last passes while nobody writes. False when that can't be had: the job goes on as before, and complete() tells why."""
        verdict: Exception | bool | None = None
        try:
            until = time.monotonic() + LAST_SECONDS
            with self._alone():
                while self._left():
                    self._copy(until)       # every pass flushes what it wrote, within the time: nothing is left to flush
                    self.disk._engine.finish_discards()     # one that waited for the snapshot of a pass may mark again
                if self.cancelled:
                    raise JobCancelled(f"commit: cancelled; {self.disk.name} has everything")
            self.pivoted = True
            verdict = True
        except (JobFailed, JobCancelled) as error:
            verdict = error
            raise
        except Exception as error:
            verdict = error                 # nothing has changed: the job goes on
        finally:
            with self._changed:
                self._verdict = verdict
                if verdict is not True:
                    self._completing = None
                self._changed.notify_all()
            self._end_late()                # the guest goes on meanwhile
        return self.pivoted

    def _end_late(self) -> None:
        """Wait for a last pass that took too long; what it has not copied is marked again."""
        if self._late is not None:
            (job, snapshot), self._late = self._late, None
            try:
                with snapshot:
                    job.wait()
            except (JobCancelled, JobFailed):
                pass

    def _left(self) -> int:
        return self._bitmap.report()["count"]

    def _copy(self, until: float | None = None) -> None:
        """One pass. What it does not copy is marked again. UNTIL: it is TimeoutError when it takes longer, and the pass, cancelled, is
        left to _end_late(), since the guest is held; no rate holds it up then.
        """
        rate = None if until is not None else self._rate or None
        snapshot = self.disk.snapshot(f"{self.id}.commit", bitmap=self._bitmap.name, bitmap_for=self._owner, on_full="wait")
        try:
            job = snapshot.backup(self.base, rate=rate, workers=self._workers)
            with self._lock:
                self._pass = job
                if self._paused:
                    job.pause()
                cancelled = self.cancelled
            if cancelled:
                job.cancel()
            try:
                self._done += job.wait(None if until is None else max(0.0, until - time.monotonic()))["data_bytes"]
            except TimeoutError:
                job.cancel()
                self._late, snapshot = (job, snapshot), None
                raise TimeoutError(f"{self.id}: the last pass did not end within {LAST_SECONDS:g} s (nothing was changed)") from None
            except JobFailed as error:
                raise JobFailed(f"commit: {error}; {self.disk.name} has everything") from None
            except JobCancelled:
                raise JobCancelled(f"commit: cancelled; {self._base_name} is incomplete, {self.disk.name} has everything") from None
            finally:
                with self._lock:
                    self._pass = None
        finally:
            if snapshot is not None:
                snapshot.close()

    def end(self) -> None:
        with self._changed:
            self._over = True
            if self._verdict is None:
                self._verdict = Error(f"{self.id}: has ended")
            self._changed.notify_all()
        self._bitmap.keep_for(None)
        self._bitmap.remove()
        self._on_release()

    # -- what others do

    def complete(self, pivot: bool = True) -> None:
        """End a job that is ready. pivot: after last passes beside which nobody writes, returning when that is done; Error, OSError when
        it can't be: the job goes on.

        Without, the base stays what the overlay was at the instant of the last pass; a pause ends.
        """
        if not self.is_ready:
            raise Error(f"{self.id}: is not ready")
        with self._changed:
            if self._over:
                raise Error(f"{self.id}: has ended")
            if self._completing is not None:
                raise Error(f"{self.id}: is being completed already")
            if pivot and self._paused:
                raise Error(f"{self.id}: is paused (resume it, then complete it)")
            self._completing, self._verdict = ("alone", None) if pivot else ("here", True)
            self._changed.notify_all()
            if pivot:
                self._changed.wait_for(lambda: self._verdict is not None)
            verdict = self._verdict
        if isinstance(verdict, BaseException):
            raise verdict
        if not pivot:
            self._set_paused(False)

    def stop(self) -> None:
        with self._changed:
            job = self._pass
            self._changed.notify_all()
        if job is not None:
            job.cancel()

    def _set_paused(self, paused: bool) -> None:
        with self._changed:
            if paused and self._completing == "alone" and not self._over:
                raise Error(f"{self.id}: is being completed, it can't be paused")
            self._paused = paused
            job = self._pass
            self._changed.notify_all()
        if job is not None:
            (job.pause if paused else job.resume)()

    def _set_rate(self, rate: int) -> None:
        with self._lock:
            self._rate = rate
            job = self._pass
        if job is not None:
            job.rate = rate or None

    @property
    def pacing(self) -> dict[str, Any]:
        """As of a BackupJob: that of the pass under way."""
        job = self._pass
        return {"rate": self.rate, "guest_p99": None, "guest_p99_now": None, "workers": 0, "in_flight": 0} if job is None else job.pacing

    @property
    def progress(self) -> dict[str, float]:
        job = self._pass
        done = self._done + (0 if job is None else job._copier.counters()["data"])
        try:
            left = self._left()
        except Error:
            left = 0            # it has ended, or is about to
        return self._describe_progress(done, done + left)
