"""A snapshot whose store is the backup's target: preserved clusters lie there at their own offsets, the job copies the others."""

import errno
import tempfile
import threading

import numpy as np
import pytest

import fastcbw
from fastcbw.block.delay import DelayDevice
from fastcbw.block.fault import FaultDevice
from fastcbw.block.file import FileDevice
from fastcbw.block.memory import MemoryDevice

K = 1 << 10
CLUSTER = 64 * K
LENGTH = 20 * CLUSTER + 777     # the last cluster is a part of one


@pytest.fixture
def content():
    data = np.random.default_rng(1).integers(1, 256, LENGTH, dtype=np.uint8)
    data[3 * CLUSTER : 5 * CLUSTER] = 0
    return data.tobytes()


@pytest.fixture
def disk(content):
    child = MemoryDevice(LENGTH, name="vm")
    child.write(0, content)
    with fastcbw.open(child) as disk:
        yield disk


@pytest.fixture
def target():
    """What is late, above what fails, above memory of another content, a little longer than the disk."""
    device = MemoryDevice(LENGTH + 4096, name="target")
    device.write(0, b"\xff" * (LENGTH + 4096))      # zeroes have to be written, too
    device = DelayDevice(FaultDevice(device))
    yield device
    device.open_all()


def snapshot(disk, target, **options):
    return disk.snapshot("s", **{"spill": target, "in_place": True, "ram": 0, "cluster_size": CLUSTER, **options})


def check(target, content):
    assert target.read(0, LENGTH) == content and target.read(LENGTH, 4096) == b"\xff" * 4096


def test_what_the_guest_overwrites_lies_at_its_own_offset_and_the_job_copies_the_rest(disk, target, content):
    with snapshot(disk, target) as snap:
        disk.write(5, b"n")
        disk.write(2 * CLUSTER - 1, b"nn")
        disk.write_zeroes(7 * CLUSTER, 3 * CLUSTER)
        disk.write(LENGTH - 1, b"n")
        landed = [0, CLUSTER, 2 * CLUSTER, 7 * CLUSTER, 8 * CLUSTER, 9 * CLUSTER, 20 * CLUSTER]
        for offset in landed:
            length = min(CLUSTER, LENGTH - offset)
            assert target.read(offset, length) == content[offset : offset + length]
        assert target.read(5 * CLUSTER, CLUSTER) == b"\xff" * CLUSTER       # nobody's so far
        assert snap.read(0, LENGTH) == content
        assert snap.status()["disk_bytes"] == len(landed) * CLUSTER and snap.status()["seconds_to_full"] is None
        result = snap.backup(target, workers=3).wait(30)
        check(target, content)
        assert result["landed_bytes"] == 6 * CLUSTER + 777
        assert result["data_bytes"] == LENGTH - 6 * CLUSTER - 777 - 2 * CLUSTER and result["zero_bytes"] == 2 * CLUSTER
        disk.write(0, b"m" * LENGTH)        # after the job, too: the same data, again
        check(target, content)
    check(target, content)                  # and nothing of it goes with the snapshot


@pytest.mark.parametrize("options", [{}, {"verify": True}, {"consume": True}])
def test_with_a_tier_in_ram_the_flusher_brings_each_cluster_to_its_place(disk, target, content, options):
    with snapshot(disk, target, ram=4 * CLUSTER) as snap:
        for cluster in (20, 2, 9, 7, 8, 0, 1):          # the oldest go: neighbours at once and others apart
            disk.write(cluster * CLUSTER, b"new")
        while not disk._engine.flusher_idle:
            pass
        assert snap.status()["flushed_clusters"] > 0 and snap.read(0, LENGTH) == content
        assert target.read(20 * CLUSTER, 777) == content[20 * CLUSTER :]
        result = snap.backup(target, **options).wait(30)
        assert result["landed_bytes"] >= 777
        check(target, content)
        if options.get("consume"):
            assert snap.status()["disk_bytes"] == snap.status()["ram_bytes"] == 0


def test_a_guest_write_waits_for_the_target_and_no_longer_than_the_timeout(disk, target, content):
    with snapshot(disk, target, cbw_timeout=100) as snap:
        with target.hold("write", 0, CLUSTER) as gate:
            writer = threading.Thread(target=disk.write, args=(0, b"new"))
            writer.start()
            gate.wait_arrived()
            assert disk.read(0, 3) == content[:3]
            writer.join(30)                 # at the timeout the guest goes on, and the snapshot is what suffers
            assert not writer.is_alive() and disk.read(0, 3) == b"new"
            assert "cbw-timeout" in snap.status()["reason"]
            assert not disk._engine.tier_is_quiet(target)       # who would reuse the target can see that a write may come yet
        with pytest.raises(fastcbw.JobFailed, match="broken"):
            snap.backup(target).wait(30)
    while not disk._engine.tier_is_quiet(target):
        pass


