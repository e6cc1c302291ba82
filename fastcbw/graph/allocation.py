"""What of an image in a format with backing files is its own: for backups with sync top, and for commits into the backing file.

The qemu-nbd that has the image open tells, by the meta context qemu:allocation-depth: 1 is the image itself, more is below.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess

from fastcbw.bitmaps.dirty import DirtyWords
from fastcbw.errors import Error
from fastcbw.export.nbd.client import Client
from fastcbw.graph.kinds.foreign import QemuNbd
from fastcbw.graph.node import Node

GRANULARITY = 4096
_CONTEXT = "qemu:allocation-depth"
_ASK_BYTES = 1 << 30
_INFO_SECONDS = 30


def server_of(node: Node) -> QemuNbd | None:
    """Return the qemu-nbd that has the image at the bottom of NODE open, None when its format is ours."""
    server = node.bottom.server
    return server if isinstance(server, QemuNbd) else None


def backing_of(server: QemuNbd) -> str | None:
    """Return the path of the backing file of SERVER's image, None when it has none. Error when qemu-img does not tell."""
    program = shutil.which("qemu-img")
    if program is None:
        raise Error(f"{server.path}: its backing file is told by qemu-img, which is not installed (Debian's package is qemu-utils)")
    try:
        told = subprocess.run([program, "info", "--force-share", "--output=json", "-f", server.format, "--", server.path],
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_INFO_SECONDS)
    except subprocess.TimeoutExpired:
        raise Error(f"{server.path}: qemu-img does not answer after {_INFO_SECONDS} s") from None
    if told.returncode:
        raise Error(f"{server.path}: {' '.join(told.stderr.split()) or 'qemu-img failed'}")
    info = json.loads(told.stdout)
    path = info.get("full-backing-filename") or info.get("backing-filename")
    return None if path is None else os.path.join(os.path.dirname(server.path), path)


def allocated(server: QemuNbd, length: int) -> DirtyWords:
    """Return what of the LENGTH bytes of SERVER's image lies in the image itself, rounded outwards to GRANULARITY."""
    words = DirtyWords(length, GRANULARITY)
    with Client(server.socket, contexts=[_CONTEXT]) as client:
        if _CONTEXT not in client.contexts:
            raise Error(f"{server.path}: this qemu-nbd does not tell what is allocated (QEMU 5.2 or later does)")
        at = 0
        while at < length:
            for size, depth in client.block_status(at, min(_ASK_BYTES, length - at))[_CONTEXT]:
                size = min(size, length - at)
                if depth == 1:
                    words.mark(at, size)
                at += size
    return words
