"""Overlays: made by qemu-img, and committed once the disk below is copied."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

from fastcbw.compare.process import find
from fastcbw.compare.schemes.base import Daemon, Progress
from fastcbw.errors import Error

COMMIT = "commit"


def create_qcow2(path: str, length: int, backing: str | None = None) -> None:
    """Make an image at PATH, of LENGTH bytes; BACKING: the raw file below it."""
    below = [] if backing is None else ["-b", backing, "-F", "raw"]
    subprocess.run([find("qemu-img", "qemu-utils"), "create", "-q", "-f", "qcow2", *below, path, str(length)], check=True, timeout=30)


def committed(scheme: Daemon, copying: Callable[[], Progress], base: str = "disk", **options: Any) -> Progress:
    """Return how far SCHEME is: COPYING tells of its backup; when that is complete, the node `overlay` is committed into BASE."""
    if scheme.copied is None:
        progress = copying()
        if not progress.ended or progress.error is not None:
            return progress
        scheme.copied = progress
        scheme.qmp.execute("job-dismiss", id=scheme.JOB)
        scheme.qmp.execute("block-commit", job_id=COMMIT, device="overlay", base_node=base, auto_dismiss=False, **options)
    for job in scheme.qmp.execute("query-jobs"):
        if job["id"] == COMMIT:
            if job["status"] == "ready":
                scheme.qmp.execute("job-complete", id=COMMIT)
            return Progress(scheme.copied.done, scheme.copied.total, job["status"] == "concluded", job.get("error"))
    raise Error(f"{scheme.name}: the job is gone")
