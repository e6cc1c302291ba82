"""The watchdog of a cell: gives it up when it takes too long, says where everybody was, and ends the cell's processes.

With its processes ended, whatever the harness waits for fails: so the cell ends with an error, and the run goes on.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable

from fastcbw.compare.process import Process, state_of, threads_of

#: How long a process may take to write its threads' stacks before it is killed.
DUMP_S = 1.0
#: Calls of the harness that are named, the innermost ones; threads of a process that are described.
FRAMES_MAX = 6
THREADS_MAX = 40


class Watchdog:
    """As a context: ends what PROCESSES returns when the context takes longer than SECONDS."""

    def __init__(self, seconds: float, processes: Callable[[], Iterable[Process]]):
        self.seconds, self._processes = seconds, processes
        self._where: list[str] | None = None
        self._over, self._looked = threading.Event(), threading.Event()
        self._watched = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def where(self) -> list[str] | None:
        """Return who was where when the time was over, the harness first; None when it was not."""
        if self._where is not None:
            self._looked.wait()
        return self._where

    def _watch(self) -> None:
        if self._over.wait(self.seconds):
            return
        frame = sys._current_frames().get(self._watched)
        calls = [f"{os.path.basename(entry.filename)}:{entry.lineno} {entry.name}" for entry in traceback.extract_stack(frame)[-FRAMES_MAX:]]
        self._where = where = ["harness: " + " > ".join(calls)]
        running = [process for process in self._processes() if process.running()]
        for process in running:
            where += [f"{process.name}: {line}" for line in where_threads_are(process.pid)]
            process.send_all(signal.SIGCONT)
            process.send(signal.SIGABRT)        # those of Python then write their stacks to their log
        deadline = time.monotonic() + DUMP_S
        while time.monotonic() < deadline and any(process.running() for process in running):
            time.sleep(0.01)
        where += [f"{process.name} said: {process.words_said(4000)}" for process in running]
        self._looked.set()
        while True:         # the harness may begin another one before it finds out
            for process in self._processes():
                if process.running():
                    process.send_all(signal.SIGKILL)
            if self._over.wait(0.2):
                return


def where_threads_are(pid: int) -> list[str]:
    """Return a line for each thread of process PID: name, state, and where in the kernel it is, as far as we may know."""
    lines = []
    for thread in threads_of(pid)[:THREADS_MAX]:
        comm, wchan, call = (_read(f"/proc/{pid}/task/{thread}/{name}") for name in ("comm", "wchan", "syscall"))
        lines.append(f"thread {thread} {comm}: {state_of(pid, thread) or 'ended'} in {wchan}, system call {call}")
    return lines or ["has ended"]


def _read(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read().strip()
    except OSError as error:
        return f"({os.strerror(error.errno)})"
