"""Copy-on-read, guest reads from RAM, and dropping: what they do, counted at the device."""

import errno

import pytest
from engine_disks import wait_until

from fastcbw.block.delay import DelayDevice
from fastcbw.block.fault import FaultDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.cbw.engine import Engine
from fastcbw.errors import SnapshotBroken

K = 4096
CLUSTERS = 64
LENGTH = CLUSTERS * K


def content(cluster):
    return bytes([cluster + 1]) * K


@pytest.fixture
def counted():
    """The disk that counts; every cluster its own byte, none of them zeroes."""
    device = FaultDevice(MemoryDevice(LENGTH))
    device.write(0, b"".join(map(content, range(CLUSTERS))))
    return device


@pytest.fixture
def disk(counted):
    return DelayDevice(counted)


def reads(counted):
    return counted.requests["read"]


def keep(engine, first, count=1, name="s"):
    engine.snapshots[name].read(first * K, count * K)


# -- what is kept


def test_a_snapshot_read_leaves_its_clusters_in_ram_and_the_next_one_reads_no_disk(engine, counted):
    view = engine.snapshot("s", ram="1M", copy_on_read=True)
    before = reads(counted)
    assert view.read(3 * K, 4 * K) == b"".join(map(content, range(3, 7)))
    assert reads(counted) == before + 1                 # one run, one request
    assert view.read(3 * K, 4 * K) == b"".join(map(content, range(3, 7)))
    assert reads(counted) == before + 1
    facts = engine.report("s")
    assert (facts["kept_clusters"], facts["kept_bytes"], facts["ram_bytes"], facts["preserved_clusters"]) == (4, 4 * K, 4 * K, 0)


def test_a_read_of_a_part_takes_the_whole_cluster(engine, counted):
    view = engine.snapshot("s", ram="1M", copy_on_read=True, cluster_size="64K")
    assert view.read(65536 + 5, 10) == content(16)[5:15]
    before = reads(counted)
    assert view.read(65536, 65536) == b"".join(map(content, range(16, 32)))
    assert reads(counted) == before and engine.report("s")["kept_bytes"] == 65536


def test_without_the_option_a_read_leaves_nothing_and_cache_does(engine, counted):
    view = engine.snapshot("s", ram="1M")
    view.read(0, LENGTH)
    assert engine.report("s")["ram_bytes"] == 0
    assert view.can_cache
    view.cache(K, 2 * K)
    assert engine.report("s")["kept_clusters"] == 2
    before = reads(counted)
    assert view.read(K, 2 * K) == content(1) + content(2)
    assert reads(counted) == before


def test_a_guest_write_to_a_kept_cluster_copies_nothing_and_marks_it(engine, counted):
    view = engine.snapshot("s", ram="1M", copy_on_read=True)
    keep(engine, 3, 4)
    before, touches = reads(counted), engine.counters()["touches"]
    for cluster in range(3, 7):
        engine.device.write(cluster * K, b"n" * K)
    assert reads(counted) == before and engine.counters()["touches"] == touches
    facts = engine.report("s")
    assert (facts["kept_clusters"], facts["copies_avoided"], facts["ram_bytes"]) == (0, 4, 4 * K)
    assert view.read(3 * K, 4 * K) == b"".join(map(content, range(3, 7)))
    assert engine.device.read(3 * K, 4 * K) == b"n" * 4 * K


def test_reads_never_take_the_slots_that_first_touches_need_and_never_the_disk_tier(engine, shm_path):
    view = engine.snapshot("s", ram=16 * K, spill=shm_path, spill_limit="1M", copy_on_read=True)
    assert view.read(0, LENGTH) == b"".join(map(content, range(CLUSTERS)))
    facts = engine.report("s")
    assert (facts["ram_bytes"], facts["disk_bytes"]) == (14 * K, 0)     # an eighth of the slots is left


def test_zeroes_read_take_no_room_holes_and_content_alike(engine, counted):
    counted.child.write_zeroes(0, 8 * K)
    counted.child.write(4 * K, bytes(2 * K))            # zeroes by content
    view = engine.snapshot("s", ram="1M", copy_on_read=True)
    assert view.read(0, 9 * K) == bytes(8 * K) + content(8)
    assert engine.report("s")["ram_bytes"] == K
    before = reads(counted)
    engine.device.write(0, b"n" * 8 * K)                # settled all the same
    assert reads(counted) == before and view.read(0, 9 * K) == bytes(8 * K) + content(8)
    assert view.extents(0, 8 * K)["flags"].tolist() == [3]


