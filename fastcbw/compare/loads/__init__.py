"""The loads by name."""

from fastcbw.compare.loads import fio, ours
from fastcbw.compare.loads.base import Load

LOADS: dict[str, type[Load]] = {load.name: load for load in (*fio.LOADS, *ours.LOADS)}
