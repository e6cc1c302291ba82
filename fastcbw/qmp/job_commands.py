"""QEMU's commands for jobs: job-* by `id`, block-job-* by `device`, the same jobs and the same verbs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastcbw.qmp.errors import QmpError
from fastcbw.qmp.schema import Argument, Command

if TYPE_CHECKING:
    from fastcbw.qmp.daemon import Daemon


def _query_jobs(daemon: Daemon) -> list:
    return [record.describe() for record in daemon.jobs.all()]


def _query_block_jobs(daemon: Daemon) -> list:
    return [record.describe_block() for record in daemon.jobs.all() if record.status != "null"]


def _cancel(daemon: Daemon, job: str, force: bool = True) -> None:
    daemon.jobs.cancel(job, force)


def _pause(daemon: Daemon, job: str) -> None:
    daemon.jobs.pause(job, True)


def _resume(daemon: Daemon, job: str) -> None:
    daemon.jobs.pause(job, False)


def _complete(daemon: Daemon, job: str) -> None:
    daemon.jobs.complete(job)


def _finalize(daemon: Daemon, job: str) -> None:
    daemon.jobs.finalize(job)


def _dismiss(daemon: Daemon, job: str) -> None:
    daemon.jobs.dismiss(job)


def _change(daemon: Daemon, id: str, type: str, copy_mode: str | None = None) -> None:
    record = daemon.jobs.find(id)
    if type != record.type:
        raise QmpError(f"Job '{id}' is of type '{record.type}', not '{type}'")
    raise QmpError("Job type does not support change")      # QEMU's words; in QEMU mirror does, which is not here


def _set_speed(daemon: Daemon, device: str, speed: int) -> None:
    if speed < 0:
        raise QmpError("Invalid parameter 'speed'")
    daemon.jobs.set_speed(device, speed)


_VERBS = (
    ("cancel", "ask a job to end", _cancel),
    ("pause", "let a running job begin nothing more until it is resumed", _pause),
    ("resume", "let a paused job go on", _resume),
    ("complete", "have a job that is ready end", _complete),
    ("finalize", "let a pending job end", _finalize),
    ("dismiss", "forget an ended job", _dismiss),
)


def _verb(prefix: str, argument: str, verb: str, doc: str, run) -> Command:
    # As in QEMU job-cancel is by force, and block-job-cancel only if told so: else a job that is ready completes, and changes nothing.
    soft = (prefix, verb) == ("block-job", "cancel")
    more = (Argument("force", "bool", "also when it is ready (default false: then it ends as completed, where it is)"),) if soft else ()
    name = "id" if verb in ("finalize", "dismiss") else argument        # as QEMU has it
    if soft:
        return Command(f"{prefix}-{verb}", doc, lambda daemon, device, force=False: run(daemon, device, force),
                       (Argument(name, "str", "the job", required=True), *more))
    return Command(f"{prefix}-{verb}", doc, lambda daemon, **given: run(daemon, given[name]),
                   (Argument(name, "str", "the job", required=True), *more))


JOB_COMMANDS = (
    Command("query-jobs", "all jobs, ended ones until they are dismissed", _query_jobs, paged=True),
    Command("query-block-jobs", "the same jobs, with the members of QEMU's block jobs", _query_block_jobs, paged=True),
    *(_verb("job", "id", *row) for row in _VERBS),
    *(_verb("block-job", "device", *row) for row in _VERBS),
    Command("block-job-change", "change what kind of copy a job makes; no kind of job here has a choice", _change, (
        Argument("id", "str", "the job", required=True),
        Argument("type", "str", "its type", required=True),
        Argument("copy-mode", "str", "of a mirror"))),
    Command("block-job-set-speed", "limit a running job", _set_speed, (
        Argument("device", "str", "the job", required=True),
        Argument("speed", "int", "bytes per second; 0: no limit", required=True))),
)
