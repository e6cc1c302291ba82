"""What a run consists of: which schemes, loads and targets, how often, how large, in which order."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from fastcbw.compare.loads import LOADS
from fastcbw.compare.process import Missing
from fastcbw.compare.schemes import SCHEMES
from fastcbw.compare.targets import TARGETS

QUICK_SCHEMES = ("none", "filter-ram", "filter-tiers", "qemu-direct", "qemu-fleecing")
QUICK_LOADS = ("paced-4k",)
QUICK_TARGETS = ("file", "20mbs")
#: The load and the targets under which a full run has every scheme.
CENTRE_LOAD = "paced-4k"
CENTRE_TARGETS = ("file", "20mbs", "50ms")
#: The schemes that it has most often there, and those that it has under every load and with every target.
DECISIVE_SCHEMES = ("none", "notifier", "filter-ram", "filter-tiers", "pull", "qemu-direct", "qemu-fleecing")
FEW_SCHEMES = ("none", "notifier", "filter-tiers", "qemu-direct", "qemu-fleecing")
#: What a cell takes beside its load: processes that start and end, a disk that is made, copied and compared.
AROUND_S, AROUND_S_PER_BYTE = 1.6, 4 / (1 << 30)
#: A cell that takes this much longer than it may is given up.
GRACE_S = 60.0


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
class Part:
    """Each of SCHEMES under each of LOADS with each of TARGETS, REPETITIONS times."""

    schemes: tuple[str, ...]
    loads: tuple[str, ...]
    targets: tuple[str, ...]
    repetitions: int


@dataclass(frozen=True)
class Plan:
    """A run. length: of the disk. ram: bytes of the RAM tier. Seconds: before anything counts, before the instant, during the backup at least and at most, after it.

    backup_s_max: a backup that is not complete by then is given up. pinned: server on one core, load and target on another. trace: the file that
    the load `trace` replays. steal_max: a cell of whose processors' time the host took more than this share is measured anew. A cell of several parts is measured as often as the part says that has it most often.
    """

    parts: tuple[Part, ...]
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
    steal_max: float = 1.0

    def cells(self) -> Iterator[Cell]:
        """Return the cells in their order: the schemes of one load and target one after the other, from another one on each time."""
        for repetition in range(max((part.repetitions for part in self.parts), default=0)):
            places: dict[tuple[str, str], dict[str, None]] = {}
            for part in self.parts:
                for place in product(part.targets, part.loads) if repetition < part.repetitions else ():
                    places.setdefault(place, {}).update(dict.fromkeys(part.schemes))
            for (target, load), found in places.items():
                schemes = list(found)
                turn = repetition % len(schemes)
                for scheme in schemes[turn:] + schemes[:turn]:
                    yield Cell(scheme, load, target, repetition)

    def settings(self) -> dict[str, Any]:
        """Return what two runs must share for their cells to be of one kind."""
        chosen = asdict(self)
        del chosen["parts"]
        return chosen

    def seconds(self, cell: Cell) -> float:
        """Return about how long CELL takes; a guess from the target, on a machine with memory to spare."""
        if reason_not_to_run(cell, self.trace) is not None:
            return 0.0
        return AROUND_S + AROUND_S_PER_BYTE * self.length + self.warm_up_s + self.before_s + self.after_s + self._backup_s(cell)

    def _backup_s(self, cell: Cell) -> float:
        return min(max(TARGETS[cell.target].seconds(self.length), self.during_s_min), self.during_s_max)

    def during_s(self, cell: Cell) -> float:
        """Return how long CELL's load runs after the instant at least. Without a backup as long as one would: what disturbs the machine now
        and then is in the p99 of five seconds more often than in that of one."""
        return self.during_s_min if SCHEMES[cell.scheme].backs_up else self._backup_s(cell)

    @property
    def cell_s_max(self) -> float:
        """How long a cell may take before it is given up: as long as all that may be waited for in it, and more."""
        return self.warm_up_s + self.before_s + max(self.during_s_max, self.backup_s_max) + self.after_s + GRACE_S


def quick() -> dict[str, Any]:
    """Return the fields of a run that ends within a minute. Without fio our own generator stands in for it, beside rows that say so."""
    loads = QUICK_LOADS if shutil.which("fio") else (*QUICK_LOADS, "generator-4k")
    return {"parts": (Part(QUICK_SCHEMES, loads, QUICK_TARGETS, 1),), "length": 48 << 20, "ram": 8 << 20, "warm_up_s": 0.5, "before_s": 0.8,
            "during_s_min": 1.0, "during_s_max": 6.0, "after_s": 0.5, "backup_s_max": 20.0}


def full(trace: bool, cross: bool = False) -> dict[str, Any]:
    """Return the fields of a whole run, a star: every scheme under one load with the targets that tell most, few of them under every load, and with
    every target; the most important ones most often. trace: there is one to replay. cross: everything with everything, for hours."""
    loads = tuple(load for load in LOADS if trace or load != "trace")
    if cross:
        parts = (Part(tuple(SCHEMES), loads, tuple(TARGETS), 3),)
    else:
        parts = (Part(DECISIVE_SCHEMES, (CENTRE_LOAD,), CENTRE_TARGETS, 4), Part(tuple(SCHEMES), (CENTRE_LOAD,), CENTRE_TARGETS, 2),
                 Part(FEW_SCHEMES, tuple(load for load in loads if load != CENTRE_LOAD), ("20mbs",), 2),
                 Part(FEW_SCHEMES, (CENTRE_LOAD,), tuple(target for target in TARGETS if target not in CENTRE_TARGETS), 2))
    return {"parts": parts, "length": 96 << 20, "ram": 8 << 20, "warm_up_s": 0.4, "before_s": 0.6, "during_s_min": 2.0, "during_s_max": 15.0,
            "after_s": 0.4, "backup_s_max": 60.0}


def narrowed(parts: tuple[Part, ...], schemes: tuple[str, ...] | None, loads: tuple[str, ...] | None, targets: tuple[str, ...] | None,
             repetitions: int | None) -> tuple[Part, ...]:
    """Return PARTS with only what is named, None: all; repetitions: of each.

    Of a single part, and where that leaves nothing, what is named takes the place of what was there.
    """
    def kept(part: Part) -> Part:
        return Part(*(have if named is None else tuple(name for name in named if name in have)
                      for have, named in ((part.schemes, schemes), (part.loads, loads), (part.targets, targets))), repetitions or part.repetitions)

    found = [part for part in map(kept, parts) if part.schemes and part.loads and part.targets]
    if len(parts) > 1 and found:
        return tuple(found)
    first = parts[0]
    return (Part(schemes or first.schemes, loads or first.loads, targets or first.targets, repetitions or first.repetitions),)


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
