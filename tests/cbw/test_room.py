"""No room, and errors of source and store: who waits, for what, how long, and what the policies make of it."""

import errno
import os
import threading
import weakref

import pytest
from engine_disks import wait_until
from test_invariants import K, LENGTH, Task, read, write

from fastcbw.cbw import engine as engine_module

OLD = b"o" * LENGTH


def consume(engine, view, name="s"):
    """Stand in for a consumer: make room by a limit, as a discard would by freeing slots."""
    engine.set_limits(name, ram=engine.report(name)["ram_limit"] + K)


def waiting(engine, count=1):
    wait_until(lambda: engine.room_waiters == count)


def test_wait_ends_when_room_comes_and_the_write_goes_on(engine):
    view = engine.snapshot("s", ram=2 * K, on_full="wait", cbw_timeout=60_000)
    engine.consumer_begin(view)
    write(engine, 0, b"n", 2)
    late = Task(write, engine, 5, b"n")
    waiting(engine)
    assert engine.device.read(5 * K, K) == b"o" * K         # I1
    consume(engine, view)
    late.result()
    assert view.broken is None and view.read(0, LENGTH) == OLD
    assert engine.report("s")["stalls"]["room"]["count"] == 1
    engine.consumer_end(view)


def test_a_write_needs_one_cluster_of_room_at_a_time(engine):
    """Sixteen clusters at once, and room that comes one by one: what is preserved stays so, and zeroes need none."""
    engine.device.write(10 * K, bytes(2 * K))
    old = engine.device.read(0, LENGTH)
    view = engine.snapshot("s", ram=2 * K, on_full="wait", cbw_timeout=60_000)
    engine.consumer_begin(view)
    late = Task(write, engine, 0, b"n", 16)
    for _ in range(12):
        waiting(engine)
        assert late.is_alive()
        consume(engine, view)
        wait_until(lambda: engine.report("s")["ram_bytes"] == engine.report("s")["ram_limit"])
    late.result()
    facts = engine.report("s")
    assert (facts["preserved_clusters"], facts["zero_clusters"], facts["ram_bytes"]) == (16, 2, 14 * K)
    assert view.read(0, LENGTH) == old
    engine.consumer_end(view)


def test_room_goes_first_come_first_served(engine):
    view = engine.snapshot("s", ram=K, on_full="wait", cbw_timeout=60_000)
    engine.consumer_begin(view)
    write(engine, 0, b"n")
    writers = []
    for i in range(1, 5):
        writers.append(Task(write, engine, i * 8, b"n"))
        waiting(engine, i)
    for i in range(4):
        consume(engine, view)
        writers[i].result()
        waiting(engine, 3 - i)
        assert all(writer.is_alive() for writer in writers[i + 1:])
    assert view.read(0, LENGTH) == OLD
    engine.consumer_end(view)


def test_a_newcomer_does_not_overtake_who_waits(engine):
    """Room for one comes and the first is held up in its copy: the newcomer queues behind it and the second."""
    view = engine.snapshot("s", ram=K, on_full="wait", cbw_timeout=60_000)
    engine.consumer_begin(view)
    write(engine, 0, b"n")
    first = Task(write, engine, 1, b"n", 3)
    waiting(engine)
    second = Task(write, engine, 10, b"n")
    waiting(engine, 2)
    consume(engine, view)
    wait_until(lambda: engine.report("s")["preserved_clusters"] == 2)
    newcomer = Task(write, engine, 20, b"n")
    waiting(engine, 3)
    engine.set_limits("s", ram=4 * K)       # what the first lacks
    first.result()
    assert second.is_alive() and newcomer.is_alive()
    engine.set_limits("s", ram=6 * K)
    second.result()
    newcomer.result()
    assert view.read(0, LENGTH) == OLD
    engine.consumer_end(view)


def test_m_a_wait_ends_when_somebody_else_settles_the_cluster(engine):
    """Both wait for room for the same cluster; there is room for one copy of it, and both go on."""
    view = engine.snapshot("s", ram=K, on_full="wait", cbw_timeout=60_000)
    engine.consumer_begin(view)
    write(engine, 0, b"n")
    writers = [Task(engine.device.write, 5 * K + i * 512, bytes([i]) * 512) for i in range(3)]
    waiting(engine, 3)
    consume(engine, view)
    for writer in writers:
        writer.result()
    assert engine.report("s")["preserved_clusters"] == 2 and view.read(0, LENGTH) == OLD
    assert engine.device.read(5 * K, 3 * 512) == b"".join(bytes([i]) * 512 for i in range(3))
    engine.consumer_end(view)


