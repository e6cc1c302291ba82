"""What a scheme is: it serves a guest's disk over NBD, and at an instant begins to back it up."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fastcbw.compare.process import Process, Usage, find, nbd_answers, socket_uri
from fastcbw.compare.targets.base import Target
from fastcbw.errors import Error
from fastcbw.qmp.client import QmpClient

REPLY_SECONDS_LIMIT = 20


@dataclass(frozen=True)
class Setting:
    """Where a scheme works. image: the disk's file, of LENGTH bytes; folder: for what it makes; cpu: its core, or None.

    ram: bytes of the RAM tier, where there is one beside a disk tier or a limit is part of the scheme.
    """

    image: str
    length: int
    folder: str
    cpu: int | None
    ram: int

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)


@dataclass
class Progress:
    """How far a backup is. error: why it ended without being complete."""

    done: int = 0
    total: int = 0
    ended: bool = False
    error: str | None = None


@dataclass
class Tiers:
    """Where old data is, in bytes; preserved: since the instant, all together (None: the scheme does not tell)."""

    ram: int = 0
    disk: int = 0
    preserved: int | None = field(default=None)


class Scheme:
    """One way to back up a disk in use. Made for one cell and its target, which is there before start(); then begin(), stop().

    needs: programs and their packages. settings: what is to be said with its figures. 
    """

    name: ClassVar[str]
    title: ClassVar[str]
    needs: ClassVar[tuple[tuple[str, str], ...]] = ()
    backs_up: ClassVar[bool] = True
    #: Whether a wrong backup is ours to answer for.
    ours: ClassVar[bool] = True

    def __init__(self, setting: Setting, target: Target):
        self.setting, self.target = setting, target
        self.settings: dict[str, Any] = {}
        self.processes: list[Process] = []      # the servers: what they use counts
        self.clients: list[Process] = []        # who takes the backup away

    @classmethod
    def check(cls) -> None:
        """Raise Missing when a program is not installed."""
        for program, package in cls.needs:
            find(program, package)

    @property
    def uri(self) -> str:
        """The guest's disk, from start() on."""
        raise NotImplementedError

    def start(self) -> None:
        """Serve the disk, without a backup."""
        raise NotImplementedError

    def begin(self) -> None:
        """Begin to back up the disk as it is now to the target. The guest is stopped meanwhile."""

    def progress(self) -> Progress:
        return Progress(ended=True)

    def tiers(self) -> Tiers:
        return Tiers()

    def wait_for_change(self, seconds: float) -> None:
        """Return when progress() has something new to say, as the end, or after SECONDS. Costs the server nothing."""
        time.sleep(seconds)

    def usage(self) -> Usage:
        """What its processes have used, and those that have ended when it says so."""
        used = [process.usage() for process in self.processes]
        return Usage(*(sum(values) for values in zip(*(vars(one).values() for one in used))))

    def stop(self) -> None:
        for process in (*self.clients, *reversed(self.processes)):
            process.stop()


class Daemon(Scheme):
    """A scheme that is a server with NBD and QMP sockets, and one job in it."""

    JOB = "backup"

    def __init__(self, setting: Setting, target: Target):
        super().__init__(setting, target)
        self.socket = setting.path("guest.sock")
        self.qmp: QmpClient | None = None

    @property
    def uri(self) -> str:
        return socket_uri(self.socket, "disk")

    def words(self) -> list[str]:
        """The command."""
        raise NotImplementedError

    def start(self) -> None:
        process = Process(self.name, self.words(), self.setting.folder, self.setting.cpu)
        self.processes.append(process)
        process.start(lambda: nbd_answers(self.socket))
        self.qmp = self._connect(process)

    def _connect(self, process: Process) -> QmpClient:
        while True:     # the QMP socket may come a moment after the NBD one
            try:
                return QmpClient(f"{self.socket}.qmp", timeout=REPLY_SECONDS_LIMIT)
            except OSError:
                if not process.running():
                    raise Error(f"{self.name}: did not start: {process.words_said()}") from None
                time.sleep(0.01)

    def progress(self) -> Progress:
        for job in self.qmp.execute("query-jobs"):
            if job["id"] == self.JOB:
                ended = job["status"] == "concluded"
                error = job.get("error") or (f"the job was {job['outcome']}" if job.get("outcome", "completed") != "completed" else None)
                return Progress(job["current-progress"], job["total-progress"], ended, error if ended else None)
        raise Error(f"{self.name}: the job is gone")

    def wait_for_change(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        if self.clients:
            self.clients[-1].ends_within(seconds)
        else:
            while (left := end - time.monotonic()) > 0 and self.qmp.has_event(left):
                event = self.qmp.next_event()
                if event["event"] == "JOB_STATUS_CHANGE" and event["data"]["status"] in ("ready", "concluded"):
                    return

    def stop(self) -> None:
        if self.qmp is not None:
            self.qmp.close()
        super().stop()


def allocated_bytes(path: str) -> int:
    """Return what the file at PATH occupies; 0 when there is none."""
    try:
        return os.stat(path).st_blocks * 512
    except FileNotFoundError:
        return 0
