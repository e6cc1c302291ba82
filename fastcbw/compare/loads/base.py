"""What a load is: a guest's requests to an NBD export by a process of their own, each of them recorded."""

from __future__ import annotations

import signal
from typing import Any, ClassVar

from numpy.typing import NDArray

from fastcbw.compare.process import Process, find
from fastcbw.compare.stopping import stop_between_requests

SEED = 20240229


class Load:
    """A guest of the export URI of LENGTH bytes, on core CPU; it puts its files into FOLDER.

    trace: a file of requests, for the load that replays one. It runs until finish(), at most SECONDS. pause() stops it for an instant: no request begins until go_on().
    """

    name: ClassVar[str]
    title: ClassVar[str]
    needs: ClassVar[tuple[tuple[str, str], ...]] = ()
    settings: ClassVar[dict[str, Any]] = {}
    #: Requests a second that it asks for, one after the other; None: as many as it can, or several at a time.
    rate: ClassVar[int | None] = None

    def __init__(self, uri: str, length: int, folder: str, cpu: int | None, seconds: float, trace: str | None = None):
        self.trace = trace
        self.uri, self.length, self.folder, self.seconds = uri, length, folder, seconds
        self.process = Process("load", [], folder, cpu)

    @classmethod
    def check(cls) -> None:
        """Raise Missing when a program is not installed."""
        for program, package in cls.needs:
            find(program, package)

    def start(self) -> None:
        """Begin; returns when requests are under way."""
        raise NotImplementedError

    def pause(self) -> None:
        stop_between_requests(self.process)

    def go_on(self) -> None:
        self.process.send_all(signal.SIGCONT)

    def finish(self) -> NDArray:
        """End it and return its requests, as measures.REQUESTS."""
        raise NotImplementedError

    def stop(self) -> None:
        """End its process, if it still runs."""
        self.process.stop()
