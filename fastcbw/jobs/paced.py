"""What jobs have in common that can be paused and held to a rate: both, and what is told of them."""

from __future__ import annotations

from typing import Any

from fastcbw.cbw.pace import Pace
from fastcbw.jobs.job import RUNNING, Job
from fastcbw.jobs.pacing import check_rate


class PacedJob(Job):
    """A job whose workers ask a Pace; subclasses say which one, by use_pace(), and run them.

    One whose work is done by other jobs overrides _set_paused(), _set_rate(), pacing.
    """

    def __init__(self, id: str | None = None, rate: int | str | None = None) -> None:
        super().__init__(id)
        self._rate = check_rate(rate)
        self._paused = False
        self._pace: Pace | None = None

    def use_pace(self, pace: Pace) -> Pace:
        """Pace what comes now by PACE, as the job is paced already; return it."""
        with self._lock:
            self._pace = pace
            pace.set_rate(self._rate)
            pace.set_paused(self._paused)
        return pace

    def pause(self) -> None:
        """Begin nothing more until resume(); what is under way ends. Pausing twice is no error."""
        self._set_paused(True)

    def resume(self) -> None:
        """Go on."""
        self._set_paused(False)

    def _set_paused(self, paused: bool) -> None:
        with self._lock:
            self._paused = paused
            self._pace.set_paused(paused)

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
        self._set_rate(check_rate(rate))

    def _set_rate(self, rate: int) -> None:
        """RATE: 0 for no limit."""
        with self._lock:
            self._rate = rate
            self._pace.set_rate(rate)

    @property
    def pacing(self) -> dict[str, Any]:
        """How the job is paced now: rate (limit, or None), guest_p99 (target, ms, or None), guest_p99_now (ms of the last second, or
        None), workers (at work at once), in_flight (bytes, at most)."""
        status = self._pace.status()
        return {"rate": self.rate, "guest_p99": None, "guest_p99_now": None, "workers": status["workers"], "in_flight": status["in_flight"]}

    def _describe_progress(self, done: int, total: int) -> dict[str, float]:
        elapsed = self.elapsed()
        return {"done": done, "total": total, "bytes_per_s": int(done / elapsed) if elapsed else 0}
