"""The report: one HTML page with tables and plots, that needs nothing but a browser."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from fastcbw.compare.loads import LOADS
from fastcbw.compare.measures import SHARES
from fastcbw.compare.output import svg, table
from fastcbw.compare.results import Group, during_p99, groups, guest_p99
from fastcbw.compare.schemes import SCHEMES
from fastcbw.compare.targets import TARGETS
from fastcbw.units import format_size

_STYLE = """
body { font: 14px/1.45 sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; font-size: 12px; margin: .5em 0 } th, td { padding: 2px 7px; text-align: right; white-space: nowrap }
th { border-bottom: 1px solid #888 } th:first-child, td:first-child { text-align: left } tr:nth-child(even) td { background: #f4f4f4 }
td.why { text-align: left; color: #777 } td.wrong { background: #fbb !important }
h2 { margin-top: 2em; border-top: 1px solid #ccc; padding-top: .6em } h3 { margin-bottom: .2em } .legend span { margin-right: 1.2em; white-space: nowrap }
.wide { overflow-x: auto } svg { max-width: 100%; height: auto } .legend svg, p svg { vertical-align: middle } .note { color: #555 } details { margin: .4em 0 }
"""
_HOW = """Each scheme got the same disk, the same guest and the same kind of target. At the instant (time 0, dashed) the guest was stopped, its disk
copied aside, the backup begun, and the guest went on. “verified” says that the backup is, byte for byte, what the disk was then. Latencies are of the
guest's requests while the backup ran. “p99 paced” counts the requests that were due while one was under way, too: a guest that waits asks
nothing, so that a plain p99 hides a stall. “by none” is p99 paced, or p99 where a load is not one request after the other, by that of no backup in
the same repetition. The first table has the same figure. “steal” is the share of the processors' time that the host of a virtual machine
took meanwhile; where it is not 0, the longest waits may be its. Plots show, of each scheme, the repetition with the median p99."""


def page(document: dict[str, Any]) -> str:
    """Return the report of DOCUMENT as HTML."""
    numbers, places = _sorted(document)
    parts = [f"<h1>Backup schemes, and what the guest had of them</h1><p>{escape(_HOW)}</p>", _facts(document)]
    if len(places) > 1:
        parts.append("<h2>All in one</h2><p class=note>p99 of the guest while the backup ran, by load and target.</p>" + _overview(places))
    for (target, load), found in places.items():
        parts.append(f"<h2>{escape(table.title(TARGETS, target))}; guest: {escape(table.title(LOADS, load))}</h2>" + _place(found, numbers))
    return (f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>fastcbw compare</title><style>{_STYLE}</style></head>'
            f"<body>{''.join(parts)}</body></html>\n")


def _sorted(document: dict[str, Any]) -> tuple[dict[str, int], dict[tuple[str, str], list[Group]]]:
    """Return the number of each scheme, for its style, and the groups by target and load."""
    there = {cell["scheme"] for cell in document["cells"]}
    numbers = {name: number for number, name in enumerate([name for name in SCHEMES if name in there] + sorted(there - set(SCHEMES)))}
    places: dict[tuple[str, str], list[Group]] = {}
    for group in groups(document, SCHEMES):
        places.setdefault((group.target, group.load), []).append(group)
    return numbers, places


def plots(document: dict[str, Any]) -> dict[str, str]:
    """Return the plots of lines as SVG files: name -> content."""
    numbers, places = _sorted(document)
    files = {}
    for (target, load), found in places.items():
        drawn = [(group, record) for group in found if (record := group.middle(during_p99)) is not None]
        if drawn:
            entries = [(group.scheme, *svg.style(numbers[group.scheme])) for group, _ in drawn]
            files[f"latency-{target}-{load}.svg"] = svg.alone(latency_over_time(drawn, numbers), entries)
            files[f"percentiles-{target}-{load}.svg"] = svg.alone(percentiles(drawn, numbers), entries)
    return files


def _facts(document: dict[str, Any]) -> str:
    rows = [(name, value) for facts in (document["host"], document["settings"]) for name, value in facts.items()]
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(_fact(name, value))}</td></tr>" for name, value in rows)
    return f"<details><summary>Machine, versions, settings</summary><table>{cells}</table></details>"


def _fact(name: str, value: Any) -> str:
    if name in ("length", "ram"):
        return format_size(value)
    if name == "pinned":
        return "server on core 0, guest and target on core 1" if value else "no"
    return str(value)


def _overview(places: dict[tuple[str, str], list[Group]]) -> str:
    schemes = list(dict.fromkeys(group.scheme for found in places.values() for group in found))
    schemes.sort(key=lambda name: list(SCHEMES).index(name) if name in SCHEMES else len(SCHEMES))
    heads = "".join(f"<th>{escape(target)}<br>{escape(load)}</th>" for target, load in places)
    rows = []
    for scheme in schemes:
        by_place = [next((group for group in found if group.scheme == scheme), None) for found in places.values()]
        cells = "".join(f"<td>{escape(table.microseconds(group.median(guest_p99)) if group else '')}</td>" for group in by_place)
        rows.append(f"<tr><td>{escape(scheme)}</td>{cells}</tr>")
    return f"<div class=wide><table><tr><th>scheme</th>{heads}</tr>{''.join(rows)}</table></div>"


def _place(found: list[Group], numbers: dict[str, int]) -> str:
    drawn = [(group, record) for group in found if (record := group.middle(during_p99)) is not None]
    entries = [(group.scheme, *svg.style(numbers[group.scheme])) for group, _ in drawn]
    parts = [_table(found)]
    if drawn:
        parts += ["<h3>Latency over time</h3><p class=note>p99 of the requests that began in each moment; where none began, what the one took that was waited for.</p>",
                  latency_over_time(drawn, numbers), svg.legend(entries),
                  "<h3>Latency by percentile</h3>", percentiles(drawn, numbers), svg.legend(entries),
                  "<h3>Bytes moved while the backup ran</h3><p class=note>By the server, and by the target's server where there is one; caches count.</p>",
                  bytes_moved(drawn)]
        filled = [(group, record) for group, record in drawn if any(record["tiers"]["ram"]) or any(record["tiers"]["disk"])]
        parts.append("<h3>Old data in the tiers over time</h3>")
        parts.append(tier_fill(filled, numbers) if filled else "<p class=note>No scheme here kept any.</p>")
    return "".join(parts)


def _table(found: list[Group]) -> str:
    heads = "".join(f"<th>{escape(head)}</th>" for head in table.HEADS)
    rows = []
    for group in found:
        cells = table.row(group, found)
        title = SCHEMES[group.scheme].title if group.scheme in SCHEMES else ""
        first = f'<td title="{escape(title)}">{escape(cells[0])}</td>'
        if len(cells) != len(table.HEADS):
            rows.append(f"<tr>{first}<td class=why colspan={len(table.HEADS) - 1}>{escape(cells[1])}</td></tr>")
        else:
            wrong = " class=wrong" if "WRONG" in cells else ""
            rows.append(f"<tr>{first}" + "".join(f"<td{wrong}>{escape(cell)}</td>" for cell in cells[1:]) + "</tr>")
    return f"<table><tr>{heads}</tr>{''.join(rows)}</table>"


def latency_over_time(drawn: list[tuple[Group, dict[str, Any]]], numbers: dict[str, int]) -> str:
    return svg.lines([(group.scheme, list(zip(record["time"]["t_s"], record["time"]["p99_us"])), numbers[group.scheme]) for group, record in drawn],
                     x_label="seconds from the instant", y_label="p99", y_text=table.microseconds, logarithmic=True, mark=0.0)


def percentiles(drawn: list[tuple[Group, dict[str, Any]]], numbers: dict[str, int]) -> str:
    """Draw the curves with each further nine as far from the last as the one before."""
    def place(share: float) -> float:
        return -math.log10(1 - min(share, 99.995) / 100)
    named = [(group.scheme, [(place(share), value) for share, value in record["curve"]], numbers[group.scheme]) for group, record in drawn]
    marks = [(place(share), f"{share:g}") for share in SHARES if share in (0, 50, 90, 99, 99.9, 99.99)]
    return svg.lines(named, x_label="percent of the requests", y_label="latency at most", y_text=table.microseconds, logarithmic=True,
                     x_ticks=[*marks, (place(100), "all")])


def bytes_moved(drawn: list[tuple[Group, dict[str, Any]]]) -> str:
    rows = [(group.scheme, [("read", record["use"]["read_bytes"]), ("written", record["use"]["written_bytes"])])
            for group, record in drawn if record["backup"] is not None]
    return svg.bars(rows, x_label="bytes", x_text=format_bytes)


def tier_fill(drawn: list[tuple[Group, dict[str, Any]]], numbers: dict[str, int]) -> str:
    named, entries = [], []
    for group, record in drawn:
        for tier in ("ram", "disk"):
            if any(record["tiers"][tier]):
                number = numbers[group.scheme] if tier == "ram" else numbers[group.scheme] + len(svg.COLOURS)
                named.append((f"{group.scheme}, {tier}", list(zip(record["tiers"]["t_s"], record["tiers"][tier])), number))
                entries.append((named[-1][0], *svg.style(number)))
    return svg.lines(named, x_label="seconds from the instant", y_label="bytes", y_text=format_bytes) + svg.legend(entries)


def format_bytes(value: float) -> str:
    """Return VALUE in decimal units, which round marks of an axis need."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f}"
