"""The flusher: the oldest clusters go from RAM to the disk tier, with no claim over I/O, and nothing is lost on the way."""

import errno
import threading

import pytest
from engine_disks import wait_until
from test_invariants import K, LENGTH, Task, read, wait_for_flip, write

from fastcbw.block.delay import DelayDevice
from fastcbw.block.fault import FaultDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.cbw.engine import Engine
from fastcbw.errors import LimitReached, SnapshotBroken

OLD = b"o" * LENGTH


@pytest.fixture
def log_faults():
    return FaultDevice(MemoryDevice(LENGTH * 16))


@pytest.fixture
def log(log_faults):
    return DelayDevice(log_faults)


def tiers(engine, name="s"):
    facts = engine.report(name)
    return facts["ram_bytes"] // K, facts["disk_bytes"] // K


def wait_idle(engine):
    wait_until(lambda: engine.flusher_idle)


def test_above_the_high_water_mark_the_oldest_clusters_move_to_the_disk_tier_in_one_write(engine, log, log_faults):
    view = engine.snapshot("s", ram=16 * K, spill=log)
    for cluster in (40, 3, 17, 8, 25, 60, 1, 33, 12, 50, 7, 22):       # twelve: at the mark, not above it
        write(engine, cluster, b"n")
    wait_idle(engine)
    assert tiers(engine) == (12, 0) and log_faults.requests["write"] == 0
    write(engine, 2, b"n")
    wait_idle(engine)
    assert tiers(engine) == (8, 5) and log_faults.requests["write"] == 1
    assert engine.report("s")["flushed_clusters"] == 5
    with log_faults.fail_on("read"):        # the five oldest are on disk, and none of the others
        for cluster in (40, 3, 17, 8, 25):
            with pytest.raises(OSError):
                read(view, cluster)
        for cluster in (60, 1, 33, 12, 50, 7, 22, 2):
            assert read(view, cluster) == b"o" * K
    assert view.read(0, LENGTH) == OLD


def test_without_a_disk_tier_or_below_the_mark_there_is_no_flusher_thread_or_it_sleeps(engine, log):
    engine.snapshot("a", ram=16 * K)
    assert not any(thread.name == "fastcbw-flusher" for thread in threading.enumerate())
    engine.snapshot("s", ram=16 * K, spill=log)
    write(engine, 0, b"n", 12)
    assert any(thread.name == "fastcbw-flusher" for thread in threading.enumerate())
    assert engine.flusher_idle and tiers(engine) == (12, 0)


def test_m_flusher_holds_no_claim_during_io(engine, log):
    """A batch hangs in its write: guest writes to its clusters, of a new snapshot, and deletions wait for none of it."""
    view = engine.snapshot("s", ram=4 * K, spill=log, cbw_timeout=60_000)
    with log.hold("write") as gate:
        write(engine, 0, b"n", 4)
        gate.wait_arrived()
        other = engine.snapshot("t", ram="1M")
        Task(write, engine, 0, b"m", 4).result()
        assert read(other, 0) == b"n" * K and read(view, 0) == b"o" * K
        engine.delete("t")
    wait_idle(engine)
    assert view.read(0, LENGTH) == OLD


def test_m_flusher_switches_a_word_only_when_it_is_still_the_one_it_wrote(engine, log):
    """Claim, enter; T.map[c] still == w. While a batch is in its write, the words go to an older snapshot: it must not touch them."""
    oldest = engine.snapshot("s1", ram="1M")
    engine.snapshot("s2", ram=4 * K, spill=log, cbw_timeout=60_000)
    with log.hold("write") as gate:
        write(engine, 0, b"n", 4)
        gate.wait_arrived()
        deletion = Task(engine.delete, "s2")
        wait_until(lambda: "s2" not in engine.snapshots and not deletion.is_alive() or oldest.read(0, K) == b"o" * K)
        deletion.join(5)        # the words are s1's now; the end waits a moment for the batch, then leaves it
        assert not deletion.is_alive()
    wait_idle(engine)
    # Still in the slots of the store that outlives s2, nothing in its log; and the records were given back.
    with log.hold("read"):
        assert Task(read, oldest, 0, 4).result() == b"o" * 4 * K
    assert oldest.read(0, LENGTH) == OLD
    engine.delete("s1")
    again = engine.snapshot("s3", ram=0, spill=log)         # the store is gone, and its device free
    write(engine, 0, b"m", 4)
    assert read(again, 0, 4) == b"n" * 4 * K


