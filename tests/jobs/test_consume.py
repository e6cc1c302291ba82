"""Backup jobs that drop from the snapshot what is in the target."""

import errno
import threading
import time

import pytest

import fastcbw
from fastcbw.block.delay import DelayDevice
from fastcbw.block.fault import FaultDevice
from fastcbw.block.memory import MemoryDevice

K = 4096
LENGTH = 2 << 20


@pytest.fixture
def disk():
    device = MemoryDevice(LENGTH, name="vm")
    for cluster in range(LENGTH // K):
        device.write(cluster * K, bytes([cluster % 251 + 1]) * K)
    device.write_zeroes(1 << 20, 300_000)
    with fastcbw.open(device, name="vm") as disk:
        disk.old = disk.read(0, LENGTH)
        yield disk


@pytest.mark.parametrize("size", ["4K", "64K", "1M"])
@pytest.mark.parametrize("order", ["sequential", "ram-first"])
def test_what_is_copied_is_dropped(disk, tmp_path, order, size):
    snap = disk.snapshot("s", cluster_size=size)
    disk.write(0, b"n" * LENGTH)
    assert snap.status()["ram_bytes"] > 0
    snap.backup(tmp_path / "b.img", order=order, consume=True, workers=2).wait(60)
    assert (tmp_path / "b.img").read_bytes() == disk.old
    assert snap.status()["ram_bytes"] == 0 and snap.status()["discarded_bytes"] == LENGTH
    with pytest.raises(fastcbw.NotInSnapshot):
        snap.read(5 * K, K)


def test_the_guest_pays_nothing_behind_the_job_and_the_rest_stays_after_a_failure(disk):
    """The target fails in the middle; what was not written is still there, and a second job on the same target completes it."""
    snap = disk.snapshot("s")
    target = FaultDevice(MemoryDevice(LENGTH, name="target"))
    with target.fail_on("write", 1_600_000, K, errno=errno.ENOSPC):
        job = snap.backup(target, consume=True, workers=1, in_flight="64K")
        with pytest.raises(fastcbw.JobFailed, match="No space left"):
            job.wait(60)
    dropped = snap.status()["discarded_bytes"]
    assert 1_000_000 < dropped < 1_700_000
    disk.write(0, b"n" * LENGTH)
    assert snap.status()["preserved_bytes"] == LENGTH - dropped
    with pytest.raises(ValueError, match="parts of the snapshot were discarded"):
        snap.backup(target)
    snap.backup(target, consume=True, workers=1).wait(60)
    assert target.read(0, LENGTH) == disk.old
    assert snap.status()["ram_bytes"] == 0


def test_a_snapshot_that_was_consumed_makes_no_new_file_and_replaces_none(disk, tmp_path):
    """The second job has nothing left: a file of its own would be holes, under a name that says complete."""
    snap = disk.snapshot("s")
    snap.backup(tmp_path / "b.img", consume=True).wait(60)
    for target, force in ((tmp_path / "b.img", True), (tmp_path / "c.img", False)):
        with pytest.raises(ValueError, match="parts of the snapshot were discarded, and .* would be a new file without them"):
            snap.backup(target, consume=True, force=force)
    assert (tmp_path / "b.img").read_bytes() == disk.old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.img"]
    snap.close()


def test_a_job_is_refused_where_somebody_else_would_lose_data(disk, tmp_path):
    snap = disk.snapshot("s")
    target = DelayDevice(MemoryDevice(LENGTH, name="target"))
    with target.hold("write") as gate:
        job = snap.backup(target)
        gate.wait_arrived()
        with pytest.raises(fastcbw.Error, match="would lose"):
            snap.backup(tmp_path / "b.img", consume=True)
    job.wait(60)
    with pytest.raises(ValueError, match="consume: not with verify"):
        snap.backup(tmp_path / "b.img", consume=True, verify=True)
    assert list(tmp_path.iterdir()) == []


def test_a_backup_that_others_discard_from_fails(disk, tmp_path):
    snap = disk.snapshot("s")
    target = DelayDevice(MemoryDevice(LENGTH, name="target"))
    with target.hold("write") as gate:
        job = snap.backup(target, workers=1, in_flight="64K")
        gate.wait_arrived()
        snap.discard(1 << 19, 1 << 18)
    with pytest.raises(fastcbw.JobFailed, match="discarded|not in the snapshot"):
        job.wait(60)


def test_of_two_snapshots_the_older_one_keeps_what_the_job_consumed(disk, tmp_path):
    older, newer = disk.snapshot("s1"), disk.snapshot("s2")
    disk.write(0, b"n" * LENGTH)
    newer.backup(tmp_path / "b.img", consume=True).wait(60)
    assert older.read(0, LENGTH) == disk.old == (tmp_path / "b.img").read_bytes()


def test_with_ram_only_a_guest_that_waits_for_room_waits_for_what_is_in_ram_and_not_for_the_disk(disk):
    """The job is at its first request when the RAM tier is full: it copies what is there next, of a disk of 512 clusters."""
    snap = disk.snapshot("s", ram=16 * K, on_full="wait", cbw_timeout=60_000)
    target = FaultDevice(MemoryDevice(LENGTH, name="target"))
    slow = DelayDevice(target)
    with slow.hold("write") as gate:
        job = snap.backup(slow, consume=True, workers=1, in_flight=16 * K)
        gate.wait_arrived()
        offset = LENGTH - 100 * K                       # far behind where the job is
        for cluster in range(16):
            disk.write(offset + cluster * K, b"n" * K)
        assert snap.status()["ram_bytes"] == 16 * K
        writer = threading.Thread(target=disk.write, args=(offset + 16 * K, b"n" * K))
        writer.start()
        deadline = time.monotonic() + 20
        while disk._engine.room_waiters != 1:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        slow.set(write_ms=20)                           # so that the guest goes on long before the job has ended
    writer.join(20)
    assert not writer.is_alive()
    assert target.bytes["write"] <= 8 * 16 * K and job.status == "running"
    assert snap.status()["stalls"]["room"]["count"] == 1
    slow.set(write_ms=0)
    job.wait(60)
    assert target.read(0, LENGTH) == disk.old
