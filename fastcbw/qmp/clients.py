"""Who sent the command that this thread runs: the client of a QMP session, as far as commands need to know it."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_here = threading.local()


@dataclass(frozen=True)
class Client:
    """One session. number: never used twice; pid, command: of the process at the other end, as the kernel knows it, or None."""

    number: int
    pid: int | None = None
    command: str | None = None

    def describe(self) -> dict:
        return {"client": self.number, "pid": self.pid, "command": self.command}


def client_of(number: int, sock: socket.socket | None) -> Client:
    """Return the Client at the other end of SOCK."""
    if sock is None or sock.family != socket.AF_UNIX:
        return Client(number)
    pid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII")))[0]
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            command = file.read().strip()
    except OSError:
        command = None
    return Client(number, pid or None, command)


@contextmanager
def running_for(client: Client) -> Iterator[None]:
    """Let current_client() of this thread be CLIENT."""
    _here.client = client
    try:
        yield
    finally:
        _here.client = None


def current_client() -> Client | None:
    """Return whose command this thread runs; None outside of one."""
    return getattr(_here, "client", None)
