"""Requests that wait for their device: others go on, replies come as they end, and nothing is kept from the engine meanwhile."""

import errno
import random
import struct
import threading

import pytest
from nbd_waiting import wait_for

from fastcbw.block.delay import DelayDevice
from fastcbw.block.direct import DirectDevice
from fastcbw.block.fault import FaultDevice
from fastcbw.block.file import FileDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.cbw.engine import Engine
from fastcbw.export.nbd.client import Client, NbdError
from fastcbw.export.nbd.pool import BufferPool
from fastcbw.export.nbd.server import Server
from fastcbw.wire import constants as c

K, MIB = 4096, 1 << 20
LENGTH = 16 * MIB


@pytest.fixture
def late():
    """A device whose requests wait at the gates of a test."""
    with DelayDevice(MemoryDevice(LENGTH), io="threads") as device:
        yield device


@pytest.fixture
def engine(late):
    engine = Engine(late)
    yield engine
    late.open_all()
    engine.close()


@pytest.fixture
def guest(path, server, engine):
    server.add_export("vm", engine.device)
    with Client(path, "vm") as client:
        yield client


def replies(client, count):
    """The next COUNT replies by cookie."""
    got = [client.receive_reply() for _ in range(count)]
    return {reply.cookie: reply for reply in got}


# -- every engine gives what a model says


