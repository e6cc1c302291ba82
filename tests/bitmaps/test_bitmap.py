"""ClusterBitmap: what it promises, one behaviour a test, at the boundaries of words, pages and ends."""

import threading

import bitarray
import numpy as np
import pytest

from fastcbw.bitmaps.bitmap import ClusterBitmap
from fastcbw.bitmaps.runs import RUN_DTYPE

PAGE = 32768        # bits of one page of words
LENGTHS = [0, 1, 63, 64, 65, 127, 128, 129, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 77]


def rows(runs):
    assert runs.dtype == RUN_DTYPE
    return [tuple(row) for row in runs.tolist()]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_new_bitmap_is_all_zero(length):
    bitmap = ClusterBitmap(length)
    assert len(bitmap) == length
    assert bitmap.count() == 0 and not bitmap.any() and bitmap.next_one() is None and rows(bitmap.runs()) == []
    assert bitmap.all() == (length == 0)
    assert bitmap.next_zero() == (0 if length else None)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_filled_bitmap_is_all_one_and_its_padding_zero(length):
    bitmap = ClusterBitmap(length, fill=True)
    assert bitmap.count() == length and bitmap.all() and bitmap.next_zero() is None
    assert rows(bitmap.runs()) == ([(0, length)] if length else [])
    assert bitmap.bitarray.count() == length


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("width", [0, 1, 2, 63, 64, 65, 128, 129])
def test_set_and_clear_touch_their_range_only(length, width):
    for first in {0, 1, 62, 63, 64, 65, length - width, length - width - 1, PAGE - 1, PAGE, PAGE - width}:
        if first < 0 or first + width > length:
            continue
        bitmap = ClusterBitmap(length)
        bitmap.set(first, width)
        assert bitmap.count() == width
        assert rows(bitmap.runs()) == ([(first, width)] if width else [])
        assert bitmap.next_run() == ((first, width) if width else None)
        filled = ClusterBitmap(length, fill=True)
        filled.clear(first, width)
        assert filled.count() == length - width
        assert filled.next_zero() == (first if width else None)
        assert filled.or_(bitmap).all()
        assert filled.bitarray.count() == length - width


def test_test_tells_a_bit():
    bitmap = ClusterBitmap(65)
    bitmap.set(64)
    assert bitmap.test(64) and not bitmap.test(63) and bitmap.test(np.int64(64))


@pytest.mark.parametrize("edge", [64, 128, PAGE, 2 * PAGE])
def test_a_run_over_an_edge_is_one_run(edge):
    bitmap = ClusterBitmap(3 * PAGE)
    bitmap.set(edge - 3, 7)
    assert bitmap.next_run() == (edge - 3, 7)
    assert rows(bitmap.runs()) == [(edge - 3, 7)]
    assert rows(bitmap.runs(edge - 1, 2)) == [(edge - 1, 2)]
    assert rows(bitmap.runs(edge, 1)) == [(edge, 1)]
    assert bitmap.next_run(edge + 4) is None


def test_a_search_stays_in_its_range():
    bitmap = ClusterBitmap(4 * PAGE)
    bitmap.set(10, 20)
    bitmap.set(3 * PAGE, 5)
    assert bitmap.next_one(30) == 3 * PAGE
    assert bitmap.next_one(30, 3 * PAGE - 30) is None
    assert bitmap.next_one(12, 3) == 12
    assert bitmap.next_run(12, 3) == (12, 3)
    assert bitmap.next_zero(12, 18) is None
    assert bitmap.next_zero(12) == 30
    assert bitmap.count(12, 3 * PAGE) == 18 + 5
    assert bitmap.any(30, 3 * PAGE - 29) and not bitmap.any(30, 3 * PAGE - 30)
    assert bitmap.all(10, 20) and not bitmap.all(10, 21) and bitmap.all(500, 0)


def test_runs_go_on_from_a_limit():
    bitmap = ClusterBitmap(100_000)
    for first in range(0, 100_000, 10):
        bitmap.set(first, 3)
    everything = bitmap.runs()
    assert len(everything) == 10_000
    got, first = [], 0
    while len(part := bitmap.runs(first, limit=333)):
        assert len(part) <= 333
        got.append(part)
        first = int(part[-1]["first"] + part[-1]["count"])
    assert np.array_equal(np.concatenate(got), everything)
    assert len(bitmap.runs(limit=0)) == 0


