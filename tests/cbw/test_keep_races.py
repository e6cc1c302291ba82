"""The [M] rules of copy-on-read, drop, guest reads from RAM and lazy discard that have no I/O in them, and what a slot's generation is for.

What has no I/O in it is held at a stop (cbw/stops), the rest at a gate of the device.
"""

import pytest
from test_copy_on_read import CLUSTERS, LENGTH, K, content, keep
from test_copy_on_read import counted, disk  # noqa: F401 - fixtures
from test_invariants import Task, wait_for_flip

from fastcbw.block.delay import DelayDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.cbw.stops import Stops
from fastcbw.errors import NotInSnapshot

EVERYTHING = b"".join(map(content, range(CLUSTERS)))


@pytest.fixture
def stops(engine):  # noqa: F811
    stops = Stops()
    engine.set_stops(stops)
    yield stops
    engine.set_stops(None)


def write(engine, cluster, byte, count=1):  # noqa: F811
    engine.device.write(cluster * K, byte * (count * K))


def test_m_insert_looks_up_again_under_the_claim_what_was_preserved_meanwhile_stays(engine, stops):  # noqa: F811
    view = engine.snapshot("s", ram="1M", copy_on_read=True)
    with stops.hold("insert-read") as stop:
        reader = Task(view.read, 3 * K, K)
        stop.wait_arrived()
        write(engine, 3, b"n")
        assert engine.report("s")["preserved_clusters"] == 1
    assert reader.result() == content(3) == view.read(3 * K, K)
    facts = engine.report("s")
    assert (facts["read_kept_clusters"], facts["ram_bytes"]) == (0, K)


def test_m_insert_looks_up_again_under_the_claim_new_data_of_the_guest_is_thrown_away(engine, disk):  # noqa: F811
    """The reader's request, clusters 3 and 4, is held for 4 while the guest overwrites 3: it then brings new data of 3."""
    view = engine.snapshot("s", ram="1M", copy_on_read=True)
    with disk.hold("read", 4 * K, K) as gate:
        reader = Task(view.read, 3 * K, 2 * K)
        gate.wait_arrived()
        write(engine, 3, b"n")
    assert reader.result() == content(3) + content(4) == view.read(3 * K, 2 * K)


def test_m_r3_insert_gives_up_when_its_epoch_has_passed(engine, stops):  # noqa: F811
    older = engine.snapshot("s1", ram="1M", copy_on_read=True)
    write(engine, CLUSTERS - 1, b"o")       # settled: the next one that copies is after the flip
    with stops.hold("insert-claimed", 1) as stop:
        reader = Task(older.read, 3 * K, K)
        stop.wait_arrived()
        creation = Task(engine.snapshot, "s2", ram="1M")
        wait_for_flip(engine)
        assert creation.is_alive()      # insert is counted in the epoch before
    reader.result()
    newer = creation.result()
    assert engine.report("s1")["read_kept_clusters"] == engine.report("s2")["read_kept_clusters"] == 0
    assert newer.read(3 * K, K) == older.read(3 * K, K) == content(3)


def test_m_insert_settles_the_bitmap_of_its_own_epoch_and_not_the_current_one(engine, stops):  # noqa: F811
    """A snapshot is taken after the last look at the epoch: the new one must still be preserved for."""
    older = engine.snapshot("s1", ram="1M", copy_on_read=True)
    write(engine, CLUSTERS - 1, b"o")       # settled: the next one that copies is after the flip
    with stops.hold("insert-checked", 1) as stop:
        reader = Task(older.read, 3 * K, K)
        stop.wait_arrived()
        creation = Task(engine.snapshot, "s2", ram="1M")
        wait_for_flip(engine)
    reader.result()
    newer = creation.result()
    assert engine.report("s1")["read_kept_clusters"] == 1
    write(engine, 3, b"n")
    assert newer.read(3 * K, K) == older.read(3 * K, K) == content(3)


@pytest.mark.parametrize("place", ["drop-claimed", "drop-cleared", "drop-decided"])
def test_m_drop_and_a_guest_write_never_both_miss_each_other(engine, stops, place):  # noqa: F811
    """Drop clears `settled`, then looks at `changed`; the write marks, then looks at `settled`. Whenever it comes, old data stays."""
    view = engine.snapshot("s", ram="1M", copy_on_read=True, cbw_timeout=60_000)
    keep(engine, 3)
    with stops.hold(place, 1) as stop:
        dropper = Task(engine.drop, "s")
        stop.wait_arrived()
        writer = Task(write, engine, 3, b"n")
        writer.join(0.1)                # it has marked; where it waits for the drop, nothing else tells
        assert writer.is_alive() == (place != "drop-claimed")
    dropped = dropper.result()
    writer.result()
    assert dropped == (K if place == "drop-decided" else 0)
    assert view.read(3 * K, K) == content(3) and engine.device.read(3 * K, K) == b"n" * K
    write(engine, 3, b"m")
    assert view.read(3 * K, K) == content(3)


