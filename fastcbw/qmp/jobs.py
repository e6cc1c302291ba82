"""The daemon's jobs by id: what query-jobs shows, what job-cancel reaches, and the events of their states and ends.

    created ─ running ⇄ paused ─ (ready) ─ waiting ─ pending ─ concluded ─ null
                 └────────────────┴──────────┴─────────┴─ aborting ─┘

Jobs that a transaction grouped end together: each waits, its work done, for the others; when all are pending and somebody has finalized
one of them (or none of them asks for that) all complete, and when one fails or is cancelled before, all are cancelled. A job by
itself is a group of one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from fastcbw.errors import Error, JobCancelled, LimitReached

log = logging.getLogger("fastcbw.jobs")

JOBS_RUNNING_LIMIT = 64
#: Ended jobs that nobody dismissed; the oldest goes when one more ends.
JOBS_CONCLUDED_LIMIT = 64
#: How long close() waits for jobs to end before it gives up what they wait for.
END_SECONDS = 5.0


class JobGroup:
    """Jobs that complete together or not at all. Thread-safe."""

    def __init__(self) -> None:
        self.records: list[JobRecord] = []      # complete before the first of them is started
        self._changed = threading.Condition()
        self._done: set[JobRecord] = set()      # their work is done
        self._final = False                     # all of them complete
        self.broken: str | None = None          # the first that failed or was cancelled: all the others are cancelled

    @property
    def needs_finalize(self) -> bool:
        return any(not record.auto_finalize for record in self.records)

    def work_done(self, record: JobRecord) -> bool:
        """Wait until the work of all is done; False when one of them failed or was cancelled."""
        with self._changed:
            self._done.add(record)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.broken is not None or len(self._done) == len(self.records))
            return self.broken is None

    def await_final(self) -> bool:
        """Wait until somebody has finalized one of them; False as work_done."""
        with self._changed:
            self._changed.wait_for(lambda: self.broken is not None or self._final)
            return self.broken is None

    def finalize(self) -> bool:
        """Let all complete; False when one was cancelled before, or not all have done their work."""
        with self._changed:
            if self.broken is not None or len(self._done) < len(self.records):
                return False
            self._final = True
            self._changed.notify_all()
            return True

    def break_up(self, record: JobRecord) -> bool:
        """RECORD has failed or is cancelled: cancel the others. False when it is too late, since all complete."""
        with self._changed:
            if self._final:
                return False
            self.broken = self.broken or record.id
            self._changed.notify_all()
        for other in self.records:
            if other is not record:
                other.job.cancel()
        return True


class JobRecord:
    """One job as the daemon keeps it. job: a fastcbw Job; disk, snapshot, target: for display; auto_dismiss: forgotten at its end.

    auto_finalize: without it a job whose work is done is pending, and holds what it has, until finalize or cancel.
    """

    def __init__(self, name: str, job, disk: str, snapshot: str, target: str, *, type: str = "backup", auto_dismiss: bool = False,
                 auto_finalize: bool = True, group: JobGroup | None = None):
        self.id = name
        self.job = job
        self.type = type
        self.disk = disk
        self.snapshot = snapshot
        self.target = target
        self.auto_dismiss = auto_dismiss
        self.auto_finalize = auto_finalize
        self.group = JobGroup() if group is None else group
        self.group.records.append(self)
        self.state = "created"  # QEMU's, without paused and concluded, which are derived
        self.outcome: str | None = None  # completed, failed, cancelled; set when all is cleaned up
        self.error: str | None = None
        self.thread: threading.Thread | None = None

    @property
    def status(self) -> str:
        """QEMU's name of the state; ``concluded`` only after the job's own snapshot is gone too."""
        if self.outcome is not None:
            return "concluded"
        if self.state in ("running", "ready") and self.job.paused:
            return "paused" if self.state == "running" else "standby"
        return self.state

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
            "busy": status in ("running", "ready"), "paused": status in ("paused", "standby"), "speed": self.job.rate or 0,
            "io-status": "ok", "ready": status in ("ready", "standby"),
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

    def add(self, record: JobRecord, on_end: Callable[[JobRecord, str], None]) -> None:
        """Watch RECORD's job, whose group is complete; ON_END(record, outcome) runs after it ended and before it shows as concluded."""
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

    def became_ready(self, record: JobRecord) -> None:
        """The job has caught up, and goes on until it is completed or cancelled."""
        self._enter(record, "ready")
        self._emit("BLOCK_JOB_READY", self._describe_end(record))

    @staticmethod
    def _describe_end(record: JobRecord) -> dict:
        progress = record.job.progress
        return {"type": record.type, "device": record.id, "len": progress["total"], "offset": progress["done"], "speed": record.job.rate or 0}

    def _await_decision(self, record: JobRecord) -> str:
        """The work is done: end at once, or when the others of the group are there, or when somebody says so. Return the outcome."""
        group = record.group
        self._enter(record, "waiting")
        if not group.work_done(record) and not record.job.pivoted:
            return self._broken_up(record)
        self._enter(record, "pending")
        if not group.needs_finalize:
            group.finalize()        # whichever comes first
        elif not record.auto_finalize:
            self._emit("BLOCK_JOB_PENDING", {"type": record.type, "id": record.id})
        return "completed" if group.await_final() or record.job.pivoted else self._broken_up(record)

    @staticmethod
    def _broken_up(record: JobRecord) -> str:
        if record.group.broken not in (None, record.id):
            record.error = f"job {record.group.broken!r} of the same transaction did not complete"
        return "cancelled"

    def _watch(self, record: JobRecord, on_end: Callable[[JobRecord, str], None]) -> None:
        try:
            record.job.wait()
            outcome = self._await_decision(record)
        except JobCancelled as error:
            outcome, record.error = self._broken_up(record), record.error or record.job.error or str(error)
        except Exception as error:  # whatever ended it, the job has ended and its reason is shown
            outcome, record.error = "failed", record.job.error or str(error) or type(error).__name__
        if outcome != "completed":
            record.group.break_up(record)
            self._enter(record, "aborting")
        try:
            on_end(record, outcome)
        except Exception as error:
            log.exception("job %s: cleaning up failed", record.id)
            if outcome == "completed":
                outcome, record.error = "failed", f"the copy is complete, cleaning up failed: {error}"
        record.outcome = outcome
        self._forget_oldest()
        data = self._describe_end(record)
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

    def cancel(self, name: str, force: bool = True) -> None:
        """Ask the job to end; it has ended when it shows as concluded. An ended job can't be cancelled.

        force: also one that is ready ends as cancelled; else that one completes, and changes nothing.
        """
        record = self.find(name)
        if record.outcome is not None:
            raise Error(f"job {name!r}: has ended, it can't be cancelled (job-dismiss removes it)")
        if record.job.pivoted:
            raise Error(f"job {name!r}: the guest is on {record.target!r} already, the job can't be cancelled (job-finalize ends one that is pending)")
        if not force and record.state == "ready":
            record.job.complete(pivot=False)
            return
        if record.state in ("waiting", "pending"):
            record.group.break_up(record)
        record.job.cancel()

    def complete(self, name: str) -> None:
        """Have a job that is ready end; refused of every other."""
        record = self.find(name)
        if record.status != "ready":
            raise Error(f"Job '{name}' in state '{record.status}' cannot accept command verb 'complete'")
        record.job.complete(pivot=True)

    def finalize(self, name: str) -> None:
        """Let a pending job end, and all that are grouped with it."""
        record = self.find(name)
        if record.state != "pending" or record.outcome is not None or not record.group.finalize():
            raise Error(f"Job '{name}' in state '{record.status}' cannot accept command verb 'finalize'")

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

    def cancel_all(self) -> None:
        """Ask all that runs to end."""
        for record in self.all():
            if record.outcome is None:
                record.group.break_up(record)
                record.job.cancel()

    def close(self, give_up: Callable[[str], None] = lambda node: None) -> list[JobRecord]:
        """Cancel what runs and wait until all of it has ended. Return what has not, since its devices do not answer.

        give_up: called with the name of a job's target, and then of its source, when the job has not ended END_SECONDS after what came
        before: it ends what these do not answer. The thread of a job that is returned is left behind; it keeps no process from ending.
        """
        self.cancel_all()
        left = self._join()
        for name in ("target", "disk"):
            for record in left:
                give_up(getattr(record, name))
            left = self._join() if left else []
        for record in left:
            log.warning("job %s: does not end, since its devices do not answer; it is left behind", record.id)
        return left

    def _join(self) -> list[JobRecord]:
        """Wait for the threads of all jobs, END_SECONDS in all; return the jobs of those that have not ended."""
        until = time.monotonic() + END_SECONDS
        threads = [(record, record.thread) for record in self.all() if record.thread is not None]
        for _, thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        return [record for record, thread in threads if thread.is_alive()]
