"""What a hostile reading of the engine found: each of these once lost data, waited without limit, or ended the process."""

import gc
import threading
import weakref

import pytest
from engine_disks import wait_until

import fastcbw
from fastcbw.block.delay import DelayDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.cbw.engine import Engine
from fastcbw.errors import SnapshotBroken
from fastcbw.jobs.backup import BackupJob

K = 4096


def in_thread(function, *arguments):
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread


def test_handed_over_data_never_hides_older_data_of_a_snapshot_that_broke_meanwhile():
    """s1 reads a cluster from s2; s2 breaks while s3 is being deleted: s3's newer data must not become s1's."""
    disk = DelayDevice(MemoryDevice(64 * K))
    engine = Engine(disk)
    guest = engine.device
    guest.write(0, b"0" * K)
    guest.write(8 * K, b"x" * 24 * K)
    first = engine.snapshot("s1", ram="1M")
    engine.snapshot("s2", ram=K)
    guest.write(0, b"1" * K)                    # b"0" is kept in s2, for s1 too; s2's only slot is taken
    engine.snapshot("s3", ram="1M")
    guest.write(0, b"2" * K)                    # b"1" is kept in s3
    with disk.hold("write", 32 * K, K) as gate:
        held = in_thread(guest.write, 32 * K, b"h" * K)         # counted: deleting s3 has to wait for it
        gate.wait_arrived()
        deletion = in_thread(engine.delete, "s3")
        wait_until(lambda: "s3" not in engine.snapshots)
        clusters = iter(range(8, 32))
        # Once s3 is out of `need`, a cluster more is one too many for s2, and it is given up.
        wait_until(lambda: not guest.write(next(clusters) * K, b"y" * K) and engine.snapshots["s2"].broken)
    deletion.join(10)
    held.join(10)
    assert first.read(0, K) == b"0" * K
    assert first.read(8 * K, 24 * K) == b"x" * 24 * K
    engine.close()


def test_reader_of_a_deleted_snapshot_never_looks_into_one_of_another_cluster_size():
    """A read under way outlives its snapshot; the next one has 256 times fewer clusters, and smaller tables."""
    disk = DelayDevice(MemoryDevice("1G"))
    engine = Engine(disk)
    old = engine.snapshot("old", cluster_size="4K")
    engine.device.write(disk.length - K, b"x" * K)
    outcome = []

    def read():
        try:
            outcome.append(old.read(disk.length - (1 << 20), 1 << 20))
        except Exception as error:
            outcome.append(error)

    with disk.hold("read") as gate:
        reader = in_thread(read)
        gate.wait_arrived()
        engine.delete("old")
        engine.snapshot("new", cluster_size="1M")
    reader.join(10)
    assert isinstance(outcome[0], SnapshotBroken)
    engine.close()


def test_copier_in_ram_first_order_survives_that_its_snapshot_is_replaced_by_one_with_larger_clusters():
    disk = MemoryDevice("1G")
    engine = Engine(disk)
    disk.write(0, b"y" * 8 * K)
    old = engine.snapshot("old", cluster_size="4K")
    for i in range(8):
        engine.device.write(i * K, b"x" * K)
    target = DelayDevice(MemoryDevice("1G"))
    with target.hold("write") as gate:
        job = BackupJob(old, target, order="ram-first", workers=1, in_flight=K).start()
        gate.wait_arrived()
        engine.break_snapshot("old")
        wait_until(lambda: engine.cluster_size is None)
        engine.snapshot("new", cluster_size="1M")
    with pytest.raises(fastcbw.JobFailed, match="broken"):
        job.wait(20)
    engine.close()


def test_zeroes_need_no_room_even_when_both_tiers_are_full(shm_path):
    disk = MemoryDevice(64 * K)
    engine = Engine(disk)
    disk.write(0, b"x" * 2 * K)
    view = engine.snapshot("s", ram=K, spill=shm_path, spill_limit=2 * K)
    engine.device.write(0, b"y" * 2 * K)
    facts = engine.report("s")
    assert (facts["ram_bytes"], facts["disk_bytes"]) == (K, K)          # both full
    engine.device.write(2 * K, b"y" * 62 * K)
    assert view.broken is None
    assert view.read(0, 64 * K) == b"x" * 2 * K + bytes(62 * K)
    assert engine.report("s")["zero_clusters"] == 62
    engine.close()


def test_a_write_larger_than_the_ram_tier_is_no_reason_to_break_when_it_overwrites_zeroes():
    engine = Engine(MemoryDevice(256 * K))
    view = engine.snapshot("s", ram=K)
    engine.device.write(0, b"y" * 256 * K)
    assert view.broken is None
    assert view.read(0, 256 * K) == bytes(256 * K)
    engine.close()


def test_guest_does_not_wait_for_a_disk_tier_that_hangs_in_a_discard():
    log = DelayDevice(MemoryDevice(64 * K))
    engine = Engine(MemoryDevice(64 * K))
    engine.snapshot("s", ram=0, spill=log, spill_limit=2 * K, cbw_timeout=300)
    with log.hold("discard"):
        writer = in_thread(lambda: [engine.device.write(i * K, b"x" * K) for i in range(64)])
        writer.join(5)
        assert not writer.is_alive()
    engine.close()