def test_m_flusher_gives_the_record_back_of_a_slot_that_has_come_back_with_other_data(engine, log):
    """The same cluster and slot, but not the same word: s2's data was dropped, s3's came into the same store's... map of another."""
    engine.snapshot("s2", ram=4 * K, spill=log, cbw_timeout=60_000)
    with log.hold("write") as gate:
        write(engine, 0, b"n", 4)
        gate.wait_arrived()
        engine.delete("s2")             # nobody needs the words: they are dropped while the batch writes
        last = engine.snapshot("s3", ram=4 * K)
        write(engine, 0, b"m", 4)
        assert read(last, 0, 4) == b"n" * 4 * K
    wait_idle(engine)
    assert read(last, 0, 4) == b"n" * 4 * K and tiers(engine, "s3") == (4, 0)


def test_m_flusher_leaves_a_cluster_whose_claim_is_busy(engine, disk, log):
    """A copy for a newer snapshot hangs with the claim: the flusher gives the record back and goes on with the others."""
    view = engine.snapshot("s", ram=8 * K, spill=log, cbw_timeout=60_000)
    with log.hold("write") as gate:
        write(engine, 0, b"n", 7)
        gate.wait_arrived()             # clusters 0, 1, 2
        newer = engine.snapshot("t", ram="1M", cbw_timeout=60_000)
        reads = disk.hold("read", K, K)
        copy = Task(write, engine, 1, b"m")
        reads.wait_arrived()
        gate.open()
        wait_until(lambda: engine.report("s")["flushed_clusters"] >= 2)
        assert copy.is_alive()
        wait_until(lambda: tiers(engine)[0] == 4)       # another cluster went in its place
        reads.open()
    copy.result()
    assert view.read(0, LENGTH) == OLD and read(newer, 1) == b"n" * K


def test_a_guest_that_finds_both_tiers_taken_by_a_batch_waits_for_its_end_and_breaks_nothing(engine, log):
    """A cluster on its way is in both tiers: that is no full store."""
    view = engine.snapshot("s", ram=4 * K, spill=log, spill_limit=4096 + 5 * K, cbw_timeout=60_000)
    assert engine.report("s")["disk_limit"] == 5 * K
    with log.hold("write") as gate:
        write(engine, 0, b"n", 4)
        gate.wait_arrived()             # two are under way; three more places in the log
        through = Task(write, engine, 10, b"n", 3)
        gate.wait_arrived(2)
        late = Task(write, engine, 20, b"n", 2)
        wait_until(lambda: state_waits(engine))
        assert late.is_alive()
    late.result()
    through.result()
    assert view.broken is None and view.read(0, LENGTH) == OLD
    stalls = engine.report("s")["stalls"]
    assert stalls["room"]["count"] == 1 and stalls["room"]["us"] > 0
    write(engine, 30, b"n")             # nine in all: now it is full
    assert "both tiers" in view.broken


def state_waits(engine):
    return engine.room_waiters == 1


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_disk_tier_that_fails_keeps_everything_in_ram_says_so_and_is_tried_again(engine, log_faults, log, code):
    view = engine.snapshot("s", ram=16 * K, spill=log)
    with log_faults.fail_on("write", errno=code):
        write(engine, 0, b"n", 13)
        wait_until(lambda: engine.report("s")["disk_error"])
        assert view.read(0, LENGTH) == OLD and tiers(engine)[0] == 13
    wait_until(lambda: tiers(engine) == (8, 5))
    assert engine.report("s")["disk_error"] is None
    assert view.broken is None and view.read(0, LENGTH) == OLD


def test_places_that_a_failed_copy_gives_back_are_the_flushers(engine, log_faults, log):
    """A guest's copy has taken all that the log has when the flusher looks, and then fails: nobody else would wake the flusher."""
    view = engine.snapshot("s", ram=4 * K, spill=log, spill_limit=4096 + 2 * K, cbw_timeout=60_000, on_cbw_error="break-guest-write")
    write(engine, 0, b"n", 3)
    with log_faults.fail_on("write", count=1):
        with log.hold("write") as gate:
            writer = Task(write, engine, 10, b"n", 3)       # one slot, two places
            gate.wait_arrived()
            engine.set_limits("s", ram=3 * K)               # above the high-water mark now
            wait_idle(engine)
            assert tiers(engine) == (4, 2)
        with pytest.raises(OSError, match="disk tier"):
            writer.result()
    wait_until(lambda: tiers(engine) == (1, 2))
    assert view.read(0, LENGTH) == OLD


POLICIES = [("break-snapshot", None), ("break-guest-write", errno.EIO)]


