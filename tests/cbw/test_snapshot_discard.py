"""What a reader has done with: discards of a snapshot, of parts of clusters too, take(). The [M] rules by name."""

import threading

import pytest
from engine_disks import Task, wait_until

from fastcbw.cbw.engine import Engine
from fastcbw.errors import NotInSnapshot, SnapshotBroken

K = 4096
CLUSTERS = 200
LENGTH = CLUSTERS * K - 1000
ABSENT = 4


def write(engine, cluster, byte=b"n", count=1):
    engine.device.write(cluster * K, (byte * count * K)[:LENGTH - cluster * K])


def gone(view, offset, length):
    with pytest.raises(NotInSnapshot, match="not in the snapshot"):
        view.read(offset, length)
    return True


def rows(view):
    return [tuple(map(int, row)) for row in view.extents()]


# -- whole clusters


def test_what_was_discarded_is_an_error_for_readers_and_costs_the_guest_nothing(engine, faults):
    view = engine.snapshot("s")
    write(engine, 3)
    view.discard(2 * K, 3 * K)
    assert engine.report("s")["ram_bytes"] == 0
    reads = faults.requests["read"]
    write(engine, 2, count=3)
    assert faults.requests["read"] == reads and engine.report("s")["preserved_clusters"] == 1
    assert gone(view, 2 * K, 1) and gone(view, 5 * K - 1, 1)
    assert view.read(0, 2 * K) == b"o" * 2 * K and view.read(5 * K, LENGTH - 5 * K) == b"o" * (LENGTH - 5 * K)


@pytest.mark.parametrize("first, count", [(0, 1), (63, 1), (63, 2), (64, 64), (1, 198), (199, 1), (0, 200)])
def test_exactly_the_clusters_of_the_discard_go(engine, first, count):
    view = engine.snapshot("s")
    write(engine, 0, count=100)
    end = min((first + count) * K, LENGTH)
    view.discard(first * K, end - first * K)
    assert [row for row in rows(view) if row[2] == ABSENT] == [(first * K, end - first * K, ABSENT)]
    assert sum(length for _, length, _ in rows(view)) == LENGTH
    assert first == 0 or view.read(0, first * K) == b"o" * first * K
    assert end == LENGTH or view.read(end, LENGTH - end) == b"o" * (LENGTH - end)
    assert engine.report("s")["ram_bytes"] == sum(K for c in range(100) if not first <= c < first + count)
    view.discard(first * K, end - first * K)        # again: no error


def test_i5_a_read_that_touches_what_was_discarded_is_an_error_as_a_whole(engine):
    view = engine.snapshot("s")
    view.discard(10 * K, K)
    for offset, length in ((0, LENGTH), (9 * K, K + 1), (11 * K - 1, 2), (10 * K + 5, 1)):
        assert gone(view, offset, length)
    buffer = bytearray(b"?" * 3 * K)
    with pytest.raises(NotInSnapshot):
        view.readinto(9 * K, buffer)


def test_block_status_tells_the_truth_and_is_no_error(engine):
    view = engine.snapshot("s")
    write(engine, 20)
    view.discard(10 * K, K)
    view.discard(20 * K, K)
    view.discard(30 * K + 512, 1024)
    assert rows(view) == [(0, 10 * K, 0), (10 * K, K, ABSENT), (11 * K, 9 * K, 0), (20 * K, K, ABSENT), (21 * K, 9 * K + 512, 0),
                          (30 * K + 512, 1024, ABSENT), (30 * K + 1536, LENGTH - 30 * K - 1536, 0)]


def test_a_broken_snapshot_is_not_discarded(engine):
    view = engine.snapshot("s")
    engine.break_snapshot("s")
    for call in (view.discard, view.take):
        with pytest.raises(SnapshotBroken, match="by command"):
            call(0, K)


@pytest.mark.parametrize("offset, length", [(-K, K), (0, LENGTH + 1), (LENGTH, K)])
def test_a_discard_outside_the_disk_is_refused(engine, offset, length):
    view = engine.snapshot("s")
    with pytest.raises(ValueError, match="not within"):
        view.discard(offset, length)
    assert view.discarded == 0


# -- parts


@pytest.mark.parametrize("size, granule", [("4K", 512), ("16K", 512), ("64K", 1024), ("1M", 16384)])
def test_parts_of_a_cluster_add_up(engine, faults, size, granule):
    view = engine.snapshot("s", cluster_size=size)
    cluster = 1 << view.cluster_bits
    length = min(cluster, LENGTH)
    assert view.granule == granule
    engine.device.write(0, b"n")
    assert engine.report("s")["ram_bytes"] == cluster
    for offset in range(granule, length, granule):
        view.discard(offset, min(granule, LENGTH - offset))
        assert gone(view, offset, 1)
        assert view.read(0, granule) == b"o" * granule
    assert engine.report("s")["ram_bytes"] == cluster and rows(view)[1][:2] == (granule, length - granule)
    view.discard(0, granule)
    assert engine.report("s")["ram_bytes"] == 0 and view.discarded == cluster
    reads = faults.requests["read"]
    engine.device.write(0, b"m" * length)
    assert faults.requests["read"] == reads
    assert gone(view, 0, 1)


