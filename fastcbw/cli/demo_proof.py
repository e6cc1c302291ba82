"""The demo's proof: a file is, byte for byte, the disk at the instant of the snapshot.

What was never written must be the original, known by one digest per block. What the guest wrote must be the content of
the last write to that block before the instant; the instant is, per connection, one number of its sequence of writes,
between the last acknowledged before the snapshot was asked for and the last issued before it was handed out.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy

from fastcbw.cli.demo_guest import BLOCK, Diary, content, identify

DIGEST = 16
PIECE = 1 << 20


def _digest(block: bytes | memoryview) -> bytes:
    return hashlib.blake2b(block, digest_size=DIGEST).digest()


ZERO_DIGEST = _digest(bytes(BLOCK))


def data_pieces(file: int, size: int) -> Iterator[tuple[int, memoryview]]:
    """Yield (offset, bytes) of what is not a hole, in whole blocks."""
    at = 0
    while at < size:
        try:
            start = os.lseek(file, at, os.SEEK_DATA) // BLOCK * BLOCK
        except OSError:  # ENXIO: a hole to the end
            return
        end = min(size, -(-os.lseek(file, start, os.SEEK_HOLE) // BLOCK) * BLOCK)
        for at in range(max(start, at), end, PIECE):
            yield at, memoryview(os.pread(file, min(PIECE, end - at), at))
        at = end


def digests(path: str) -> numpy.ndarray:
    """Return one digest per block of the file at PATH, whose size is a multiple of the block."""
    size = os.path.getsize(path)
    found = numpy.empty((size // BLOCK, DIGEST), numpy.uint8)
    found[:] = numpy.frombuffer(ZERO_DIGEST, numpy.uint8)
    file = os.open(path, os.O_RDONLY)
    try:
        for offset, piece in data_pieces(file, size):
            for at in range(0, len(piece), BLOCK):
                found[(offset + at) // BLOCK] = numpy.frombuffer(_digest(piece[at : at + BLOCK]), numpy.uint8)
    finally:
        os.close(file)
    return found


@dataclass
class Instant:
    """What is known of a point in time: per connection, the fewest and the most writes that it holds."""

    least: list[int]
    most: list[int]


@dataclass
class Verdict:
    """problem: None when all is as it must be. cuts: per connection, how many writes the point in time holds."""

    problem: str | None
    cuts: list[int]
    written_blocks: int


def prove(path: str, original: numpy.ndarray, diaries: list[Diary], instant: Instant) -> Verdict:
    """Compare every byte of the file at PATH with what the disk was at INSTANT."""
    size = len(original) * BLOCK
    if os.path.getsize(path) != size:
        return Verdict(f"{os.path.getsize(path)} bytes instead of {size}", [], 0)
    file = os.open(path, os.O_RDONLY)
    try:
        cuts = [_find_cut(file, number, diary, instant) for number, diary in enumerate(diaries)]
        expected = original.copy()
        written: set[int] = set()
        for number, (diary, cut) in enumerate(zip(diaries, cuts)):
            last = {int(block): index for index, block in enumerate(diary.written_blocks(cut), 1)}
            for block, index in last.items():
                expected[block] = numpy.frombuffer(_digest(content(number, index, block)), numpy.uint8)
            written |= last.keys()
        return Verdict(_compare(file, size, expected), cuts, len(written))
    finally:
        os.close(file)


def _find_cut(file: int, number: int, diary: Diary, instant: Instant) -> int:
    """Return how many writes of a connection the file holds: the last one of the uncertain ones that is there."""
    least, most = instant.least[number], instant.most[number]
    blocks = diary.written_blocks(most)
    for index in range(most, least, -1):
        if identify(os.pread(file, BLOCK, int(blocks[index - 1]) * BLOCK)) == (number, index, int(blocks[index - 1])):
            return index
    return least


def _compare(file: int, size: int, expected: numpy.ndarray) -> str | None:
    """Return the first block that differs from its digest, as text, or None."""
    hole = numpy.ones(len(expected), bool)
    for offset, piece in data_pieces(file, size):
        for at in range(0, len(piece), BLOCK):
            block = (offset + at) // BLOCK
            hole[block] = False
            if _digest(piece[at : at + BLOCK]) != expected[block].tobytes():
                return f"block {block} (offset {block * BLOCK}) is not what it was at the instant"
    wrong = numpy.nonzero(hole & (expected != numpy.frombuffer(ZERO_DIGEST, numpy.uint8)).any(axis=1))[0]
    return f"block {wrong[0]} (offset {wrong[0] * BLOCK}) is a hole and was not zero at the instant" if len(wrong) else None
