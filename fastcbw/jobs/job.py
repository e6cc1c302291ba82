"""A job: something long that runs beside the guest, shows progress, can be waited for and cancelled."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

from fastcbw.errors import JobCancelled, JobFailed

_log = logging.getLogger("fastcbw.jobs")
_numbers = itertools.count(1)

CREATED, RUNNING, CONCLUDED = "created", "running", "concluded"


class Job:
    """Base of all jobs; subclasses override run(), stop(), progress.

    id: unique in the process. status: "created", "running", "concluded". error: None, or why it failed or was cancelled.
    pivoted: what it did can't be taken back any more, so that it can't be cancelled. Safe from any thread; also awaitable in asyncio.
    """

    pivoted = False

    def __init__(self, id: str | None = None) -> None:
        self.id = id if id is not None else f"job{next(_numbers)}"
        self.status = CREATED
        self.error: str | None = None
        self.cancelled = False
        self.started_s: float | None = None
        self.ended_s: float | None = None
        self.result: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._callbacks: list[Callable[[Job], None]] = []
        self._thread: threading.Thread | None = None

    # -- what subclasses do

    def run(self) -> None:
        """Do the work, in the job's own thread. An exception fails the job; its text becomes `error`."""
        raise NotImplementedError

    def stop(self) -> None:
        """Make run() end soon; called at most once, from another thread."""

    @property
    def progress(self) -> dict[str, float]:
        """done, total in bytes; bytes_per_s since the start."""
        raise NotImplementedError

    def end(self) -> None:
        """Release what the job holds; called once, after run() and before anybody learns that the job has ended."""

    # -- what users do

    def start(self) -> Job:
        """Begin; returns self."""
        self.status = RUNNING
        self.started_s = time.monotonic()
        self._thread = threading.Thread(target=self._main, name=f"fastcbw-{self.id}", daemon=True)
        self._thread.start()
        return self

    def cancel(self) -> None:
        """Ask the job to end; it ends as cancelled, unless it had ended already."""
        with self._lock:
            if self.cancelled or self.status == CONCLUDED:
                return
            self.cancelled = True
        self.stop()

    def wait(self, timeout: float | None = None) -> dict[str, Any]:
        """Return `result` when the job has ended.

        timeout: seconds. Raises TimeoutError (the job goes on), JobFailed, JobCancelled.
        """
        if not self._ended.wait(timeout):
            raise TimeoutError(f"{self.id}: still running after {timeout} s")
        if self._thread is not threading.current_thread():
            self._thread.join()
        return self._outcome()

    def on_end(self, callback: Callable[[Job], None]) -> None:
        """Call CALLBACK with the job once it has ended, from its thread; at once when it has ended already."""
        with self._lock:
            if not self._ended.is_set():
                self._callbacks.append(callback)
                return
        callback(self)

    def __await__(self) -> Generator[Any, None, dict[str, Any]]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def wake(_job: Job) -> None:
            loop.call_soon_threadsafe(lambda: future.done() or future.set_result(None))

        self.on_end(wake)
        yield from future
        return self._outcome()

    def elapsed(self) -> float:
        """Seconds since the start, until now or the end."""
        if self.started_s is None:
            return 0.0
        return (self.ended_s or time.monotonic()) - self.started_s

    # -- inside

    def _outcome(self) -> dict[str, Any]:
        if self.error is None:
            return self.result
        raise (JobCancelled if self.cancelled else JobFailed)(f"{self.id}: {self.error}")

    def _main(self) -> None:
        error = None
        try:
            self.run()
        except Exception as exception:
            error = str(exception) or type(exception).__name__
            if not isinstance(exception, (OSError, ValueError, JobFailed, JobCancelled)):
                _log.exception("%s: failed", self.id)
        try:
            self.end()
        except Exception as exception:
            _log.exception("%s: failed to clean up", self.id)
            error = error or f"clean-up failed: {exception}"
        self.ended_s = time.monotonic()
        with self._lock:
            # A cancel that came too late changes nothing: the work is done.
            self.cancelled = self.cancelled and error is not None
            self.error = error
            self.status = CONCLUDED
            callbacks, self._callbacks = self._callbacks, []
            self._ended.set()
        for callback in callbacks:
            try:
                callback(self)
            except Exception:
                _log.exception("%s: a callback failed", self.id)