@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_zeroes_take_no_space_in_either_tier_as_holes_and_as_content(engine, counted, tier, shm_path):
    counted.child.discard(0, 4 * K)
    counted.child.write(4 * K, bytes(4 * K))
    view = engine.snapshot("s", **({"ram": "1M"} if tier == "ram" else {"ram": 0, "spill": shm_path, "spill_limit": "1M"}))
    engine.device.write(0, b"n" * 9 * K)
    facts = engine.report("s")
    assert (facts["ram_bytes"] + facts["disk_bytes"], facts["zero_clusters"]) == (K, 8)
    assert view.read(0, 9 * K) == bytes(8 * K) + content(8)


def test_the_last_part_of_a_cluster_at_the_end_of_the_disk_is_kept_too():
    counted = FaultDevice(MemoryDevice(2 * K + 100))
    counted.write(0, b"x" * (2 * K + 100))
    engine = Engine(counted)
    view = engine.snapshot("s", ram="1M", copy_on_read=True)
    assert view.read(0, 2 * K + 100) == b"x" * (2 * K + 100)
    before = reads(counted)
    assert engine.device.read(2 * K, 100) == b"x" * 100 and view.read(2 * K, 100) == b"x" * 100
    assert reads(counted) == before
    engine.close()


def test_an_error_of_the_disk_while_keeping_is_the_readers_and_keeps_nothing(engine, counted):
    view = engine.snapshot("s", ram="1M", copy_on_read=True)
    with counted.fail_on("read", 3 * K, K):
        with pytest.raises(OSError) as caught:
            view.read(2 * K, 4 * K)
        assert caught.value.errno == errno.EIO
        with pytest.raises(OSError):
            view.cache(2 * K, 4 * K)
    assert engine.report("s")["ram_bytes"] == 0
    assert view.read(2 * K, 4 * K) == b"".join(map(content, range(2, 6)))


def test_cache_of_a_broken_snapshot_is_an_error(engine):
    view = engine.snapshot("s", ram="1M")
    engine.break_snapshot("s")
    with pytest.raises(SnapshotBroken):
        view.cache(0, K)


# -- guest reads


def test_a_guest_read_of_an_unchanged_kept_cluster_does_not_touch_the_device(engine, counted):
    engine.snapshot("s", ram="1M", copy_on_read=True)
    keep(engine, 3, 4)
    before = reads(counted)
    for offset, length in ((3 * K, 4 * K), (3 * K, 1), (3 * K + 100, K), (7 * K - 1, 1)):
        expected = b"".join(map(content, range(CLUSTERS)))[offset : offset + length]
        assert engine.device.read(offset, length) == expected
    assert reads(counted) == before
    counters = engine.counters()
    assert (counters["ram_reads"], counters["ram_read_bytes"]) == (4, 5 * K + 2)


def test_a_guest_read_across_kept_and_other_clusters_reads_the_others_in_runs(engine, counted):
    engine.snapshot("s", ram="1M", copy_on_read=True)
    for cluster in (2, 5, 6, 9):
        keep(engine, cluster)
    engine.device.write(6 * K, b"n" * K)                # changed: from the disk
    before, moved = reads(counted), counted.bytes["read"]
    expected = bytearray(b"".join(map(content, range(12))))
    expected[6 * K : 7 * K] = b"n" * K
    assert engine.device.read(K + 7, 10 * K) == expected[K + 7 : 11 * K + 7]
    assert reads(counted) == before + 4                 # 1, 3-4, 6-8, 10-11
    assert counted.bytes["read"] == moved + 7 * K


def test_guest_reads_with_a_slow_disk_are_served_while_the_disk_is_held(engine, disk):
    engine.snapshot("s", ram="1M", copy_on_read=True)
    keep(engine, 0, 8)
    with disk.hold("read") as gate:
        assert engine.device.read(0, 8 * K) == b"".join(map(content, range(8)))
        assert gate.arrived == 0


def test_what_a_first_touch_preserved_is_never_served_to_the_guest(engine):
    engine.snapshot("s", ram="1M", copy_on_read=True)
    engine.device.write(3 * K, b"n" * 10)
    keep(engine, 5)
    assert engine.device.read(3 * K, K) == b"n" * 10 + content(3)[10:]


def test_after_the_last_snapshot_guest_reads_go_to_the_disk_again(engine, counted):
    engine.snapshot("s", ram="1M", copy_on_read=True)
    keep(engine, 0, 8)
    engine.delete("s")
    before = reads(counted)
    assert engine.device.read(0, K) == content(0)
    assert reads(counted) == before + 1


# -- drop


