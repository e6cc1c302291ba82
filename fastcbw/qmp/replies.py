"""Replies stay below what a client reads of a line by default: long lists come in pages, and nobody is sent what breaks his connection.

A command that returns a list takes where to begin and how many; a page is cut so that it fits, and an empty one says that there is
no more. Without these a reply that is too long is an error that says how to ask. Who enables the capability LONG_REPLIES
gets replies of any length.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from fastcbw.qmp.errors import QmpError
from fastcbw.qmp.schema import Command

#: Of a line with its end: the limit of asyncio's streams, and so of qemu.qmp.
REPLY_BYTES_LIMIT = 64 << 10
#: What a client enables by qmp_capabilities that reads longer lines.
LONG_REPLIES = "fastcbw-long-replies"
#: Characters of an error's description: it may quote what the client sent.
DESCRIPTION_LIMIT = 4000
#: What of a reply is not the page itself, without the id.
FRAME_BYTES = 256


class Page(NamedTuple):
    """What part of a list is asked for: from index START on, LIMIT items at most, or as many as fit."""

    start: int
    limit: int | None


def encode(message: dict) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\r\n"


def take_page(command: Command, arguments: dict[str, Any]) -> Page | None:
    """Take the arguments of a page out of checked ARGUMENTS; None when none were given. QmpError for those that make no sense."""
    names = command.page_arguments
    given = {name: arguments.pop(name.replace("-", "_")) for name in names if name.replace("-", "_") in arguments}
    if not given:
        return None
    for name, least in zip(names, (0, 1)):
        if given.get(name, least) < least:
            raise QmpError(f"Parameter '{name}' expects a value of at least {least}, not {given[name]}")
    return Page(given.get(names[0], 0), given.get(names[1]))


def cut(items: list, page: Page, request_id: object, long: bool) -> list:
    """Return the PAGE of ITEMS; unless LONG as many of it as fit in a reply. QmpError when the first of them does not."""
    items = items[page.start : None if page.limit is None else page.start + page.limit]
    if long:
        return items
    room = REPLY_BYTES_LIMIT - FRAME_BYTES - len(encode({"id": request_id}))
    for count, item in enumerate(items):
        room -= len(encode(item))
        if room < 0:
            if count == 0:
                raise QmpError(f"item {page.start} is longer than a reply of {REPLY_BYTES_LIMIT} bytes (enable '{LONG_REPLIES}' and read longer lines)")
            return items[:count]
    return items


def encode_reply(reply: dict, command: Command | None, long: bool) -> bytes:
    """Return the line of REPLY; unless LONG that of an error in its place when it is too long. COMMAND: None when it is an error anyway."""
    if "error" in reply and len(reply["error"]["desc"]) > DESCRIPTION_LIMIT:
        reply = reply | {"error": reply["error"] | {"desc": reply["error"]["desc"][: DESCRIPTION_LIMIT - 1] + "…"}}
    line = encode(reply)
    if long or len(line) <= REPLY_BYTES_LIMIT or command is None:
        return line
    hint = f"ask for parts of it, by {command.page_hint}" if command.page_hint else f"enable '{LONG_REPLIES}' and read longer lines"
    error = QmpError(f"The reply of {command.name} is {len(line)} bytes, more than a client reads by default, {REPLY_BYTES_LIMIT} ({hint})")
    return encode({"error": error.wire()} | ({"id": reply["id"]} if "id" in reply else {}))
