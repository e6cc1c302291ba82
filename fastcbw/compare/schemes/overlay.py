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


class Commit:
    """What ends a backup of SCHEME: the node `overlay` is committed into BASE when the disk below is copied. options: of block-commit."""

    def __init__(self, scheme: Daemon, base: str = "disk", **options: Any):
        self.scheme, self.base, self.options = scheme, base, options
        self.copied: Progress | None = None
        self.completing = False

    def progress(self, copying: Callable[[], Progress]) -> Progress:
        """Go on, and return how far it is; COPYING tells how far the copy is."""
        execute = self.scheme.qmp.execute
        if self.copied is None:
            progress = copying()
            if not progress.ended or progress.error is not None:
                return progress
            self.copied = progress
            execute("job-dismiss", id=self.scheme.JOB)
            execute("block-commit", job_id=COMMIT, device="overlay", base_node=self.base, auto_dismiss=False, **self.options)
        for job in execute("query-jobs"):
            if job["id"] == COMMIT:
                if job["status"] == "ready" and not self.completing:    # once: it is ready for a while after it was asked to
                    execute("job-complete", id=COMMIT)
                    self.completing = True
                return Progress(self.copied.done, self.copied.total, job["status"] == "concluded", job.get("error"))
        raise Error(f"{self.scheme.name}: the job is gone")