def test_dropped_clusters_free_their_room_and_are_preserved_again_by_a_write(engine, counted):
    view = engine.snapshot("s", ram="1M", copy_on_read=True)
    keep(engine, 0, 8)
    engine.device.write(2 * K, b"n")
    assert engine.drop("s", 0, 4 * K) == 3 * K          # not the changed one
    assert engine.drop("s") == 4 * K
    assert engine.drop("s") == 0
    facts = engine.report("s")
    assert (facts["ram_bytes"], facts["kept_clusters"], facts["dropped_clusters"]) == (K, 0, 7)
    before = reads(counted)
    engine.device.write(5 * K, b"m" * K)
    assert reads(counted) == before + 1
    assert view.read(0, 8 * K) == b"".join(map(content, range(8)))


def test_drop_refuses_what_does_not_exist(engine):
    engine.snapshot("s")
    with pytest.raises(KeyError, match="'t'"):
        engine.drop("t")
    with pytest.raises(ValueError, match="not within"):
        engine.drop("s", 0, LENGTH + 1)


@pytest.mark.parametrize("spill", [False, True])
def test_first_touches_drop_what_reads_left_before_anything_spills_or_breaks(engine, spill, shm_path):
    options = {"spill": shm_path, "spill_limit": "1M"} if spill else {}
    view = engine.snapshot("s", ram=16 * K, copy_on_read=True, **options)
    view.read(0, LENGTH)
    assert engine.report("s")["kept_clusters"] == 14
    for cluster in range(40, 56):                       # 16 first touches, as many as there are slots
        engine.device.write(cluster * K, b"n" * K)
    facts = engine.report("s")
    assert facts["state"] == "live" and facts["dropped_clusters"] > 0
    if not spill:                                       # else the flusher makes room as well
        assert (facts["ram_bytes"], facts["kept_clusters"]) == (16 * K, 0)
    assert view.read(0, LENGTH) == b"".join(map(content, range(CLUSTERS)))


def test_first_touches_of_many_clusters_at_once_drop_as_many(engine):
    view = engine.snapshot("s", ram=16 * K, copy_on_read=True)
    view.read(0, LENGTH)
    engine.device.write(40 * K, b"n" * 16 * K)
    assert view.broken is None
    assert view.read(40 * K, 16 * K) == b"".join(map(content, range(40, 56)))


def test_what_the_guest_has_changed_meanwhile_is_not_dropped_for_room(engine):
    view = engine.snapshot("s", ram=16 * K, copy_on_read=True)
    keep(engine, 0, 14)
    engine.device.write(0, b"n" * 14 * K)
    engine.device.write(20 * K, b"n" * 2 * K)           # the reserve
    assert view.broken is None and view.read(0, LENGTH) == b"".join(map(content, range(CLUSTERS)))
    engine.device.write(30 * K, b"n")                   # one too many
    assert "full" in view.broken


def test_the_keeper_drops_in_the_background_when_few_slots_are_left():
    disk = MemoryDevice("1M")
    disk.write(0, b"x" * disk.length)
    engine = Engine(disk)
    view = engine.snapshot("s", ram=64 * K, copy_on_read=True)
    view.read(0, 64 * K)
    assert engine.report("s")["kept_clusters"] == 56
    for cluster in range(100, 106):                     # two of the eight spare ones are left
        engine.device.write(cluster * K, b"n" * K)
    wait_until(lambda: engine.report("s")["dropped_clusters"])
    assert engine.report("s")["ram_bytes"] < 62 * K and view.read(0, 1 << 20) == b"x" * (1 << 20)
    engine.close()


# -- several snapshots


def test_what_an_older_snapshot_reads_goes_to_the_newest_that_needs_it_and_is_there_for_both(engine, counted):
    older = engine.snapshot("s1", ram="1M", copy_on_read=True)
    newer = engine.snapshot("s2", ram="1M")
    older.read(0, 4 * K)
    assert (engine.report("s1")["ram_bytes"], engine.report("s2")["ram_bytes"]) == (0, 4 * K)
    before = reads(counted)
    assert newer.read(0, 4 * K) == older.read(0, 4 * K)
    engine.device.write(0, b"n" * 4 * K)
    assert reads(counted) == before
    assert newer.read(0, 4 * K) == older.read(0, 4 * K) == b"".join(map(content, range(4)))


def test_kept_clusters_of_a_snapshot_that_ends_go_to_the_older_one_and_serve_on(engine, counted):
    older = engine.snapshot("s1", ram="1M")
    newer = engine.snapshot("s2", ram="1M", copy_on_read=True)
    newer.read(0, 4 * K)
    engine.delete("s2")
    assert engine.report("s1")["kept_clusters"] == 4
    before = reads(counted)
    assert engine.device.read(0, 4 * K) == older.read(0, 4 * K)
    engine.device.write(0, b"n" * K)
    assert reads(counted) == before
    assert engine.drop("s1") == 3 * K
    assert older.read(0, 4 * K) == b"".join(map(content, range(4)))
    engine.delete("s1")
    engine.snapshot("s3")
    assert engine.report("s3")["ram_bytes"] == 0