@pytest.mark.parametrize("offset, length", [(1, 512), (0, 511), (512, 100), (0, LENGTH - 1), (K + 256, K)])
def test_what_is_finer_than_a_granule_is_refused_and_changes_nothing(engine, offset, length):
    view = engine.snapshot("s")
    for call in (view.discard, view.take):
        with pytest.raises(ValueError, match="multiples of 512 bytes"):
            call(offset, length)
    assert view.discarded == 0 and view.read(0, LENGTH) == b"o" * LENGTH


def test_head_body_and_tail_of_one_discard(engine):
    view = engine.snapshot("s")
    view.discard(3 * K + 1024, 5 * K)
    assert [row for row in rows(view) if row[2]] == [(3 * K + 1024, 5 * K, ABSENT)]
    view.discard(3 * K, 1024)
    view.discard(8 * K + 1024, K - 1024)
    assert [row for row in rows(view) if row[2]] == [(3 * K, 6 * K, ABSENT)]
    write(engine, 3, count=6)
    assert engine.report("s")["preserved_clusters"] == 0


def test_the_last_cluster_ends_with_the_disk(engine):
    view = engine.snapshot("s")
    view.discard((CLUSTERS - 1) * K, 1024)
    view.discard((CLUSTERS - 1) * K + 1024, LENGTH - (CLUSTERS - 1) * K - 1024)
    write(engine, CLUSTERS - 1)
    assert engine.report("s")["preserved_clusters"] == 0


# -- take


def test_take_reads_and_drops(engine):
    view = engine.snapshot("s")
    write(engine, 1)
    assert view.take(0, 3 * K) == b"o" * 3 * K
    assert gone(view, 0, 1) and engine.report("s")["ram_bytes"] == 0
    with pytest.raises(NotInSnapshot):
        view.take(2 * K, 2 * K)
    assert view.read(3 * K, K) == b"o" * K          # nothing of the failed one has gone
    assert view.take(0, 0) == b""


def test_overlapping_takes_deliver_each_byte_at_least_once(engine, disk):
    """Both have begun before either has ended: whoever ends first delivers; the other does too, or dropped nothing. A third gets an error."""
    view = engine.snapshot("s")
    with disk.hold("read", 5 * K, K, after=True) as gate:
        takes = {4: Task(view.take, 4 * K, 2 * K), 5: Task(view.take, 5 * K, 2 * K)}
        gate.wait_arrived(2)
    delivered = 0
    for first, take in takes.items():
        try:
            assert take.result() == b"o" * 2 * K
            delivered += 1
        except NotInSnapshot:
            assert view.read((4 if first == 4 else 6) * K, K) == b"o" * K       # it dropped nothing
    assert delivered >= 1 and gone(view, 5 * K, K)


# -- [M] rules


def test_m_discard_hands_over_to_the_older_snapshot(engine):
    oldest, middle, newest = (engine.snapshot(name) for name in ("s1", "s2", "s3"))
    write(engine, 5)
    newest.discard(5 * K, K)
    assert gone(newest, 5 * K, K)
    assert middle.read(5 * K, K) == oldest.read(5 * K, K) == b"o" * K
    oldest.discard(5 * K, K)
    assert middle.read(5 * K, K) == b"o" * K
    middle.discard(5 * K, K)
    assert all(engine.report(name)["ram_bytes"] == 0 for name in ("s1", "s2", "s3"))


def test_m_what_an_older_snapshot_still_needs_from_the_disk_is_not_settled(engine):
    oldest, newest = engine.snapshot("s1"), engine.snapshot("s2")
    newest.discard(5 * K, K)
    write(engine, 5)
    assert oldest.read(5 * K, K) == b"o" * K and engine.report("s1")["preserved_clusters"] == 1


def test_m_older_data_in_between_is_not_covered_by_newer(engine):
    oldest = engine.snapshot("s1")
    middle = engine.snapshot("s2")
    write(engine, 5, b"a")
    newest = engine.snapshot("s3")
    write(engine, 5, b"b")
    newest.discard(5 * K, K)                        # its word is newer than what the older ones read
    assert oldest.read(5 * K, K) == middle.read(5 * K, K) == b"o" * K


def test_m_r5_a_read_that_a_discard_overtakes_is_an_error_and_no_new_data(engine, disk):
    """`copy` goes first, the reader looks at it last: what the guest wrote meanwhile is never returned."""
    view = engine.snapshot("s")
    with disk.hold("read", 9 * K, K) as gate:
        reader = Task(view.read, 9 * K, K)
        gate.wait_arrived()
        view.discard(9 * K, K)
        write(engine, 9)                            # preserves nothing
    with pytest.raises(NotInSnapshot):
        reader.result()


