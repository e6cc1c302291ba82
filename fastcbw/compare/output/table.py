"""The table for a terminal: medians, their spread, and ratios to no backup."""

from __future__ import annotations

import statistics
from typing import Any

from fastcbw.compare.loads import LOADS
from fastcbw.compare.results import Group, during_p99, groups, guest_p99, ratios, steal
from fastcbw.compare.schemes import SCHEMES
from fastcbw.compare.targets import TARGETS
from fastcbw.units import format_size

HEADS = ("scheme", "IOPS", "p50", "p99", "spread", "p99.9", "p99 paced", "by none", "longest", "stalled", "backup", "verdict", "moved", "RAM", "disk",
         "CPU", "steal")


def tables(document: dict[str, Any]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Return for each load and target a title and rows under HEADS."""
    by_place: dict[tuple[str, str], list[Group]] = {}
    for group in groups(document, SCHEMES):
        by_place.setdefault((group.target, group.load), []).append(group)
    return [(f"target: {title(TARGETS, target)}; guest: {title(LOADS, load)}", [row(group, rows) for group in rows])
            for (target, load), rows in by_place.items()]


def title(known: dict[str, Any], name: str) -> str:
    """Return NAME with its title; results may name what this version does not have."""
    return f"{name} ({known[name].title})" if name in known else name


def row(group: Group, beside: list[Group]) -> tuple[str, ...]:
    if group.why is not None:
        return (group.scheme, group.why)
    guest = {name: group.median(lambda record, name=name: record["guest"]["during"][name])
             for name in ("iops", "p50_us", "p99_us", "p999_us", "p99_paced_us", "max_us", "stalled_s")}
    use = {name: group.median(lambda record, name=name: record["use"][name])
           for name in ("amplification", "ram_tier_bytes_max", "disk_tier_bytes_max", "cpu_s")}
    spread = group.values(during_p99)
    base = next((other for other in beside if other.scheme == "none"), None)
    by_none = ratios(group, base, guest_p99) if base is not None else []
    seconds = group.median(lambda record: record["backup"] and record["backup"]["seconds"])
    return (group.scheme, number(guest["iops"]), microseconds(guest["p50_us"]), microseconds(guest["p99_us"]),
            f"{microseconds(spread[0])}..{microseconds(spread[-1])}" if len(spread) > 1 else "",
            microseconds(guest["p999_us"]), microseconds(guest["p99_paced_us"]), f"{statistics.median(by_none):.2f}" if by_none else "",
            microseconds(guest["max_us"]),
            f"{guest['stalled_s']:.1f} s" if guest["stalled_s"] else "", f"{seconds:.2f} s" if seconds is not None else "", group.verdict(),
            f"x{use['amplification']:.2f}" if use["amplification"] else "", size(use["ram_tier_bytes_max"]), size(use["disk_tier_bytes_max"]),
            f"{use['cpu_s']:.2f} s", percent(group.median(steal)))


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def microseconds(value: float | None) -> str:
    """Return VALUE as people read it."""
    if value is None:
        return ""
    for limit, divisor, unit in ((999.5, 1, "us"), (999.5e3, 1e3, "ms")):
        if value < limit:
            return f"{value / divisor:.3g} {unit}"
    return f"{value / 1e6:.3g} s"


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


def size(value: float | None) -> str:
    return format_size(int(value)) if value else ""


def lines(document: dict[str, Any]) -> list[str]:
    """Return the tables as lines."""
    said = []
    for heading, rows in tables(document):
        said += ["", heading]
        whole = [found for found in rows if len(found) == len(HEADS)]
        widths = [max(map(len, column)) for column in zip(HEADS, *whole)]
        first = max(widths[0], *(len(found[0]) for found in rows))
        for found in (HEADS, *rows):
            cells = found if len(found) == len(HEADS) else (found[0],)
            line = "  ".join([cells[0].ljust(first), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))])
            said.append((line if len(found) == len(HEADS) else f"{line}  {found[1]}").rstrip())
    return said