def test_a_snapshot_taken_later_is_preserved_for_although_an_older_one_kept_the_cluster(engine):
    older = engine.snapshot("s1", ram="1M", copy_on_read=True)
    keep(engine, 0, 4, "s1")
    newer = engine.snapshot("s2", ram="1M")
    engine.device.write(0, b"n" * 4 * K)
    assert engine.report("s2")["preserved_clusters"] == 4
    assert newer.read(0, 4 * K) == older.read(0, 4 * K) == b"".join(map(content, range(4)))
    assert engine.drop("s1") == 0                       # changed since, by the newer one's marks


def test_breaking_a_snapshot_with_kept_clusters_gives_them_to_the_older_one(engine):
    older = engine.snapshot("s1", ram="1M")
    engine.snapshot("s2", ram="1M", copy_on_read=True)
    keep(engine, 0, 4, "s2")
    engine.device.write(0, b"n" * 2 * K)
    engine.break_snapshot("s2")
    wait_until(lambda: engine.report("s1")["kept_clusters"])
    assert older.read(0, LENGTH) == b"".join(map(content, range(CLUSTERS)))
    assert engine.device.read(0, 4 * K) == b"n" * 2 * K + content(2) + content(3)


def test_guest_reads_that_look_in_vain_have_what_was_changed_forgotten_and_look_no_more(engine, counted):
    view = engine.snapshot("s", ram="1M", copy_on_read=True)
    keep(engine, 0, 8)
    engine.device.write(0, b"n" * 7 * K)
    assert engine.kept_words == 8                       # a settled write does not look there
    for _ in range(1024):
        engine.device.read(30 * K, 1)
    wait_until(lambda: engine.kept_words == 1)
    facts = engine.report("s")
    assert (facts["kept_clusters"], facts["copies_avoided"]) == (1, 7)
    before = reads(counted)
    assert engine.device.read(7 * K, K) == content(7) and reads(counted) == before      # still served
    assert view.read(0, LENGTH) == b"".join(map(content, range(CLUSTERS)))


def test_what_was_changed_spills_and_makes_room_for_further_reads(engine, shm_path):
    view = engine.snapshot("s", ram=16 * K, spill=shm_path, spill_limit="1M", copy_on_read=True)
    spare = iter(range(56, CLUSTERS))
    for round in range(4):
        keep(engine, 14 * round, 14)
        engine.device.write(14 * round * K, b"n" * 14 * K)
        wait_until(lambda: engine.flusher_idle)
        # The flusher may have begun while there was something to drop; else first touches take the tier above its high-water mark.
        while engine.report("s")["ram_bytes"] > 8 * K:
            engine.device.write(next(spare) * K, b"n")
            wait_until(lambda: engine.flusher_idle)
        assert engine.report("s")["ram_bytes"] <= 8 * K
    assert view.read(0, LENGTH) == b"".join(map(content, range(CLUSTERS)))


@pytest.mark.parametrize("by", ["a first touch", "the flusher"])
def test_what_an_older_snapshot_inherits_in_a_live_store_is_dropped_for_room_there(engine, by, shm_path):
    """A reader discards of the newer one what copy-on-read left there: the older one reads it on, in the newer one's RAM."""
    older = engine.snapshot("s1", ram="1M")
    spill = {"spill": shm_path, "spill_limit": "1M"} if by == "the flusher" else {}
    newer = engine.snapshot("s2", ram=16 * K, **spill)
    newer.cache(0, 12 * K)
    newer.discard(0, 12 * K)
    assert (engine.report("s1")["kept_clusters"], engine.report("s2")["kept_clusters"], engine.report("s2")["ram_bytes"]) == (12, 0, 12 * K)
    if by == "the flusher":
        engine.set_limits("s2", ram=4 * K)
        wait_until(lambda: engine.flusher_idle and engine.report("s2")["ram_bytes"] <= 4 * K)
        assert engine.report("s2")["disk_bytes"] == 0          # never in the disk tier
    else:
        for cluster in range(20, 36):
            engine.device.write(cluster * K, b"n" * K)
        assert engine.report("s2")["ram_bytes"] == 16 * K and engine.report("s2")["state"] == "live"
    assert engine.report("s1")["kept_clusters"] <= 4
    assert newer.read(20 * K, K) == content(20) and older.read(0, 12 * K) == b"".join(map(content, range(12)))
