"""Slots populated ahead of the guest: never beyond the limit, never missing, and gone with the snapshot."""

import os

import pytest

import fastcbw
from fastcbw.block.memory import MemoryDevice
from fastcbw.errors import SnapshotBroken

K, M = 1 << 10, 1 << 20


def threads():
    return len(os.listdir("/proc/self/task"))


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def content(number):
    return number.to_bytes(4, "little") * 16384


@pytest.fixture
def disk():
    with MemoryDevice(48 * M) as device:
        for number in range(768):
            device.write(number * 64 * K, content(number + 1))
        with fastcbw.open(device, name="disk") as disk:
            yield disk


@pytest.mark.parametrize("cluster", ["4K", "64K", "1M"])
def test_old_data_in_slots_of_either_kind_is_what_it_was(disk, cluster):
    snapshot = disk.snapshot("s", ram="64M", cluster_size=cluster)
    for number in range(767, -1, -1):
        disk.write(number * 64 * K, content(number + 1000))
    assert disk.status()["snapshots"]["s"]["ram_bytes"] == 48 * M
    assert all(snapshot.read(number * 64 * K, 64 * K) == content(number + 1) for number in range(768))


@pytest.mark.parametrize("length", [64 * K, 4 * M, 8 * M, 8 * M - 4 * K, 19 * M + 4 * K])
def test_every_slot_of_the_limit_can_be_used_and_no_more(disk, length):
    """However much is ahead when the last ones are asked for: the guest gets them all, and the next one breaks the snapshot."""
    snapshot = disk.snapshot("s", ram=length, cluster_size="4K")
    for offset in range(0, length, 64 * K):
        disk.write(offset, content(7)[: min(64 * K, length - offset)])
    status = disk.status()["snapshots"]["s"]
    assert status["state"] == "live" and status["ram_bytes"] == length
    assert snapshot.read(0, 64 * K) == content(1)
    disk.write(32 * M, content(7))
    with pytest.raises(SnapshotBroken, match="full"):
        snapshot.read(0, 4096)


def test_what_is_ahead_is_at_most_8_mib_and_its_thread_goes_with_the_snapshot(disk):
    disk.snapshot("warm-up", ram="1M").close()
    before, others = resident(), threads()
    snapshot = disk.snapshot("s", ram="40M")
    for number in range(200):
        disk.write(number * 64 * K, content(7))
    assert threads() == others + 1
    assert 12 * M <= resident() - before <= 12.5 * M + (8 + 2 + 2) * M
    snapshot.close()
    assert threads() == others


def test_a_snapshot_that_preserves_little_has_no_thread(disk):
    disk.snapshot("warm-up", ram="1M").close()
    before = threads()
    disk.snapshot("s", ram="40M")
    for number in range(15):
        disk.write(number * 64 * K, content(7))
    assert threads() == before