def test_m_a_discard_waits_for_the_claim_of_a_copy_under_way(engine, disk):
    view = engine.snapshot("s", cbw_timeout=60_000)
    with disk.hold("read", 5 * K, K) as gate:
        writer = Task(write, engine, 5)
        gate.wait_arrived()
        dropper = Task(view.discard, 0, 64 * K)
        wait_until(lambda: view.discarded == 63 * K)
        assert dropper.is_alive()
    writer.result()
    dropper.result()
    assert view.discarded == 64 * K and engine.report("s")["ram_bytes"] == 0


def test_m_a_recorded_guest_discard_is_carried_out_when_the_snapshot_drops_the_cluster(engine, faults):
    oldest, newest = engine.snapshot("s1"), engine.snapshot("s2")
    engine.device.discard(5 * K, 2 * K)
    newest.discard(5 * K, 2 * K)
    assert engine.counters()["lazy_bytes"] == 2 * K                 # s1 needs them
    oldest.discard(5 * K, K)
    wait_until(lambda: engine.counters()["lazy_bytes"] == K)
    assert faults.child.read(5 * K, 2 * K) == bytes(K) + b"o" * K
    assert oldest.read(6 * K, K) == b"o" * K
    write(engine, 6)                                # cancelled, preserved
    oldest.discard(6 * K, K)
    assert engine.counters()["lazy_bytes"] == 0 and faults.child.read(6 * K, K) == b"n" * K


def test_space_of_the_disk_tier_comes_back(engine, shm_path):
    view = engine.snapshot("s", ram=0, spill=shm_path, spill_limit="1M")
    write(engine, 0, count=100)
    assert engine.report("s")["disk_bytes"] == 100 * K
    assert view.take(0, 100 * K) == b"o" * 100 * K
    assert engine.report("s")["disk_bytes"] == 0
    write(engine, 0, b"m", count=200)
    assert view.broken is None and engine.report("s")["preserved_clusters"] == 200


def test_a_place_of_the_disk_tier_is_dead_until_its_whole_segment_has_gone_and_status_says_so(engine, shm_path):
    view = engine.snapshot("s", ram=0, spill=shm_path, spill_limit=4096 + 8 * K, on_full="break-guest-write")

    def disk_tier():
        facts = engine.report("s")
        return [facts[f"disk_{what}"] // K for what in ("bytes", "dead_bytes", "limit")]

    write(engine, 0, count=6)
    assert disk_tier() == [6, 0, 8]
    view.discard(K, 3 * K)
    assert disk_tier() == [3, 3, 8]
    write(engine, 20, count=2)
    assert disk_tier() == [5, 3, 8]
    with pytest.raises(OSError, match="both tiers at their limits"):
        write(engine, 30)
    view.discard(0, 22 * K)
    assert disk_tier() == [0, 0, 8]
    write(engine, 30, count=8)
    assert disk_tier() == [8, 0, 8] and view.read(30 * K, 8 * K) == b"o" * 8 * K


def test_many_readers_take_everything_exactly_while_guests_write(disk):
    """Four readers take disjoint ranges of one snapshot and discard another's, in any order, while writers overwrite all of it."""
    engine = Engine(disk)
    one, two = engine.snapshot("s1", ram="4M"), engine.snapshot("s2", ram="4M")
    stopping, errors, taken = threading.Event(), [], {}

    def guest(number):
        n = 0
        try:
            while not stopping.is_set():
                n += 1
                for cluster in range(number, CLUSTERS - 1, 2):
                    engine.device.write(cluster * K + n % 7 * 100, bytes([n % 251]) * 600)
        except BaseException as error:
            errors.append(error)

    def reader(number):
        try:
            for offset in range(number * 1024, LENGTH, 4096):
                piece = min(1024, LENGTH - offset)
                taken[offset] = (two.take(offset, piece), one.read(offset, piece))
                one.discard(offset, piece)
        except BaseException as error:
            errors.append(error)

    guests = [threading.Thread(target=guest, args=(i,)) for i in range(2)]
    readers = [threading.Thread(target=reader, args=(i,)) for i in range(4)]
    for thread in guests + readers:
        thread.start()
    for thread in readers:
        thread.join(20)
    stopping.set()
    for thread in guests:
        thread.join(20)
    assert errors == []
    assert all(first == second == b"o" * len(first) for first, second in taken.values())
    assert sum(len(first) for first, _ in taken.values()) == LENGTH
    assert engine.report("s1")["ram_bytes"] == engine.report("s2")["ram_bytes"] == 0
    assert rows(one) == rows(two) == [(0, LENGTH, ABSENT)]
    engine.close()
