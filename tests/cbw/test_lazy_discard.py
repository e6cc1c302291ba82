"""Guest discards of what a snapshot needs: recorded, cancelled, carried out. The [M] rules by name.

A device here reads zeroes where it was discarded, so that one sees on the disk below whether that has happened.
"""

import errno
import threading
import time

import pytest
from engine_disks import Task, wait_until

from fastcbw.block.memory import MemoryDevice
from fastcbw.block.python import Device, PythonDevice
from fastcbw.cbw.engine import Engine, take_snapshots
from fastcbw.cbw.options import SnapshotOptions

K = 4096
CLUSTERS = 300
LENGTH = CLUSTERS * K - 1000        # the last cluster is a part of one


def old(cluster, count=1):
    return b"o" * (min((cluster + count) * K, LENGTH) - cluster * K)


def trim(engine, cluster, count=1):
    engine.device.discard(cluster * K, min(count * K, LENGTH - cluster * K))


def below(faults, cluster, count=1):
    return faults.child.read(cluster * K, min(count * K, LENGTH - cluster * K))


def lazy(engine):
    return engine.counters()["lazy_bytes"] // K


# -- recording


def test_a_discard_of_what_a_snapshot_needs_copies_and_touches_nothing(engine, faults):
    view = engine.snapshot("s")
    before = dict(faults.requests)
    trim(engine, 0, CLUSTERS)
    assert dict(faults.requests) == before
    assert engine.report("s")["preserved_clusters"] == 0 and lazy(engine) == CLUSTERS
    assert view.read(0, LENGTH) == b"o" * LENGTH
    # The guest may read anything there; it reads the old data, and block status says so.
    assert engine.device.read(0, LENGTH) == b"o" * LENGTH
    assert engine.device.extents()["flags"].tolist() == [0]


@pytest.mark.parametrize("first, count", [(0, 1), (63, 1), (63, 2), (64, 64), (0, 65), (1, 200), (299, 1), (0, 300)])
def test_exactly_the_clusters_of_the_discard_are_recorded_and_carried_out(engine, faults, first, count):
    engine.snapshot("s")
    trim(engine, first, count)
    assert lazy(engine) == count and below(faults, 0, CLUSTERS) == b"o" * LENGTH
    engine.delete("s")
    engine.finish_discards()
    zeroes = bytes(len(old(first, count)))
    assert below(faults, 0, CLUSTERS) == old(0, first) + zeroes + old(first + count, CLUSTERS - first - count)


@pytest.mark.parametrize("offset, length, clusters", [(1, 2 * K - 2, 0), (K - 1, K + 2, 1), (100, K, 0), (0, K - 1, 0), (298 * K + 1, LENGTH - 298 * K - 1, 1)])
def test_head_and_tail_parts_are_dropped_unless_settled(engine, faults, offset, length, clusters):
    engine.snapshot("s")
    engine.device.discard(offset, length)
    assert lazy(engine) == clusters and engine.report("s")["preserved_clusters"] == 0
    assert below(faults, 0, CLUSTERS) == b"o" * LENGTH
    engine.device.write(0, b"n" * LENGTH)
    engine.device.discard(offset, length)
    assert faults.child.read(0, LENGTH) == b"n" * offset + bytes(length) + b"n" * (LENGTH - offset - length)


def test_what_is_preserved_already_is_discarded_at_once_and_the_rest_is_recorded(engine, faults):
    view = engine.snapshot("s")
    for cluster in (3, 4, 70):
        engine.device.write(cluster * K, b"n" * K)
    before = faults.requests["discard"]
    trim(engine, 0, 128)
    assert faults.requests["discard"] == before + 2         # 3 and 4 in one
    assert lazy(engine) == 125
    assert below(faults, 3, 2) == bytes(2 * K) and below(faults, 70) == bytes(K) and below(faults, 5, 65) == old(5, 65)
    assert view.read(0, LENGTH) == b"o" * LENGTH


def test_write_zeroes_is_a_write_and_reads_as_zeroes(engine):
    view = engine.snapshot("s")
    trim(engine, 5)
    engine.device.write_zeroes(5 * K, K)
    assert engine.device.read(5 * K, K) == bytes(K) and view.read(5 * K, K) == b"o" * K
    assert engine.report("s")["preserved_clusters"] == 1 and lazy(engine) == 0