@pytest.mark.parametrize("engine_name", ["sync", "threads", "uring"])
@pytest.mark.parametrize("kind", [FileDevice, DirectDevice])
def test_many_requests_under_way_are_what_the_model_says_with_every_engine(path, server, folder, engine_name, kind):
    source = random.Random(3)
    with kind(folder / "image", create_length=LENGTH // 2, io=engine_name) as child:
        model = bytearray(source.randbytes(child.length))
        child.write(0, model)
        engine = Engine(child)
        server.add_export("vm", engine.device)
        images, place = {}, child.length // 40
        with Client(path, "vm") as client:
            for round_ in range(8):
                if round_ in (2, 5):
                    images[engine.snapshot(f"s{round_}", ram="64M")] = bytes(model)
                wanted, got = {}, {}
                # A client that sends only, and takes no replies, blocks the server and then itself.
                receiver = threading.Thread(target=lambda: got.update(replies(client, 40)), daemon=True)
                receiver.start()
                for i in range(40):         # one request in each place, so that their order is no matter
                    offset = i * place + source.choice([0, 512, -i * place % K])
                    length = min(source.choice([1, 512, K, K, 65536, 65537, 131073, 200_000]), (i + 1) * place - offset)
                    part = slice(offset, offset + length)
                    match source.choice("wwwwrzt"):
                        case "w":
                            model[part] = source.randbytes(length)
                            wanted[client.send(c.CMD_WRITE, offset, length, source.choice([0, 0, 0, c.CMD_FLAG_FUA]), model[part])] = None
                        case "r":
                            wanted[client.send(c.CMD_READ, offset, length, source.choice([0, c.CMD_FLAG_DF]))] = offset, bytes(model[part])
                        case "z":
                            model[part] = bytes(length)
                            wanted[client.send(c.CMD_WRITE_ZEROES, offset, length)] = None
                        case "t":
                            wanted[client.send(c.CMD_FLUSH)] = None
                receiver.join(30)
                assert got.keys() == wanted.keys()
                for cookie, reply in got.items():
                    assert reply.error == 0, reply
                    if wanted[cookie] is not None:
                        offset, data = wanted[cookie]
                        whole = bytearray(len(data))
                        for at, piece in reply.data:
                            whole[at - offset : at - offset + len(piece)] = piece
                        assert whole == data
            assert client.read(0, len(model)) == model == child.read(0, len(model))
            data = source.randbytes(3 * MIB)
            client.write(K + 1, data, fua=True)
            assert client.read(K + 1, len(data)) == data
        for number, (view, image) in enumerate(images.items()):
            server.add_export(f"snap{number}", view, background=True)
            for structured in (True, False):
                with Client(path, f"snap{number}", structured=structured) as reader:
                    assert reader.read(0, len(image)) == image and reader.read(70_000, K) == image[70_000 : 70_000 + K]
        server.close()
        engine.close()


# -- who waits, and who does not


@pytest.mark.parametrize("operation", ["flush", "read", "zero", "discard"])
def test_a_slow_request_does_not_hold_up_a_settled_write_of_its_connection(guest, engine, late, operation):
    engine.snapshot("s")
    guest.write(0, b"x" * K)                # settles it
    guest.write(MIB, b"x" * K)              # and what the slow request is about, so that it gets to the device
    kinds = {"flush": c.CMD_FLUSH, "read": c.CMD_READ, "zero": c.CMD_WRITE_ZEROES, "discard": c.CMD_TRIM}
    with late.hold(operation, MIB, K) as gate:
        slow = guest.send(kinds[operation], *(() if operation == "flush" else (MIB, K)))
        gate.wait_arrived()
        for i in range(100):
            guest.write(0, bytes([i]) * K)  # answered, one after the other, out of order
        assert guest.read(0, K) == bytes([99]) * K
    assert guest.receive_reply().cookie == slow


def test_a_first_touch_whose_old_data_is_slow_does_not_hold_up_others(guest, engine, late):
    view = engine.snapshot("s", cbw_timeout=60_000)
    with late.hold("read", 5 * K, K) as gate:
        slow = guest.send(c.CMD_WRITE, 5 * K, K, payload=b"n" * K)
        gate.wait_arrived()
        for cluster in (4, 6, 7):
            guest.write(cluster * K, b"n" * K)
        same = guest.send(c.CMD_WRITE, 5 * K, 512, payload=b"m" * 512)      # waits for the same claim, elsewhere
        guest.write(8 * K, b"n" * K)
    assert sorted(replies(guest, 2)) == [slow, same]
    assert view.read(0, 16 * K) == bytes(16 * K)


def test_a_write_that_waits_for_room_does_not_hold_up_others(guest, engine, late):
    log = DelayDevice(MemoryDevice(MIB))
    late.child.write(0, b"o" * 8 * K)
    view = engine.snapshot("s", ram=0, spill=log, cbw_timeout=60_000)
    guest.write(0, b"n" * K)                # settles it
    with log.hold("write") as gate:
        slow = guest.send(c.CMD_WRITE, K, K, payload=b"n" * K)
        gate.wait_arrived()
        for i in range(10):
            guest.write(0, bytes([i]) * K)
    assert guest.receive_reply().cookie == slow
    assert view.read(0, 8 * K) == b"o" * 8 * K


def test_flights_are_bounded_and_the_rest_waits_in_the_socket(path, server, late):
    export = server.add_export("vm", late)
    requests = b"".join(struct.pack(">IHHQQI", c.REQUEST_MAGIC, 0, c.CMD_WRITE, i, i * 512, 512) + bytes([i]) * 512 for i in range(150))
    with Client(path, "vm") as client:
        with late.hold("write") as gate:
            client.sock.sendall(requests)
            gate.wait_arrived(32)           # as many as the queue has threads
            wait_for(lambda: export.status()["counters"]["requests"] == 64)
        assert {cookie: reply.error for cookie, reply in replies(client, 150).items()} == dict.fromkeys(range(150), 0)
        assert client.read(0, 150 * 512) == b"".join(bytes([i]) * 512 for i in range(150))


def test_a_flush_covers_what_was_answered_and_waits_for_nothing_else(path, server, late):
    fault = FaultDevice(MemoryDevice(LENGTH))
    gate_device = DelayDevice(fault, io="threads")
    server.add_export("vm", gate_device)
    with Client(path, "vm") as client:
        with gate_device.hold("write", 8 * K, K) as gate:
            slow = client.send(c.CMD_WRITE, 8 * K, K, payload=b"s" * K)
            gate.wait_arrived()
            client.write(0, b"x" * K)
            client.flush()
            assert (fault.requests["write"], fault.requests["flush"]) == (1, 1)
        assert client.receive_reply().cookie == slow


def test_a_client_that_takes_no_replies_keeps_nothing_from_the_engine(path, server, folder):
    """Its writes are counted in an epoch while the kernel has them; its thread, stuck in a send, must let them end."""
    with DirectDevice(folder / "image", create_length=LENGTH, io="uring") as child:
        engine = Engine(child)
        export = server.add_export("vm", engine.device)
        engine.snapshot("s1")
        stuck = Client(path, "vm")
        read = struct.pack(">IHHQQI", c.REQUEST_MAGIC, 0, c.CMD_READ, 1, 0, 4 * MIB)
        write = b"".join(struct.pack(">IHHQQI", c.REQUEST_MAGIC, 0, c.CMD_WRITE, i, i * K, K) + b"n" * K for i in range(20))
        stuck.sock.sendall(read + write + read + write)     # in one receive: begun before the first reply blocks
        wait_for(lambda: server.pool.status()["used_bytes"] > 0)
        for number in range(2, 5):
            engine.snapshot(f"s{number}", cbw_timeout=60_000)
            with Client(path, "vm") as other:
                other.write(0, b"o" * 20 * K)               # needs the claims of the same clusters
        assert export.connections >= 1
        stuck.sock.close()
        server.close()
        engine.close()


def test_writes_need_no_pool_even_when_they_wait_for_the_device(path, folder):
    pool = BufferPool("4M", "2M")
    held = pool.hold(4 * MIB)
    with Server(path, pool=pool) as server, DirectDevice(folder / "image", create_length=LENGTH, io="uring") as child:
        server.add_export("vm", child)
        with Client(path, "vm") as client:
            data = random.Random(1).randbytes(5 * MIB)
            client.write(0, data[:200_000])
            client.write(0, data)
            assert client.read(100, 131072) == data[100 : 100 + 131072]     # as small reads
            held.release()
            assert client.read(0, len(data)) == data
        server.close()
    assert pool.status()["used_bytes"] == 0


# -- errors


@pytest.mark.parametrize("io", ["threads", "uring"])
def test_errors_of_requests_under_way_have_their_text_and_harm_no_other(path, server, folder, io):
    with FaultDevice(DirectDevice(folder / "image", create_length=LENGTH, io=io)) as faults:
        server.add_export("vm", faults)
        with Client(path, "vm") as client, faults.fail_on("write", 8 * K, K, errno=errno.ENOSPC), \
                faults.fail_on("read", MIB + K, K):
            bad = client.send(c.CMD_WRITE, 8 * K, K, payload=b"x" * K)
            good = client.send(c.CMD_WRITE, 9 * K, K, payload=b"y" * K)
            large = client.send(c.CMD_WRITE, 0, 2 * MIB, payload=b"z" * 2 * MIB)
            unread = client.send(c.CMD_READ, MIB, 2 * MIB)
            got = replies(client, 4)
            assert [got[cookie].error for cookie in (bad, good, large)] == [c.ENOSPC, 0, c.ENOSPC]
            assert got[bad].message == f"vm: write {8 * K}+{K}: No space left on device"
            assert got[unread].error == c.EIO and MIB <= got[unread].error_offset <= MIB + K
            assert client.read(9 * K, K) in (b"y" * K, b"z" * K)
            with pytest.raises(NbdError):
                client.read(MIB + K, 512)


@pytest.mark.parametrize("io", ["threads", "uring"])
def test_a_large_write_is_flushed_once_after_all_its_pieces(path, server, folder, io):
    with FaultDevice(DirectDevice(folder / "image", create_length=LENGTH, io=io)) as faults:
        server.add_export("vm", faults)
        with Client(path, "vm") as client:
            data = random.Random(2).randbytes(4 * MIB)
            client.write(K, data, fua=True)
            assert faults.requests["flush"] == 1 and faults.bytes["write"] == 4 * MIB
            with faults.fail_on("flush"), pytest.raises(NbdError):
                client.write(K, data, fua=True)
            assert client.read(K, 4 * MIB) == data


# -- the end


def test_close_answers_what_is_under_way(path, late):
    server = Server(path)
    server.add_export("vm", late)
    client = Client(path, "vm")
    with late.hold("write") as gate, late.hold("flush") as other:
        cookies = [client.send(c.CMD_WRITE, i * K, K, payload=b"x" * K) for i in range(5)] + [client.send(c.CMD_FLUSH)]
        gate.wait_arrived(5)
        other.wait_arrived()
        closer = threading.Thread(target=server.close)
        closer.start()
        client.sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            client.receive(1)
    client.sock.settimeout(20)
    assert sorted(replies(client, 6)) == cookies
    with pytest.raises(EOFError):
        client.receive(1)
    closer.join(20)
    assert late.child.read(0, 5 * K) == b"x" * 5 * K
    client.sock.close()


def test_a_disconnect_is_obeyed_after_what_came_before_it_was_answered(path, server, late):
    server.add_export("vm", late)
    client = Client(path, "vm")
    with late.hold("write") as gate:
        cookie = client.send(c.CMD_WRITE, 0, K, payload=b"x" * K)
        client.send(c.CMD_DISC)
        gate.wait_arrived()
    assert client.receive_reply().cookie == cookie
    with pytest.raises(EOFError):
        client.receive(1)
    client.sock.close()


@pytest.mark.parametrize("part", [0, 300_000])
def test_a_client_that_dies_with_requests_under_way_leaves_nothing_behind(path, server, late, part):
    """PART: of a large write, whose first pieces are under way."""
    export = server.add_export("vm", late)
    client = Client(path, "vm")
    with late.hold("write") as gate, late.hold("read") as other:
        for i in range(5):
            client.send(c.CMD_WRITE, i * K, K, payload=b"x" * K)
        client.send(c.CMD_READ, 0, 2 * MIB)
        if part:
            client.sock.sendall(struct.pack(">IHHQQI", c.REQUEST_MAGIC, 0, c.CMD_WRITE, 99, MIB, MIB) + b"y" * part)
        gate.wait_arrived(6 if part else 5)
        other.wait_arrived()
        client.sock.close()
    wait_for(lambda: export.connections == 0)
    assert server.pool.status()["used_bytes"] == 0
    with Client(path, "vm") as client:
        assert client.read(0, 5 * K) == b"x" * 5 * K


def test_a_wrong_magic_ends_the_connection_after_what_is_under_way(path, server, late):
    server.add_export("vm", late)
    client = Client(path, "vm")
    with late.hold("write") as gate:
        cookie = client.send(c.CMD_WRITE, 0, K, payload=b"x" * K)
        client.sock.sendall(bytes(28))
        gate.wait_arrived()
    assert client.receive_reply().cookie == cookie
    with pytest.raises((EOFError, ConnectionError)):
        client.receive(1)
    client.sock.close()


def test_a_device_without_an_engine_is_asked_in_the_connection(path, server):
    late = DelayDevice(MemoryDevice(LENGTH))
    server.add_export("vm", late)
    with Client(path, "vm") as client:
        with late.hold("flush") as gate:
            first = client.send(c.CMD_FLUSH)
            second = client.send(c.CMD_WRITE, 0, 512, payload=b"x" * 512)
            gate.wait_arrived()
            client.sock.settimeout(0.05)
            with pytest.raises(TimeoutError):
                client.receive(1)
        client.sock.settimeout(20)
        assert [client.receive_reply().cookie for _ in range(2)] == [first, second]
