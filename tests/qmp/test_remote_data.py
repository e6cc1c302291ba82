"""Bytes, maps, copy orders and groups of another process's disks: what the objects of one's own say, says the remote one."""

import numpy as np
import pytest

import fastcbw

K = 4096
LENGTH = 1 << 20


def test_a_remote_disk_reads_and_writes_through_the_filter(daemon, remote):
    disk = remote.disks["a"]
    view = daemon.disks["a"].snapshot("s")
    disk.write(8 * K, b"n" * K)
    disk.write_zeroes(9 * K, K)
    disk.discard(200 * K, K)
    disk.flush()
    buffer = bytearray(2 * K)
    assert disk.readinto(8 * K, buffer) == 2 * K and buffer == b"n" * K + bytes(K)
    assert disk.read(0, K) == b"a" * K == view.read(0, K) and view.read(8 * K, K) == bytes(K)
    assert view.status()["preserved_clusters"] == 2 and disk.length == LENGTH
    assert disk.extents(0, K)["length"].sum() == K


def test_maps_and_orders_are_the_arrays_of_the_objects_themselves(daemon, remote):
    local = daemon.disks["a"].snapshot("s", ram="1M", spill_limit=None)
    local.discard(100 * K, 4 * K)
    daemon.disks["a"].write(0, b"n" * 3 * K)
    daemon.disks["a"].write(50 * K, b"n" * K)
    far = remote.disks["a"].snapshots["s"]
    assert (far.map() == local.map()).all() and far.map().dtype == local.map().dtype
    assert (far.map(K, 60 * K) == local.map(K, 60 * K)).all()
    assert (remote.disks["a"].map() == daemon.disks["a"].map()).all()
    rows = np.concatenate(list(far.order("ram-first")))
    assert rows["length"].sum() == LENGTH - 4 * K and rows["class"][0] == 0 and rows["offset"][0] == 0
    assert rows.dtype == next(iter(local.order())).dtype


def test_a_remote_snapshot_is_read_taken_and_discarded_and_kept_in_use_by_none_of_it(daemon, remote):
    far = remote.disks["a"].snapshot("s")
    daemon.disks["a"].write(0, b"n" * 2 * K)
    assert far.read(0, K) == b"a" * K and far.take(0, K) == b"a" * K
    far.discard(64 * K, K)
    for offset in (0, 64 * K):
        with pytest.raises(OSError, match="not in the snapshot"):
            far.read(offset, K)
    with pytest.raises(OSError, match="not in the snapshot"):
        far.take(0, 2 * K)
    assert far.read(K, K) == bytes(K)           # an error has dropped nothing
    with pytest.raises(fastcbw.Error, match="multiples of"):
        far.discard(1, 5)
    assert far.status()["status"]["discarded_bytes"] == 2 * K
    far.close()
    assert not daemon.disks["a"].snapshots


def test_a_group_of_remote_disks_has_one_instant_and_refuses_mixed_ones(daemon, remote):
    disks = [remote.disks["a"], remote.disks["b"]]
    with fastcbw.group(disks).snapshot("g", ram="1M") as (a, b):
        assert (a.read(0, K), b.read(0, K)) == (b"a" * K, b"b" * K)
    assert not daemon.disks["a"].snapshots and not daemon.disks["b"].snapshots
    with pytest.raises(TypeError, match="no instant in common"):
        fastcbw.group([disks[0], daemon.disks["b"]])
