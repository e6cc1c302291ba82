"""The invariants I1 to I8 of the design and the [M] rules of the protocol, each by name.

Each race is made with a gate on the device, so that the step in question has certainly begun and has certainly not ended.
"""

import errno
import threading

import pytest
from engine_disks import Task, wait_until

from fastcbw.block.delay import DelayDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.cbw.engine import Engine, take_snapshots
from fastcbw.cbw.options import SnapshotOptions
from fastcbw.errors import SnapshotBroken

K = 4096
CLUSTERS = 64
LENGTH = CLUSTERS * K


def write(engine, cluster, byte, count=1):
    engine.device.write(cluster * K, byte * (count * K))


def wait_for_flip(engine):
    """Return when a creation under way has flipped: from then on a guest write finds something to preserve."""
    before = engine.counters()["touches"]
    wait_until(lambda: write(engine, CLUSTERS - 1, b"o") or engine.counters()["touches"] > before)


def read(view, cluster, count=1):
    return view.read(cluster * K, count * K)


# -- invariants


def test_i1_a_guest_write_reaches_the_disk_only_when_its_old_data_is_preserved(engine, disk, faults):
    view = engine.snapshot("s", cbw_timeout=60_000)
    with disk.hold("read", 3 * K, K, after=True) as gate:
        writer = Task(write, engine, 3, b"n")
        gate.wait_arrived()
        assert faults.child.read(3 * K, K) == b"o" * K
        assert faults.requests["write"] == 1        # the fixture's own
    writer.result()
    assert faults.child.read(3 * K, K) == b"n" * K and read(view, 3) == b"o" * K


def test_i2_a_settled_cluster_is_not_copied_again(engine, faults):
    view = engine.snapshot("s")
    write(engine, 3, b"a")
    reads = faults.requests["read"]
    for byte in (b"b", b"c", b"d"):
        write(engine, 3, byte)
    assert faults.requests["read"] == reads
    assert engine.report("s")["preserved_clusters"] == 1
    assert read(view, 3) == b"o" * K


def test_i3_published_data_only_moves_or_goes(engine):
    oldest = engine.snapshot("s1")
    middle = engine.snapshot("s2")
    write(engine, 0, b"a")
    newest = engine.snapshot("s3")
    write(engine, 0, b"b")
    assert (read(oldest, 0), read(middle, 0), read(newest, 0)) == (b"o" * K, b"o" * K, b"a" * K)
    engine.delete("s2")         # its word moves to s1, the slot stays
    assert (read(oldest, 0), read(newest, 0)) == (b"o" * K, b"a" * K)
    engine.delete("s3")         # nobody needs its word
    assert read(oldest, 0) == b"o" * K


def test_i4_a_read_in_flight_keeps_what_its_word_names(engine, shm_path):
    """A read of the log is held while the snapshot that owns the log goes: the data moves to the older one and stays."""
    log = DelayDevice(MemoryDevice(LENGTH * 2))
    oldest = engine.snapshot("s1")
    engine.snapshot("s2", ram=0, spill=log)
    write(engine, 0, b"a")
    with log.hold("read") as gate:
        reader = Task(read, oldest, 0)
        gate.wait_arrived()
        Task(engine.delete, "s2").result()
    assert reader.result() == b"o" * K
    assert read(oldest, 0) == b"o" * K


def test_i5_a_broken_snapshot_gives_errors_for_every_part(engine):
    view = engine.snapshot("s", ram=K)
    write(engine, 0, b"n")
    write(engine, 1, b"n")
    for call in (lambda: view.read(0, 1), lambda: view.read(LENGTH - 1, 1), lambda: view.extents(), lambda: view.readinto(0, bytearray(5))):
        with pytest.raises(SnapshotBroken, match="full"):
            call()


def test_i5_a_read_that_a_break_overtakes_is_an_error_and_no_data(engine, disk):
    view = engine.snapshot("s")
    with disk.hold("read", 9 * K, K, after=True) as gate:
        reader = Task(read, view, 9)
        gate.wait_arrived()
        engine.break_snapshot("s")
    with pytest.raises(SnapshotBroken):
        reader.result()


