"""The daemon's jobs by id: what query-jobs shows, what job-cancel reaches, and the events of their ends."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from fastcbw.errors import Error, JobCancelled, LimitReached

log = logging.getLogger("fastcbw.jobs")

JOBS_RUNNING_LIMIT = 64
#: Ended jobs that nobody dismissed; the oldest goes when one more ends.
JOBS_CONCLUDED_LIMIT = 64


class JobRecord:
    """One job as the daemon keeps it. job: a fastcbw Job; disk, snapshot, target: for display; auto_dismiss: forgotten at its end.

    auto_finalize: without it a job whose work is done is pending, and holds what it has, until finalize or cancel.
    """

    def __init__(self, name: str, job, disk: str, snapshot: str, target: str, *, auto_dismiss: bool = False, auto_finalize: bool = True):
        self.id = name
        self.job = job
        self.type = "backup"
        self.disk = disk
        self.snapshot = snapshot
        self.target = target
        self.auto_dismiss = auto_dismiss
        self.auto_finalize = auto_finalize
        self.state = "created"  # QEMU's, without paused and concluded, which are derived
        self.decided = threading.Event()  # a pending job was finalized or cancelled
        self.outcome: str | None = None  # completed, failed, cancelled; set when all is cleaned up
        self.error: str | None = None
        self.thread: threading.Thread | None = None

    @property
    def status(self) -> str:
        """QEMU's name of the state; ``concluded`` only after the job's own snapshot is gone too."""
        if self.outcome is not None:
            return "concluded"
        return "paused" if self.state == "running" and self.job.paused else self.state

    def describe(self) -> dict:
        """Return QEMU's members of a job, and ours: outcome, bytes-per-s, pacing (see BackupJob), result, disk, snapshot, target."""
        progress = self.job.progress
        described = {
            "id": self.id,
            "type": self.type,
            "status": self.status,
            "current-progress": progress["done"],
            "total-progress": progress["total"],
            "bytes-per-s": progress["bytes_per_s"],
            **{name.replace("_", "-"): value for name, value in self.job.pacing.items()},
            "disk": self.disk,
            "snapshot": self.snapshot,
            "target": self.target,
        }
        if self.outcome is not None:
            described["outcome"] = self.outcome
            described["result"] = self.job.result or {}
        if self.error is not None:
            described["error"] = self.error
        return described

    def describe_block(self) -> dict:
        """Return the members of QEMU's query-block-jobs."""
        progress, status = self.job.progress, self.status
        described = {
            "type": self.type, "device": self.id, "len": progress["total"], "offset": progress["done"],
            "busy": status == "running", "paused": status == "paused", "speed": self.job.rate or 0, "io-status": "ok", "ready": False,
            "status": status, "auto-finalize": self.auto_finalize, "auto-dismiss": self.auto_dismiss,
        }
        return described if self.error is None else described | {"error": self.error}


