"""What a job that tracks has not got into its target: whole granules, rounded to the safe side."""

import pytest

import fastcbw
from fastcbw.bitmaps.dirty import DirtyWords
from fastcbw.block.fault import FaultDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.cbw.copier import Copier
from fastcbw.errors import JobFailed

K = 1 << 10


def extents(words):
    return [(int(row["offset"]) // K, int(row["length"]) / K) for row in words.extents()]


@pytest.mark.parametrize("chunk, copied", [(128 * K, [(0, 256)]), (96 * K, [(0, 64), (128, 128)]), (4 * K, [])])
def test_a_granule_that_a_piece_covers_in_part_does_not_count_as_copied(chunk, copied):
    """Granules of 64 KiB; the write at 288 KiB fails. Two pieces that share a granule may both be there: it is said of none."""
    words = DirtyWords(512 * K, 64 * K)
    with MemoryDevice(512 * K) as source, FaultDevice(MemoryDevice(512 * K)) as target, target.fail_on("write", 288 * K, 1):
        source.write(0, b"x" * 512 * K)
        copier = Copier(source, target, chunk=chunk, copied=words)
        copier.run()
        assert "294912" in copier.error or "262144" in copier.error
        for offset, length in copied:
            assert (target.read(offset * K, int(length) * K)) == b"x" * int(length) * K
    assert extents(words) == copied


@pytest.mark.parametrize("length", [64 * K, 64 * K + 512, 4 * K - 512, 512])
def test_nothing_is_left_of_a_disk_that_was_copied_whole_whatever_its_length(length):
    with fastcbw.open(MemoryDevice(length, name="d"), name="d") as disk, MemoryDevice(length) as target, disk.snapshot("s") as snapshot:
        disk.write(0, b"x" * length)
        job = snapshot.backup(target, tracks=True)
        job.wait(20)
        job._kept = True
        wanted = DirtyWords(length, 512)
        wanted.mark(0, length)
        assert extents(job.left(wanted)) == []


def test_what_did_not_compare_is_left_whole():
    source = MemoryDevice(64 * K, name="d")
    source.write(0, b"x" * 64 * K)
    with fastcbw.open(source, name="d") as disk, FaultDevice(MemoryDevice(64 * K)) as target, disk.snapshot("s") as snapshot:
        with target.fail_on("read"):
            job = snapshot.backup(target, tracks=True, verify=True)
            with pytest.raises(JobFailed, match="verify"):
                job.wait(20)
        wanted = DirtyWords(64 * K, 512)
        wanted.mark(1 * K, 2 * K)
        assert extents(job.left(wanted)) == [(1, 2)]


def test_words_without_others_are_rounded_outwards():
    some, done = DirtyWords(64 * K, 4 * K), DirtyWords(64 * K, 512)
    some.mark(0, 16 * K)
    done.mark(0, 4 * K)
    done.mark(4 * K, 512)
    done.mark(9 * K, 7 * K)
    assert extents(some.without(done)) == [(4, 8)]
    with pytest.raises(ValueError, match="do not match"):
        some.without(DirtyWords(4 * K, 512))
