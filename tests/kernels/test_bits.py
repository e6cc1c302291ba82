"""The bitmap kernels that only the engine calls, beside NumPy bools; the others are tested through ClusterBitmap."""

import numpy as np
import pytest

from fastcbw.kernels import door

BITS = 64 * 40
EDGES = [0, 1, 2, 31, 62, 63, 64, 65, 127, 128, 129, 640, 1023, 1024, 1025, BITS - 65, BITS - 64, BITS - 63, BITS - 1, BITS]
SPANS = [(first, end - first) for first in EDGES for end in EDGES if first <= end]


@pytest.fixture(params=door.instruction_sets(), autouse=True)
def instruction_set(request):
    before = door.use_instruction_set(request.param)
    yield request.param
    door.use_instruction_set(before)


def words_of(bools):
    return np.packbits(bools, bitorder="little").view(np.uint64)


def bools_of(words):
    return np.unpackbits(words.view(np.uint8), bitorder="little").view(np.bool_)


def test_mark_sets_the_range_and_nothing_else():
    for first, count in SPANS:
        bits = np.random.default_rng(first).random(BITS) < 0.5
        words = words_of(bits)
        door.mark_seq(words, first, count)
        bits[first:first + count] = True
        assert np.array_equal(bools_of(words), bits), (first, count)


def test_a_range_is_all_set_only_when_every_bit_of_it_is():
    for first, count in SPANS:
        bits = np.zeros(BITS, np.bool_)
        bits[first:first + count] = True            # nothing beside it is
        assert door.all_seq(words_of(bits), first, count), (first, count)
        for hole in {first, first + count // 2, first + count - 1} if count else ():
            bits[hole] = False
            assert not door.all_seq(words_of(bits), first, count), (first, count, hole)
            bits[hole] = True


def test_a_range_has_any_only_from_bits_of_its_own():
    for first, count in SPANS:
        bits = np.ones(BITS, np.bool_)
        bits[first:first + count] = False           # everything beside it is set
        words = words_of(bits)
        assert not door.any_one(words, first, count), (first, count)
        assert door.next_run(words, first, first + count) == (first + count, 0)
        for one in {first, first + count // 2, first + count - 1} if count else ():
            bits[one] = True
            words = words_of(bits)
            assert door.any_one(words, first, count), (first, count, one)
            assert door.next_run(words, first, first + count) == (one, 1)
            bits[one] = False


def test_a_run_ends_where_the_range_does():
    words = words_of(np.ones(BITS, np.bool_))
    for first, count in SPANS:
        assert door.next_run(words, first, first + count) == (first, count)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 64, 65])
def test_or_into_is_numpy_s(count):
    random = np.random.default_rng(count)
    target, source = random.integers(0, 1 << 64, (2, count), dtype=np.uint64)
    expected = target | source
    door.or_into(target, source)
    assert np.array_equal(target, expected)


def test_a_range_outside_the_words_is_refused():
    words = np.zeros(1, np.uint64)
    for first, count in ((-1, 1), (64, 1), (0, 65), (0, -1)):
        with pytest.raises(ValueError, match="not within their 64 bits"):
            door.mark_seq(words, first, count)
    assert words[0] == 0


@pytest.mark.parametrize(("words", "text"), [
    (np.zeros(2, np.uint32), "words: expected one dimension of uint64, got 1 of 'I', 4 bytes each"),
    (np.zeros(2, np.float64), "words: expected one dimension of uint64, got 1 of 'd', 8 bytes each"),
    (np.zeros(2, np.int64), "words: expected one dimension of uint64, got 1 of 'l', 8 bytes each"),
    (np.zeros(2, ">u8"), "words: expected one dimension of uint64, got 1 of '>Q', 8 bytes each"),
    (np.zeros((2, 2), np.uint64), "words: expected one dimension of uint64, got 2 of 'L', 8 bytes each"),
    (np.zeros(4, np.uint64)[::2], "words: expected writable, contiguous memory"),
    (memoryview(np.zeros(2, np.uint64)).toreadonly(), "words: expected writable, contiguous memory"),
    (None, "words: expected writable, contiguous memory"),
])
def test_memory_that_is_no_row_of_words_is_refused_by_name(words, text):
    with pytest.raises(TypeError, match=text):
        door.mark_seq(words, 0, 1)
