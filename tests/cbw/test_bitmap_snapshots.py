"""Snapshots of what a dirty bitmap marks, and bitmaps that begin at the instant of a snapshot."""

import os
import random
import threading
import time

import numpy as np
import pytest

from fastcbw.block.delay import DelayDevice
from fastcbw.block.file import FileDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.block.sectors import SectorLoad
from fastcbw.cbw.engine import Engine, take_snapshots
from fastcbw.cbw.options import SnapshotOptions
from fastcbw.errors import Error, NotInSnapshot

LENGTH = (1 << 20) + 333
CLUSTER = 65536
SECONDS = float(os.environ.get("FASTCBW_RACE_SECONDS", 4))
INSTANTS = 1000             # at least so many, of each of three kinds


@pytest.fixture
def engine():
    disk = MemoryDevice(LENGTH)
    disk.write(0, b"old!" * (LENGTH // 4))
    engine = Engine(disk)
    yield engine
    engine.close()
    disk.close()


def extents(bitmap):
    return [tuple(map(int, row)) for row in bitmap.extents()]


def test_only_what_the_bitmap_marks_is_preserved_and_readable(engine):
    bitmap = engine.bitmaps.add("b", granularity=512)
    engine.device.write(CLUSTER + 700, b"marked")
    view = engine.snapshot("s", bitmap="b", cluster_size=CLUSTER)
    before = engine.counters()["touches"]
    engine.device.write(0, b"new" * 50_000)          # clusters 0 to 2, of which 1 is in the snapshot
    assert engine.report("s")["preserved_clusters"] == 1
    engine.device.write(100, b"again")               # settled by the first
    assert engine.counters()["touches"] == before + 1
    old = b"old!" * (CLUSTER // 4)
    assert view.read(CLUSTER, CLUSTER) == old[:700] + b"marked" + old[706:]
    for offset, length in ((0, 1), (CLUSTER - 1, 2), (2 * CLUSTER - 1, 2), (0, LENGTH), (LENGTH - 1, 1)):
        with pytest.raises(NotInSnapshot, match="not in the snapshot"):
            view.read(offset, length)
    assert [tuple(row) for row in view.extents()] == [
        (0, CLUSTER, 4), (CLUSTER, CLUSTER, 0), (2 * CLUSTER, LENGTH - 2 * CLUSTER, 4)]
    assert view.bitmap.extents()["offset"].tolist() == [CLUSTER + 512]        # as it was at the instant
    # The bitmap goes on as it was.
    assert extents(bitmap) == [(0, 150_016)]


def test_an_empty_bitmap_makes_a_snapshot_of_nothing(engine):
    engine.bitmaps.add("b")
    view = engine.snapshot("s", bitmap="b")
    engine.device.write(0, b"x" * LENGTH)
    assert engine.report("s")["preserved_clusters"] == 0
    assert [tuple(row) for row in view.extents()] == [(0, LENGTH, 4)]


def test_the_last_cluster_of_an_odd_disk_can_be_in_it(engine):
    engine.bitmaps.add("b", granularity="2G")
    engine.device.write(LENGTH - 1, b"x")
    view = engine.snapshot("s", bitmap="b", cluster_size=CLUSTER)
    assert view.read(0, LENGTH) == engine.device.read(0, LENGTH)


def test_a_new_bitmap_begins_at_the_instant_and_takes_the_granularity(engine):
    engine.bitmaps.add("b", granularity=512)
    engine.device.write(0, b"x")
    engine.snapshot("s", bitmap="b", new_bitmap="n")
    engine.device.write(4096, b"y")
    assert extents(engine.bitmaps.named["n"]) == [(4096, 512)]
    engine.snapshot("t", new_bitmap="m", new_bitmap_granularity="1M")
    engine.device.write(4096, b"y")
    assert extents(engine.bitmaps.named["m"]) == [(0, 1 << 20)]
    engine.snapshot("u", new_bitmap="default")
    assert engine.bitmaps.named["default"].granularity == CLUSTER


def test_a_bitmap_that_was_handed_out_is_what_changed_since_or_all_of_it_again(engine):
    bitmap = engine.bitmaps.add("b", granularity=512)
    for success, expected in ((True, [(512, 512)]), (False, [(512, 512), (1024, 512)])):
        engine.device.write(0 if success else 512, b"x")
        engine.snapshot("s", bitmap="b", bitmap_for="a job")
        engine.device.write(512 if success else 1024, b"x")
        assert extents(bitmap)[0][0] == (0 if success else 512)       # both parts are the bitmap meanwhile
        for change in (bitmap.clear, bitmap.remove, bitmap.disable, bitmap.enable, lambda: bitmap.merge("b"),
                       lambda: engine.bitmaps.remove("b"), lambda: engine.snapshot("t", bitmap="b")):
            with pytest.raises(Error, match="'b': in use by a job"):
                change()
        assert bitmap.report()["busy"] and bitmap.report()["recording"]
        engine.bitmaps.give_back("b", success)
        assert extents(bitmap) == ([(512, 512)] if success else [(512, 1024)])
        engine.delete("s")


def test_what_the_newest_snapshot_does_not_need_is_preserved_for_the_older_one(engine):
    whole = engine.snapshot("whole", cluster_size=CLUSTER)
    engine.bitmaps.add("b")
    engine.device.write(0, b"marked")
    part = engine.snapshot("part", bitmap="b")
    before = b"marked" + engine.device.read(6, CLUSTER - 6)
    engine.device.write(0, b"n" * LENGTH)
    assert whole.read(0, 300_000) == (b"old!" * LENGTH)[:300_000]
    assert part.read(0, CLUSTER) == before
    assert engine.report("part")["preserved_clusters"] == 1
    engine.delete("part")
    assert whole.read(0, LENGTH - 1) == (b"old!" * LENGTH)[:LENGTH - 1]


def test_a_group_has_its_bitmaps_of_one_instant_or_none():
    disks = [MemoryDevice(1 << 20) for _ in range(2)]
    engines = [Engine(disk) for disk in disks]
    engines[0].bitmaps.add("b")
    with pytest.raises(Error, match="'b': not found"):
        take_snapshots(engines, "g", SnapshotOptions.parse(bitmap="b", new_bitmap="n"))
    assert list(engines[0].bitmaps.named) == ["b"] and list(engines[1].bitmaps.named) == []
    engines[0].device.write(0, b"x")
    assert extents(engines[0].bitmaps.named["b"]) == [(0, 65536)]
    engines[1].bitmaps.add("b")
    take_snapshots(engines, "g", SnapshotOptions.parse(bitmap="b", new_bitmap="n"))
    for engine in engines:
        engine.device.write(65536, b"x")
        assert extents(engine.bitmaps.named["n"]) == [(65536, 65536)]
        engine.close()


def test_the_frozen_bitmap_is_read_after_the_drains_and_copy_is_everything_until_then():
    """A write of the old epoch is held: the creation waits, and meanwhile clusters that the bitmap lacks are preserved as well."""
    disk = DelayDevice(MemoryDevice(1024 * CLUSTER))
    engine = Engine(disk)
    engine.bitmaps.add("b", granularity=512)
    gate = disk.hold("write", 0, 512)
    writer = threading.Thread(target=engine.device.write, args=(0, b"x" * 512))
    writer.start()
    gate.wait_arrived()
    taken = []
    taker = threading.Thread(target=lambda: taken.append(engine.snapshot("s", bitmap="b", new_bitmap="n", cluster_size=CLUSTER)))
    taker.start()
    deadline = time.monotonic() + 20
    cluster = 1
    while engine.counters()["touches"] == 0:       # until the epoch is flipped there is nothing to touch
        assert time.monotonic() < deadline and cluster < 1024
        time.sleep(0.01)
        engine.device.write(cluster * CLUSTER, b"y")
        cluster += 1
    assert taken == []
    gate.open()
    writer.join(20)
    taker.join(20)
    (view,) = taken
    assert engine.report("s")["preserved_clusters"] == 1
    with pytest.raises(NotInSnapshot):
        view.read((cluster - 1) * CLUSTER, 1)
    assert view.read(0, 512) == b"x" * 512         # what it held was in the old epoch, and so is in both
    engine.close()
    disk.close()


@pytest.mark.parametrize("length", [64 << 30, 64 << 40])
def test_an_increment_of_a_large_disk_costs_what_is_dirty(length, shm_path):
    """Memory; the time is a row of benchmarks/bench_increment.py."""
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with FileDevice(shm_path / "disk", create_length=length) as device:
        engine = Engine(device)
        engine.snapshot("warm-up")
        engine.delete("warm-up")
        before = resident()
        engine.bitmaps.add("b", granularity=512)
        touches = [i * (length // 64) for i in range(64)]
        for offset in touches:
            engine.device.write(offset, b"x" * 512)
        view = engine.snapshot("s", bitmap="b", new_bitmap="n")
        rows = view.extents()
        assert rows["offset"][rows["flags"] != 4].tolist() == touches
        for offset in touches:
            engine.device.write(offset + 1, b"y" * 511)
            engine.device.write(offset + 8192, b"y")
        assert view.read(touches[5], 4096) == b"x" * 512 + bytes(3584)
        assert resident() - before <= 6 << 20
        engine.close()


@pytest.mark.parametrize("cluster_size, writers", [(CLUSTER, 2), (CLUSTER, 8), (4096, 8)])
def test_no_write_is_missed_by_both_the_backup_and_the_new_bitmap(cluster_size, writers):
    """512 bytes per bit, writers side by side in one cluster across the instant, thousands of instants.

    More writers than processors, so that at most instants some are stopped in the middle of a write, by chance also between being
    counted and marking, where a bitmap that is read too early has not got their mark.

    In each turn the writers sweep over the disk, and write each sector once, so that nothing that is lost is made good by a
    later write. The instant falls somewhere in the sweep. Then, at rest, what the new bitmap does not mark is in the backup,
    which is kept by increments alone; and the backup is the disk of the instant, sector by sector.
    """
    rng = random.Random(cluster_size)
    disk = MemoryDevice(16 * CLUSTER)
    engine = Engine(disk)
    load = SectorLoad(engine.device)
    threads = [threading.Thread(target=load.run, args=(i, writers)) for i in range(writers)]
    for thread in threads:
        thread.start()
    engine.bitmaps.add("b0", granularity=512)
    backup = np.zeros(disk.length, np.uint8)
    image = np.zeros(disk.length, np.uint8)
    in_backup, on_disk = backup.view(np.uint64).reshape(-1, 64), image.view(np.uint64).reshape(-1, 64)
    number, split = 0, 0
    try:
        end = time.monotonic() + SECONDS / 3
        while time.monotonic() < end or number < INSTANTS:
            before = load.acknowledged_now
            load.sweep(0, 16 * 128)
            began = time.perf_counter() + rng.random() * 3e-4
            while time.perf_counter() < began:
                pass
            view = engine.snapshot("s", bitmap=f"b{number}", new_bitmap=f"b{number + 1}", cluster_size=cluster_size, ram="2M")
            load.wait(writers)
            engine.bitmaps.remove(f"b{number}")
            number += 1
            for offset, length, flags in view.extents():
                if flags != 4:
                    view.readinto(int(offset), backup[offset : offset + length])
            engine.delete("s")
            disk.readinto(0, image)
            marked = engine.bitmaps.named[f"b{number}"].view().to_bools()
            lost = (in_backup[:, 1] != on_disk[:, 1]) & ~marked
            assert not lost.any(), f"increment {number}: sectors {np.flatnonzero(lost)} are in neither"
            assert (in_backup[:, 1] >= before).all(), f"increment {number}: a write from before the sweep is missing"
            split += 0 < marked.sum() < 16 * 128
    finally:
        load.stop()
        for thread in threads:
            thread.join(20)
    # At the end, the last increment: all of it is the disk, in every word.
    view = engine.snapshot("s", bitmap=f"b{number}", cluster_size=cluster_size, ram="2M")
    for offset, length, flags in view.extents():
        if flags != 4:
            view.readinto(int(offset), backup[offset : offset + length])
    assert backup.tobytes() == disk.read(0, disk.length)
    writes, error = load.total
    assert error == 0 and split, "no instant fell into a sweep"
    if "FASTCBW_RACE_SECONDS" in os.environ:
        print(f"{number} instants, {split} of them within a sweep, {writes} writes")
    engine.close()
    disk.close()
