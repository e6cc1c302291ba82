"""Whether two runs say the same: the order of the schemes, and their ratios to no backup.

Repetitions scatter, so a figure is its median and a spread: median x e^±(t s / √n), of n repetitions, s the scatter of their logarithms, t the
99 % point of Student's distribution. s is that of all schemes of a place together, or the scheme's own where that is larger: of three repetitions
alone it would be a guess. Two schemes are apart where their spreads don't overlap. A figure that was measured once has no spread and is not judged.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from itertools import combinations
from typing import Any, NamedTuple

from fastcbw.compare.loads import LOADS
from fastcbw.compare.output import table
from fastcbw.compare.results import Group, groups, ratios
from fastcbw.compare.schemes import SCHEMES
from fastcbw.compare.targets import TARGETS

#: Two-sided 99 % points of Student's distribution for 1, 2, ... degrees of freedom; beyond, the normal one's is near enough.
STUDENT = (63.66, 9.925, 5.841, 4.604, 4.032, 3.707, 3.499, 3.355, 3.250, 3.169, 3.106, 3.055, 3.012, 2.977, 2.947, 2.921, 2.898, 2.878, 2.861, 2.845)
STUDENT_BEYOND = 2.75


class Figure(NamedTuple):
    """A median, and the spread that another run's is expected to overlap."""

    median: float
    least: float
    most: float

    def overlaps(self, other: Figure) -> bool:
        return self.least <= other.most and other.least <= self.most


def figures(values: dict[str, list[float]]) -> dict[str, Figure]:
    """Return the figure of each scheme that has at least two VALUES."""
    scatter = {name: [math.log(value / statistics.median(found)) for value in found] for name, found in values.items() if len(found) > 1}
    freedom = sum(len(found) - 1 for found in scatter.values())
    if not freedom:
        return {}
    together = math.sqrt(sum(value * value for found in scatter.values() for value in found) / freedom)
    student = STUDENT[freedom - 1] if freedom <= len(STUDENT) else STUDENT_BEYOND
    made = {}
    for name, found in scatter.items():
        own = math.sqrt(sum(value * value for value in found) / (len(found) - 1))
        factor = math.exp(student * max(own, together) / math.sqrt(len(found)))
        median = statistics.median(values[name])
        made[name] = Figure(median, median / factor, median * factor)
    return made


def metric(load: str) -> str:
    """Return what is compared under LOAD: p99 with the requests that were due, where the load is one request after the other."""
    return "p99_paced_us" if load in LOADS and LOADS[load].rate else "p99_us"


def places(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Group]]:
    found: dict[tuple[str, str], dict[str, Group]] = {}
    for group in groups(document, SCHEMES):
        if group.measured:
            found.setdefault((group.target, group.load), {})[group.scheme] = group
    return found


class Place(NamedTuple):
    """What two runs say of one load and target. apart: pairs of schemes that are apart in both; turned: those of them in another order.

    ratios: scheme -> figures of both runs, by none.
    """

    pairs: int
    apart: int
    turned: list[tuple[str, str]]
    ratios: dict[str, tuple[Figure, Figure]]

    @property
    def moved(self) -> list[str]:
        return [name for name, (one, other) in self.ratios.items() if not one.overlaps(other)]


def compare(one: dict[str, Group], other: dict[str, Group], name: str) -> Place:
    """Compare the groups of one place in two runs by the figure NAME of the guest."""
    def of(record: dict[str, Any]) -> float | None:
        return record["guest"]["during"][name] or None

    def made(found: dict[str, Group], values: Callable[[Group], list[float]]) -> dict[str, Figure]:
        return figures({scheme: values(group) for scheme, group in found.items() if scheme in one and scheme in other})

    first, second = (made(found, lambda group: group.values(of)) for found in (one, other))
    both = [scheme for scheme in first if scheme in second]
    apart = [(a, b) for a, b in combinations(both, 2) if not first[a].overlaps(first[b]) and not second[a].overlaps(second[b])]
    turned = [(a, b) for a, b in apart if (first[a].median < first[b].median) != (second[a].median < second[b].median)]
    by_none = [made(found, lambda group, found=found: ratios(group, found["none"], of)) if "none" in found else {} for found in (one, other)]
    return Place(len(both) * (len(both) - 1) // 2, len(apart), turned,
                 {scheme: (by_none[0][scheme], by_none[1][scheme]) for scheme in by_none[0] if scheme in by_none[1] and scheme != "none"})


def lines(document: dict[str, Any], other: dict[str, Any]) -> tuple[list[str], bool]:
    """Return what two runs say of each load and target, as lines, and whether it is the same."""
    said: list[str] = []
    pairs = apart = ratios_count = 0
    turned, moved = 0, 0
    here, there = places(document), places(other)
    for key in here:
        if key not in there:
            continue
        target, load = key
        name = metric(load)
        place = compare(here[key], there[key], name)
        if not place.pairs:
            continue
        pairs, apart, ratios_count = pairs + place.pairs, apart + place.apart, ratios_count + len(place.ratios)
        turned, moved = turned + len(place.turned), moved + len(place.moved)
        said += ["", f"target: {table.title(TARGETS, target)}; guest: {table.title(LOADS, load)}; {name.removesuffix('_us').replace('_', ' ')} by none:"]
        width = max(map(len, place.ratios), default=0)
        said += [f"  {scheme:{width}}  {_figure(a)}  {_figure(b)}{'' if a.overlaps(b) else '  APART'}" for scheme, (a, b) in place.ratios.items()]
        said.append(f"  order: of {place.pairs} pairs {place.apart} are apart in both runs, "
                    + ("all in the same order" if not place.turned else "not in the same order: " + ", ".join(f"{a} and {b}" for a, b in place.turned)))
    if not pairs:
        return ["nothing to compare: no load and target with two repetitions of the same schemes in both runs"], False
    said += ["", f"in all: of {pairs} pairs of schemes {apart} are apart in both runs, {turned} of these in another order; "
                 f"of {ratios_count} ratios {moved} are outside each other's spread"]
    return said, not turned and not moved


def _figure(figure: Figure) -> str:
    return f"{figure.median:8.2f} ({figure.least:.2f} to {figure.most:.2f})".ljust(32)