def test_claim_tells_the_runs_that_were_free():
    bitmap = ClusterBitmap(3 * PAGE)
    bitmap.set(100, 50)
    bitmap.set(PAGE + 5)
    assert rows(bitmap.claim(90, PAGE)) == [(90, 10), (150, PAGE - 145), (PAGE + 6, 84)]
    assert rows(bitmap.claim(90, PAGE)) == []
    assert rows(bitmap.claim(0, 0)) == []
    assert rows(bitmap.claim(3 * PAGE - 1)) == [(3 * PAGE - 1, 1)]
    assert bitmap.runs()[0]["first"] == 90 and bitmap.count() == PAGE + 1


def test_claim_of_every_second_bit_gives_every_one():
    bitmap = ClusterBitmap(2 * PAGE)
    for first in range(0, 2 * PAGE, 2):
        bitmap.set(first)
    got = bitmap.claim(0, 2 * PAGE)
    assert np.array_equal(got["first"], np.arange(1, 2 * PAGE, 2)) and (got["count"] == 1).all()


def test_of_many_threads_that_claim_exactly_one_gets_each_bit():
    length, threads = 3 * PAGE + 77, 8
    bitmap = ClusterBitmap(length)
    start = threading.Barrier(threads)
    got = [np.zeros(length, np.int64) for _ in range(threads)]

    def claim(mine, seed):
        random = np.random.default_rng(seed)
        start.wait()
        for _ in range(300):
            first = int(random.integers(length))
            for run in bitmap.claim(first, min(int(random.integers(1, 3000)), length - first)):
                mine[run["first"]:run["first"] + run["count"]] += 1
        for run in bitmap.claim(0, length):
            mine[run["first"]:run["first"] + run["count"]] += 1

    workers = [threading.Thread(target=claim, args=(got[i], i)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (sum(got) == 1).all()
    assert bitmap.all()


def test_threads_that_set_and_clear_neighbours_lose_no_update():
    bitmap = ClusterBitmap(2 * PAGE)
    other = ClusterBitmap(2 * PAGE)
    other.set(63)
    other.set(PAGE + 63)
    start = threading.Barrier(4)

    def work(index):
        start.wait()
        for _ in range(2000):
            for bit in range(index, 60, 4):
                bitmap.set(bit)
                bitmap.clear(bit)
            bitmap.set(index * 10, 3)
            bitmap.update(other)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    bitmap.clear(0, 60)
    assert rows(bitmap.runs()) == [(63, 1), (PAGE + 63, 1)]


def test_numpy_and_bitarray_show_the_same_live_memory():
    bitmap = ClusterBitmap(70)
    words, bits = bitmap.numpy, bitmap.bitarray
    bitmap.set(0)
    bitmap.set(69)
    assert words.dtype == np.uint64 and words.tolist() == [1, 1 << 5]
    assert len(bits) == 128 and bits.endian == "little" and bits.search(bitarray.bitarray("1")) is not None
    assert [i for i, bit in enumerate(bits) if bit] == [0, 69]
    assert np.frombuffer(bits, np.uint64).__array_interface__["data"][0] == words.__array_interface__["data"][0]


def test_the_views_are_read_only():
    bitmap = ClusterBitmap(70)
    with pytest.raises(ValueError):
        bitmap.numpy[0] = 1
    with pytest.raises(TypeError):
        bitmap.bitarray[0] = 1
    assert bitmap.count() == 0


def test_a_view_outlives_the_bitmap_object():
    bitmap = ClusterBitmap(1 << 20)
    bitmap.set(1 << 19)
    words, bits = bitmap.numpy, bitmap.bitarray
    del bitmap
    assert words[(1 << 19) // 64] == 1 and bits[1 << 19] == 1


def test_views_of_an_empty_bitmap_are_empty():
    bitmap = ClusterBitmap(0)
    assert len(bitmap.numpy) == 0 and len(bitmap.bitarray) == 0 and len(bitmap.to_bools()) == 0


def test_and_not_or_and_update_agree_with_numpy():
    random = np.random.default_rng(3)
    for length in LENGTHS:
        a, b = random.random(length) < 0.3, random.random(length) < 0.6
        left, right = ClusterBitmap.from_bools(a), ClusterBitmap.from_bools(b)
        assert np.array_equal(left.and_not(right).to_bools(), a & ~b)
        assert np.array_equal(left.or_(right).to_bools(), a | b)
        assert np.array_equal(left.to_bools(), a) and np.array_equal(right.to_bools(), b)
        left.update(right)
        assert np.array_equal(left.to_bools(), a | b)
        assert left.bitarray.count() == (a | b).sum()


def test_and_not_into_a_bitmap_leaves_nothing_of_what_was_there():
    left, right, out = ClusterBitmap(5 * PAGE), ClusterBitmap(5 * PAGE), ClusterBitmap(5 * PAGE, fill=True)
    left.set(2 * PAGE, 10)
    right.set(2 * PAGE + 5, PAGE)
    assert left.and_not(right, out=out) is out
    assert rows(out.runs()) == [(2 * PAGE, 5)]
    left.and_not(right, out=left)
    assert rows(left.runs()) == [(2 * PAGE, 5)]
    left.set(0, 3)
    left.and_not(right, out=right)
    assert rows(right.runs()) == [(0, 3), (2 * PAGE, 5)]
    right.and_not(right, out=right)
    assert not right.any()


def test_a_copy_is_its_own():
    bitmap = ClusterBitmap(3 * PAGE)
    bitmap.set(2 * PAGE + 1, 9)
    twin = bitmap.copy()
    assert twin == bitmap
    twin.set(0)
    assert twin != bitmap and rows(bitmap.runs()) == [(2 * PAGE + 1, 9)]


def test_equality_is_about_bits_not_about_history():
    one, other = ClusterBitmap(4 * PAGE), ClusterBitmap(4 * PAGE)
    one.set(PAGE, 2 * PAGE)
    one.clear(PAGE, 2 * PAGE)
    assert one == other and other == one
    other.set(3 * PAGE + 1)
    assert one != other and other != one
    one.set(3 * PAGE + 1)
    assert one == other
    one.set(5)
    assert one != other and other != one
    assert ClusterBitmap(64) != ClusterBitmap(65)
    assert ClusterBitmap(64) != "bitmap"


def test_bools_of_a_range_are_the_range():
    bitmap = ClusterBitmap(100)
    bitmap.set(9, 5)
    assert bitmap.to_bools(8, 8).tolist() == [False] + [True] * 5 + [False] * 2
    assert bitmap.to_bools(100, 0).tolist() == []


def test_tidy_changes_no_bit_and_later_sets_are_found():
    bitmap = ClusterBitmap(4 * PAGE)
    bitmap.set(0, 4 * PAGE)
    bitmap.clear(5, 4 * PAGE - 5)
    bitmap.tidy()
    assert rows(bitmap.runs()) == [(0, 5)]
    bitmap.set(3 * PAGE)
    assert bitmap.next_one(5) == 3 * PAGE


def test_a_sparse_bitmap_of_sixteen_gibibits_costs_what_is_dirty():
    length = 1 << 34
    bitmap = ClusterBitmap(length)
    dirty = sorted(np.random.default_rng(4).choice(length, 64, replace=False).tolist())
    for bit in dirty:
        bitmap.set(bit)
    assert bitmap.runs()["first"].tolist() == dirty
    assert bitmap.count() == 64
    assert bitmap.next_one(dirty[-1] + 1) is None
    twin = bitmap.copy()
    assert twin == bitmap and twin.and_not(bitmap).count() == 0
    assert bitmap.resident() <= 64 * 4096 + length // PAGE // 8       # a page for each bit, and the summary


def test_a_wrapped_buffer_is_a_live_read_only_view():
    words = np.zeros(PAGE // 64 * 3, np.uint64)
    view = ClusterBitmap.wrap(words, 3 * PAGE - 5)
    words[-1] = 1
    assert view.next_run() == (3 * PAGE - 64, 1) and view.count() == 1 and rows(view.runs(7)) == [(3 * PAGE - 64, 1)]
    assert view.numpy.__array_interface__["data"][0] == words.__array_interface__["data"][0]
    for change in (view.set, view.clear, view.claim):
        with pytest.raises(ValueError, match="read-only view of a live bitmap"):
            change(0)
    with pytest.raises(ValueError, match="read-only"):
        view.update(view)
    with pytest.raises(ValueError, match="read-only"):
        view.and_not(view, out=view)
    assert words.sum() == 1 and not view.writable
    twin = view.copy()
    twin.tidy()
    assert twin == view and view.and_not(twin).count() == 0 and twin.and_not(view).count() == 0
    twin.set(0)
    assert twin != view and view != twin and view.or_(twin) == twin


def test_a_wrapped_buffer_outlives_its_name():
    words = np.full(1000, 5, np.uint64)
    view = ClusterBitmap.wrap(words, 64_000)
    bits = view.bitarray
    del words, view
    assert bits.count() == 2000


def test_a_buffer_that_does_not_fit_is_refused():
    words = np.zeros(2, np.uint64)
    with pytest.raises(ValueError, match="length_bits: 129 is not in 0..128"):
        ClusterBitmap.wrap(words, 129)
    with pytest.raises(ValueError, match="not aligned"):
        ClusterBitmap.wrap(words.view(np.uint8)[1:9], 64)
    words[1] = 2
    with pytest.raises(ValueError, match="bits past the end \\(65\\) are set"):
        ClusterBitmap.wrap(words, 65)
    assert ClusterBitmap.wrap(words, 66).count() == 1
    assert len(ClusterBitmap.wrap(b"", 0)) == 0


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda b: b.test(100), IndexError, "bit 100 is not within its 100 bits"),
        (lambda b: b.test(-1), IndexError, "bit -1 is not within its 100 bits"),
        (lambda b: b.test(1 << 70), IndexError, "is not within its 100 bits"),
        (lambda b: b.test("1"), TypeError, "index: expected an int, got str"),
        (lambda b: b.test(1.0), TypeError, "index: expected an int, got float"),
        (lambda b: b.set(99, 2), ValueError, "range 99\\+2 is not within its 100 bits"),
        (lambda b: b.set(-1), ValueError, "range -1\\+1 is not"),
        (lambda b: b.set(0, -1), ValueError, "range 0\\+-1 is not"),
        (lambda b: b.set(1 << 70, 1), ValueError, "is not within its 100 bits"),
        (lambda b: b.set(5, 1 << 63), ValueError, "is not within its 100 bits"),
        (lambda b: b.clear(50, 51), ValueError, "range 50\\+51 is not"),
        (lambda b: b.claim(101, 0), ValueError, "range 101\\+0 is not"),
        (lambda b: b.claim(None), TypeError, "first: expected an int, got NoneType"),
        (lambda b: b.next_one(101), ValueError, "range 101\\+ is not"),
        (lambda b: b.runs(limit=-1), ValueError, "limit: -1 is negative"),
        (lambda b: b.update([1, 2]), TypeError, "other: expected a ClusterBitmap, got list"),
        (lambda b: b.and_not(ClusterBitmap(101)), ValueError, "other: 101 bits do not match the bitmap's 100"),
        (lambda b: b.and_not(b, out=ClusterBitmap(99)), ValueError, "out: 99 bits do not match"),
        (lambda b: ClusterBitmap(-1), ValueError, "length_bits: -1 is not in 0\\.\\."),
        (lambda b: ClusterBitmap(1 << 60), ValueError, "length_bits: .* is not in 0\\.\\."),
        (lambda b: ClusterBitmap("64"), TypeError, "length_bits: expected an int, got str"),
        (lambda b: ClusterBitmap.from_bools(np.zeros(5)), TypeError, "array: expected one dimension of bool, got 1 of float64"),
        (lambda b: hash(b), TypeError, "unhashable"),
    ],
)
def test_bad_input_names_the_thing_and_changes_nothing(call, error, message):
    bitmap = ClusterBitmap(100)
    bitmap.set(50, 3)
    with pytest.raises(error, match=message):
        call(bitmap)
    assert rows(bitmap.runs()) == [(50, 3)]