class JobTable:
    """Jobs by id. Thread-safe. emit(event, data) is called from the threads that watch the jobs."""

    def __init__(self, emit: Callable[[str, dict], None]):
        self._emit = emit
        self._lock = threading.Lock()
        self._records: dict[str, JobRecord] = {}
        self._reserved: set[str] = set()
        self._next = 1

    def reserve(self, name: str | None) -> str:
        """Take NAME, or the next free ``jobN``, before the job exists, so that no two starts get the same."""
        with self._lock:
            if name is not None and (name in self._records or name in self._reserved):
                raise Error(f"job {name!r}: the id is in use (dismiss that job, or choose another id)")
            running = sum(record.outcome is None for record in self._records.values()) + len(self._reserved)
            if running >= JOBS_RUNNING_LIMIT:
                raise LimitReached(f"{running} jobs are running, the limit (wait for one, or cancel one)")
            while name is None:
                candidate = f"job{self._next}"
                self._next += 1
                if candidate not in self._records and candidate not in self._reserved:
                    name = candidate
            self._reserved.add(name)
            return name

    def give_back(self, name: str) -> None:
        """Free a reserved id whose job did not start."""
        with self._lock:
            self._reserved.discard(name)

    def add(self, record: JobRecord, on_end: Callable[[], None]) -> None:
        """Watch RECORD's job; ON_END runs after it ended and before the job shows as concluded."""
        record.thread = threading.Thread(target=self._watch, args=(record, on_end), name=f"fastcbw-job-{record.id}",
                                         daemon=True)
        with self._lock:
            self._reserved.discard(record.id)
            self._records[record.id] = record
        self._emit("JOB_STATUS_CHANGE", {"id": record.id, "status": "created"})
        self._enter(record, "running")
        record.thread.start()

    def _enter(self, record: JobRecord, state: str) -> None:
        record.state = state
        self._emit("JOB_STATUS_CHANGE", {"id": record.id, "status": state})

    def _await_decision(self, record: JobRecord) -> str:
        """The work is done: end at once, or when somebody says so. Return the outcome."""
        self._enter(record, "waiting")
        self._enter(record, "pending")
        if not record.auto_finalize:
            self._emit("BLOCK_JOB_PENDING", {"type": record.type, "id": record.id})
            record.decided.wait()
        return "cancelled" if record.state == "aborting" else "completed"

    def _watch(self, record: JobRecord, on_end: Callable[[], None]) -> None:
        try:
            record.job.wait()
            outcome = self._await_decision(record)
        except JobCancelled as error:
            outcome, record.error = "cancelled", record.job.error or str(error)
        except Exception as error:  # whatever ended it, the job has ended and its reason is shown
            outcome, record.error = "failed", record.job.error or str(error) or type(error).__name__
        if outcome != "completed" and record.state != "aborting":
            self._enter(record, "aborting")
        try:
            on_end()
        except Exception as error:
            log.exception("job %s: cleaning up failed", record.id)
            if outcome == "completed":
                outcome, record.error = "failed", f"the copy is complete, cleaning up failed: {error}"
        record.outcome = outcome
        self._forget_oldest()
        progress = record.job.progress
        data = {"type": record.type, "device": record.id, "len": progress["total"], "offset": progress["done"],
                "speed": record.job.rate or 0}
        if outcome == "failed":
            data["error"] = record.error
        self._emit("BLOCK_JOB_CANCELLED" if outcome == "cancelled" else "BLOCK_JOB_COMPLETED", data)
        self._emit("JOB_STATUS_CHANGE", {"id": record.id, "status": "concluded"})
        if record.auto_dismiss:
            with self._lock:
                self._records.pop(record.id, None)
            self._emit("JOB_STATUS_CHANGE", {"id": record.id, "status": "null"})

    def _forget_oldest(self) -> None:
        with self._lock:
            ended = [name for name, record in self._records.items() if record.outcome is not None]
            for name in ended[: max(0, len(ended) - JOBS_CONCLUDED_LIMIT)]:
                del self._records[name]

    def find(self, name: str) -> JobRecord:
        with self._lock:
            try:
                return self._records[name]
            except KeyError:
                raise Error(f"job {name!r}: not found") from None

    def all(self) -> list[JobRecord]:
        """Return every job, oldest first."""
        with self._lock:
            return list(self._records.values())

    def cancel(self, name: str) -> None:
        """Ask the job to end; it has ended when it shows as concluded. An ended job can't be cancelled."""
        record = self.find(name)
        if record.outcome is not None:
            raise Error(f"job {name!r}: has ended, it can't be cancelled (job-dismiss removes it)")
        with self._lock:
            pending = record.state == "pending" and not record.decided.is_set()
            if pending:
                record.state = "aborting"
        if pending:
            self._emit("JOB_STATUS_CHANGE", {"id": record.id, "status": "aborting"})
            record.decided.set()
        record.job.cancel()

    def complete(self, name: str) -> None:
        """Refused: a backup is never ready, so there is nothing to complete."""
        raise Error(f"Job '{name}' in state '{self.find(name).status}' cannot accept command verb 'complete'")

    def finalize(self, name: str) -> None:
        """Let a pending job end."""
        record = self.find(name)
        with self._lock:
            if record.state != "pending" or record.outcome is not None or record.auto_finalize:
                raise Error(f"Job '{name}' in state '{record.status}' cannot accept command verb 'finalize'")
            record.decided.set()

    def pause(self, name: str, pause: bool) -> None:
        """Pause a running job, or resume it."""
        self._running(name).job.pause() if pause else self._running(name).job.resume()

    def set_speed(self, name: str, speed: int) -> None:
        """Limit a running job to SPEED bytes a second; 0: no limit."""
        self._running(name).job.rate = speed or None

    def _running(self, name: str) -> JobRecord:
        record = self.find(name)
        if record.outcome is not None:
            raise Error(f"job {name!r}: has ended")
        return record

    def dismiss(self, name: str) -> None:
        """Forget an ended job."""
        record = self.find(name)
        if record.outcome is None:
            raise Error(f"job {name!r}: is {record.status}, it can't be dismissed (cancel it first)")
        with self._lock:
            self._records.pop(name, None)

    def close(self) -> None:
        """Cancel what runs and wait until all of it has ended."""
        for record in self.all():
            if record.outcome is None:
                record.job.cancel()
                record.decided.set()
        for record in self.all():
            if record.thread is not None:
                record.thread.join()