def test_i6_every_byte_is_reachable_while_snapshots_come_and_go(engine, shm_path):
    views, images = {}, {}
    for n in range(12):
        name = f"s{n}"
        views[name] = engine.snapshot(name, ram=4 * K, spill=shm_path, spill_limit="1M")
        images[name] = views[name].read(0, LENGTH)
        write(engine, n * 3 % CLUSTERS, bytes([n + 1]), 4)
        if n % 3 == 2:
            gone = sorted(views)[n % len(views)]
            engine.delete(gone)
            del views[gone]
        for name, view in views.items():
            assert view.read(0, LENGTH) == images[name]


@pytest.mark.parametrize("operation", ["write", "zero", "discard"])
def test_i7_an_error_of_the_disk_is_the_guests_and_only_that(engine, faults, operation):
    view = engine.snapshot("s")
    call = {"write": lambda: write(engine, 3, b"n"), "zero": lambda: engine.device.write_zeroes(3 * K, K),
            "discard": lambda: engine.device.discard(3 * K, K)}[operation]
    if operation == "discard":
        write(engine, 3, b"m")      # else the disk is not asked: the discard is recorded
    with faults.fail_on(operation, errno=errno.ENOSPC):
        with pytest.raises(OSError, match="No space left"):
            call()
    assert view.broken is None and view.read(0, LENGTH) == b"o" * LENGTH
    call()
    assert read(view, 3) == b"o" * K and engine.device.read(3 * K, K) != b"o" * K


def test_i8_a_failed_copy_gives_its_claim_back_and_wakes_who_waits(engine, disk, faults):
    """The first write's copy fails; the second waits for the same claim: the snapshot breaks, both write."""
    view = engine.snapshot("s", cbw_timeout=60_000)
    with faults.fail_on("read", 5 * K, K):
        with disk.hold("read", 5 * K, K) as gate:
            first = Task(write, engine, 5, b"1")
            gate.wait_arrived()
            waits = engine.counters()["waits"]
            second = Task(engine.device.write, 5 * K + 100, b"2" * 100)
            wait_until(lambda: engine.counters()["waits"] > waits)      # it waits for the claim
        first.result()
        second.result()
    assert "could not be read" in view.broken
    content = engine.device.read(5 * K, K)
    assert content[:100] == b"1" * 100 and content[100:200] in (b"2" * 100, b"1" * 100)


def test_i8_a_write_that_waits_for_a_claim_goes_on_once_it_is_released(engine, disk):
    view = engine.snapshot("s", cbw_timeout=60_000)
    with disk.hold("read", 5 * K, K) as gate:
        first = Task(write, engine, 5, b"1")
        gate.wait_arrived()
        waits = engine.counters()["waits"]
        second = Task(engine.device.write, 5 * K, b"2")
        wait_until(lambda: engine.counters()["waits"] > waits)
        write(engine, 6, b"3")          # a neighbour in the same word of the bitmap is free
    first.result()
    second.result()
    assert engine.report("s")["preserved_clusters"] == 2
    assert view.read(0, LENGTH) == b"o" * LENGTH


# -- [M] rules


def test_m_creation_waits_for_the_writes_of_the_old_epoch(engine, disk):
    with disk.hold("write", 5 * K, K) as gate:
        writer = Task(write, engine, 5, b"n")
        gate.wait_arrived()
        creation = Task(engine.snapshot, "s")
        wait_for_flip(engine)
        assert creation.is_alive()
        write(engine, 7, b"n")          # the guest waits for nothing
        assert creation.is_alive()
    view = creation.result()
    writer.result()
    first = view.read(0, LENGTH)
    assert first[7 * K : 8 * K] == b"o" * K
    write(engine, 5, b"x")
    assert view.read(0, LENGTH) == first