# -- forgetting


def test_what_is_forgotten_is_not_carried_out(engine, faults):
    view = engine.snapshot("s")
    trim(engine, 0, CLUSTERS)
    engine.forget_discards(1)
    assert lazy(engine) == 0 and engine.counters()["lazy_cancelled"] >= LENGTH
    engine.device.write(7 * K, b"n" * K)
    trim(engine, 20)                        # recorded anew
    assert view.read(0, LENGTH) == b"o" * LENGTH and lazy(engine) == 1
    engine.delete("s")
    engine.finish_discards()
    assert below(faults, 0, CLUSTERS) == old(0, 7) + b"n" * K + old(8, 12) + bytes(K) + old(21, CLUSTERS - 21)


def test_forgetting_waits_for_what_is_being_carried_out(engine, disk, faults):
    engine.snapshot("s")
    trim(engine, 10)
    trim(engine, 12)
    with disk.hold("discard", 10 * K, K) as gate:
        engine.break_snapshot("s")
        gate.wait_arrived()                 # the keeper is at 10, and has 12 before it
        with pytest.raises(TimeoutError, match="1 clusters that the guest has discarded were in use for 0.01 s"):
            engine.forget_discards(0.01)
        forgetting = Task(engine.forget_discards, 30)
    forgetting.result()
    assert lazy(engine) == 0 and below(faults, 10) == bytes(K) and below(faults, 12) == old(12)


# -- [M] rules


def test_m_a_recorded_discard_keeps_its_cluster_unsettled(engine, faults):
    """R6: the guest's later write preserves as usual, and cancels; else the discard would be carried out over it."""
    view = engine.snapshot("s")
    trim(engine, 5, 3)
    engine.device.write(6 * K + 10, b"n" * 10)
    assert engine.report("s")["preserved_clusters"] == 1 and lazy(engine) == 2
    assert engine.counters()["lazy_cancelled"] == K
    assert view.read(0, LENGTH) == b"o" * LENGTH
    engine.delete("s")
    engine.finish_discards()
    assert below(faults, 5) == below(faults, 7) == bytes(K)
    assert below(faults, 6) == b"o" * 10 + b"n" * 10 + b"o" * (K - 20)


def test_m_a_write_that_no_snapshot_asks_anything_of_still_cancels_the_record(engine, disk, faults):
    """The snapshot is broken, so a write preserves nothing; it must come by the record all the same."""
    engine.snapshot("s")
    trim(engine, 10)
    trim(engine, 12)
    with disk.hold("discard", 10 * K, K) as gate:
        engine.break_snapshot("s")
        gate.wait_arrived()                 # the keeper is at 10, and has 12 before it
        engine.device.write(12 * K, b"n" * K)
        assert engine.counters()["lazy_cancelled"] == K
    engine.finish_discards()
    assert below(faults, 10) == bytes(K) and below(faults, 12) == b"n" * K


def test_m_a_discard_is_recorded_under_the_claim(engine, disk, faults):
    """While a write preserves the cluster, the discard waits for its claim; then the cluster is settled: nothing is recorded."""
    view = engine.snapshot("s", cbw_timeout=60_000)
    with disk.hold("read", 5 * K, K) as gate:
        writer = Task(engine.device.write, 5 * K, b"n" * K)
        gate.wait_arrived()
        trimmer = Task(trim, engine, 0, 64)
        wait_until(lambda: lazy(engine) == 63)      # all but 5
        assert trimmer.is_alive()
    writer.result()
    trimmer.result()
    assert lazy(engine) == 63
    engine.delete("s")
    engine.finish_discards()
    assert below(faults, 5) in (b"n" * K, bytes(K)) and below(faults, 6, 58) == bytes(58 * K)
    assert view is not None