@pytest.mark.parametrize("what", ["delete", "break", "policy"])
def test_a_wait_ends_with_the_snapshot_or_the_policy(engine, what):
    view = engine.snapshot("s", ram=K, on_full="wait", cbw_timeout=60_000)
    engine.consumer_begin(view)
    write(engine, 0, b"n")
    late = Task(write, engine, 5, b"n")
    waiting(engine)
    if what == "delete":
        engine.delete("s")              # I: a creation and a deletion wait for no guest that waits for room
    elif what == "break":
        engine.break_snapshot("s")
    else:
        engine.set_policy("s", on_full="break-snapshot")
    late.result()
    assert engine.device.read(5 * K, K) == b"n" * K
    if what == "policy":
        assert "both tiers" in view.broken


def test_m_a_wait_holds_up_neither_creation_nor_deletion_nor_readers_nor_other_writes(engine):
    view = engine.snapshot("s", ram=K, on_full="wait", cbw_timeout=60_000)
    engine.consumer_begin(view)
    write(engine, 0, b"n")
    late = Task(write, engine, 5, b"n")
    waiting(engine)
    assert view.read(0, LENGTH) == OLD
    write(engine, 0, b"m")                                  # settled
    newer = engine.snapshot("t", ram="1M")                  # it has room: what waits is its business now
    late.result()
    assert view.read(0, LENGTH) == OLD and read(newer, 0) == b"m" * K
    engine.delete("t")
    assert view.read(0, LENGTH) == OLD
    engine.consumer_end(view)


def test_m_wait_without_a_consumer_counts_as_full_at_once_and_says_so(engine, caplog):
    view = engine.snapshot("s", ram=K, on_full="wait", cbw_timeout=86_400_000)
    write(engine, 0, b"n", 2)
    assert "nothing that runs can free room" in view.broken
    wait_until(lambda: "nothing that runs can free room" in caplog.text)
    assert "nothing that runs" in engine.report("s")["reason"]


def test_m_wait_without_a_consumer_refuses_the_write_where_the_policy_protects_the_snapshot(engine, caplog):
    view = engine.snapshot("s", ram=K, on_full="wait", on_cbw_error="break-guest-write", cbw_timeout=86_400_000)
    write(engine, 0, b"n")
    for n in range(2):
        with pytest.raises(OSError, match="nothing that runs can free room") as error:
            write(engine, 1, b"n")
        assert error.value.errno == errno.ENOSPC
    facts = engine.report("s")
    assert facts["state"] == "live" and facts["refused_writes"] == 2 and "nothing that runs" in facts["refused_reason"]
    assert view.read(0, LENGTH) == OLD and engine.device.read(K, K) == b"o" * K
    wait_until(lambda: "a guest write failed for its sake" in caplog.text)
    assert caplog.text.count("failed for its sake") == 1


def test_m_who_waits_is_judged_anew_when_the_last_consumer_ends(engine):
    view = engine.snapshot("s", ram=K, on_full="wait", cbw_timeout=86_400_000)
    engine.consumer_begin(view)
    engine.consumer_begin(view)
    write(engine, 0, b"n")
    late = Task(write, engine, 5, b"n")
    waiting(engine)
    engine.consumer_end(view)
    waiting(engine)
    engine.consumer_end(view)
    late.result()
    assert "nothing that runs can free room" in view.broken


@pytest.mark.parametrize("on_cbw_error", ["break-snapshot", "break-guest-write"])
def test_cbw_timeout_turns_a_wait_for_room_into_what_on_cbw_error_says(engine, on_cbw_error):
    view = engine.snapshot("s", ram=K, on_full="wait", on_cbw_error=on_cbw_error, cbw_timeout=50)
    engine.consumer_begin(view)
    write(engine, 0, b"n")
    if on_cbw_error == "break-snapshot":
        write(engine, 5, b"n")
        assert "no room came within cbw-timeout" in view.broken
    else:
        with pytest.raises(TimeoutError, match="no room came within cbw-timeout"):
            write(engine, 5, b"n")
        assert view.read(0, LENGTH) == OLD and engine.device.read(5 * K, K) == b"o" * K
    engine.consumer_end(view)
    assert engine.room_waiters == 0