def test_m_r3_a_write_whose_epoch_has_passed_does_not_preserve_or_write_in_it(engine, stops):  # noqa: F811
    """A reader leaves the cluster in the new snapshot's RAM meanwhile: unmarked there, it would be served to the guest for ever."""
    older = engine.snapshot("s1", ram="1M", copy_on_read=True, cbw_timeout=60_000)
    write(engine, CLUSTERS - 1, b"o")       # settled: the next one that copies is after the flip
    with stops.hold("write-entered", 1) as stop:
        writer = Task(write, engine, 3, b"n")
        stop.wait_arrived()
        creation = Task(engine.snapshot, "s2", ram="1M", cbw_timeout=60_000)
        wait_for_flip(engine)
        assert older.read(3 * K, K) == content(3)           # goes to s2, the newest that needs it
        assert creation.is_alive()
    writer.result()
    creation.result()
    assert engine.device.read(3 * K, K) == b"n" * K
    assert older.read(3 * K, K) == content(3)


def swap_slot(engine, cluster, other):  # noqa: F811
    """Drop CLUSTER and have its slot filled with OTHER: the slot that was freed last is the next one taken."""
    assert engine.drop("s", cluster * K, K) == K
    keep(engine, other)


@pytest.mark.parametrize("who", ["reader", "guest"])
def test_m_a_slot_is_copied_and_its_word_looked_at_again(engine, stops, who):  # noqa: F811
    """Between the look-up and the copy the slot gets another cluster's data."""
    view = engine.snapshot("s", ram="1M", copy_on_read=True)
    keep(engine, 3)
    with stops.hold(f"{who}-found", 1) as stop:
        reader = Task((view if who == "reader" else engine.device).read, 3 * K, K)
        stop.wait_arrived()
        swap_slot(engine, 3, 9)
    assert reader.result() == content(3)


@pytest.mark.parametrize("who", ["reader", "guest"])
def test_m_a_slot_that_came_back_to_its_cluster_is_no_proof(engine, stops, who):  # noqa: F811
    """Another cluster's data is copied out of it, then the slot is the first one's again: only its generation tells."""
    view = engine.snapshot("s", ram="1M", copy_on_read=True)
    keep(engine, 3)
    with stops.hold(f"{who}-found", 1) as found:
        reader = Task((view if who == "reader" else engine.device).read, 3 * K, K)
        found.wait_arrived()
        swap_slot(engine, 3, 9)
        copied = stops.hold(f"{who}-copied", 1)
    copied.wait_arrived()
    swap_slot(engine, 9, 3)
    copied.open()
    assert reader.result() == content(3)


def test_a_store_that_has_ended_stays_while_a_look_up_holds_what_was_discarded_last(engine, stops):  # noqa: F811
    """The older snapshot inherits a word in the store of the newer; a client reads it while another discards it."""
    view = engine.snapshot("s1", ram="1M")
    engine.snapshot("s2", ram="1M")
    write(engine, 3, b"n")
    engine.delete("s2")
    with stops.hold("reader-found", 1) as stop:
        reader = Task(view.read, 3 * K, K)
        stop.wait_arrived()
        view.discard(3 * K, K)
        sweeper = Task(engine.drop, "s1", 0, K)     # which frees stores as the end of any snapshot does
        sweeper.join(0.2)
        assert sweeper.is_alive()
    sweeper.result()
    with pytest.raises(NotInSnapshot):
        reader.result()


def fill(reader):
    """Leave one slot of sixteen to reads, and two to first touches."""
    assert reader.read(0, 13 * K) == EVERYTHING[: 13 * K]


def test_m_r3_drop_gives_up_when_its_epoch_has_passed(engine, stops):  # noqa: F811
    """A first touch that lacks a slot is about to drop something when a snapshot is flipped in: its chain lacks the marks from then on."""
    older = engine.snapshot("s1", ram=16 * K, spill=MemoryDevice(LENGTH * 16), copy_on_read=True, cbw_timeout=60_000)
    write(engine, CLUSTERS - 1, b"o")       # settled: the next one that copies is after the flip
    fill(older)
    older.read(13 * K, K)
    with stops.hold("drop-entered", 1) as entered:
        writer = Task(write, engine, 40, b"n", 3)
        entered.wait_arrived()
        creation = Task(engine.snapshot, "s2", ram="1M", cbw_timeout=60_000)
        wait_for_flip(engine)
        with stops.hold("drop-claimed"):
            entered.open()
            writer.result()             # it did not come to where a drop goes on
    creation.result()
    assert older.read(0, LENGTH) == EVERYTHING
    assert engine.device.read(39 * K, 5 * K) == content(39) + b"n" * 3 * K + content(43)


