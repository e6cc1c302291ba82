"""What a backup goes to: a file, or an NBD export, the same one for every scheme."""

from __future__ import annotations

import os
from typing import ClassVar

from fastcbw.compare.process import Process, Usage, find, nbd_answers, python_module, socket_uri
from fastcbw.compare.targets.server import EXPORT


class Target:
    """A file of LENGTH bytes in FOLDER that does not exist yet. cpu: the core of its server, where there is one.

    where: a path or an NBD URI. socket, export: of its server; None for a file. path: the file that has the backup in the end.
    fails: a backup to it is expected to fail.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    needs: ClassVar[tuple[tuple[str, str], ...]] = ()
    fails: ClassVar[bool] = False

    def __init__(self, folder: str, length: int, cpu: int | None):
        self.path = os.path.join(folder, "backup.img")
        self.folder, self.length, self.cpu = folder, length, cpu
        self.socket: str | None = None
        self.export = ""
        self.process: Process | None = None

    @classmethod
    def check(cls) -> None:
        """Raise Missing when a program is not installed."""
        for program, package in cls.needs:
            find(program, package)

    @classmethod
    def seconds(cls, length: int) -> float:
        """Return about how long a backup of LENGTH bytes to it takes."""
        return 1.0

    @property
    def where(self) -> str:
        return self.path if self.socket is None else socket_uri(self.socket, self.export)

    def start(self) -> None:
        """Make it ready to be written."""
        with open(self.path, "wb") as file:
            file.truncate(self.length)

    def usage(self) -> Usage:
        return Usage() if self.process is None else self.process.usage()

    def stop(self) -> None:
        if self.process is not None:
            self.process.stop()


class File(Target):
    name = "file"
    title = "a file"


class Served(Target):
    """An export of our own server, behind devices that make it slow or faulty: see targets/server.py."""

    options: ClassVar[dict[str, int]] = {}

    @classmethod
    def seconds(cls, length: int) -> float:
        """As fast as its bandwidth, until it fails for good, and a stall."""
        written = min(length, cls.options.get("full_after_bytes", length), cls.options.get("fail_after_bytes", length))
        return 1.0 + written / cls.options.get("bytes_per_s", 1 << 30) + cls.options.get("stall_ms", 0) / 1000

    def __init__(self, folder: str, length: int, cpu: int | None):
        super().__init__(folder, length, cpu)
        self.export = EXPORT

    def words(self) -> list[str]:
        return python_module("fastcbw.compare.targets.server", self.path, self.socket,
                             *(f"{name}={value}" for name, value in self.options.items()))

    def start(self) -> None:
        super().start()
        self.socket = os.path.join(self.folder, "target.sock")
        self.process = Process("target", self.words(), self.folder, self.cpu, elsewhere=True)
        self.process.start(lambda: nbd_answers(self.socket))


class Nbdkit(Served):
    """nbdkit's file plugin behind filters."""

    needs = (("nbdkit", "nbdkit"),)
    filters: ClassVar[tuple[str, ...]] = ()
    parameters: ClassVar[tuple[str, ...]] = ()
    bytes_per_s: ClassVar[int] = 1 << 30

    @classmethod
    def seconds(cls, length: int) -> float:
        return 1.0 + length / cls.bytes_per_s

    def __init__(self, folder: str, length: int, cpu: int | None):
        super().__init__(folder, length, cpu)
        self.export = ""

    def words(self) -> list[str]:
        return [find("nbdkit", "nbdkit"), "-f", "-U", self.socket, *(f"--filter={name}" for name in self.filters), "file", self.path,
                *self.parameters]
