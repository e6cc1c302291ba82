"""Disks of 64 TiB: what is not touched costs nothing."""

import os
import threading

import pytest

import fastcbw
from fastcbw.block.file import FileDevice

LENGTH = 64 << 40
TOUCHES = [i * (LENGTH // 64) for i in range(64)]


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def disk(shm_path):
    with FileDevice(shm_path / "disk", create_length=LENGTH) as device:
        for offset in TOUCHES:
            device.write(offset, b"old!" * 1024)
        with fastcbw.open(device, name="large") as disk:
            disk.snapshot("warm-up", ram="1M").close()      # threads and their stacks are not the snapshot's
            yield disk


def test_taking_a_snapshot_of_64_tib_touches_no_memory_to_speak_of(disk):
    before = resident()
    disk.snapshot("s")
    assert resident() - before <= 1 << 20


def test_what_is_touched_is_what_is_paid(disk):
    snapshot = disk.snapshot("s")
    before = resident()
    for offset in TOUCHES:
        disk.write(offset, b"new!" * 1024)
    assert resident() - before <= 4 << 20
    assert all(snapshot.read(offset, 4096) == b"old!" * 1024 for offset in TOUCHES)
    assert resident() - before <= 4 << 20


def test_walks_cost_what_is_preserved(disk):
    snapshot = disk.snapshot("s")
    for offset in TOUCHES[::2]:
        disk.write(offset, b"new!" * 1024)
    before = resident()
    extents = snapshot.extents()
    assert extents["offset"][extents["flags"] == 0].tolist() == TOUCHES
    assert resident() - before <= 4 << 20


def test_a_snapshot_between_others_ends_without_a_walk_of_the_disk(disk):
    snapshots = [disk.snapshot(name) for name in ("a", "b", "c")]
    for offset in TOUCHES:
        disk.write(offset, b"new!" * 1024)
    before = resident()
    for snapshot in (snapshots[2], snapshots[1]):
        snapshot.close()
    assert resident() - before <= 4 << 20
    assert all(snapshots[0].read(offset, 4096) == b"old!" * 1024 for offset in TOUCHES)


@pytest.mark.parametrize("order", ["sequential", "ram-first"])
def test_a_sparse_backup_of_it_is_sparse(disk, shm_path, order):
    snapshot = disk.snapshot("s")
    for offset in TOUCHES[::2]:
        disk.write(offset, b"new!" * 1024)
    result = snapshot.backup(shm_path / "copy", order=order).wait(60)
    assert result["data_bytes"] == 64 * 4096 and os.stat(shm_path / "copy").st_blocks * 512 <= 1 << 20
    with FileDevice(shm_path / "copy", read_only=True) as copy:
        assert all(copy.read(offset, 4096) == b"old!" * 1024 for offset in TOUCHES)
    assert threading.active_count() < 20
