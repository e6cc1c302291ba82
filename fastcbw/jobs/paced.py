"""What jobs have in common whose workers a Pace lets go: pause, rate, and what is told of both."""

from __future__ import annotations

from typing import Any

from fastcbw.cbw.pace import Pace
from fastcbw.jobs.job import RUNNING, Job
from fastcbw.jobs.pacing import check_rate


class PacedJob(Job):
    """A job whose workers ask PACE; subclasses run them."""

    def __init__(self, pace: Pace, rate: int | str | None, id: str | None = None) -> None:
        super().__init__(id)
        self._pace = pace
        self._rate = check_rate(rate)
        self._pace.set_rate(self._rate)
        self._paused = False

    def pause(self) -> None:
        """Begin nothing more until resume(); what is under way ends. Pausing twice is no error."""
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

    def _describe_progress(self, done: int, total: int) -> dict[str, float]:
        elapsed = self.elapsed()
        return {"done": done, "total": total, "bytes_per_s": int(done / elapsed) if elapsed else 0}
