"""The buffer pool by itself, and under connections that stall."""

import pytest
from nbd_waiting import wait_for

from fastcbw.export.nbd.client import Client
from fastcbw.export.nbd.pool import BufferPool
from fastcbw.export.nbd.server import Server
from fastcbw.wire import constants as c

MIB = 1 << 20
PIECE = 256 << 10


def test_the_limit_is_never_exceeded():
    pool = BufferPool("2M", "1M")
    held = [pool.hold(PIECE) for _ in range(8)]
    with pytest.raises(BlockingIOError):
        pool.hold(1)
    assert pool.status()["used_bytes"] == 2 * MIB
    held.pop().release()
    pool.hold(PIECE).release()
    for hold in held:
        hold.release()
        hold.release()
    assert pool.status()["used_bytes"] == 0


def test_background_never_gets_the_reserve_of_guests():
    pool = BufferPool("2M", "1M")
    held = [pool.hold(PIECE, background=True) for _ in range(4)]
    with pytest.raises(BlockingIOError):
        pool.hold(1, background=True)
    guest = pool.hold(MIB)
    assert pool.status() | {"spare": 0} == {
        "limit_bytes": 2 * MIB, "guest_reserve_bytes": MIB, "used_bytes": 2 * MIB, "used_background_bytes": MIB,
        "used_bytes_max": 2 * MIB, "waiting_guests": 0, "waiting_background": 0, "spare": 0}
    for hold in [guest, *held]:
        hold.release()


def test_what_can_never_be_had_is_refused_at_once():
    pool = BufferPool("2M", "1M")
    with pytest.raises(MemoryError):
        pool.hold(2 * MIB + 1)
    with pytest.raises(MemoryError):
        pool.hold(MIB + 1, background=True)
    with pytest.raises(ValueError, match="length"):
        pool.hold(0)


def test_a_dropped_hold_gives_its_buffer_back():
    pool = BufferPool("2M", "1M")
    pool.hold(2 * MIB)
    assert pool.status()["used_bytes"] == 0


@pytest.mark.parametrize(("limit", "reserve"), [("1M", "1M"), ("1M", "2M"), (0, 0), ("1M", 800_000)])
def test_a_reserve_that_leaves_background_nothing_is_refused(limit, reserve):
    with pytest.raises(ValueError, match="limit_bytes"):
        BufferPool(limit, reserve)


@pytest.fixture
def small(path, disk):
    """A server with a pool of 4 MiB, 2 of them for guests; the disk is a guest's and a snapshot's export."""
    with Server(path, pool=BufferPool("4M", "2M")) as server:
        server.add_export("guest", disk)
        server.add_export("snap", disk, read_only=True, background=True)
        yield server


def stall(path, export, length, flags=0):
    """A client that asks for LENGTH bytes and never reads the reply."""
    client = Client(path, export)
    client.send(c.CMD_READ, 0, length, flags)
    return client


def test_a_request_waits_while_the_pool_is_empty_and_goes_on_when_a_buffer_comes_back(path, small):
    held = small.pool.hold(4 * MIB)
    with Client(path, "guest") as client:
        client.send(c.CMD_READ, 0, MIB)
        wait_for(lambda: small.pool.status()["waiting_guests"] == 1)
        assert small.exports["guest"].status()["counters"]["reads"] == 0
        held.release()
        assert client.receive_reply().error == 0


def test_replies_that_are_ready_do_not_wait_for_the_pool(path, small):
    held = small.pool.hold(4 * MIB)
    with Client(path, "guest") as client:
        small_read = client.send(c.CMD_READ, 0, 512)
        client.send(c.CMD_READ, 0, MIB)
        assert client.receive_reply().cookie == small_read
        wait_for(lambda: small.pool.status()["waiting_guests"] == 1)
        held.release()
        assert client.receive_reply().error == 0


def test_stalled_snapshot_readers_pin_only_their_part_and_the_guest_goes_on(path, small, disk):
    readers = [stall(path, "snap", 2 * MIB, c.CMD_FLAG_DF if i % 2 else 0) for i in range(12)]
    wait_for(lambda: small.pool.status()["waiting_background"] >= 2)
    with Client(path, "guest") as guest:
        guest.write(MIB, b"guest" * 200_000)
        assert guest.read(MIB, MIB)[:5] == b"guest"
        assert guest.read(0, 2 * MIB, unfragmented=True)[MIB : MIB + 5] == b"guest"
        status = small.pool.status()
        assert status["used_background_bytes"] <= 2 * MIB
        assert status["used_bytes_max"] <= 4 * MIB
    for reader in readers:
        reader.sock.close()
    wait_for(lambda: small.pool.status()["used_bytes"] == 0)


def test_a_stalled_reader_that_leaves_frees_what_it_pinned_for_the_next(path, small):
    first = stall(path, "snap", 2 * MIB, c.CMD_FLAG_DF)
    wait_for(lambda: small.pool.status()["used_background_bytes"] == 2 * MIB)
    with Client(path, "snap") as second:
        second.send(c.CMD_READ, 0, MIB)
        wait_for(lambda: small.pool.status()["waiting_background"] == 1)
        first.sock.close()
        assert second.receive_reply().error == 0


def test_small_requests_and_writes_of_any_length_need_no_pool(path, small):
    held = small.pool.hold(4 * MIB)
    with Client(path, "guest") as client:
        client.write(0, b"x" * 32 * MIB)
        assert client.read(32 * MIB - 1, 131072) == b"x" + bytes(131071)
    held.release()


def test_an_unfragmented_read_that_the_pool_can_never_hold_is_refused(path, small):
    with Client(path, "snap") as client:
        with pytest.raises(OSError) as caught:
            client.read(0, 2 * MIB + 1, unfragmented=True)
        assert caught.value.errno == c.EOVERFLOW
        assert len(client.read(0, 32 * MIB)) == 32 * MIB
    with Client(path, "snap", structured=False) as client:
        with pytest.raises(OSError) as caught:
            client.read(0, 2 * MIB + 1)
        assert caught.value.errno == c.ENOMEM


def test_close_ends_connections_that_wait_for_the_pool(path, disk):
    pool = BufferPool("4M", "2M")
    held = pool.hold(4 * MIB)
    with Server(path, pool=pool) as server:
        server.add_export("guest", disk)
        clients = [stall(path, "guest", MIB) for _ in range(3)]
        wait_for(lambda: pool.status()["waiting_guests"] == 3)
    assert pool.status()["waiting_guests"] == 0
    held.release()
    for client in clients:
        client.sock.close()
    assert pool.status()["used_bytes"] == 0
