"""What the host of a virtual machine takes of its processors while something is measured.

A virtual processor that would run and does not, because the host runs something else there, makes every latency longer, and no scheme is
to blame. The kernel counts that time as `steal`; on a machine of its own it is 0.
"""

from __future__ import annotations

import os
from collections.abc import Collection

_FIELD = 8      # of a line `cpuN user nice system idle iowait irq softirq steal ...`


def steal_s(cpus: Collection[int]) -> float:
    """Return the seconds that were taken of processors CPUS since the machine began, in steps of 10 ms."""
    names = {f"cpu{cpu}" for cpu in cpus}
    with open("/proc/stat") as lines:
        ticks = [int(fields[_FIELD]) for fields in map(str.split, lines) if fields and fields[0] in names]
    return sum(ticks) / os.sysconf("SC_CLK_TCK")


class Steal:
    """The share that was taken of processors CPUS since this was made."""

    def __init__(self, cpus: Collection[int]):
        self.cpus, self.before_s = cpus, steal_s(cpus)

    def share(self, seconds: float) -> float:
        """Return the share of the processors' time that was taken in the SECONDS until now: 0 to 1."""
        return round((steal_s(self.cpus) - self.before_s) / (seconds * len(self.cpus)), 5)