@pytest.mark.parametrize("on_cbw_error, shown", POLICIES)
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_with_an_error_at_any_write_to_the_disk_tier_nothing_is_lost_that_the_policy_protects(faults, on_cbw_error, shown, code):
    """The n-th write to the log fails, once or for ever, for each n that there is: flusher's or a guest's write-through, whoever makes it."""
    for times in (1, -1):
        for n in range(200):
            engine = Engine(faults)
            log_faults = FaultDevice(MemoryDevice(LENGTH * 16))
            now = bytearray(engine.device.read(0, LENGTH))
            old = bytes(now)
            view = engine.snapshot("s", ram=4 * K, spill=log_faults, on_cbw_error=on_cbw_error)
            failures = 0
            with log_faults.fail_on("write", errno=code, after=n, count=times):
                for i in range(24):
                    data = bytes([(n + i) % 255 + 1]) * 2 * K
                    offset = i * 7 % 31 * 2 * K
                    try:
                        engine.device.write(offset, data)
                        now[offset : offset + 2 * K] = data
                    except OSError as error:
                        assert error.errno == shown and "disk tier" in str(error), (n, i)
                        failures += 1
                wait_idle(engine)
                # I7, and the snapshot is its instant, or broken for the reason that its policy allows.
                assert engine.device.read(0, LENGTH) == now
                if view.broken is None:
                    assert view.read(0, LENGTH) == old
                else:
                    assert shown is None and "disk tier could not be written" in view.broken
                assert failures == engine.report("s")["refused_writes"] or view.broken
                reached = log_faults.requests["write"] > n
            if shown is not None:       # what was refused is written when the tier has recovered
                assert view.broken is None and view.read(0, LENGTH) == old
                engine.device.write(0, b"!" * LENGTH)
                assert view.read(0, LENGTH) == old
            elif times == -1 and n < 8:
                assert view.broken      # more than RAM holds
            elif not reached:
                assert view.broken is None
            engine.close()
            faults.write(0, old)
            if not reached:
                break
        assert not reached and n > 10, "every write was failed once"


def test_m_the_generation_tells_a_reader_that_its_slot_was_flushed_and_reused(shm_path):
    """The RAM copy of a reader is a seqlock: the word is looked up again after it. One slot or two, refilled all the time."""
    size = 1 << 20
    count = 24
    disk = MemoryDevice(count * size)
    for i in range(count):
        disk.write(i * size, bytes([i + 1]) * size)
    engine = Engine(disk)
    log = MemoryDevice(count * 4 * size)
    view = engine.snapshot("s", cluster_size=size, ram=2 * size, spill=log)
    stopping, errors = threading.Event(), []
    at = [0]

    def read_on():
        buffer = bytearray(size)
        try:
            while not stopping.is_set():
                for cluster in range(max(0, at[0] - 2), min(count, at[0] + 1)):
                    view.readinto(cluster * size, buffer)
                    assert buffer.count(buffer[0]) == size and buffer[0] == cluster + 1, f"cluster {cluster}"
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=read_on) for _ in range(3)]
    for reader in readers:
        reader.start()
    for cluster in range(count):
        at[0] = cluster
        engine.device.write(cluster * size, b"\xff" * size)
        wait_until(lambda: engine.report("s")["ram_bytes"] <= size or errors)
    stopping.set()
    for reader in readers:
        reader.join(20)
    assert errors == []
    assert view.read(0, count * size) == b"".join(bytes([i + 1]) * size for i in range(count))
    engine.close()


def test_what_copy_on_read_left_is_dropped_before_anything_moves_and_moves_only_once_it_is_changed(engine, log, log_faults):
    view = engine.snapshot("s", ram=16 * K, spill=log, copy_on_read=True)
    read(view, 0, 10)                           # kept; then half of it is changed, and can't be dropped any more
    write(engine, 0, b"n", 5)
    kept = tiers(engine)[0]
    assert kept >= 8 and log_faults.requests["write"] == 0
    for cluster in range(20, 40):
        write(engine, cluster, b"n")
        wait_idle(engine)
        assert tiers(engine)[0] <= 12
    write(engine, 50, b"n", 8)
    wait_idle(engine)
    ram, disk = tiers(engine)
    assert ram + disk == 5 + 20 + 8             # what was clean is nowhere
    assert engine.device.read(5 * K, 5 * K) == b"o" * 5 * K
    with log_faults.fail_on("read"), pytest.raises(OSError):
        read(view, 0, 5)                        # the changed ones, which were the oldest
    assert view.read(0, LENGTH) == OLD


# -- limits


def test_the_limit_of_ram_grows_and_the_next_clusters_use_it(engine):
    view = engine.snapshot("s", ram=4 * K)
    write(engine, 0, b"n", 4)
    engine.set_limits("s", ram=10 * K)
    write(engine, 4, b"n", 6)
    assert tiers(engine) == (10, 0) and engine.report("s")["ram_limit"] == 10 * K
    assert view.read(0, LENGTH) == OLD
    write(engine, 20, b"n")
    assert "full" in view.broken


