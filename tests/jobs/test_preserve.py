"""Backups with sync none: the target gets what the guest overwrites, at its offsets, and nothing else."""

import random
import threading

import pytest

import fastcbw
from fastcbw.block.delay import DelayDevice
from fastcbw.block.fault import FaultDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.errors import Error, JobCancelled, JobFailed

K = 1 << 10
LENGTH = 1 << 20
UNTOUCHED = b"\xee"


@pytest.fixture
def disk():
    with fastcbw.open(MemoryDevice(LENGTH, name="disk"), name="disk") as disk:
        for i in range(256):
            disk.write(i * 4 * K, bytes([i % 200 + 1]) * 4 * K)
        disk.write_zeroes(128 * K, 64 * K)
        yield disk


@pytest.fixture
def plain():
    device = MemoryDevice(LENGTH, name="target")
    device.write(0, UNTOUCHED * LENGTH)
    with device:
        yield device


def ended(job):
    job.cancel()
    with pytest.raises(JobCancelled, match="what was overwritten until then is in target"):
        job.wait(30)


def test_what_the_guest_overwrites_is_in_the_target_and_nothing_else(disk, plain):
    before = disk.read(0, LENGTH)
    with disk.snapshot("s") as snapshot:
        job = snapshot.preserve(plain)
        disk.write(4 * K, b"n" * 8 * K)
        disk.write(128 * K + 100, b"n")             # old data of zeroes is written as zeroes
        disk.write_zeroes(300 * K, 4 * K)
        disk.write(LENGTH - 1, b"n")
        ended(job)
        wanted = bytearray(UNTOUCHED * LENGTH)
        for offset, length in ((4 * K, 8 * K), (128 * K, 4 * K), (300 * K, 4 * K), (LENGTH - 4 * K, 4 * K)):
            wanted[offset : offset + length] = before[offset : offset + length]
        assert plain.read(0, LENGTH) == wanted
        assert snapshot.status()["ram_bytes"] == 0 and job.progress["done"] == 20 * K


def test_old_data_leaves_the_store_while_the_job_runs(disk, plain):
    """A store of 16 clusters for a guest that overwrites 256: it waits for the job, which makes room, and loses nothing."""
    before = disk.read(0, LENGTH)
    with disk.snapshot("s", ram=64 * K, on_full="wait", cbw_timeout=60_000) as snapshot:
        job = snapshot.preserve(plain, workers=2)
        for i in random.Random(1).sample(range(256), 256):
            disk.write(i * 4 * K, b"n" * 4 * K)
        ended(job)
    assert plain.read(0, LENGTH) == before


def test_several_writers_beside_the_job_and_every_cluster_is_of_the_instant(disk, plain):
    before = disk.read(0, LENGTH)
    touched = [set() for _ in range(4)]

    def write(n):
        rng = random.Random(n)
        for _ in range(600):
            i = rng.randrange(256)
            disk.write(i * 4 * K + rng.randrange(4096), bytes([n]))
            touched[n].add(i)

    with disk.snapshot("s", ram=128 * K, on_full="wait", cbw_timeout=60_000) as snapshot:
        job = snapshot.preserve(plain)
        writers = [threading.Thread(target=write, args=(n,)) for n in range(4)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(60)
        ended(job)
    for i in range(256):
        old = before[i * 4 * K : (i + 1) * 4 * K] if i in set.union(*touched) else UNTOUCHED * 4 * K
        if (i * 4 * K) // (64 * K) == 2 and i in set.union(*touched):
            old = bytes(4 * K)
        assert plain.read(i * 4 * K, 4 * K) == old, i


def test_a_target_that_fails_ends_the_job_and_not_the_guest(disk):
    with FaultDevice(MemoryDevice(LENGTH), name="target") as target, target.fail_on("write", 8 * K, 4 * K), disk.snapshot("s") as snapshot:
        job = snapshot.preserve(target)
        disk.write(8 * K, b"n" * 4 * K)
        with pytest.raises(JobFailed, match="write to the target.*8192.*target is incomplete"):
            job.wait(30)
        disk.write(12 * K, b"n" * 4 * K)
        assert disk.read(12 * K, 4 * K) == b"n" * 4 * K


def test_a_snapshot_that_breaks_ends_the_job(disk):
    """The target hangs, the store is full, and the guest's time limit has come."""
    target = DelayDevice(MemoryDevice(LENGTH), name="target")
    with target, disk.snapshot("s", ram=4 * K, on_full="wait", cbw_timeout=50) as snapshot:
        with target.hold("write") as gate:
            job = snapshot.preserve(target)
            disk.write(0, b"n" * 4 * K)
            gate.wait_arrived()
            disk.write(8 * K, b"n" * 4 * K)         # waits, breaks the snapshot, goes on
            gate.open()
        with pytest.raises(JobFailed, match="disk@s.*target is incomplete"):
            job.wait(30)


def test_a_cancel_ends_a_job_that_is_paused_or_slow(disk, plain):
    before = disk.read(0, 16 * K)
    for hinder in (lambda job: job.pause(), lambda job: setattr(job, "rate", 1)):
        with disk.snapshot("s") as snapshot:
            job = snapshot.preserve(plain)
            hinder(job)
            disk.write(0, b"n" * 16 * K)
            ended(job)
        assert plain.read(0, 16 * K) == before
        before = b"n" * 16 * K


def test_nobody_else_may_read_what_the_job_takes_away(disk, plain):
    with disk.snapshot("s") as snapshot:
        snapshot.hold()
        with pytest.raises(Error, match="in use"):
            snapshot.preserve(plain)
        snapshot.release()
        with pytest.raises(ValueError, match="is the source itself"):
            snapshot.preserve(disk.device)
        ended(snapshot.preserve(plain))
