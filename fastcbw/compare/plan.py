"""What a run consists of: which schemes, loads and targets, how often, how large, in which order."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fastcbw.compare.loads import LOADS
from fastcbw.compare.process import Missing
from fastcbw.compare.schemes import SCHEMES
from fastcbw.compare.targets import TARGETS

QUICK_SCHEMES = ("none", "filter-ram", "filter-tiers", "qemu-direct", "qemu-fleecing")
QUICK_LOADS = ("paced-4k",)
QUICK_TARGETS = ("file", "20mbs")


@dataclass(frozen=True)
class Cell:
    """One measurement: a scheme under a load with a target, once more."""

    scheme: str
    load: str
    target: str
    repetition: int

    @property
    def name(self) -> str:
        return f"{self.scheme}@{self.load}@{self.target}@{self.repetition}"


@dataclass(frozen=True)
class Plan:
    """A run. length: of the disk. ram: bytes of the RAM tier. Seconds: before anything counts, before the instant, during the backup at least and at most, after it.

    backup_s_max: a backup that is not complete by then is given up. pinned: server on one core, load and target on another. trace: the file that
    the load `trace` replays.
    """

    schemes: tuple[str, ...]
    loads: tuple[str, ...]
    targets: tuple[str, ...]
    repetitions: int
    length: int
    ram: int
    warm_up_s: float
    before_s: float
    during_s_min: float
    during_s_max: float
    after_s: float
    backup_s_max: float
    pinned: bool
    trace: str | None = None

    def cells(self) -> Iterator[Cell]:
        """Return the cells in their order: the schemes of one load and target one after the other, from another one on each time."""
        for repetition in range(self.repetitions):
            for target in self.targets:
                for load in self.loads:
                    turn = repetition % len(self.schemes)
                    for scheme in self.schemes[turn:] + self.schemes[:turn]:
                        yield Cell(scheme, load, target, repetition)

    def settings(self) -> dict[str, Any]:
        """Return what two runs must share for their cells to be of one kind."""
        chosen = asdict(self)
        for name in ("schemes", "loads", "targets", "repetitions"):
            del chosen[name]
        return chosen


def quick() -> dict[str, Any]:
    """Return the fields of a run that ends within a minute. Without fio our own generator stands in for it, beside rows that say so."""
    loads = QUICK_LOADS if shutil.which("fio") else (*QUICK_LOADS, "generator-4k")
    return {"schemes": QUICK_SCHEMES, "loads": loads, "targets": QUICK_TARGETS, "repetitions": 1, "length": 48 << 20,
            "ram": 8 << 20, "warm_up_s": 0.5, "before_s": 0.8, "during_s_min": 1.0, "during_s_max": 6.0, "after_s": 0.5, "backup_s_max": 20.0}


def full() -> dict[str, Any]:
    """Return the fields of the whole matrix."""
    return {"schemes": tuple(SCHEMES), "loads": tuple(LOADS), "targets": tuple(TARGETS), "repetitions": 3, "length": 256 << 20,
            "ram": 16 << 20, "warm_up_s": 0.5, "before_s": 2.0, "during_s_min": 2.0, "during_s_max": 30.0, "after_s": 1.0, "backup_s_max": 120.0}


def select(what: str, names: str, known: Mapping[str, object]) -> tuple[str, ...]:
    """Return the NAMES, a list with commas; ValueError with the list of KNOWN names for one that is not there."""
    chosen = tuple(dict.fromkeys(name for name in names.split(",") if name))
    for name in chosen:
        if name not in known:
            raise ValueError(f"{what}: {name!r} is unknown (there is {', '.join(known)})")
    if not chosen:
        raise ValueError(f"{what}: names nothing (there is {', '.join(known)})")
    return chosen


def reason_not_to_run(cell: Cell, trace: str | None) -> str | None:
    """Return why CELL can't be measured on this machine, or None."""
    scheme = SCHEMES[cell.scheme]
    if cell.load == "trace" and trace is None:
        return "not installed: a trace (give --trace FILE)"
    for part in (scheme, LOADS[cell.load], TARGETS[cell.target]):
        try:
            part.check()
        except Missing as missing:
            return str(missing)
    return None
