"""Bitmap kernels through ClusterBitmap, beside NumPy, bitarray, memcpy and the plain C loops."""

import bitarray
import numpy as np
import pytest

from fastcbw.bitmaps.bitmap import ClusterBitmap
from fastcbw.kernels import door


@pytest.fixture
def length(full):
    return 1 << 30 if full else 1 << 20     # bits


def dense(length, seed):
    """A bitmap of LENGTH random bits, half of them set."""
    words = np.random.default_rng(seed).integers(0, 1 << 64, length // 64, dtype=np.uint64)
    return ClusterBitmap.wrap(words, length).copy()


def scattered(length, ones):
    """A bitmap of LENGTH bits with ONES of them set, at random places."""
    bitmap = ClusterBitmap(length)
    for bit in np.random.default_rng(ones).choice(length, ones, replace=False).tolist():
        bitmap.set(bit)
    return bitmap


def walk(bits):
    """The walk over set bits as bitarray offers it; returns how many runs it met."""
    runs, end = 0, 0
    while (first := bits.find(1, end)) >= 0:
        end = bits.find(0, first)
        runs += 1
        if end < 0:
            break
    return runs


def plainly(call):
    """CALL on the plain C loops: what any compiler makes of them for any x86-64."""
    def run():
        before = door.use_instruction_set("generic")
        call()
        door.use_instruction_set(before)
    return run


def test_count(beside, length):
    bitmap = dense(length, 1)
    words, bits = bitmap.numpy, bitmap.bitarray
    assert bitmap.count() == int(np.bitwise_count(words).sum()) == bits.count()
    beside(bitmap.count, {
        "numpy": lambda: np.bitwise_count(words).sum(),
        "bitarray": bits.count,
        "the plain loop": plainly(bitmap.count),
    }, goals={"numpy": 1.7}, bytes=length // 8)


def test_and_not(beside, length):
    left, right, out = dense(length, 1), dense(length, 2), ClusterBitmap(length, fill=True)
    a, b, result = left.numpy, right.numpy, np.ones(length // 64, np.uint64)
    left_bits, right_bits = left.bitarray, right.bitarray

    def numpy():
        np.bitwise_not(b, out=result)
        np.bitwise_and(a, result, out=result)

    numpy()
    assert np.array_equal(left.and_not(right, out=out).numpy, result)
    beside(lambda: left.and_not(right, out=out), {
        "numpy": numpy,
        "bitarray": lambda: left_bits & ~right_bits,
        "the plain loop": plainly(lambda: left.and_not(right, out=out)),
        "memcpy": lambda: np.copyto(result, a),
    }, goals={"numpy": 1.5, "the plain loop": 0.9}, bytes=length // 8 * 3)


def test_and_not_in_place(beside, length):
    left, right = dense(length, 1), dense(length, 2)
    b, result = right.numpy, left.numpy.copy()
    spare = np.ones(length // 64, np.uint64)

    def numpy():
        np.bitwise_not(b, out=spare)
        np.bitwise_and(result, spare, out=result)

    numpy()
    assert np.array_equal(left.and_not(right, out=left).numpy, result)
    beside(lambda: left.and_not(right, out=left), {
        "numpy": numpy,
        "the plain loop": plainly(lambda: left.and_not(right, out=left)),
    }, bytes=length // 8 * 3)


@pytest.mark.parametrize("one_in", [1024, 1 << 26], ids=["one in 1024", "16 in 1 Gi"])
def test_walk_runs(beside, length, one_in):
    ones = max(length // one_in, 16)
    bitmap = scattered(length, ones)
    bits, words = bitmap.bitarray, bitmap.numpy
    assert len(bitmap.runs()) == walk(bits) and int(bitmap.runs()["count"].sum()) == ones
    beside(bitmap.runs, {
        "bitarray": lambda: walk(bits),
        "numpy, finding the words": lambda: np.flatnonzero(words),
        "count": bitmap.count,
    }, goals={"bitarray": 10 if one_in == 1024 else 100})


def test_walk_runs_without_a_summary(beside, length):
    bitmap = scattered(length, 16)
    bare = ClusterBitmap.wrap(bitmap.numpy, length)
    bits = bitmap.bitarray
    assert np.array_equal(bare.runs(), bitmap.runs())
    beside(bare.runs, {"bitarray": lambda: walk(bits), "with its summary": bitmap.runs}, bytes=length // 8)


def test_find_the_last_bit(beside, length):
    bitmap = ClusterBitmap(length)
    bitmap.set(length - 1)
    bits, words = bitmap.bitarray, bitmap.numpy
    assert bitmap.next_one() == bits.find(1) == length - 1
    beside(bitmap.next_one, {"bitarray": lambda: bits.find(1), "numpy": lambda: words.nonzero()})


def test_claim(beside):
    count = 1 << 16
    bitmap, bits = ClusterBitmap(count), bitarray.bitarray(count, endian="little")
    assert bitmap.claim(0, count).tolist() == [(0, count)]

    def claim_and_give_back():
        bitmap.claim(0, count)
        bitmap.clear(0, count)

    def slices():
        bits[:] = 1
        bits[:] = 0

    beside(claim_and_give_back, {"bitarray, not atomic": slices}, bytes=count // 8)


def test_update(beside, length):
    bitmap, other = scattered(length, 4096), scattered(length, 1024)
    result, source = bitmap.numpy.copy(), other.numpy
    bitmap.update(other)
    np.bitwise_or(result, source, out=result)
    assert np.array_equal(bitmap.numpy, result)
    beside(lambda: bitmap.update(other), {"numpy": lambda: np.bitwise_or(result, source, out=result)})
