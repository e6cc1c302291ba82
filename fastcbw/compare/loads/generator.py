"""The guest for machines without fio, and for traces: threads with one NBD connection each, in a process of their own.

Run as ``python -m fastcbw.compare.loads.generator SOCKET EXPORT LENGTH DEPTH SECONDS OUTPUT WHAT``. WHAT: ``random BLOCK RATE`` (RATE 0: as
fast as it can), or ``trace FILE``, begun again from its first request when it has ended. A request that comes late is sent at once; those
after it keep their times. At SIGTERM it ends what is under way and writes OUTPUT: measures.REQUESTS as .npy.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator

from fastcbw.compare.loads.base import SEED
from fastcbw.compare.loads.trace import Request, parse
from fastcbw.export.nbd.client import Client


def random_writes(length: int, block: int, rate: float) -> Iterator[Request]:
    """Yield writes of BLOCK bytes at random, RATE a second, without an end."""
    chance = random.Random(SEED)
    due = 0.0
    while True:
        yield Request(int(due), "write", chance.randrange(length // block) * block, block)
        due += 1e6 / rate if rate else 0


def trace(path: str, length: int) -> Iterator[Request]:
    """Yield the requests of the trace at PATH, over and over; what lies beyond LENGTH is moved into the disk."""
    with open(path, encoding="utf-8", errors="replace") as file:
        requests = list(parse(file, path))
    begin = 0
    while requests:
        for due, operation, offset, size in requests:
            size = min(size, length)
            yield Request(begin + due, operation, offset % (length - size + 1) // 512 * 512, size)
        begin += requests[-1].due_us + 1000


class Guest:
    """DEPTH threads that take turns at REQUESTS until it is told to stop."""

    def __init__(self, requests: Iterator[Request], depth: int):
        self.requests = requests
        self.stopping = threading.Event()
        self.taken: list[tuple[int, int, bool, int]] = []       # append is atomic
        self.error: BaseException | None = None
        self._next = threading.Lock()
        self._begin_ns = time.monotonic_ns()
        self._depth = depth

    def run(self, socket: str, export: str, seconds: float) -> None:
        threads = [threading.Thread(target=self._work, args=(socket, export)) for _ in range(self._depth)]
        for thread in threads:
            thread.start()
        self.stopping.wait(seconds)
        self.stopping.set()
        for thread in threads:
            thread.join()

    def _work(self, socket: str, export: str) -> None:
        try:
            with Client(socket, export) as client:
                while not self.stopping.is_set():
                    with self._next:
                        request = next(self.requests, None)
                    if request is None:
                        return
                    early = self._begin_ns + request.due_us * 1000 - time.monotonic_ns()
                    if early > 0 and self.stopping.wait(early / 1e9):
                        return
                    self._do(client, request)
        except BaseException as error:      # told by the main thread
            self.error = error
            self.stopping.set()

    def _do(self, client: Client, request: Request) -> None:
        content = os.urandom(request.length) if request.operation == "write" else b""
        begun = time.monotonic_ns()
        match request.operation:
            case "read":
                client.read(request.offset, request.length)
            case "write":
                client.write(request.offset, content)
            case "zero":
                client.zero(request.offset, request.length)
            case "discard":
                client.trim(request.offset, request.length)
            case "flush":
                client.flush()
        self.taken.append((begun, time.monotonic_ns() - begun, request.operation == "write", request.length))


def main(arguments: list[str]) -> None:
    import numpy

    from fastcbw.compare.measures import REQUESTS

    socket, export, length, depth, seconds, output, what, *rest = arguments
    if what == "trace":
        requests = trace(rest[0], int(length))
    else:
        requests = random_writes(int(length), int(rest[0]), float(rest[1]))
    guest = Guest(requests, int(depth))
    signal.signal(signal.SIGTERM, lambda *_: guest.stopping.set())
    guest.run(socket, export, float(seconds))
    numpy.save(output, numpy.array(guest.taken, REQUESTS))
    if guest.error is not None:
        raise SystemExit(f"{type(guest.error).__name__}: {guest.error}")


if __name__ == "__main__":
    main(sys.argv[1:])
