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
    """Measure the cells of PLAN that are not in FOLDER yet, and return the document.

    work: where disks and backups are, for as long as their cell takes. say: called with a line of progress for each cell.
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
    own = tempfile.mkdtemp(prefix="fastcbw-compare-", dir=work)
    began = time.monotonic()
    try:
        for number, cell in enumerate(left, 1):
            record = measure(cell, plan, own)
            kept.put(cell.name, record)
            taken = time.monotonic() - began
            say(f"[{len(cells) - len(left) + number}/{len(cells)}] {cell.scheme}, {cell.load}, {cell.target}: {outcome(record)} "
                f"({taken / number * (len(left) - number):.0f} s left)")
    finally:
        shutil.rmtree(own, ignore_errors=True)
    return kept.document()


def outcome(record: dict[str, Any]) -> str:
    """Return what became of a cell, in a few words."""
    if record["status"] != "measured":
        return record["why"]
    p99 = record["guest"]["during"]["p99_us"]
    backup = record["backup"]
    told = [f"guest p99 {p99:.0f} us" if p99 is not None else "no request ended"]
    if backup is not None:
        told.append(f"backup {backup['seconds']:.1f} s, {backup['error'] or 'verified'}")
    return "; ".join(told)