def test_break_guest_write_on_full_is_enospc_and_the_snapshot_lives(engine):
    view = engine.snapshot("s", ram=4 * K, on_full="break-guest-write")
    write(engine, 0, b"n", 3)
    with pytest.raises(OSError, match="both tiers at their limits") as error:
        write(engine, 10, b"n", 2)
    assert error.value.errno == errno.ENOSPC
    write(engine, 10, b"n")             # there is room for one
    assert view.read(0, LENGTH) == OLD
    assert engine.device.read(0, LENGTH) == b"n" * 3 * K + b"o" * 7 * K + b"n" * K + b"o" * 53 * K
    engine.delete("s")
    write(engine, 10, b"m", 2)


def test_i8_break_guest_write_gives_the_claim_back_after_an_error_of_the_source(engine, faults):
    view = engine.snapshot("s", on_cbw_error="break-guest-write")
    with faults.fail_on("read", 5 * K, K):
        for operation in (lambda: write(engine, 5, b"n"), lambda: engine.device.write_zeroes(4 * K, 2 * K)):
            with pytest.raises(OSError, match="could not be read") as error:
                operation()
            assert error.value.errno == errno.EIO
    write(engine, 5, b"n")
    assert view.read(0, LENGTH) == OLD and engine.device.read(5 * K, K) == b"n" * K
    assert engine.report("s")["refused_writes"] == 2


def test_i8_break_guest_write_after_a_timeout_leaves_the_snapshot_and_the_claim_comes_back(engine, disk):
    view = engine.snapshot("s", on_cbw_error="break-guest-write", cbw_timeout=50)
    with disk.hold("read", 5 * K, K):
        for _ in range(2):              # the first's copy hangs; the second waits for its claim
            with pytest.raises(TimeoutError, match="longer than cbw-timeout"):
                write(engine, 5, b"n")
        assert engine.device.read(6 * K, K) == b"o" * K
    wait_until(lambda: engine.copies_abandoned == 0)
    write(engine, 5, b"n")
    assert view.read(0, LENGTH) == OLD
    stalls = engine.report("s")["stalls"]
    assert stalls["device"]["count"] >= 1 and stalls["claim"]["count"] >= 1


def test_forty_writes_wait_and_all_are_let_go_when_the_snapshot_ends(engine):
    view = engine.snapshot("s", ram=K, on_full="wait", cbw_timeout=60_000)
    engine.consumer_begin(view)
    write(engine, 0, b"n")
    ready = [Task(write, engine, 1 + i, b"n") for i in range(40)]
    waiting(engine, 40)
    engine.delete("s")
    for task in ready:
        task.result()
    assert engine.room_waiters == 0 and engine.device.read(0, 41 * K) == b"n" * 41 * K


def test_what_is_preserved_is_counted_by_its_cause(engine):
    view = engine.snapshot("s", ram=LENGTH, copy_on_read=True)
    write(engine, 0, b"n", 2)
    engine.device.write_zeroes(4 * K, 3 * K)
    engine.device.discard(8 * K, K)         # recorded: copies nothing
    assert view.read(12 * K, K) == b"o" * K
    assert engine.report("s")["preserved_by"] == {"write": 2 * K, "write-zeroes": 3 * K, "copy-on-read": K}


def test_the_keeper_ends_though_the_end_comes_with_a_break():
    """Both wake it once: the end is set just after it has looked for one, and must not be taken for the break's wake-up."""
    wake = os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    class Ending:
        closed = False

        @property
        def is_closed(self):
            before, self.closed = self.closed, True
            if not before:
                os.eventfd_write(wake, 1)
            return before

        def _tell_refusals(self):
            pass

        _keep = _drop_unneeded = _tell_refusals

    engine = Ending()
    thread = threading.Thread(target=engine_module._keep, args=(weakref.ref(engine), wake), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