def test_a_claim_that_is_held_too_long_costs_the_discard_and_not_the_guest(engine, disk):
    view = engine.snapshot("s", cbw_timeout=60_000)
    other = engine.snapshot("newer", cbw_timeout=50)
    assert engine.device.read(0, 1) == b"o"
    with disk.hold("read", 5 * K, K) as gate:
        writer = Task(engine.device.write, 5 * K, b"n" * K)     # its own limit breaks `newer`, then `s` is asked
        gate.wait_arrived()
        Task(trim, engine, 5, 3).result()
        assert 2 <= lazy(engine) <= 3
    writer.result()
    assert view.read(6 * K, 2 * K) == b"o" * 2 * K and other is not None


def test_m_carrying_out_marks_changed_and_every_dirty_bitmap_again_before_the_disk_changes(engine, disk, faults):
    """An increment begun between the discard and its carrying out would miss it: the content changes only then."""
    bitmap = engine.bitmaps.add("b", granularity=512)
    engine.snapshot("s1")
    trim(engine, 5, 2)
    assert bitmap.report()["count"] == 2 * K
    bitmap.clear()                          # somebody's increment has it
    engine.snapshot("s2")
    engine.delete("s1")
    assert lazy(engine) == 2 and bitmap.report()["count"] == 0          # s2 needs them as well
    with disk.hold("discard", 5 * K, K) as gate:
        engine.delete("s2")
        gate.wait_arrived()
        assert below(faults, 5) == b"o" * K and bitmap.report()["count"] == 2 * K
    wait_until(lambda: lazy(engine) == 0)
    assert below(faults, 5, 2) == bytes(2 * K)
    assert [(int(row["offset"]), int(row["length"])) for row in bitmap.extents()] == [(5 * K, 2 * K)]


def test_a_snapshot_of_what_a_bitmap_marks_keeps_nothing_else_from_being_discarded(engine, faults):
    bitmap = engine.bitmaps.add("b")
    engine.device.write(0, b"n" * 16 * K)
    view = engine.snapshot("s", bitmap="b", cluster_size="64K")
    trim(engine, 0, 32)                     # the first 16 are in the snapshot
    assert lazy(engine) == 16
    assert below(faults, 0, 16) == b"n" * 16 * K
    assert below(faults, 16, 16) == bytes(16 * K) and view.read(0, 16 * K) == b"n" * 16 * K
    engine.delete("s")
    engine.finish_discards()
    assert below(faults, 0, 32) == bytes(32 * K) and bitmap is not None


def test_m_a_write_waits_for_the_carrying_out_that_holds_its_claim(engine, disk, faults):
    engine.snapshot("s", cbw_timeout=50)
    trim(engine, 5)
    with disk.hold("discard", 5 * K, K) as gate:
        engine.delete("s")
        gate.wait_arrived()
        writer = Task(engine.device.write, 5 * K, b"n" * K)
        other = Task(engine.device.write, 6 * K, b"n" * K)
        other.result()
        wait_until(lambda: engine.counters()["waits"] > 0)
        assert writer.is_alive() and below(faults, 5) == b"o" * K
    writer.result()
    wait_until(lambda: lazy(engine) == 0)
    assert below(faults, 5, 2) == b"n" * 2 * K


def test_m_a_snapshot_that_begins_waits_for_the_carrying_out_and_is_constant(engine, disk):
    engine.snapshot("s")
    trim(engine, 5, 2)
    with disk.hold("discard", 5 * K, K) as gate:
        engine.delete("s")
        gate.wait_arrived()
        taking = Task(engine.snapshot, "new")
        engine.device.write(100 * K, b"n" * K)
        assert taking.is_alive()
    view = taking.result()
    image = view.read(0, LENGTH)
    assert image[5 * K:7 * K] in (bytes(2 * K), b"o" * 2 * K)
    wait_until(lambda: engine.counters()["lazy_bytes"] == 0 or view.read(5 * K, K) == b"o" * K)
    engine.device.write(0, b"x" * LENGTH)
    assert view.read(0, LENGTH) == image


# -- carrying out


