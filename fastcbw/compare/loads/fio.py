"""fio as the guest: its NBD engine, each request's latency from its log."""

from __future__ import annotations

import math
import os
import signal
import time
from typing import Any, ClassVar

import numpy
from numpy.typing import NDArray

from fastcbw.compare.loads.base import SEED, Load
from fastcbw.compare.measures import REQUESTS, no_requests
from fastcbw.compare.process import find
from fastcbw.errors import Error

#: What fio returns when a signal ended it in good order.
INTERRUPTED = 128


class Fio(Load):
    """words: the job, as options of fio's command line without dashes."""

    needs = (("fio", "fio"),)
    words: ClassVar[dict[str, Any]]

    def start(self) -> None:
        self.log = os.path.join(self.folder, "load_lat.1.log")
        common = {"name": "load", "ioengine": "nbd", "uri": self.uri, "size": self.length, "randseed": SEED, "time_based": 1,
                  "runtime": math.ceil(self.seconds), "output-format": "json", "write_lat_log": os.path.join(self.folder, "load"),
                  "disable_slat": 1, "disable_clat": 1, "log_unix_epoch": 1, "output": os.path.join(self.folder, "fio.json"),
                  "thread": 1}      # else the requests are those of a process in a session of its own, which no signal stops
        self.process.words = [find("fio", "fio"), *(f"--{name}={value}" for name, value in (common | self.words).items())]
        # fio tells the time of day; everything else here is monotonic.
        self._monotonic_ns = time.monotonic_ns() - time.time_ns()
        self.process.start()

    def finish(self) -> NDArray:
        if self.process.running():
            self.process.send(signal.SIGINT)
        if self.process.wait() not in (0, INTERRUPTED):
            raise Error(f"load: fio failed: {self.process.words_said()}")
        return self._requests()

    def _requests(self) -> NDArray:
        """Read the log: milliseconds since 1970, latency in ns, 0 for a read, length, offset; a line when a request ends."""
        if not os.path.exists(self.log):
            return no_requests()
        with open(self.log) as file:
            lines = numpy.fromstring(file.read().replace(",", " "), dtype=numpy.int64, sep=" ").reshape(-1, 5)
        requests = numpy.empty(len(lines), REQUESTS)
        requests["took_ns"] = lines[:, 1]
        requests["begun_ns"] = lines[:, 0] * 1_000_000 + self._monotonic_ns - lines[:, 1]
        requests["write"] = lines[:, 2] == 1
        requests["length"] = lines[:, 3]
        return requests


def fio(name: str, title: str, **words: Any) -> type[Fio]:
    """Return the load NAME: WORDS are options of fio."""
    rate = words.get("rate_iops") if words["iodepth"] == 1 else None
    return type(f"Fio_{name}", (Fio,), {"name": name, "title": title, "words": words, "rate": rate, "settings": {"program": "fio"} | words,
                                        "__doc__": title})


LOADS = (
    fio("paced-4k", "4k random writes, 1000/s", rw="randwrite", bs="4k", iodepth=1, rate_iops=1000),
    fio("hot-spot", "4k writes, 2000/s, nine in ten to a tenth", rw="randwrite", bs="4k", iodepth=1, rate_iops=2000,
        random_distribution="zoned:90/10:10/90"),
    fio("mixed", "4k, 1000 reads and 1000 writes/s", rw="randrw", bs="4k", iodepth=2, rate_iops=1000),
    fio("random-4k", "4k random writes, 16 deep", rw="randwrite", bs="4k", iodepth=16),
    fio("random-64k", "64k random writes, 16 deep", rw="randwrite", bs="64k", iodepth=16),
    fio("sequential", "64k sequential writes, 4 deep", rw="write", bs="64k", iodepth=4),
)
