"""JSON objects out of a byte stream that knows no lines: requests arrive in pieces, several in one, without newline.

The scan only finds where an object ends (brackets outside strings); json decodes it. After bad input it goes on at
the next line or the next ``{``, so that one bad request costs one error. Source: QEMU's json-streamer.c, whose
clients this reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

#: Most bytes of one request. QEMU allows 64 MiB; nothing here needs more than a list of disks.
REQUEST_BYTES_LIMIT = 1 << 20

_BETWEEN = re.compile(rb"[^\s]")
_OUTSIDE = re.compile(rb'["{}\[\]]')
_INSIDE = re.compile(rb'["\\\x00-\x1f]')
_RESUME = re.compile(rb"[\n{]")


class TooLong(Exception):
    """A request longer than the limit; the stream can't be trusted any more."""


def _members(pairs):
    """Refuse a member given twice: which one holds would be anybody's guess."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate key")
    return members


def _constant(text):
    raise ValueError(f"{text} is no JSON")


def _number(text):
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is out of range")
    return number


class Decoder:
    """Cut a stream into JSON values; feed() yields each as soon as it is complete.

    Not thread-safe: one decoder per connection.
    """

    def __init__(self, limit: int = REQUEST_BYTES_LIMIT):
        self.limit = limit
        self._buffer = bytearray()
        self._reset()

    def _reset(self):
        self._scanned = 0       # bytes of the buffer that need no second look
        self._depth = 0         # open brackets
        self._string = False
        self._skipping = False  # after bad input, until the next line or {

    def feed(self, data: bytes) -> Iterator[tuple[object, str | None]]:
        """Yield (value, None) for each complete value, or (None, reason) for each run of bytes that is none.

        Raises TooLong when an unfinished value is longer than the limit.
        """
        self._buffer += data
        while True:
            if self._skipping and not self._skip():
                return
            if self._depth == 0:
                start = _BETWEEN.search(self._buffer)
                if start is None:
                    self._buffer.clear()
                    return
                del self._buffer[: start.start()]
                if self._buffer[:1] not in (b"{", b"["):
                    del self._buffer[:1]
                    self._skipping = True
                    yield None, "JSON parse error, expecting value"
                    continue
                self._scanned = 0
            verdict = self._scan()
            if verdict is None:
                if len(self._buffer) > self.limit:
                    raise TooLong(f"request is longer than {self.limit} bytes")
                return
            end, reason = verdict
            text = bytes(self._buffer[:end])
            del self._buffer[:end]
            self._reset()
            if reason is not None:
                self._skipping = True
                yield None, reason
                continue
            try:
                value = json.loads(text, object_pairs_hook=_members, parse_constant=_constant, parse_float=_number)
            except RecursionError:
                yield None, "JSON parse error, nested too deep"
            except ValueError as error:
                yield None, f"JSON parse error, {error}"
            else:
                yield value, None

    def _skip(self) -> bool:
        """Drop bytes up to where a request may begin again; tell whether that place was found."""
        found = _RESUME.search(self._buffer)
        if found is None:
            self._buffer.clear()
            return False
        del self._buffer[: found.start()]
        self._skipping = False
        return True

    def _scan(self) -> tuple[int, str | None] | None:
        """Go on looking for the end of the value at the buffer's start: (end, None), (end, reason), or None: more."""
        while True:
            found = (_INSIDE if self._string else _OUTSIDE).search(self._buffer, self._scanned)
            if found is None:
                self._scanned = len(self._buffer)
                return None
            at = found.start()
            mark = self._buffer[at]
            self._scanned = at + 1
            if self._string:
                if mark == 0x5C:  # a backslash takes the next byte with it, which may not be here yet
                    if at + 1 == len(self._buffer):
                        self._scanned = at
                        return None
                    self._scanned = at + 2
                elif mark == 0x22:
                    self._string = False
                else:
                    return at, "JSON parse error, control character in a string"
            elif mark == 0x22:
                self._string = True
            elif mark in b"{[":
                self._depth += 1
            else:
                self._depth -= 1
                if self._depth == 0:
                    return at + 1, None