@pytest.mark.parametrize("end", ["delete", "break", "close"])
def test_the_end_of_the_last_snapshot_that_needs_them_carries_the_discards_out(engine, faults, end):
    engine.snapshot("s")
    trim(engine, 0, CLUSTERS)
    if end == "delete":
        engine.delete("s")
        wait_until(lambda: lazy(engine) == 0)
    elif end == "break":
        engine.break_snapshot("s")
        wait_until(lambda: lazy(engine) == 0)
    else:
        engine.close()
    assert below(faults, 0, CLUSTERS) == bytes(LENGTH)
    if end != "close":
        assert engine.counters()["lazy_carried_out"] == LENGTH
        engine.device.write(0, b"n" * LENGTH)
        assert engine.device.read(0, LENGTH) == b"n" * LENGTH and engine.cluster_size is None


class Trimmed(Device):
    """A disk that only remembers what it was asked to discard."""

    length = 512 << 20

    def __init__(self):
        self.discarded = []

    def write(self, offset, data):
        raise AssertionError("nobody writes")

    def discard(self, offset, length):
        self.discarded.append((offset, length))


@pytest.mark.parametrize("size", ["4K", "1M"])
def test_half_a_gigabyte_is_carried_out_in_large_requests(size):
    device = Trimmed()
    engine = Engine(PythonDevice(device))
    engine.snapshot("s", cluster_size=size)
    engine.device.discard(0, device.length)
    assert engine.counters()["lazy_bytes"] == device.length and device.discarded == []
    engine.delete("s")
    engine.finish_discards()
    assert sorted(device.discarded) == [(i * (64 << 20), 64 << 20) for i in range(8)]
    assert engine.counters()["lazy_carried_out"] == device.length
    engine.close()


@pytest.mark.parametrize("first", ["s1", "s2"])
def test_of_several_snapshots_the_last_one_decides(engine, faults, first):
    views = {name: engine.snapshot(name) for name in ("s1", "s2")}
    trim(engine, 0, 100)
    engine.delete(first)
    left = "s2" if first == "s1" else "s1"
    assert lazy(engine) == 100 and views[left].read(0, LENGTH) == b"o" * LENGTH
    engine.delete(left)
    wait_until(lambda: lazy(engine) == 0)
    assert below(faults, 0, 100) == bytes(100 * K) and below(faults, 100) == old(100)


def test_a_snapshot_taken_while_discards_wait_keeps_them_waiting(engine, disk, faults):
    engine.snapshot("s1")
    trim(engine, 5)
    trim(engine, 7)
    with disk.hold("discard", 5 * K, K) as gate:
        engine.delete("s1")
        gate.wait_arrived()                                  # the keeper is at 5, 7 is to come
        taking = Task(engine.snapshot, "s2")
        taking.join(0.05)
    view = taking.result()
    image = view.read(0, LENGTH)
    engine.device.write(7 * K, b"n" * K)
    assert view.read(0, LENGTH) == image
    engine.delete("s2")
    engine.finish_discards()
    assert below(faults, 5) == bytes(K) and below(faults, 7) == b"n" * K


def test_another_cluster_size_waits_until_the_queue_is_empty(engine, faults):
    engine.snapshot("s")
    trim(engine, 0, 32)
    engine.delete("s")
    view = engine.snapshot("large", cluster_size="64K")
    assert below(faults, 0, 32) == bytes(32 * K) and lazy(engine) == 0
    assert view.read(0, LENGTH) == bytes(32 * K) + old(32, CLUSTERS - 32)


def test_a_discard_that_the_disk_fails_is_dropped_and_counted(engine, faults):
    engine.snapshot("s")
    trim(engine, 5, 3)
    with faults.fail_on("discard", errno=errno.EIO):
        engine.delete("s")
        engine.finish_discards()
    assert (lazy(engine), engine.counters()["lazy_failed"], engine.counters()["lazy_carried_out"]) == (0, 3 * K, 0)
    assert below(faults, 5, 3) == old(5, 3)
    engine.device.write(5 * K, b"n" * K)        # nothing comes after it
    view = engine.snapshot("s2")
    engine.device.write(6 * K, b"n" * K)
    engine.delete("s2")
    engine.finish_discards()
    assert below(faults, 5, 2) == b"n" * 2 * K and view is not None


