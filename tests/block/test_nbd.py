"""The NBD client device and its server, request by request: what goes over the wire, and in which order it may come back."""

import contextlib
import errno
import functools
import random

import pytest
from nbd_fake import ALL_FLAGS, LENGTH, contents, fake_server, serve_well, together

from fastcbw.block import vectors
from fastcbw.block.memory import MemoryDevice
from fastcbw.block.nbd import CONNECTIONS_DEFAULT, NbdDevice
from fastcbw.wire import constants as c

MIB = 1 << 20


def kinds(log):
    return [(request.kind, request.flags) for request in log]


@pytest.fixture
def logged(shm_path):
    """logged(**options of fake_server) -> (URI, list that its requests go to)."""
    with contextlib.ExitStack() as stack:
        def start(**options):
            log = []
            serve = functools.partial(serve_well, log=log)
            return stack.enter_context(fake_server(shm_path / "fake.sock", serve, **options)), log

        yield start


# -- order of replies

@pytest.mark.parametrize("structured", [False, True])
def test_replies_may_come_in_any_order(shm_path, structured):
    source = random.Random(1)

    def serve(peer):
        while True:
            requests = [peer.request() for _ in range(8)]
            source.shuffle(requests)
            for request in requests:
                data = contents(request.offset, request.length)
                if structured:
                    peer.data(request.cookie, request.offset, data)
                else:
                    peer.simple(request.cookie, data=data)

    with fake_server(shm_path / "fake.sock", serve, structured=structured) as uri, NbdDevice(uri) as device:
        assert device.structured == structured
        for turn in range(30):
            places = [(source.randrange(LENGTH - 70000), source.choice((1, 511, 4096, 70000))) for _ in range(8)]
            got = together(*(functools.partial(device.read, *place) for place in places))
            assert got == [contents(*place) for place in places]


def test_chunks_and_holes_may_come_in_any_order_and_mixed_with_other_replies(shm_path):
    source = random.Random(2)

    def serve(peer):
        while True:
            requests = [peer.request() for _ in range(4)]
            pieces = []
            for request in requests:
                cuts = sorted({0, request.length, *(source.randrange(1, request.length) for _ in range(5))})
                mine = [(request, a, b - a) for a, b in zip(cuts, cuts[1:])]
                pieces += mine
            source.shuffle(pieces)
            left = {request.cookie: sum(1 for other, _, _ in pieces if other is request) for request in requests}
            for request, skip, length in pieces:
                left[request.cookie] -= 1
                offset = request.offset + skip
                if offset % 2:      # the device reads a hole there
                    peer.hole(request.cookie, offset, length, done=False)
                else:
                    peer.data(request.cookie, offset, contents(offset, length), done=False)
                if left[request.cookie] == 0:
                    peer.chunk(request.cookie, c.REPLY_TYPE_NONE)

    def check(offset, length, data):
        """Every byte is the disk's or, in a hole, zero; and both come in runs."""
        wanted = contents(offset, length)
        return all(got in (0, want) for got, want in zip(data, wanted)) and len(data) == length

    with fake_server(shm_path / "fake.sock", serve) as uri, NbdDevice(uri) as device:
        for turn in range(30):
            places = [(source.randrange(LENGTH - 30000), source.choice((700, 4096, 30000))) for _ in range(4)]
            got = together(*(functools.partial(device.read, *place) for place in places))
            assert all(check(*place, data) for place, data in zip(places, got))


def test_a_hole_is_zeroes_in_every_piece_of_a_vector(shm_path):
    def serve(peer):
        request = peer.request()
        peer.data(request.cookie, request.offset + 500, b"\x55" * 500, done=False)
        peer.hole(request.cookie, request.offset, 500)

    with fake_server(shm_path / "fake.sock", serve) as uri, NbdDevice(uri) as device:
        buffer = bytearray(b"\xaa" * 1000)
        assert vectors.readv(device, 77, buffer, [0, 3, 0, 490, 9, 498]) == 0
        assert buffer == bytes(500) + b"\x55" * 500


# -- what is sent

def test_many_threads_share_few_connections_and_get_their_own_data(served):
    uri = served("vm", MemoryDevice(16 * MIB))
    share = MIB
    with NbdDevice(uri, connections=2, requests=3, in_flight="256K") as device:
        def work(n):
            source = random.Random(n)
            for _ in range(60):
                offset, data = n * share + source.randrange(share - 70000), source.randbytes(source.choice((1, 4096, 70000)))
                device.write(offset, data)
                if device.read(offset, len(data)) != data:
                    return "other data"
            device.flush()

        assert together(*(functools.partial(work, n) for n in range(16))) == [None] * 16


