"""The generator of this package as a load: random writes, and traces."""

from __future__ import annotations

import os
import signal
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit

import numpy
from numpy.typing import NDArray

from fastcbw.compare.loads.base import Load
from fastcbw.compare.process import python_module
from fastcbw.errors import Error


class Generated(Load):
    """what: the last arguments of loads/generator.py."""

    what: ClassVar[tuple[str, ...]]
    depth: ClassVar[int] = 1

    def start(self) -> None:
        uri = urlsplit(self.uri)
        self.output = os.path.join(self.folder, "load.npy")
        self.process.words = python_module("fastcbw.compare.loads.generator", parse_qs(uri.query)["socket"][0], uri.path[1:], str(self.length),
                                           str(self.depth), str(self.seconds), self.output, *self.what)
        self.process.start()

    def finish(self) -> NDArray:
        if self.process.running():
            self.process.send(signal.SIGTERM)
        if self.process.wait() != 0:
            raise Error(f"load: failed: {self.process.words_said()}")
        return numpy.load(self.output)


class Generator4k(Generated):
    name = "generator-4k"
    title = "4k random writes, 500/s, without fio"
    rate = 500
    what = ("random", "4096", "500")
    settings = {"program": "fastcbw", "rw": "randwrite", "bs": "4k", "iodepth": 1, "rate_iops": 500}


class Replay(Generated):
    """The requests of a recorded guest, at their times; over and over. Which trace, is a setting of the run."""

    name = "trace"
    title = "a recorded guest (--trace)"
    depth = 16
    settings = {"program": "fastcbw", "connections": 16}

    def start(self) -> None:
        if self.trace is None:
            raise Error("load: trace: which? (give --trace FILE; an x-fastcbw-trace node records one)")
        self.what = ("trace", self.trace)
        super().start()


LOADS = (Generator4k, Replay)