def test_an_error_of_a_discard_that_goes_to_the_disk_is_the_guests(engine, faults):
    view = engine.snapshot("s")
    engine.device.write(5 * K, b"n" * K)
    with faults.fail_on("discard", errno=errno.EIO), pytest.raises(OSError, match="Input/output"):
        trim(engine, 0, 64)
    assert lazy(engine) == 63 and view.read(0, LENGTH) == b"o" * LENGTH


def test_a_group_records_on_each_disk_and_carries_out_on_each(faults):
    disks = [MemoryDevice(64 * K), MemoryDevice(64 * K)]
    engines = [Engine(disk) for disk in disks]
    for disk in disks:
        disk.write(0, b"o" * disk.length)
    views = take_snapshots(engines, "g", SnapshotOptions.parse())
    for engine in engines:
        engine.device.discard(0, 10 * K)
    assert [view.read(0, 64 * K) for view in views] == [b"o" * 64 * K] * 2
    engines[0].delete("g")
    engines[0].finish_discards()
    assert disks[0].read(0, 10 * K) == bytes(10 * K) and disks[1].read(0, 10 * K) == b"o" * 10 * K
    for engine in engines:
        engine.close()
    assert disks[1].read(0, 10 * K) == bytes(10 * K)


def test_writers_and_discards_of_the_same_clusters_lose_no_write(disk, faults):
    """Each thread owns every fourth cluster: discards it, writes it, and finds its last write, while snapshots come and go."""
    engine = Engine(disk)
    errors, stopping, turns = [], threading.Event(), [0] * 4

    def guest(number):
        try:
            while not stopping.is_set():
                turns[number] += 1
                for cluster in range(number, CLUSTERS - 1, 4):
                    trim(engine, cluster)
                    if cluster % 3:
                        engine.device.write(cluster * K, bytes([turns[number] % 255 + 1]) * K)
                for cluster in range(number, CLUSTERS - 1, 4):
                    if cluster % 3:
                        assert engine.device.read(cluster * K, K) == bytes([turns[number] % 255 + 1]) * K
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guest, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for n in range(60):
        view = engine.snapshot(f"s{n}", ram="8M")
        image = view.read(0, LENGTH)
        if n % 3 == 1:
            engine.delete(f"s{n - 1}")
        assert view.read(0, LENGTH) == image
        if n % 3:
            engine.delete(f"s{n}")
        elif n > 2:
            engine.finish_discards()
    stopping.set()
    for thread in threads:
        thread.join(20)
    assert errors == [] and min(turns) > 1
    for name in list(engine.snapshots):
        engine.delete(name)
    engine.finish_discards()
    for cluster in range(CLUSTERS - 1):
        last = bytes([turns[cluster % 4] % 255 + 1]) * K if cluster % 3 else bytes(K)
        assert below(faults, cluster) == last, cluster
    engine.close()


class Gated(Device):
    """A disk written in Python whose discards and writes wait to be let through, each kind by its own gate."""

    length = 64 * K

    def __init__(self):
        self.gates = {"discard": threading.Event(), "write": threading.Event()}
        self.came = {"discard": threading.Event(), "write": threading.Event()}

    def read(self, offset, length):
        return bytes(length)

    def write(self, offset, data):
        self.pass_gate("write")

    def discard(self, offset, length):
        self.pass_gate("discard")

    def pass_gate(self, kind):
        self.came[kind].set()
        assert self.gates[kind].wait(20)


def test_the_keeper_waits_for_guest_writes_without_holding_the_interpreter():
    """What it waits for may be a write of a device in Python, which could never end."""
    disk = Gated()
    engine = Engine(PythonDevice(disk))
    engine.snapshot("s")
    engine.device.discard(0, 8 * K)
    engine.delete("s")                                              # the keeper carries the discard out
    assert disk.came["discard"].wait(20)
    write = Task(engine.device.write, 32 * K, b"n" * K)             # counted in the epoch that the keeper is to end
    assert disk.came["write"].wait(20)
    disk.gates["discard"].set()
    wait_until(lambda: lazy(engine) == 0)
    time.sleep(0.05)                                                # the keeper comes to its wait
    disk.gates["write"].set()
    write.result()
    engine.finish_discards()
    assert engine.cluster_size is None
    engine.close()