@pytest.mark.parametrize(("options", "most"), [
    ({"requests": 3}, {4096: 3, MIB // 2: 3}),
    ({"in_flight": "64K"}, {16384: 4, 65536: 1, MIB // 2: 1}),
])
def test_what_is_in_flight_is_bounded_by_requests_and_by_bytes(shm_path, options, most):
    outstanding = []

    def serve(peer):
        waiting = []
        while True:
            if not waiting or not peer.idle():
                waiting.append(peer.request())
                outstanding.append(len(waiting))
            else:
                request = waiting.pop(0)
                peer.hole(request.cookie, request.offset, request.length)

    with fake_server(shm_path / "fake.sock", serve) as uri, NbdDevice(uri, **options) as device:
        for length, limit in most.items():
            outstanding.clear()
            assert together(*(functools.partial(device.read, 0, length) for _ in range(8))) == [bytes(length)] * 8
            assert max(outstanding) == limit


def test_requests_are_cut_to_what_the_server_takes(logged):
    uri, log = logged(block_sizes=(1, 4096, 4096))
    with NbdDevice(uri) as device:
        buffer = bytearray(10000)
        assert vectors.readv(device, 5, buffer, [1, 4094, 2, 0, 5903]) == 0
        assert buffer == contents(5, 10000)
        assert vectors.writev(device, 5, bytes(buffer), [4090, 10, 5900]) == 0
    assert [(request.offset, request.length) for request in log] == [(5, 4096), (4101, 4096), (8197, 1808)] * 2
    assert b"".join(request.payload for request in log) == contents(5, 10000)


def test_zeroes_and_trims_of_any_length_are_cut_to_what_the_protocol_takes(logged):
    length = (1 << 40) + 5
    uri, log = logged(length=length)
    with NbdDevice(uri) as device:
        device.write_zeroes(1, 5 << 30)
        device.discard(0, 3 << 30)
        assert device.extents(0, 2 << 30).tolist() == [(0, 2 << 30, 0)]
    assert all(request.length <= 1 << 30 for request in log)
    assert sum(request.length for request in log if request.kind == c.CMD_WRITE_ZEROES) == 5 << 30
    assert sum(request.length for request in log if request.kind == c.CMD_TRIM) == 3 << 30
    assert sum(request.length for request in log if request.kind == c.CMD_BLOCK_STATUS) == 2 << 30


def test_flags_of_zeroes_and_fua_are_the_protocols(logged):
    uri, log = logged()
    with NbdDevice(uri) as device:
        for flags in (0, vectors.MAY_UNMAP, vectors.FAST_ONLY | vectors.MAY_UNMAP, vectors.FUA):
            assert vectors.write_zeroes_at(device, 0, 4096, flags) == 0
        assert vectors.writev(device, 0, b"abc", [3], vectors.FUA) == 0
        assert vectors.discard_at(device, 0, 4096, vectors.FUA) == 0
    assert kinds(log) == [
        (c.CMD_WRITE_ZEROES, c.CMD_FLAG_NO_HOLE), (c.CMD_WRITE_ZEROES, 0), (c.CMD_WRITE_ZEROES, c.CMD_FLAG_FAST_ZERO),
        (c.CMD_WRITE_ZEROES, c.CMD_FLAG_NO_HOLE | c.CMD_FLAG_FUA), (c.CMD_WRITE, c.CMD_FLAG_FUA), (c.CMD_TRIM, c.CMD_FLAG_FUA)]


def test_what_the_server_lacks_is_done_with_what_it_has(logged):
    uri, log = logged(flags=c.FLAG_HAS_FLAGS | c.FLAG_SEND_FLUSH, context=False)
    with NbdDevice(uri) as device:
        assert vectors.writev(device, 0, b"abc", [3], vectors.FUA) == 0
        assert vectors.write_zeroes_at(device, 9, 100, vectors.MAY_UNMAP | vectors.FUA) == 0
        assert vectors.write_zeroes_at(device, 9, 100, vectors.FAST_ONLY) == -errno.EOPNOTSUPP
        assert vectors.discard_at(device, 0, 4096, 0) == 0
        assert device.extents().tolist() == [(0, LENGTH, 0)]
    assert kinds(log) == [(c.CMD_WRITE, 0), (c.CMD_FLUSH, 0)] * 2
    assert log[2].payload == bytes(100)


def test_without_flush_nothing_is_sent_for_it(logged):
    uri, log = logged(flags=c.FLAG_HAS_FLAGS)
    with NbdDevice(uri) as device:
        device.flush()
        device.write(0, b"abc", fua=True)
    assert kinds(log) == [(c.CMD_WRITE, 0)]


def test_a_flush_covers_every_connection(logged):
    uri, log = logged(flags=ALL_FLAGS | c.FLAG_CAN_MULTI_CONN)
    with NbdDevice(uri) as device:
        assert device.connections == CONNECTIONS_DEFAULT == 4
        device.flush()
    assert kinds(log) == [(c.CMD_FLUSH, 0)]


def test_without_the_servers_promise_there_is_one_connection_or_each_is_flushed(logged):
    uri, log = logged()
    with NbdDevice(uri) as device:
        assert device.connections == 1
    with NbdDevice(uri, connections=3) as device:
        device.flush()
    assert kinds(log) == [(c.CMD_FLUSH, 0)] * 3


def test_block_status_asks_for_one_extent_and_stays_within_the_range(shm_path):
    answers = [[(1000, 3)], [(5000, 1), (10, 0)], [(1 << 30, 0xFFFFFFFE)]]

    def serve(peer):
        for extents in answers:
            request = peer.request()
            assert request.flags == c.CMD_FLAG_REQ_ONE
            peer.status(request.cookie, *extents)

    with fake_server(shm_path / "fake.sock", serve) as uri, NbdDevice(uri) as device:
        assert vectors.block_status(device, 0, 4096) == (1000, 3)
        assert vectors.block_status(device, 0, 4096) == (4096, 1)
        assert vectors.block_status(device, 0, 4096) == (4096, 2)


def test_a_read_that_must_not_wait_is_not_sent(logged):
    uri, log = logged()
    with NbdDevice(uri) as device:
        assert vectors.readv(device, 0, bytearray(100), [100], nowait=True) == -errno.EAGAIN
    assert log == []


# -- opening

@pytest.mark.parametrize(("options", "error"), [
    ({"connections": 0}, "connections: 0 is not within 1 to 16"), ({"connections": 17}, "connections: 17"),
    ({"requests": 0}, "requests: 0 is not within 1 to 64"), ({"requests": 65}, "requests: 65"),
    ({"in_flight": "1K"}, "in_flight: 1024 bytes"), ({"timeout": 0}, "timeout: 0 is no number"), ({"timeout": -1}, "timeout: -1"),
])
def test_arguments_are_checked_before_anything_is_connected(options, error):
    with pytest.raises(ValueError, match=error):
        NbdDevice("nbd+unix:///x?socket=/nowhere", **options)


def test_a_read_only_export_is_opened_only_for_reading(served):
    uri = served("ro", MemoryDevice(MIB), read_only=True)
    with pytest.raises(PermissionError, match=r"nbd\.sock: the server exports it read-only .open it read-only"):
        NbdDevice(uri)
    with NbdDevice(uri, read_only=True) as device:
        assert device.read(0, 10) == bytes(10)
        with pytest.raises(PermissionError, match="opened read-only"):
            device.write(0, b"x")


def test_the_uri_is_the_name_in_messages_unless_another_is_given(served):
    uri = served("vm", MemoryDevice(MIB))
    with NbdDevice(uri) as device, NbdDevice(uri, name="target") as named:
        assert (device.name, device.uri, named.name, named.uri) == (uri, uri, "target", uri)
        assert device.same_export(uri) and not device.same_export("nbd://localhost/vm")


def test_tcp_works_as_well(served):
    served("vm", MemoryDevice(MIB))
    address = served.server.listen_tcp()
    with NbdDevice(f"nbd://{address}/vm") as device:
        device.write(7, b"over TCP")
        assert device.read(7, 8) == b"over TCP"


def test_closing_ends_the_connections_and_nothing_is_left(served):
    uri = served("vm", MemoryDevice(MIB))
    devices = [NbdDevice(uri) for _ in range(3)]
    together(*(device.flush for device in devices))
    for device in devices:
        device.close()
        device.close()
        with pytest.raises(ValueError, match="is closed"):
            device.read(0, 1)
    served.server.remove_export("vm")       # waits for clients that have hung up, refuses while one is there
