"""The point in time of a write notifier that no job empties, read beside it: the old scheme with sync none."""

import numpy as np
import pytest

from fastcbw.block.delay import DelayDevice
from fastcbw.block.fault import FaultDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.cbw.notified import NotifiedView
from fastcbw.cbw.notifier import WriteNotifier
from fastcbw.jobs.backup import BackupJob
from test_write_notifier import CLUSTER, LENGTH, K, started


@pytest.fixture
def disk():
    device = MemoryDevice(LENGTH, name="vm")
    device.write(0, np.random.default_rng(1).integers(1, 256, LENGTH, dtype=np.uint8).tobytes())
    return DelayDevice(device)


def test_the_view_is_the_disk_at_the_begin_whatever_the_guest_does(disk):
    old, notifier = disk.read(0, LENGTH), WriteNotifier(disk, MemoryDevice(LENGTH), cluster_size=CLUSTER)
    notifier.begin()
    view = NotifiedView(notifier)
    assert (view.length, view.read_only, view.name) == (LENGTH, True, "vm@begin")
    for offset, length in ((5, 3), (3 * CLUSTER - 1, 2), (7 * CLUSTER, 2 * CLUSTER), (LENGTH - 1, 1)):
        notifier.write(offset, b"n" * length)
    assert view.read(0, LENGTH) == old
    for offset, length in ((0, 1), (CLUSTER - 1, 2), (2 * CLUSTER + 7, 3 * CLUSTER), (8 * CLUSTER, CLUSTER), (LENGTH - 2, 2)):
        assert view.read(offset, length) == old[offset : offset + length]


def test_a_reader_that_a_guest_write_overtakes_has_the_old_data(disk):
    old, notifier = disk.read(0, LENGTH), WriteNotifier(disk, MemoryDevice(LENGTH), cluster_size=CLUSTER)
    notifier.begin()
    view = NotifiedView(notifier)
    with disk.hold("read", 0, 4 * CLUSTER, after=True) as gate:        # the reader has read, and not looked yet
        join = started(view.read, 0, 4 * CLUSTER)
        gate.wait_arrived(1)
        write = started(notifier.write, CLUSTER, b"new")
        gate.wait_arrived(2)                # it preserves
    write()
    assert join() == old[: 4 * CLUSTER]
    with disk.hold("read", 0, 4 * CLUSTER) as gate:                    # the reader comes too late to the disk
        join = started(view.read, 0, 4 * CLUSTER)
        gate.wait_arrived(1)
        notifier.write(CLUSTER, b"newer")
    assert join() == old[: 4 * CLUSTER]
    assert view.read(CLUSTER, 3) == old[CLUSTER : CLUSTER + 3] and disk.read(CLUSTER, 5) == b"newer"


def test_a_second_job_copies_from_both(disk):
    old, notifier, target = disk.read(0, LENGTH), WriteNotifier(disk, MemoryDevice(LENGTH), cluster_size=CLUSTER), DelayDevice(MemoryDevice(LENGTH))
    notifier.begin()
    notifier.write(K, b"1" * K)
    with target.hold("write") as gate:
        job = BackupJob(NotifiedView(notifier), target).start()
        gate.wait_arrived(1)
        for cluster in range(20):
            notifier.write(cluster * CLUSTER, b"2" * 10)
    job.wait(30)
    assert target.read(0, LENGTH) == old


def test_a_view_without_a_point_in_time_is_an_error(disk):
    store = FaultDevice(MemoryDevice(LENGTH))
    notifier = WriteNotifier(disk, store, cluster_size=CLUSTER)
    with pytest.raises(ValueError, match="vm: has not begun"):
        NotifiedView(notifier)
    notifier.begin()
    view = NotifiedView(notifier)
    store.fail_on("write")
    notifier.write(0, b"new")           # the guest goes on; the old data is lost
    with pytest.raises(OSError, match="vm@begin"):
        view.read(0, 1)