@pytest.mark.parametrize("options, names", [({"ram": "64K"}, "ram"), ({"ram": 0, "spill": "/dev/shm", "spill_limit": "16K"}, "spill_limit")])
def test_limits_are_checked_against_the_cluster_size_that_live_snapshots_fix(options, names):
    engine = Engine(MemoryDevice("4M"))
    engine.snapshot("s1", cluster_size="1M")
    with pytest.raises(ValueError, match=names):
        engine.snapshot("s2", **options)
    assert list(engine.snapshots) == ["s1"]
    engine.close()


def test_a_spill_device_serves_one_snapshot_at_a_time():
    engine = Engine(MemoryDevice("1M"))
    log = MemoryDevice("1M")
    engine.snapshot("s1", ram=0, spill=log)
    with pytest.raises(fastcbw.Error, match="spill"):
        engine.snapshot("s2", ram=0, spill=log)
    engine.delete("s1")
    engine.snapshot("s3", ram=0, spill=log)
    engine.close()
    other = Engine(MemoryDevice("1M"))
    other.snapshot("s1", ram=0, spill=log)      # a closed engine has let go of it
    other.close()


def test_the_disk_itself_is_refused_as_spill_device():
    disk = MemoryDevice("1M")
    disk.write(0, b"guest" * 1000)
    engine = Engine(disk)
    for device in (disk, engine.device):
        with pytest.raises(ValueError, match="spill"):
            engine.snapshot("s", ram=0, spill=device)
    engine.close()


def test_spill_limit_beyond_the_spill_device_is_refused():
    engine = Engine(MemoryDevice("1M"))
    with pytest.raises(ValueError, match="spill_limit"):
        engine.snapshot("s", ram=0, spill=MemoryDevice("1M"), spill_limit="2M")
    engine.close()


def test_a_filter_keeps_its_engine_alive():
    """The guest still writes through the filter when everybody has forgotten disk and snapshot."""

    def forgotten():
        disk = fastcbw.open(MemoryDevice(64 * K), name="d")
        disk.snapshot("s", ram="1M")
        return disk.device, weakref.ref(disk._engine)

    guest, engine = forgotten()
    gc.collect()
    assert engine() is not None
    guest.write(0, b"x" * 64 * K)
    assert guest.read(0, 4) == b"xxxx"
    assert engine().report("s")["preserved_clusters"] == 64
    engine().close()


def test_a_snapshot_device_keeps_its_engine_and_so_newer_snapshots_alive():
    disk = MemoryDevice(64 * K)
    engine = Engine(disk)
    guest = engine.device
    view = engine.snapshot("s1")
    engine.snapshot("s2")
    guest.write(0, b"x" * K)                    # kept in s2 only
    del engine, guest
    gc.collect()
    assert view.read(0, 64 * K) == bytes(64 * K)
    view.engine.close()


def test_a_forgotten_engine_ends_its_threads():
    before = set(threading.enumerate())

    def forgotten():
        Engine(MemoryDevice(64 * K)).snapshot("s")

    for _ in range(10):
        forgotten()
    gc.collect()
    wait_until(lambda: set(threading.enumerate()) <= before)


def test_room_of_an_abandoned_copy_is_free_again_once_the_disk_answers():
    disk = DelayDevice(MemoryDevice(64 * K))
    disk.write(0, b"x" * 64 * K)
    log = MemoryDevice("1M")
    engine = Engine(disk)
    engine.snapshot("s", ram=0, spill=log, cbw_timeout=50)
    with disk.hold("read"):
        engine.device.write(0, b"y" * K)        # the copy hangs: abandoned, and the snapshot with it
        assert "cbw-timeout" in engine.snapshots["s"].broken
        engine.delete("s")
        with pytest.raises(fastcbw.Error, match="spill"):
            engine.snapshot("t", ram=0, spill=log)      # the copy may still write there
    wait_until(lambda: engine.copies_abandoned == 0)
    engine.snapshot("t", ram=0, spill=log)
    engine.close()


def test_guest_does_not_spin_between_settled_neighbours_of_a_cluster_whose_copy_hangs():
    """The claim of cluster 5 is kept by a copy that was abandoned; its neighbours are settled and free to claim."""
    disk = DelayDevice(MemoryDevice(64 * K))
    disk.write(0, b"o" * 64 * K)
    engine = Engine(disk)
    oldest = engine.snapshot("s1")
    engine.device.write(5 * K, b"1" * K)        # s1 has it: it outlives what follows
    engine.snapshot("s2", cbw_timeout=50)
    with disk.hold("read", 5 * K, K):
        engine.device.write(5 * K, b"2" * K)
        assert "cbw-timeout" in engine.snapshots["s2"].broken
        engine.snapshot("s3", cbw_timeout=50)
        engine.device.write(4 * K, b"3" * K)
        engine.device.write(6 * K, b"3" * K)
        writer = in_thread(engine.device.write, 4 * K, b"4" * 3 * K)
        writer.join(5)
        assert not writer.is_alive()
        assert "cbw-timeout" in engine.snapshots["s3"].broken
    assert oldest.read(0, 64 * K) == b"o" * 64 * K
    assert disk.read(4 * K, 3 * K) == b"4" * 3 * K
    engine.close()
