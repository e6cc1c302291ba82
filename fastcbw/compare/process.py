"""A program that takes part in a cell: found or missing, begun on one core, its use of the machine, ended by its process."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import fastcbw
from fastcbw.errors import Error

START_SECONDS_LIMIT = 20
STOP_SECONDS_LIMIT = 20


class Missing(Error):
    """A program is not installed; the message names it and its package."""


def find(program: str, package: str) -> str:
    """Return the path of PROGRAM; Missing when it is not installed."""
    path = shutil.which(program)
    if path is None:
        raise Missing(f"not installed: {program} (apt install {package})")
    return path


def version_of(program: str, package: str) -> str | None:
    """Return the first line that PROGRAM says of its version, or None when it is not installed."""
    try:
        words = [find(program, package), "--version"]
    except Missing:
        return None
    return next(iter(subprocess.run(words, capture_output=True, text=True).stdout.splitlines()), "unknown")


def python_module(module: str, *arguments: str) -> list[str]:
    """Return the words that run MODULE of this package in another process."""
    # -P: a folder fastcbw/ where the command is run, a checkout not built, is not the package.
    return [sys.executable, "-P", "-m", module, *arguments]


@dataclass
class Usage:
    """What a process has used: processor seconds, bytes by read and write calls on files, resident bytes at most."""

    cpu_s: float = 0.0
    read_bytes: int = 0
    written_bytes: int = 0
    resident_bytes: int = 0
    resident_bytes_max: int = 0


class Process:
    """WORDS, to be run as NAME with its output in FOLDER; on core CPU, when one is given.

    elsewhere: it stands for another machine, and runs on a processor of this one when nobody else wants it.
    """

    def __init__(self, name: str, words: list[str], folder: str, cpu: int | None = None, *, elsewhere: bool = False):
        self.name, self.words, self.cpu, self.elsewhere = name, words, cpu, elsewhere
        self.log_path = os.path.join(folder, f"{name}.log")
        self._process: subprocess.Popen | None = None

    def start(self, ready: Callable[[], bool] | None = None) -> None:
        """Begin, and return when READY says so. Error with the program's words when it ends before."""
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(
            [os.path.dirname(os.path.dirname(os.path.abspath(fastcbw.__file__))), os.environ.get("PYTHONPATH", "")]),
            "PYTHONFAULTHANDLER": "1"}      # what the watchdog aborts writes its stacks to the log
        allowed = os.sched_getaffinity(0)
        with open(self.log_path, "w+b") as log:
            try:
                if self.cpu is not None:
                    os.sched_setaffinity(0, {self.cpu})     # of this thread; the child has it from its first instruction on
                self._process = subprocess.Popen(self.words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                                                 start_new_session=True)    # Ctrl-C is for us: we end it
                if self.elsewhere:      # before it has threads, which inherit it
                    os.sched_setscheduler(self._process.pid, os.SCHED_IDLE, os.sched_param(0))
            finally:
                os.sched_setaffinity(0, allowed)
        deadline = time.monotonic() + START_SECONDS_LIMIT
        while ready is not None and not ready():
            if not self.running() or time.monotonic() > deadline:
                self.stop()
                raise Error(f"{self.name}: did not start: {self.words_said()}")
            time.sleep(0.01)

    def words_said(self, characters: int = 300) -> str:
        """Return the end of what it wrote, on one line."""
        with open(self.log_path, errors="replace") as log:
            return " ".join(log.read()[-characters:].split()) or "without a word"

    @property
    def pid(self) -> int:
        return self._process.pid

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def send_all(self, number: signal.Signals) -> None:
        """Send NUMBER to it and to its children."""
        os.killpg(self.pid, number)

    def wait(self, seconds: float = STOP_SECONDS_LIMIT) -> int:
        """Wait for its end and return its status; Error when it does not end."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Error(f"{self.name}: did not end within {seconds:g} seconds") from None

    def ends_within(self, seconds: float) -> bool:
        """Tell whether it has ended, or does within SECONDS."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def usage(self) -> Usage:
        """Return what it has used until now; Error when it has ended by itself."""
        try:
            with open(f"/proc/{self.pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            with open(f"/proc/{self.pid}/io") as file:
                counters = {name: int(value) for name, value in (line.split(": ") for line in file)}
            with open(f"/proc/{self.pid}/status") as file:
                memory = {name: value for name, value in (line.split(":", 1) for line in file)}
            resident = [int(memory[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")]
        except (OSError, KeyError):
            raise Error(f"{self.name}: has ended: {self.words_said()}") from None
        return Usage((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), counters["rchar"], counters["wchar"], *resident)

    def is_busy(self) -> bool:
        """Tell whether one of its threads runs, or would if it had a processor, or waits for a disk."""
        return any(state_of(self.pid, thread) in ("R", "D") for thread in threads_of(self.pid))

    def stop(self) -> None:
        """End it, by force when it must be. Stopping twice is no error."""
        if self._process is not None:
            if self.running():
                self.send_all(signal.SIGCONT)
                self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS_LIMIT)
            except subprocess.TimeoutExpired:
                self.send_all(signal.SIGKILL)
                self._process.wait()


def threads_of(pid: int) -> list[int]:
    """Return the threads of process PID, oldest first; none when it has ended."""
    try:
        return sorted(int(thread) for thread in os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return []


def state_of(pid: int, thread: int) -> str | None:
    """Return the letter of what THREAD of process PID does, as ps has it; None when it has ended."""
    try:
        with open(f"/proc/{pid}/task/{thread}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return None


def nbd_answers(path: str) -> bool:
    """Tell whether an NBD server greets at the unix socket PATH."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
            return probe.recv(8) == b"NBDMAGIC"
        except OSError:
            return False


def socket_uri(path: str, export: str = "") -> str:
    return f"nbd+unix:///{export}?socket={path}"