@pytest.mark.parametrize("policy", ["break-snapshot", "break-guest-write"])
def test_a_target_that_fails_fails_the_backup_or_the_guests_write(disk, target, content, policy):
    with snapshot(disk, target, on_cbw_error=policy) as snap:
        with target.child.fail_on("write", 7 * CLUSTER, CLUSTER, errno=errno.ENOSPC, count=1):
            if policy == "break-snapshot":
                disk.write(7 * CLUSTER, b"new")
                with pytest.raises(fastcbw.JobFailed, match="No space left"):
                    snap.backup(target).wait(30)
                return
            with pytest.raises(OSError, match="the disk tier could not be written"):
                disk.write(7 * CLUSTER, b"new")
        assert disk.read(7 * CLUSTER, 3) == content[7 * CLUSTER :][:3]
        disk.write(7 * CLUSTER, b"new")         # once more: it has room now
        assert snap.backup(target).wait(30)["landed_bytes"] == CLUSTER
        check(target, content)


def test_a_cluster_that_lands_while_the_job_copies_it_is_written_twice_with_the_same_data(disk, target, content):
    with snapshot(disk, target) as snap, target.hold("write", 5 * CLUSTER, CLUSTER) as gate:
        job = snap.backup(target, workers=1, order="sequential")
        gate.wait_arrived()                     # the job's write of the cluster
        writer = threading.Thread(target=disk.write, args=(5 * CLUSTER, b"n" * CLUSTER))
        writer.start()
        gate.wait_arrived(2)                    # and the guest's
        gate.open()
        writer.join(30)
        job.wait(30)
        check(target, content)


def test_any_other_target_gets_everything(disk, target, content):
    with snapshot(disk, target) as snap:
        disk.write(0, b"n" * LENGTH)
        other = MemoryDevice(LENGTH)
        assert snap.backup(other).wait(30)["landed_bytes"] == 0 and other.read(0, LENGTH) == content


def test_the_kernel_does_not_copy_into_a_store(content):
    """It would put what the guest has just written over the old data that the store keeps there."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="fastcbw-test-") as folder:
        with FileDevice(f"{folder}/disk", create_length=LENGTH) as child, FileDevice(f"{folder}/target", create_length=LENGTH) as target:
            child.write(0, content)
            with fastcbw.open(child) as disk, snapshot(disk, target) as snap:
                disk.write(0, b"new")
                job = snap.backup(target)
                assert job._copier.offload is None and job.wait(30)["landed_bytes"] == CLUSTER
                assert target.read(0, LENGTH) == content


def test_a_newer_snapshot_keeps_what_it_needs_to_itself(disk, target, content):
    with snapshot(disk, target) as snap:
        with disk.snapshot("newer", ram="1M") as newer:
            disk.write(0, b"new")
            assert newer.read(0, LENGTH) == snap.read(0, LENGTH) == content
            assert target.read(0, CLUSTER) == b"\xff" * CLUSTER
        assert snap.backup(target).wait(30)["landed_bytes"] == 0
        check(target, content)


def test_what_makes_no_sense_is_refused(disk, target):
    with disk.snapshot("older", cluster_size=CLUSTER):
        with pytest.raises(fastcbw.Error, match="has to be the oldest one, and there is 'older'"):
            snapshot(disk, target)
    with pytest.raises(ValueError, match="its 4096 bytes are less than the disk's 1311497"):
        snapshot(disk, MemoryDevice(4096))
    with pytest.raises(ValueError, match="in_place: True, and spill is None"):
        snapshot(disk, None)
    with pytest.raises(ValueError, match="spill_limit: '1M'"):
        snapshot(disk, target, spill_limit="1M")
    with pytest.raises(ValueError, match="is read-only"):
        snapshot(disk, MemoryDevice(LENGTH, read_only=True))
    with snapshot(disk, target) as snap, pytest.raises(ValueError, match="in place"):
        snap.set_limits(spill_limit="1M")


@pytest.mark.parametrize("ram", [0, 8 * CLUSTER])
@pytest.mark.parametrize("consume", [False, True])
def test_the_target_is_the_disk_at_the_instant_under_racing_writers(ram, consume):
    length = 256 * CLUSTER
    random = np.random.default_rng(ram + consume)
    child, target = MemoryDevice(length, name="vm"), MemoryDevice(length, name="target")
    child.write(0, random.integers(0, 256, length, dtype=np.uint8).tobytes())
    stop = threading.Event()

    def write(number):
        own = np.random.default_rng(number)
        while not stop.is_set():
            offset = int(own.integers(0, length - 100_000))
            disk.write(offset, bytes([int(own.integers(256))]) * int(own.integers(1, 100_000)))

    with fastcbw.open(child) as disk:
        for turn in range(10):
            content = disk.read(0, length)
            stop.clear()
            writers = [threading.Thread(target=write, args=(10 * turn + number,)) for number in range(4)]
            with snapshot(disk, target, ram=ram) as snap:
                for writer in writers:
                    writer.start()
                result = snap.backup(target, workers=4, consume=consume).wait(60)
                stop.set()
                for writer in writers:
                    writer.join(30)
                assert consume or snap.read(0, length) == content
            assert target.read(0, length) == content and result["data_bytes"] + result["zero_bytes"] + result["landed_bytes"] == length