def test_m_creation_drains_twice(engine, disk):
    """A write of the first new epoch has read old data and not published it yet: the snapshot is not handed out before it has.

    The write of the old epoch on cluster 5 is let go first, so that only the second drain is left to wait.
    """
    with disk.hold("read", 9 * K, K, after=True) as late:
        with disk.hold("write", 5 * K, K) as gate:
            old = Task(write, engine, 5, b"n")
            gate.wait_arrived()
            creation = Task(engine.snapshot, "s", cbw_timeout=60_000)
            wait_for_flip(engine)
            new = Task(write, engine, 9, b"n")
            late.wait_arrived()         # it has read, and holds what it read
        old.result()
        creation.join(0.2)              # the first drain is over; nothing says so, and nothing may come of it
        assert creation.is_alive()
    view = creation.result()
    new.result()
    assert read(view, 9) == b"o" * K


def test_m_no_torn_sector_preserving_waits_for_old_writes_that_overlap(engine, disk):
    """While a creation drains, a new write to a cluster that an old write is landing in must not preserve it half."""
    with disk.hold("write", 5 * K, 2 * K) as gate:
        old = Task(write, engine, 5, b"1", 2)       # clusters 5 and 6
        gate.wait_arrived()
        creation = Task(engine.snapshot, "s", cbw_timeout=60_000)
        wait_for_flip(engine)
        with disk.hold("read", 6 * K, K) as reads:
            new = Task(engine.device.write, 6 * K + 512, b"2" * 512)
            write(engine, 8, b"3")                  # elsewhere nothing waits
            assert reads.arrived == 0 and new.is_alive()
    old.result()
    new.result()
    view = creation.result()
    assert read(view, 6) in (b"1" * K, b"o" * K)
    assert read(view, 8) == b"o" * K


def test_m_an_old_write_that_never_lands_breaks_the_snapshot_and_not_the_guest(engine, disk):
    with disk.hold("write", 5 * K, K) as gate:
        old = Task(write, engine, 5, b"1")
        gate.wait_arrived()
        creation = Task(engine.snapshot, "s", cbw_timeout=100)
        wait_for_flip(engine)
        new = Task(engine.device.write, 5 * K + 512, b"2" * 512)
        gate.wait_arrived(2)                # the new write has come to the disk: it has given the snapshot up
    old.result()
    new.result()
    assert "cbw-timeout" in creation.result().broken


def test_m_r3_a_write_whose_epoch_has_passed_does_not_preserve_in_it(engine, disk):
    """It waits for a claim while a snapshot is taken, and starts over in the new epoch, for the new snapshot too."""
    first = engine.snapshot("s1", cbw_timeout=60_000)
    with disk.hold("read", 5 * K, K) as gate:
        holder = Task(engine.device.write, 5 * K, b"1")
        gate.wait_arrived()
        waits = engine.counters()["waits"]
        waiter = Task(engine.device.write, 5 * K + 1, b"2")
        wait_until(lambda: engine.counters()["waits"] > waits)
        creation = Task(engine.snapshot, "s2", cbw_timeout=60_000)
        wait_until(lambda: engine.snapshots.keys() == {"s1"} and creation.is_alive())
    holder.result()
    waiter.result()
    second = creation.result()
    image = read(second, 5)
    assert read(first, 5) == b"o" * K
    assert engine.device.read(5 * K, 2) == b"12"
    write(engine, 5, b"x")
    assert read(second, 5) == image and image[2:] == b"o" * (K - 2)


def test_m_lookup_goes_along_the_chain_and_dying_snapshots_are_in_it(engine, disk):
    """s2 is being deleted, held up by a guest write, and still serves s1, which has nothing of its own."""
    oldest = engine.snapshot("s1")
    engine.snapshot("s2")
    write(engine, 5, b"n")
    with disk.hold("write", 20 * K, K) as gate:
        held = Task(write, engine, 20, b"h")
        gate.wait_arrived()
        deletion = Task(engine.delete, "s2")
        wait_until(lambda: "s2" not in engine.snapshots)
        assert read(oldest, 5) == b"o" * K
        write(engine, 5, b"m")                  # the need test finds it there as well: nothing newer is preserved for s1
        write(engine, 6, b"m")
        assert read(oldest, 5, 2) == b"o" * 2 * K
    held.result()
    deletion.result()
    assert oldest.read(0, LENGTH) == b"o" * LENGTH


