"""QMP commands that look into a disk's cache: maps, copy orders, metrics. Replies are paged, so that any client can read them."""

from __future__ import annotations

from fastcbw.cbw.access import CHANGED, IN_RAM, IS_ZERO, ON_DISK, READABLE, map_extents
from fastcbw.cbw.order import order_page
from fastcbw.cbw.policies import ORDER_DEFAULT
from fastcbw.qmp.errors import QmpError
from fastcbw.qmp.metrics import prometheus
from fastcbw.qmp.schema import Argument, Command

#: Rows of a page. A row of a map takes up to 150 bytes: a page of the default fits into a reader's line of 64 KiB, what asyncio
#: grants a client that says nothing else.
ROWS_DEFAULT = 400
ROWS_MAX = 20000

HOLE, ZERO = 1, 2


def _limit(limit: int) -> int:
    if not 1 <= limit <= ROWS_MAX:
        raise QmpError(f"Parameter 'limit' expects a number from 1 to {ROWS_MAX}")
    return limit


def state_of(access: int, of_snapshot: bool, has_snapshot: bool = True) -> str:
    """Return the word for an extent's access bits.

    Of a snapshot: where its data is, `ram`, `disk`, `zero`, `active` (the active disk) or `dropped` (not in the snapshot). Of a
    disk: `changed` or `unchanged` since its newest snapshot, `plain` without one.
    """
    if not of_snapshot:
        return "plain" if not has_snapshot else "changed" if access & CHANGED else "unchanged"
    if not access & READABLE:
        return "dropped"
    return "ram" if access & IN_RAM else "disk" if access & ON_DISK else "zero" if access & IS_ZERO else "active"


def describe_row(row, of_snapshot: bool, has_snapshot: bool) -> dict:
    """Return a row of a map with the keys of `qemu-img map --output json`, and `state`; of a snapshot also `changed`."""
    start, length, flags, access = row
    preserved = bool(access & (IN_RAM | ON_DISK | IS_ZERO))
    readable = bool(access & READABLE)
    described = {"start": start, "length": length, "depth": 0 if preserved or not of_snapshot else 1, "present": readable,
                 "zero": bool(flags & ZERO), "data": readable and not flags & HOLE,
                 "state": state_of(access, of_snapshot, has_snapshot)}
    if of_snapshot:
        described["changed"] = bool(access & CHANGED)
    return described


def _map(daemon, disk: str, snapshot: str | None = None, start: int = 0, length: int | None = None, limit: int = ROWS_DEFAULT) -> dict:
    of = daemon.disk(disk) if snapshot is None else daemon.snapshot(disk, snapshot)
    if not 0 <= start < of.length:
        raise QmpError(f"Parameter 'start' expects an offset within the {of.length} bytes of {disk}")
    rest = of.length - start
    if length is not None and not 1 <= length <= rest:
        raise QmpError(f"Parameter 'length' expects 1 to {rest} bytes, what there is from start on")
    rows, resume = map_extents(of.device, start, length if length is not None else rest, limit=_limit(limit))
    has_snapshot = bool(daemon.disk(disk).snapshots)
    page = {"extents": [describe_row(row, snapshot is not None, has_snapshot) for row in rows.tolist()]}
    if resume is not None:
        page["next"] = resume
    return page


def _order(daemon, disk: str, snapshot: str, order: str = ORDER_DEFAULT, start: int = 0, limit: int = ROWS_DEFAULT) -> dict:
    of = daemon.snapshot(disk, snapshot)
    try:
        rows, resume = order_page(of.device, order, start, _limit(limit))
    except ValueError as error:
        raise QmpError(str(error)) from None
    page = {"extents": [{"offset": offset, "length": length, "class": of_class} for offset, length, of_class in rows.tolist()]}
    if resume is not None:
        page["next"] = resume
    return page


def _latency(daemon) -> dict:
    return daemon.latencies.look()


def _metrics(daemon) -> dict:
    return {"text": prometheus(daemon.status(), daemon.latencies.look())}


_PAGE = (Argument("start", "int", "where the page begins: 0, or what the page before said is next (default 0)"),
         Argument("limit", "int", f"most extents of the page (default {ROWS_DEFAULT}, at most {ROWS_MAX})"))
_DISK = Argument("disk", "str", "the disk", required=True)

CACHE_COMMANDS = [
    Command("fastcbw-map", "what is where: extents with the keys of qemu-img map, and state", _map,
            (_DISK, Argument("snapshot", "str", "a snapshot of the disk (default: the active disk)"), *_PAGE,
             Argument("length", "int", "bytes from start on (default: to the end)"))),
    Command("fastcbw-order", "the extents of a snapshot in copy order, with their class, 0 first", _order,
            (_DISK, Argument("snapshot", "str", "the snapshot", required=True),
             Argument("order", "str", f"policies with commas (default {ORDER_DEFAULT})"), *_PAGE)),
    Command("fastcbw-latency", "latency of guest writes by disk and kind, histograms since somebody began to ask", _latency),
    Command("fastcbw-metrics", "all counters as Prometheus' text format, in the member text", _metrics),
]
