"""The demo's guest: one process, one NBD connection, one request at a time; and the diary that it shares with the proof.

Every block that it writes carries what the proof needs: which write of which connection put it there. One request at a
time makes the writes of a connection a sequence, so that a point in time is a prefix of it.

Run as ``python -m fastcbw.cli.demo_guest DIARY SOCKET EXPORT BLOCKS RATE SEED NUMBER``.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import struct
import sys
import time

BLOCK = 4096
#: Out of this many requests one is a read, which checks what comes back.
READ_EVERY = 3
ENTRY = struct.Struct("<QQII")      # begun and ended (monotonic ns), block, 1 for a write
HEADER = struct.Struct("<QQQQ")     # writes issued, writes acknowledged, entries in the diary, stop
_IDENTITY = struct.Struct("<QQQQ")  # connection, write number, block, nothing


def content(connection: int, number: int, block: int) -> bytes:
    """Return the 4096 bytes that write NUMBER (from 1) of CONNECTION puts into BLOCK: 64 lines that all name it."""
    identity = _IDENTITY.pack(connection, number, block, 0)
    return (identity + hashlib.blake2b(identity, digest_size=32).digest()) * (BLOCK // 64)


def identify(data: bytes) -> tuple[int, int, int]:
    """Return (connection, write number, block) that DATA names, true or not."""
    return _IDENTITY.unpack_from(data)[:3]


class Diary:
    """What a guest did, in a file that two processes map: counters first, then one entry per request.

    A write's entry is there before it is counted as issued, and it is issued before it is sent.
    """

    def __init__(self, path: str, capacity: int | None = None):
        with open(path, "xb+" if capacity is not None else "rb+") as file:
            if capacity is not None:
                file.truncate(HEADER.size + capacity * ENTRY.size)
            self._map = mmap.mmap(file.fileno(), 0)
        self.capacity = (len(self._map) - HEADER.size) // ENTRY.size

    def _get(self, field: int) -> int:
        return int.from_bytes(self._map[field * 8 : field * 8 + 8], "little")

    def _set(self, field: int, value: int) -> None:
        self._map[field * 8 : field * 8 + 8] = value.to_bytes(8, "little")

    issued = property(lambda self: self._get(0), lambda self, value: self._set(0, value))
    acknowledged = property(lambda self: self._get(1), lambda self, value: self._set(1, value))
    entries = property(lambda self: self._get(2), lambda self, value: self._set(2, value))
    stop = property(lambda self: self._get(3), lambda self, value: self._set(3, value))

    def put(self, index: int, begun: int, ended: int, block: int, write: bool) -> None:
        ENTRY.pack_into(self._map, HEADER.size + index * ENTRY.size, begun, ended, block, write)

    def _entries(self, count: int):
        """Return the first COUNT entries as a structured array: begun, ended, block, write."""
        import numpy  # here, and not in the guest, which has no need of it

        kind = numpy.dtype([("begun", "<u8"), ("ended", "<u8"), ("block", "<u4"), ("write", "<u4")])
        return numpy.frombuffer(self._map[HEADER.size : HEADER.size + count * ENTRY.size], kind)

    def requests(self):
        """Return the requests that have ended."""
        return self._entries(self.entries)

    def written_blocks(self, count: int):
        """Return the blocks of the first COUNT writes, in order; the last of them may not have ended."""
        entries = self._entries(self.entries + 1)
        blocks = entries["block"][entries["write"] == 1][:count]
        if len(blocks) != count:
            raise ValueError(f"the diary has {len(blocks)} writes, not {count}")
        return blocks

    def close(self) -> None:
        self._map.close()


def work(diary: Diary, client, blocks: list[int], rate: float, seed: int, connection: int) -> None:
    """Write and read BLOCKS at random, RATE requests a second, until the diary says stop or is full."""
    chance = random.Random(seed)
    last: dict[int, int] = {}  # block -> its last write
    parent = os.getppid()
    due = time.monotonic_ns()
    interval = int(1e9 / rate)
    for index in range(diary.capacity - 1):
        if diary.stop or os.getppid() != parent:
            return
        now = time.monotonic_ns()
        if due > now:
            time.sleep((due - now) / 1e9)
        elif now - due > 100_000_000:
            due = now  # never make up for a long wait with a burst
        due += interval
        block = blocks[chance.randrange(len(blocks))]
        write = index % READ_EVERY != 0
        if write:
            number = diary.issued + 1
            data = content(connection, number, block)
            begun = time.monotonic_ns()
            diary.put(index, begun, 0, block, True)
            diary.issued = number
            client.write(block * BLOCK, data)
            ended = time.monotonic_ns()
            diary.acknowledged = last[block] = number
        else:
            begun = time.monotonic_ns()
            data = client.read(block * BLOCK, BLOCK)
            ended = time.monotonic_ns()
            if block in last and data != content(connection, last[block], block):
                raise SystemExit(f"guest {connection}: block {block} does not read as it was written")
        diary.put(index, begun, ended, block, write)
        diary.entries = index + 1


def main(arguments: list[str]) -> None:
    path, socket, export, blocks_path, rate, seed, connection = arguments
    from fastcbw.export.nbd.client import Client

    with open(blocks_path) as file:
        blocks = [int(line) for line in file]
    with Client(socket, export) as client:
        work(Diary(path), client, blocks, float(rate), int(seed), int(connection))


if __name__ == "__main__":
    main(sys.argv[1:])
