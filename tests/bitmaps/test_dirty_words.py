"""Words of dirty bitmaps beside NumPy: marks, conversions between granularities, extents, counts."""

import numpy as np
import pytest

from fastcbw.bitmaps.dirty import DirtyWords

GRANULARITIES = [512, 4096, 65536, 1 << 20]
LENGTHS = [1, 511, 512, 513, 64 * 512, 65 * 512 - 1, 3 * 65536 + 777, (1 << 20) + 1, 5 << 20]


def marked(length, granularity, ranges):
    """Which bytes a bitmap of GRANULARITY marks, one bool each."""
    truth = np.zeros(-(-length // granularity), bool)
    for offset, count in ranges:
        if count:
            truth[offset // granularity : (offset + count - 1) // granularity + 1] = True
    return truth


def some_ranges(rng, length, count=9):
    for _ in range(count):
        offset = int(rng.integers(length))
        yield offset, int(min(rng.choice([0, 1, 511, 512, 4096, 70_000, 1 << 30]), length - offset))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("length", LENGTHS)
def test_marks_are_rounded_outwards_and_views_agree(length, granularity):
    rng = np.random.default_rng(length + granularity)
    for _ in range(5):
        ranges = list(some_ranges(rng, length))
        words = DirtyWords(length, granularity)
        for offset, count in ranges:
            words.mark(offset, count)
        truth = marked(length, granularity, ranges)
        view = words.view()
        assert (view.to_bools() == truth).all()
        assert len(view.bitarray) % 64 == 0 and view.bitarray.count() == truth.sum()       # the padding is zero
        octets = np.repeat(truth, granularity)[:length]
        assert words.count() == octets.sum()
        again = np.zeros(length, bool)
        for offset, count in words.extents():
            assert count > 0 and not again[offset : offset + count].any()
            again[offset : offset + count] = True
        assert (again == octets).all()
        offset = int(rng.integers(length))
        part = words.extents(offset, (length - offset) // 2)
        assert part["length"].sum() == octets[offset : offset + (length - offset) // 2].sum()


@pytest.mark.parametrize("source_granularity", GRANULARITIES)
@pytest.mark.parametrize("target_granularity", GRANULARITIES)
def test_conversion_marks_every_byte_that_was_marked_and_no_granule_more(source_granularity, target_granularity):
    rng = np.random.default_rng(source_granularity * 3 + target_granularity)
    for length in LENGTHS:
        source, target = DirtyWords(length, source_granularity), DirtyWords(length, target_granularity)
        before = list(some_ranges(rng, length, 2))
        for offset, count in before:
            target.mark(offset, count)
        for offset, count in some_ranges(rng, length):
            source.mark(offset, count)
        target.merge(source)
        truth = marked(length, target_granularity, before + [tuple(row) for row in source.extents()])
        assert (target.view().to_bools() == truth).all()


def test_conversion_of_a_64_tib_bitmap_costs_what_is_dirty():
    length = 64 << 40
    source = DirtyWords(length, 512)
    for i in range(64):
        source.mark(i * (length // 64), 512)
    target = source.converted(4096)
    assert target.view().runs()["first"].tolist() == [i * (length // 64 // 4096) for i in range(64)]
    assert target.view().resident() <= 80 * 4096 and source.view().resident() <= 220 * 4096


def test_a_view_can_not_be_changed_and_keeps_its_words_alive():
    words = DirtyWords(1 << 20, 512)
    words.mark(512, 1)
    view = words.view()
    array = view.numpy
    del words
    with pytest.raises(ValueError, match="read-only"):
        view.set(0)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    assert array[0] == 2


@pytest.mark.parametrize("granularity", [0, 1, 256, 513, 768, 1 << 32])
def test_granularity_is_a_power_of_two_from_512_to_2_gib(granularity):
    with pytest.raises(ValueError, match=f"granularity: {granularity}"):
        DirtyWords(4096, granularity)


def test_ranges_outside_the_disk_are_refused():
    words = DirtyWords(1000, 512)
    for offset, length in ((-1, 1), (0, 1001), (1000, 1), (5, -1)):
        with pytest.raises(ValueError, match="1000 bytes"):
            words.mark(offset, length)
        with pytest.raises(ValueError, match="1000 bytes"):
            words.extents(offset, length)
    assert words.count() == 0