def test_m_deletion_hands_over_what_an_older_snapshot_needs_and_nothing_newer(engine):
    oldest = engine.snapshot("s1")
    write(engine, 1, b"a")              # s1's own
    engine.snapshot("s2")
    write(engine, 1, b"b")              # for s2 only
    write(engine, 2, b"b")              # for both: s1 reads it from s2
    engine.delete("s2")
    assert oldest.read(0, LENGTH) == b"o" * LENGTH
    write(engine, 1, b"c", 2)
    assert oldest.read(0, LENGTH) == b"o" * LENGTH
    assert engine.report("s1")["preserved_clusters"] == 1       # handed-over data was preserved for another
    engine.delete("s1")
    engine.snapshot("s3")
    assert engine.report("s3")["ram_bytes"] == 0


def test_m_a_reader_that_finds_new_data_on_the_disk_takes_the_old_from_the_store(engine, disk):
    """Read the disk, fence, look up again: the cluster is overwritten between the reader's look-up and its read."""
    view = engine.snapshot("s")
    with disk.hold("read", 5 * K, 3 * K) as gate:
        reader = Task(read, view, 5, 3)
        gate.wait_arrived()             # it found no word, and has not read yet
        done = Task(write, engine, 10, b"n")
        done.result()
        # Copies read the same clusters, so they would meet the gate: preserve by hand of the other half.
        writer = Task(write, engine, 6, b"n")
        gate.wait_arrived(2)
    writer.result()
    assert reader.result() == b"o" * 3 * K


def test_m_the_generation_of_a_slot_tells_new_data_from_old(engine, disk):
    """One slot, used by one snapshot after the other, and read all the while: data or an error, never the other's."""
    stopping, seen = threading.Event(), set()

    def read_on(view):
        try:
            while not stopping.is_set():
                seen.add(read(view, 0)[:1])
        except (SnapshotBroken, ValueError):
            pass

    write(engine, 0, b"0")
    for n in range(60):
        before = engine.device.read(0, 1)
        view = engine.snapshot("s", ram=K)
        readers = [Task(read_on, view) for _ in range(2)]
        write(engine, 0, bytes([n + 1]))
        assert read(view, 0) == before * K
        engine.delete("s")
        for reader in readers:
            reader.result()
        assert seen <= {before}, f"round {n}"
        seen.clear()


def test_m_group_holds_all_disks_while_it_flips_each(engine, disk):
    """A creation that is held up by one disk's writes does not hold up the guest of the other."""
    other = Engine(MemoryDevice(LENGTH))
    with disk.hold("write", 5 * K, K) as gate:
        writer = Task(write, engine, 5, b"n")
        gate.wait_arrived()
        creation = Task(take_snapshots, [engine, other], "g", SnapshotOptions.parse())
        wait_for_flip(engine)
        Task(write, other, 0, b"n").result()
        Task(write, engine, 6, b"n").result()
        assert creation.is_alive()
    writer.result()
    first, second = creation.result()
    assert read(first, 6) == b"o" * K and read(second, 0) == bytes(K)
    other.close()


def test_m_nobody_waits_for_a_claim_while_holding_one(engine, disk):
    """Two writes over ranges that overlap crosswise: whoever comes second leaves what it holds, and no deadlock."""
    view = engine.snapshot("s", cbw_timeout=60_000)
    with disk.hold("read", 10 * K, K) as gate:
        first = Task(write, engine, 8, b"1", 4)         # 8..11, held at its copy
        gate.wait_arrived()
        second = Task(write, engine, 6, b"2", 8)        # 6..13: takes what is free, preserves it, waits for the rest
        wait_until(lambda: engine.counters()["waits"] >= 2)
        third = Task(write, engine, 12, b"3", 2)        # what the second has preserved is free again
        third.result()
    first.result()
    second.result()
    assert view.read(0, LENGTH) == b"o" * LENGTH
    assert engine.report("s")["preserved_clusters"] == 8