def test_the_limit_of_ram_shrinks_the_flusher_moves_down_and_the_memory_goes_back(engine, log):
    view = engine.snapshot("s", ram=40 * K, spill=log)
    write(engine, 0, b"n", 30)
    assert tiers(engine) == (30, 0)
    engine.set_limits("s", ram=8 * K)
    wait_until(lambda: tiers(engine) == (4, 26))
    for cluster in range(30, 60):
        write(engine, cluster, b"n")
        assert engine.report("s")["ram_bytes"] <= 8 * K
    assert view.read(0, LENGTH) == OLD
    assert engine.resident("s") <= 9 * K
    engine.set_limits("s", ram=40 * K)          # what was given back is there again
    write(engine, 60, b"n", 4)
    assert view.read(0, LENGTH) == OLD


def test_a_limit_below_what_is_used_takes_effect_as_far_as_there_is_room(engine):
    view = engine.snapshot("s", ram=10 * K, on_full="break-guest-write")
    write(engine, 0, b"n", 8)
    engine.set_limits("s", ram=2 * K)
    facts = engine.report("s")
    assert (facts["ram_bytes"], facts["ram_limit"]) == (8 * K, 2 * K)
    with pytest.raises(OSError, match="both tiers at their limits") as error:
        write(engine, 20, b"n")
    assert error.value.errno == errno.ENOSPC
    write(engine, 0, b"m", 8)                   # preserved already
    assert view.read(0, LENGTH) == OLD and engine.device.read(20 * K, K) == b"o" * K


def test_the_limit_of_the_disk_tier_changes(engine, log):
    view = engine.snapshot("s", ram=0, spill=log, spill_limit=4096 + 2 * K, on_full="break-guest-write")
    write(engine, 0, b"n", 2)
    with pytest.raises(OSError):
        write(engine, 2, b"n")
    engine.set_limits("s", spill_limit=3 * (4096 + 2 * K))
    write(engine, 2, b"n", 3)
    engine.set_limits("s", spill_limit=4096 + 2 * K)
    facts = engine.report("s")
    assert (facts["disk_bytes"], facts["disk_limit"]) == (5 * K, 2 * K)
    with pytest.raises(OSError):
        write(engine, 5, b"n")                  # there is a place in the last segment, above the limit
    assert view.read(0, LENGTH) == OLD


def test_bad_limits_are_refused_and_change_nothing(engine, log):
    engine.snapshot("r", ram=4 * K)
    engine.snapshot("s", ram=4 * K, spill=log, spill_limit=4096 + 2 * K)
    for name, limits, error, words in [
        ("r", {"ram": 100}, ValueError, "less than one cluster"),
        ("r", {"ram": 0}, ValueError, "no store at all"),
        ("r", {"ram": 1 << 60}, LimitReached, "address space"),
        ("r", {"spill_limit": "1M"}, ValueError, "no disk tier"),
        ("s", {"spill_limit": 100}, ValueError, "one segment"),
        ("s", {"spill_limit": "1T"}, LimitReached, "its log can have"),
        ("x", {"ram": "1M"}, KeyError, "no snapshot 'x'"),
    ]:
        with pytest.raises(error, match=words):
            engine.set_limits(name, **limits)
    assert engine.report("r")["ram_limit"] == engine.report("s")["ram_limit"] == 4 * K
    assert engine.report("s")["disk_limit"] == 2 * K
    engine.break_snapshot("s")
    with pytest.raises(SnapshotBroken, match="by command"):
        engine.set_limits("s", ram="1M")


def test_status_forecasts_the_time_to_full_while_it_fills(engine):
    engine.snapshot("s", ram=40 * K)
    assert engine.report("s")["seconds_to_full"] is None
    write(engine, 0, b"n", 10)
    seconds = engine.report("s")["seconds_to_full"]
    # Ten in a second at most, thirty to go; less when the machine was slow.
    assert 2.9 <= seconds <= 60


def test_the_forecast_counts_both_tiers_and_what_came_free(engine, log):
    view = engine.snapshot("s", ram=10 * K, spill=log, spill_limit=4096 + 20 * K)
    write(engine, 0, b"n", 10)
    wait_idle(engine)       # what is on its way from one tier to the other takes room in both
    assert engine.report("s")["seconds_to_full"] >= 1.9         # twenty to go
    for cluster in range(10, 30):
        write(engine, cluster, b"n")
    assert engine.report("s")["seconds_to_full"] == 0
    view.discard(0, LENGTH)
    wait_idle(engine)
    assert engine.report("s")["seconds_to_full"] is None        # as much came free as was taken


def test_what_reads_keep_fills_nothing_in_the_forecast(engine):
    view = engine.snapshot("s", ram=40 * K, copy_on_read=True)
    view.read(0, 20 * K)
    assert engine.report("s")["kept_clusters"] == 20 and engine.report("s")["seconds_to_full"] is None
    write(engine, 30, b"n", 10)
    # As above: thirty to go, the kept ones among them.
    assert 2.9 <= engine.report("s")["seconds_to_full"] <= 60
    engine.drop("s")
    assert 2.9 <= engine.report("s")["seconds_to_full"] <= 60
