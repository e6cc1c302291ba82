"""A run: its cells in their order, each kept when it is finished, those that are kept already left out."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any

from fastcbw.compare.cell import measure
from fastcbw.compare.plan import Plan
from fastcbw.compare.results import Kept
from fastcbw.errors import Error
from fastcbw.units import format_size

#: Of the disk's length: the disk, its copy at the instant, the backup, a temporary image, and something to spare.
ROOM = 5


def run(plan: Plan, folder: str, work: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure the cells of PLAN that are not in FOLDER yet, and those that failed, and return the document.

    work: where disks and backups are, for as long as their cell takes. say: called with a line of how long it will take, and one for each cell.
    Raises Error when there is no room, ValueError when the folder belongs to another run. After Ctrl-C the cells that were
    finished are kept.
    """
    room = shutil.disk_usage(work).free
    if room < plan.length * ROOM:
        raise Error(f"{work}: has room for {format_size(room)}, a cell needs {format_size(plan.length * ROOM)} (name another folder by --work, "
                    f"or give a smaller --size)")
    kept = Kept(folder, plan)
    cells = list(plan.cells())
    left = [cell for cell in cells if not kept.has(cell.name)]
    guesses = {cell: plan.seconds(cell) for cell in left}
    say(f"{len(left)} of {len(cells)} cells to measure, about {minutes(sum(guesses.values()))}")
    own = tempfile.mkdtemp(prefix="fastcbw-compare-", dir=work)
    guessed = taken = 0.0       # of those that are finished: how far the guess was off says how far it is for the rest
    try:
        for number, cell in enumerate(left, 1):
            began = time.monotonic()
            record = measure(cell, plan, own)
            kept.put(cell.name, record)
            taken += time.monotonic() - began
            guessed += guesses.pop(cell)
            more = sum(guesses.values()) * (taken / guessed if guessed else 1)
            say(f"[{len(cells) - len(left) + number}/{len(cells)}] {cell.scheme}, {cell.load}, {cell.target}: {outcome(record)} ({minutes(more)} left)")
    finally:
        shutil.rmtree(own, ignore_errors=True)
    return kept.document()


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def outcome(record: dict[str, Any]) -> str:
    """Return what became of a cell, in a few words."""
    if record["status"] != "measured":
        return record["why"] if record["status"] != "failed" else f"FAILED: {record['why']}"
    p99 = record["guest"]["during"]["p99_us"]
    backup = record["backup"]
    told = [f"guest p99 {p99:.0f} us" if p99 is not None else "no request ended"]
    if backup is not None:
        told.append(f"backup {backup['seconds']:.1f} s, {backup['error'] or 'verified'}")
    return "; ".join(told)
