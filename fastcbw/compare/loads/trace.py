"""Traces: what a guest asked of its disk, as text, one request a line; block/trace writes them.

    # fastcbw-trace-1
    MICROSECONDS OP OFFSET LENGTH

MICROSECONDS: from the first request on, whole, never less than in the line before. OP: read, write, zero, discard, flush; OFFSET and
LENGTH in bytes, both 0 for a flush. Empty lines and lines that begin with # say nothing, but for the first line, which says what it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from fastcbw.block.trace import HEAD

OPERATIONS = ("read", "write", "zero", "discard", "flush")


class Request(NamedTuple):
    due_us: int
    operation: str
    offset: int
    length: int


def parse(lines: Iterable[str], name: str) -> Iterator[Request]:
    """Return the requests of LINES, a trace called NAME; ValueError names the line that is none."""
    due = 0
    for number, line in enumerate(lines, 1):
        if number == 1 and line.rstrip() != HEAD:
            raise ValueError(f"{name}: is no trace (its first line is not {HEAD!r})")
        words = line.split()
        if not words or line.startswith("#"):
            continue
        try:
            at, operation, offset, length = words
            request = Request(int(at), operation, int(offset), int(length))
        except ValueError:
            raise ValueError(f"{name}: line {number}: {line.strip()!r} is no request (expected MICROSECONDS OP OFFSET LENGTH)") from None
        if operation not in OPERATIONS:
            raise ValueError(f"{name}: line {number}: {operation!r} is unknown (there is {', '.join(OPERATIONS)})")
        if request.due_us < due or request.offset < 0 or request.length < 0:
            raise ValueError(f"{name}: line {number}: {line.strip()!r} goes back in time or is negative")
        due = request.due_us
        yield request


def line_of(request: Request) -> str:
    return f"{request.due_us} {request.operation} {request.offset} {request.length}\n"
