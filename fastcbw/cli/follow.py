"""Following a job to its end: a progress bar on a terminal, or lines of JSON. Ctrl-C cancels the job."""

from __future__ import annotations

import signal
import sys
import time

from fastcbw.cli.common import one_line, print_json, warn
from fastcbw.errors import JobCancelled
from fastcbw.units import format_size

REFRESH_SECONDS = 0.2
BAR_WIDTH = 30


class Interrupts:
    """Within it the first Ctrl-C or SIGTERM is only noted, so that nothing is torn in the middle; the second interrupts.

    number: the signal that came, or None.
    """

    def __init__(self):
        self.number: int | None = None

    def _note(self, number, frame) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number

    def __enter__(self) -> Interrupts:
        self._handlers = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @property
    def exit_status(self) -> int:
        """The shell's number for an end by this signal; 1 when there was none."""
        return 1 if self.number is None else 128 + self.number


def follow(job, interrupts: Interrupts, *, json: bool) -> int:
    """Show JOB's progress until it ends, and return the exit status. JOB: a Job, here or in a daemon."""
    show = _show_json if json else _show_bar if sys.stderr.isatty() else _show_nothing
    status, error, code, cancelled = "completed", None, 0, False
    started = time.monotonic()
    while True:
        try:
            if interrupts.number is not None and not cancelled:
                cancelled = True
                job.cancel()
            job.wait(REFRESH_SECONDS)
            break
        except TimeoutError:
            show(job)
        except JobCancelled as end:
            status, error, code = "cancelled", one_line(end), interrupts.exit_status
            break
        except Exception as failure:
            status, error, code = "failed", one_line(failure), 1
            break
    if status == "completed":
        show(job)
    if json:
        print_json({"event": "end", "status": status, "error": error})
    elif sys.stderr.isatty():
        print(file=sys.stderr)
    if status != "completed":
        warn(error)
    elif not json:
        size = job.result.get("bytes", job.progress["total"])
        verified = ", verified," if job.result.get("verified") else ""
        copied = job.result.get("data_bytes")
        of = f"{format_size(copied)} copied of {format_size(size)}" if copied is not None else format_size(size)
        print(f"{of}{verified} in {time.monotonic() - started:.1f} s")
    return code


def _show_json(job) -> None:
    print_json({"event": "progress", "job": job.id, **job.progress})


def _show_bar(job) -> None:
    progress = job.progress
    share = progress["done"] / progress["total"] if progress["total"] else 1.0
    bar = "#" * int(share * BAR_WIDTH)
    print(f"\r{share:6.1%} [{bar:<{BAR_WIDTH}}] {format_size(progress['done'])} of {format_size(progress['total'])}, "
          f"{format_size(int(progress['bytes_per_s']))}/s   ", end="", file=sys.stderr, flush=True)


def _show_nothing(job) -> None:
    pass
