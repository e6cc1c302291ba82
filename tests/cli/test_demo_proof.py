"""The demo's proof finds what is wrong with a backup, so that its "verified" means something."""

import os

import pytest

from fastcbw.cli.demo_guest import BLOCK, Diary, content
from fastcbw.cli.demo_proof import Instant, digests, prove

BLOCKS = 64
HOLE = range(16, 32)


class Disk:
    """An original, a backup of it, and two guests whose writes are told one by one."""

    def __init__(self, folder):
        self.original_path, self.backup = folder / "original", folder / "backup"
        data = bytearray(os.urandom(BLOCKS * BLOCK))
        data[HOLE.start * BLOCK : HOLE.stop * BLOCK] = bytes(len(HOLE) * BLOCK)
        for path in (self.original_path, self.backup):
            with open(path, "wb") as file:
                file.truncate(len(data))
                for number in set(range(BLOCKS)) - set(HOLE):
                    os.pwrite(file.fileno(), data[number * BLOCK : (number + 1) * BLOCK], number * BLOCK)
        self.original = digests(self.original_path)
        self.diaries = [Diary(folder / f"diary{number}", 100) for number in range(2)]

    def put(self, data, block):
        with open(self.backup, "rb+") as file:
            os.pwrite(file.fileno(), data, block * BLOCK)

    def write(self, guest, block, *, in_backup=True):
        diary = self.diaries[guest]
        number = diary.issued + 1
        diary.put(diary.entries, number, number + 1, block, True)
        diary.issued = diary.acknowledged = number
        diary.entries += 1
        if in_backup:
            self.put(content(guest, number, block), block)

    def prove(self, least, most):
        return prove(self.backup, self.original, self.diaries, Instant(least, most))


@pytest.fixture
def disk(tmp_path):
    """A disk after four writes that all belong to the instant."""
    disk = Disk(tmp_path)
    for guest, block in ((0, 1), (1, 2), (0, 20), (0, 1)):
        disk.write(guest, block)
    yield disk
    for diary in disk.diaries:
        diary.close()


def test_a_true_backup_is_proven_wherever_the_instant_is_in_its_bounds(disk):
    assert disk.prove([3, 1], [3, 1]).problem is None
    verdict = disk.prove([0, 0], [3, 1])
    assert (verdict.problem, verdict.cuts, verdict.written_blocks) == (None, [3, 1], 3)


def test_writes_after_the_instant_are_not_expected(disk):
    disk.write(0, 5, in_backup=False)
    disk.write(1, 2, in_backup=False)
    assert disk.prove([3, 1], [4, 2]).cuts == [3, 1]
    assert disk.prove([3, 1], [4, 2]).problem is None


@pytest.mark.parametrize("block", [0, 1, 2, 20, BLOCKS - 1])
def test_one_wrong_byte_is_found(disk, block):
    with open(disk.backup, "rb+") as file:
        byte = os.pread(file.fileno(), 1, block * BLOCK + 4095)
        os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), block * BLOCK + 4095)
    assert f"block {block} " in disk.prove([3, 1], [3, 1]).problem


def test_data_in_what_was_a_hole_and_a_hole_in_what_was_data_are_found(disk):
    disk.put(b"x" * BLOCK, 25)
    assert "block 25 " in disk.prove([3, 1], [3, 1]).problem
    disk.put(bytes(BLOCK), 25)
    with open(disk.backup, "rb+") as file:
        data = os.pread(file.fileno(), BLOCK, 40 * BLOCK)
        file.truncate(40 * BLOCK)
        file.truncate(BLOCKS * BLOCK)
    assert "block 40 " in disk.prove([3, 1], [3, 1]).problem
    assert any(data)


def test_a_lost_write_an_early_write_and_a_write_out_of_order_are_found(disk):
    disk.write(0, 7, in_backup=False)
    disk.write(0, 8)
    assert "block 7 " in disk.prove([3, 1], [5, 1]).problem, "the later write is there, the earlier is not"
    assert "block 8 " in disk.prove([3, 1], [3, 1]).problem, "the instant was before it"
    assert "block 7 " in disk.prove([4, 1], [4, 1]).problem, "it was acknowledged before"


def test_a_torn_write_is_found(disk):
    disk.put(content(0, 3, 1)[:2048] + content(0, 1, 1)[2048:], 1)
    assert "block 1 " in disk.prove([3, 1], [3, 1]).problem


def test_another_size_is_found(disk):
    os.truncate(disk.backup, (BLOCKS - 1) * BLOCK)
    assert "instead of" in disk.prove([3, 1], [3, 1]).problem
