"""Named dirty bitmaps of an engine: what they mark, how they are switched, what is refused."""

import threading

import pytest

from fastcbw.block.delay import DelayDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.cbw.engine import Engine
from fastcbw.errors import Error, LimitReached

LENGTH = 1 << 20


@pytest.fixture
def engine():
    disk = MemoryDevice(LENGTH)
    engine = Engine(disk)
    yield engine
    engine.close()
    disk.close()


def extents(bitmap):
    return [tuple(map(int, row)) for row in bitmap.extents()]


@pytest.mark.parametrize("with_snapshot", [False, True])
def test_writes_zeroes_and_discards_are_marked_with_or_without_a_snapshot(engine, with_snapshot):
    if with_snapshot:
        engine.snapshot("s")
    fine, coarse = engine.bitmaps.add("fine", granularity=512), engine.bitmaps.add("coarse")
    engine.device.write(512, b"x")
    engine.device.write_zeroes(4096, 1024)
    engine.device.discard(131072, 65536)
    engine.device.write(600_000, bytes(70_000))
    assert extents(fine) == [(512, 512), (4096, 1024), (131072, 65536), (599_552, 70_656)]
    assert extents(coarse) == [(0, 65536), (131072, 65536), (589_824, 131_072)]
    assert [bitmap["count"] for bitmap in engine.bitmaps.report()] == [512 + 1024 + 65536 + 70_656, 65536 * 4]


def test_a_bitmap_can_be_cleared_disabled_enabled_and_removed(engine):
    bitmap = engine.bitmaps.add("b", granularity=512)
    engine.device.write(0, b"x")
    bitmap.clear()
    assert extents(bitmap) == []
    engine.device.write(512, b"x")
    bitmap.disable()
    engine.device.write(1024, b"x")
    bitmap.enable()
    engine.device.write(2048, b"x")
    assert extents(bitmap) == [(512, 512), (2048, 512)]
    bitmap.remove()
    engine.device.write(4096, b"x")
    assert list(engine.bitmaps.named) == []
    with pytest.raises(Error, match="was removed"):
        bitmap.extents()
    with pytest.raises(Error, match="was removed"):
        bitmap.clear()


def test_a_bitmap_that_begins_disabled_marks_nothing_until_it_is_enabled(engine):
    bitmap = engine.bitmaps.add("b", enabled=False)
    engine.device.write(0, b"x")
    assert extents(bitmap) == []
    bitmap.enable()
    engine.device.write(65536, b"x")
    assert extents(bitmap) == [(65536, 65536)]


def test_merge_takes_bitmaps_of_any_granularity(engine):
    fine, coarse = engine.bitmaps.add("fine", granularity=512), engine.bitmaps.add("coarse", granularity="128K")
    engine.device.write(0, b"x")
    fine.disable()
    target = engine.bitmaps.add("target", granularity=4096, enabled=False)
    engine.device.write(300_000, b"x")
    target.merge("fine")
    assert extents(target) == [(0, 4096)]
    target.merge(fine, coarse)
    assert extents(target) == [(0, 131072), (262144, 131072)]
    assert extents(fine) == [(0, 512)]
    with pytest.raises(Error, match="'nowhere'"):
        target.merge("fine", "nowhere")


def test_clearing_a_bitmap_loses_no_mark_of_a_write_under_way():
    """A write that has marked the old words is still to land: the clear waits for it, so that what is unmarked afterwards is old."""
    disk = DelayDevice(MemoryDevice(LENGTH))
    engine = Engine(disk)
    bitmap = engine.bitmaps.add("b", granularity=512)
    gate = disk.hold("write")
    writer = threading.Thread(target=engine.device.write, args=(0, b"x"))
    writer.start()
    gate.wait_arrived()
    cleared = threading.Event()
    clearing = threading.Thread(target=lambda: (bitmap.clear(), cleared.set()))
    clearing.start()
    assert not cleared.wait(0.05)
    gate.open()
    writer.join(10)
    assert cleared.wait(10)
    clearing.join(10)
    assert extents(bitmap) == []
    engine.device.write(0, b"z")
    assert extents(bitmap) == [(0, 512)]
    engine.close()
    disk.close()


def test_what_is_refused_changes_nothing(engine):
    engine.bitmaps.add("b")
    for wrong, error, text in (
        (lambda: engine.bitmaps.add("b"), Error, "'b': exists already"),
        (lambda: engine.bitmaps.add("a/b"), ValueError, "is no name"),
        (lambda: engine.bitmaps.add("c", granularity=256), ValueError, "granularity: 256"),
        (lambda: engine.bitmaps.add("c", granularity=768), ValueError, "granularity: 768"),
        (lambda: engine.bitmaps.add("c", granularity="4G"), ValueError, "granularity: '4G'"),
        (lambda: engine.bitmaps.remove("c"), Error, "'c': not found .bitmaps of this disk: b."),
        (lambda: engine.snapshot("s", bitmap="c"), Error, "'c': not found"),
        (lambda: engine.snapshot("s", new_bitmap="b"), Error, "'b': exists already"),
        (lambda: engine.snapshot("s", bitmap="b", new_bitmap="b"), Error, "'b': exists already"),
        (lambda: engine.snapshot("s", new_bitmap_granularity=512), ValueError, "without new_bitmap"),
        (lambda: engine.snapshot("s", new_bitmap="n", new_bitmap_granularity=100), ValueError, "granularity: 100"),
    ):
        with pytest.raises(error, match=text):
            wrong()
    assert list(engine.bitmaps.named) == ["b"] and not engine.snapshots
    engine.device.write(0, b"x")
    assert extents(engine.bitmaps.named["b"]) == [(0, 65536)]
    for i in range(15):
        engine.bitmaps.add(f"n{i}")
    with pytest.raises(LimitReached, match="16 dirty bitmaps"):
        engine.bitmaps.add("one-too-many")
    with pytest.raises(LimitReached, match="16 dirty bitmaps"):
        engine.snapshot("s", bitmap="b", new_bitmap="one-too-many")
    engine.device.write(65536, b"x")
    assert extents(engine.bitmaps.named["b"]) == [(0, 131072)] and extents(engine.bitmaps.named["n14"]) == [(65536, 65536)]


def test_a_closed_engine_refuses_changes():
    engine = Engine(MemoryDevice(LENGTH))
    bitmap = engine.bitmaps.add("b")
    engine.close()
    for change in (bitmap.clear, bitmap.disable, bitmap.remove, lambda: engine.bitmaps.add("c")):
        with pytest.raises(ValueError, match="the disk is closed"):
            change()