def test_m_drop_gives_up_while_a_creation_drains(engine, stops):  # noqa: F811
    """Writes of the epoch before still go by their own `settled`, which a drop does not clear."""
    older = engine.snapshot("s1", ram="1M", copy_on_read=True, cbw_timeout=60_000)
    write(engine, CLUSTERS - 1, b"o")       # settled: the next one that copies is after the flip
    with stops.hold("insert-claimed", 1) as old_epoch:
        reader = Task(older.read, 50 * K, K)
        old_epoch.wait_arrived()
        creation = Task(engine.snapshot, "s2", ram=16 * K, spill=MemoryDevice(LENGTH * 16), cbw_timeout=60_000)
        wait_for_flip(engine)
        fill(older)                     # into the new one, which needs it
        older.read(13 * K, K)
        with stops.hold("drop-claimed"):
            Task(write, engine, 40, b"n", 3).result()       # it did not come to where a drop goes on
        assert creation.is_alive()
    newer = creation.result()
    assert reader.result() == content(50)
    assert older.read(0, LENGTH) == EVERYTHING
    assert newer.read(0, 40 * K) == EVERYTHING[: 40 * K] and newer.read(43 * K, 20 * K) == EVERYTHING[43 * K : 63 * K]
    assert engine.report("s2")["disk_bytes"] >= K       # the third of the write found no slot


# -- lazy discard


def test_m_r3_a_discard_whose_epoch_has_passed_records_nothing_in_it(engine, disk, stops):  # noqa: F811
    """A reader leaves the cluster in the new snapshot's RAM meanwhile, and settles it: a record would be carried out over a later write."""
    older = engine.snapshot("s1", ram="1M", copy_on_read=True)
    write(engine, CLUSTERS - 1, b"o")       # settled: the next one that copies is after the flip
    with stops.hold("discard-entered", 1) as stop:
        trimmer = Task(engine.device.discard, 3 * K, K)
        stop.wait_arrived()
        creation = Task(engine.snapshot, "s2", ram="1M")
        wait_for_flip(engine)
        assert older.read(3 * K, K) == content(3)           # goes to s2, the newest that needs it
        assert creation.is_alive()
    trimmer.result()
    newer = creation.result()
    assert older.read(3 * K, K) == newer.read(3 * K, K) == content(3)
    write(engine, 3, b"n")
    engine.delete("s1")
    engine.delete("s2")
    engine.finish_discards()
    assert disk.read(3 * K, K) == b"n" * K


def test_m_r3_carrying_out_gives_up_when_its_epoch_has_passed(engine, disk, stops):  # noqa: F811
    """A snapshot that began meanwhile needs the cluster: it is that one's end that the discard waits for."""
    engine.snapshot("s1", ram="1M")
    engine.device.discard(3 * K, K)
    write(engine, CLUSTERS - 1, b"o")       # settled: the next one that copies is after the flip
    with stops.hold("carry-claimed", 1) as stop:
        engine.delete("s1")
        stop.wait_arrived()
        creation = Task(engine.snapshot, "s2", ram="1M")
        wait_for_flip(engine)
        assert creation.is_alive()          # carrying out is counted in the epoch before
    view = creation.result()
    engine.finish_discards()
    assert view.read(3 * K, K) == disk.read(3 * K, K) == content(3) and engine.counters()["lazy_bytes"] == K
    engine.delete("s2")
    engine.finish_discards()
    assert disk.read(3 * K, K) == bytes(K)


# -- the disk tier


def test_m_a_cluster_of_the_log_is_looked_up_again_after_its_read(engine):  # noqa: F811
    """Its reader discards it meanwhile, so that its segment is given back: what the log returns then says nothing."""
    tier = DelayDevice(MemoryDevice(LENGTH))
    view = engine.snapshot("s", ram=0, spill=tier, spill_limit=3 * K)       # segments of two clusters
    write(engine, 3, b"n", 2)
    with tier.hold("read") as gate:
        reader = Task(view.read, 3 * K, K)
        gate.wait_arrived()
        view.discard(3 * K, 2 * K)
        assert tier.child.read(0, 3 * K) == bytes(3 * K)
    with pytest.raises(NotInSnapshot):
        reader.result()
