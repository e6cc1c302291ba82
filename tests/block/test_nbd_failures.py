"""The NBD client device and servers that refuse, err, die, stall or talk nonsense: an error at once, in words, and nothing else."""

import contextlib
import errno
import functools
import os
import platform
import random
import select
import socket
import struct
import threading
import time

import pytest
from nbd_fake import ALL_FLAGS, LENGTH, chunk, contents, fake_server, serve_well, together
from nbd_servers import process

from fastcbw.block import nbd_handshake, vectors
from fastcbw.block.fault import FaultDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.block.nbd import NbdDevice
from fastcbw.wire import constants as c

MIB = 1 << 20
GUARD = b"\xa5" * 4096
RECVMSG = {"x86_64": "47", "aarch64": "212"}[platform.machine()]      # the number of the system call


def read_guarded(device, offset, length):
    """Read into the middle of a larger buffer; what lies around it must stay as it was, whatever the server sends."""
    buffer = bytearray(GUARD + bytes(length) + GUARD)
    try:
        device.readinto(offset, memoryview(buffer)[len(GUARD) : len(GUARD) + length])
    finally:
        assert buffer.startswith(GUARD) and buffer.endswith(GUARD)
    return bytes(buffer[len(GUARD) : -len(GUARD)])


# -- the handshake

def test_a_server_that_is_not_there_is_named_with_the_reason(shm_path):
    with pytest.raises(FileNotFoundError, match=r"nbd\+unix:///vm\?socket=.*gone.sock: cannot connect: No such file"):
        NbdDevice(f"nbd+unix:///vm?socket={shm_path}/gone.sock")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(shm_path / "stale.sock"))
    with pytest.raises(ConnectionRefusedError, match="stale.sock: cannot connect: Connection refused"):
        NbdDevice(f"nbd+unix:///vm?socket={shm_path}/stale.sock")


def test_an_export_that_is_not_there_is_named_with_the_servers_words(served):
    served("vm", MemoryDevice(MIB))
    path = served.server.addresses[0]
    with pytest.raises(FileNotFoundError, match="the server has no export 'other': export 'other' is not known"):
        NbdDevice(f"nbd+unix:///other?socket={path}")


@pytest.mark.parametrize(("kind", "error", "why"), [
    (c.REP_ERR_TLS_REQD, errno.EACCES, "the server wants TLS, which is not built yet: because"),
    (c.REP_ERR_BLOCK_SIZE_REQD, errno.ENOTSUP, "only requests of its block size, which is not built yet: because"),
    (c.REP_ERR_POLICY, errno.EACCES, "refuses by its policy: because"),
    (c.REP_ERR_SHUTDOWN, errno.EACCES, "refuses because it is shutting down: because"),
    (c.REP_ERR_UNSUP, errno.ENOTSUP, "too old.*: because"),
])
def test_what_a_server_refuses_is_told_in_its_words(shm_path, kind, error, why):
    with fake_server(shm_path / "fake.sock", serve_well, go_error=(kind, "because")) as uri:
        with pytest.raises(OSError, match=why) as caught:
            NbdDevice(uri)
        assert caught.value.errno == error and uri in str(caught.value)


@pytest.mark.parametrize(("options", "why"), [
    ({"block_sizes": (512, 4096, MIB)}, "blocks of 512 bytes"), ({"block_sizes": (1, 1, 100)}, "no more than 100 bytes"),
    ({"length": 0}, "an export of 0 bytes"), ({"length": 1 << 63}, "an export of 9223372036854775808 bytes"),
])
def test_an_export_that_no_device_can_be_is_refused(shm_path, options, why):
    with fake_server(shm_path / "fake.sock", serve_well, **options) as uri, pytest.raises(OSError, match=why):
        NbdDevice(uri)


@pytest.mark.parametrize("greeting", [
    b"", b"NBDMAGIC", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"NBDMAGIC" + bytes(8) + b"\0\0",
    struct.pack(">QQH", c.MAGIC, c.OPTION_MAGIC, 0),
    struct.pack(">QQHQIII", c.MAGIC, c.OPTION_MAGIC, 3, 1, 2, 3, 4),
    struct.pack(">QQHQIII", c.MAGIC, c.OPTION_MAGIC, 3, c.OPTION_REPLY_MAGIC, c.OPT_STRUCTURED_REPLY, c.REP_ACK, 1 << 31),
])
def test_what_is_no_nbd_server_is_told_apart_and_nothing_is_left(shm_path, greeting):
    def answer(listener):
        sock, _ = listener.accept()
        with sock:
            sock.sendall(greeting)
            sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while sock.recv(4096):
                    pass

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(shm_path / "other.sock"))
        listener.listen()
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        with pytest.raises(OSError, match="does not speak NBD as it should|closed the connection during the handshake"):
            NbdDevice(f"nbd+unix:///vm?socket={shm_path}/other.sock")
        thread.join()


def test_a_server_that_says_nothing_is_given_up(shm_path, monkeypatch):
    monkeypatch.setattr(nbd_handshake, "DEADLINE_SECONDS", 0.2)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(shm_path / "mute.sock"))
        listener.listen()
        with pytest.raises(TimeoutError, match="mute.sock: no answer within 0.2 s of the handshake"):
            NbdDevice(f"nbd+unix:///vm?socket={shm_path}/mute.sock")


# -- errors of requests

@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize(("number", "code"), [
    (c.EPERM, errno.EPERM), (c.EIO, errno.EIO), (c.ENOMEM, errno.ENOMEM), (c.EINVAL, errno.EINVAL), (c.ENOSPC, errno.ENOSPC),
    (c.EOVERFLOW, errno.EOVERFLOW), (c.ENOTSUP, errno.EOPNOTSUPP), (c.ESHUTDOWN, errno.ESHUTDOWN), (7777, errno.EIO),
])
def test_an_error_of_the_server_fails_the_request_and_nothing_else(shm_path, structured, number, code):
    def serve(peer):
        request = peer.request()
        peer.error(request.cookie, number) if structured else peer.simple(request.cookie, number)
        request = peer.request()
        if structured:
            peer.data(request.cookie, request.offset, contents(request.offset, request.length))
        else:
            peer.simple(request.cookie, data=contents(request.offset, request.length))

    with fake_server(shm_path / "fake.sock", serve, structured=structured) as uri, NbdDevice(uri) as device:
        assert vectors.readv(device, 5, bytearray(10), [10]) == -code
        assert device.read(5, 10) == contents(5, 10)


def test_the_servers_own_words_are_in_the_error(shm_path):
    def serve(peer):
        request = peer.request()
        peer.data(request.cookie, 0, bytes(10), done=False)
        peer.error(request.cookie, c.ENOSPC, "the first:\nlow on\tspace", done=False)
        peer.error(request.cookie, c.EIO, "", done=False)
        body = struct.pack(">IH", c.EIO, 3) + b"odd" + struct.pack(">Q", 7)
        peer.chunk(request.cookie, c.REPLY_TYPE_ERROR_OFFSET, body)
        request = peer.request()
        peer.error(request.cookie, c.EIO, "x" * 4000)
        request = peer.request()
        peer.chunk(request.cookie, c.REPLY_TYPE_ERROR_BIT | 0x1234, struct.pack(">IH", c.EPERM, 4) + b"newer" + bytes(60))

    with fake_server(shm_path / "fake.sock", serve) as uri, NbdDevice(uri) as device:
        with pytest.raises(OSError, match=r"fake.sock: read 0\+4096: ") as caught:
            device.read(0, 4096)
        assert caught.value.errno == errno.ENOSPC     # the first; its words were overtaken by those of another kind
        with pytest.raises(OSError, match=r"write 1\+3: the server says: x{300}") as caught:
            device.write(1, b"abc")
        assert caught.value.errno == errno.EIO
        with pytest.raises(PermissionError, match=f"flush 0.{LENGTH}: the server says: newe$"):
            device.flush()


def test_errors_of_a_disk_behind_our_server_arrive_with_its_words(served):
    child = FaultDevice(MemoryDevice(MIB), name="far-disk")
    uri = served("vm", child)
    child.fail_on("write", 4096, 512, errno=errno.ENOSPC)
    with NbdDevice(uri) as device:
        with pytest.raises(OSError, match=r"write 4000\+4096: the server says: vm: write .*No space left") as caught:
            device.write(4000, bytes(4096))
        assert caught.value.errno == errno.ENOSPC
        device.write(0, bytes(4096))


# -- death

@pytest.mark.parametrize("connections", [1, 3])
def test_when_the_server_dies_all_who_wait_fail_at_once_and_later_requests_name_the_reason(shm_path, connections):
    waiting, everybody = threading.Semaphore(0), threading.Event()

    def serve(peer):
        peer.request()
        waiting.release()
        everybody.wait(20)

    def die():
        for _ in range(connections):
            waiting.acquire(timeout=20)
        everybody.set()

    with fake_server(shm_path / "fake.sock", serve) as uri, NbdDevice(uri, connections=connections) as device:
        calls = [functools.partial(device.read, i * 4096, 4096) for i in range(8)]
        *errors, _ = together(*calls, die)
        for error in errors:
            assert isinstance(error, OSError) and error.errno == errno.EIO
            assert f"{uri}: read " in str(error) and "the connection is lost: the server closed the connection" in str(error)
        for call in (device.flush, device.extents, lambda: device.write(0, b"x"), lambda: device.discard(0, 1)):
            with pytest.raises(OSError, match="the connection is lost: the server closed the connection"):
                call()


def test_one_connection_that_dies_takes_the_others_with_it(shm_path):
    connected = []

    def serve(peer):
        connected.append(peer)
        if len(connected) == 1:
            peer.request()
            return                                  # cut: the request is never answered
        serve_well(peer)

    with fake_server(shm_path / "fake.sock", serve) as uri, NbdDevice(uri, connections=4) as device:
        with pytest.raises(OSError, match="closed the connection"):
            device.read(0, 100)
        with pytest.raises(OSError, match="the connection is lost"):
            device.read(0, 100)


@pytest.mark.parametrize("kept", [0, 1, 15, 16, 19, 20, 27, 28, 29, 5000])
def test_a_server_that_dies_in_the_middle_of_a_reply_is_an_error(shm_path, kept):
    def serve(peer):
        request = peer.request()
        body = struct.pack(">Q", 0) + contents(0, 100000)
        peer.sock.sendall(chunk(request.cookie, c.REPLY_TYPE_OFFSET_DATA, body)[:kept])

    with fake_server(shm_path / "fake.sock", serve) as uri, NbdDevice(uri) as device:
        with pytest.raises(OSError, match="the server closed the connection"):
            read_guarded(device, 0, 100000)


def test_killing_a_real_server_in_the_middle_fails_every_thread(shm_path):
    path = shm_path / "kit.sock"
    with process("nbdkit", "-f", "-U", path, "--filter=delay", "memory", "64M", "rdelay=30", answers=path) as server:
        with NbdDevice(f"nbd+unix:///?socket={path}") as device:
            device.write(0, b"before")

            def kill():
                while not any(device_is_waiting(device)):
                    time.sleep(0.005)
                server.kill()

            begin = time.monotonic()
            *errors, _ = together(*(functools.partial(device.read, i * MIB, MIB) for i in range(12)), kill)
            assert time.monotonic() - begin < 20
            assert all(isinstance(error, OSError) and "connection is lost" in str(error) for error in errors)


def device_is_waiting(device):
    """Whether a thread of this process sleeps in a receive: as the kernel shows it."""
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/syscall") as file:
            yield file.read().split()[0] == RECVMSG


# -- stalls

def stall(peer):
    """Take nothing, answer nothing, until the client hangs up."""
    poll = select.poll()
    poll.register(peer.sock, select.POLLRDHUP)
    poll.poll(20000)


def test_a_request_that_waits_too_long_ends_the_connection_for_all(shm_path):
    with fake_server(shm_path / "fake.sock", stall) as uri, NbdDevice(uri, timeout=0.2, requests=2) as device:
        errors = together(*(functools.partial(device.read, 0, 4096) for _ in range(5)))
        assert all(isinstance(error, TimeoutError) and "has not answered in time" in str(error) for error in errors)
        with pytest.raises(TimeoutError, match="fake.sock: flush .*the connection is lost: the server has not"):
            device.flush()


def test_a_server_that_does_not_take_a_write_is_given_up_as_well(shm_path):
    with fake_server(shm_path / "fake.sock", stall) as uri, NbdDevice(uri, timeout=0.2) as device:
        with pytest.raises(TimeoutError, match="the server has not taken a request in time"):
            device.write(0, bytes(LENGTH))


def test_a_timeout_does_not_hit_requests_that_are_answered(shm_path):
    with fake_server(shm_path / "fake.sock", serve_well) as uri, NbdDevice(uri, timeout=20) as device:
        results = together(*(functools.partial(device.read, i, 70000) for i in range(20)))
        assert results == [contents(i, 70000) for i in range(20)]
        device.write(0, bytes(LENGTH))


@pytest.mark.parametrize("request_", ["read", "write"])
def test_close_ends_requests_that_a_stalled_server_holds(shm_path, request_):
    with fake_server(shm_path / "fake.sock", stall) as uri:
        device = NbdDevice(uri, requests=2)
        call = functools.partial(device.read, 0, 4096) if request_ == "read" else functools.partial(device.write, 0, bytes(LENGTH))

        def close():
            time.sleep(0.1)     # so that the others wait, in all the places there are; nothing depends on it
            device.close()

        *errors, closed = together(*[call] * 5, close)
        assert closed is None
        assert all(isinstance(error, (OSError, ValueError)) and "close" in str(error) for error in errors)


# -- nonsense

def corrupt(what):
    """Return serve(peer) that answers a read of 8192 bytes at 4096 with the bytes WHAT(cookie)."""
    def serve(peer):
        request = peer.request()
        peer.sock.sendall(what(request.cookie))
        stall(peer)

    return serve


def data(cookie, offset, length, done=True):
    return chunk(cookie, c.REPLY_TYPE_OFFSET_DATA, struct.pack(">Q", offset) + b"\x5a" * length, done)


def hole(cookie, offset, length, done=True):
    return chunk(cookie, c.REPLY_TYPE_OFFSET_HOLE, struct.pack(">QI", offset, length), done)


NONSENSE = {
    "another magic": lambda k: struct.pack(">IIQ", 0x12345678, 0, k),
    "an old server's magic": lambda k: bytes(16),
    "a request instead of a reply": lambda k: struct.pack(">IHHQQI", c.REQUEST_MAGIC, 0, 0, k, 0, 0),
    "an unknown cookie": lambda k: data(k + (1 << 8), 4096, 8192),
    "the cookie of another slot": lambda k: data(k + 1, 4096, 8192),
    "a cookie of a slot that is none": lambda k: data(k | 0xFF, 4096, 8192),
    "cookie zero": lambda k: data(0, 4096, 8192),
    "a simple reply to a structured read": lambda k: struct.pack(">IIQ", c.SIMPLE_REPLY_MAGIC, 0, k) + bytes(8192),
    "a simple reply after a chunk": lambda k: data(k, 4096, 10, False) + struct.pack(">IIQ", c.SIMPLE_REPLY_MAGIC, 5, k),
    "data before the range": lambda k: data(k, 4095, 8192),
    "data beyond the range": lambda k: data(k, 4097, 8192),
    "data far beyond": lambda k: data(k, 1 << 63, 100),
    "data at minus one": lambda k: data(k, (1 << 64) - 1, 100),
    "more data than the range": lambda k: data(k, 4096, 8193),
    "data twice": lambda k: data(k, 4096, 8192, False) + data(k, 4096, 1),
    "a length of 4 GiB": lambda k: struct.pack(">IHHQIQ", c.STRUCTURED_REPLY_MAGIC, 1, 1, k, 0xFFFFFFFF, 4096),
    "less data than asked": lambda k: data(k, 4096, 8191),
    "no data": lambda k: chunk(k, c.REPLY_TYPE_NONE),
    "a data chunk without data": lambda k: chunk(k, c.REPLY_TYPE_OFFSET_DATA, struct.pack(">Q", 4096)),
    "a data chunk without an offset": lambda k: chunk(k, c.REPLY_TYPE_OFFSET_DATA, b"1234"),
    "an empty chunk in the middle": lambda k: chunk(k, c.REPLY_TYPE_NONE, done=False),
    "an empty chunk with data": lambda k: chunk(k, c.REPLY_TYPE_NONE, b"1234"),
    "a hole beyond the range": lambda k: hole(k, 4096, 8193),
    "a hole before the range": lambda k: hole(k, 0, 8192),
    "a hole of 4 GiB": lambda k: hole(k, 4096, 0xFFFFFFFF),
    "a hole of nothing": lambda k: hole(k, 4096, 0),
    "a hole of a wrong length": lambda k: chunk(k, c.REPLY_TYPE_OFFSET_HOLE, bytes(13)),
    "a hole and data": lambda k: hole(k, 4096, 8192, False) + data(k, 4096, 8192),
    "a status": lambda k: chunk(k, c.REPLY_TYPE_BLOCK_STATUS, struct.pack(">III", 7, 8192, 0)),
    "an unknown type": lambda k: chunk(k, 99, bytes(100)),
    "an error without a number": lambda k: chunk(k, c.REPLY_TYPE_ERROR, b"1234"),
    "an error zero": lambda k: chunk(k, c.REPLY_TYPE_ERROR, struct.pack(">IH", 0, 0)),
    "an error with a text that is not there": lambda k: chunk(k, c.REPLY_TYPE_ERROR, struct.pack(">IH", 5, 60000)),
    "an error with too much behind": lambda k: chunk(k, c.REPLY_TYPE_ERROR, struct.pack(">IH", 5, 0) + bytes(9)),
    "an error of 4 GiB": lambda k: struct.pack(">IHHQIIH", c.STRUCTURED_REPLY_MAGIC, 1, 0x8001, k, 0xFFFFFFFF, 5, 0),
    "an error with an offset that is not there": lambda k: chunk(k, c.REPLY_TYPE_ERROR_OFFSET, struct.pack(">IH", 5, 0)),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_a_reply_that_makes_no_sense_ends_the_connection_and_touches_nothing_else(shm_path, what):
    with fake_server(shm_path / "fake.sock", corrupt(NONSENSE[what])) as uri, NbdDevice(uri, timeout=20) as device:
        with pytest.raises(OSError, match=r"read 4096\+8192: the connection is lost: the server's reply makes no sense: \w+"):
            read_guarded(device, 4096, 8192)
        with pytest.raises(OSError, match="makes no sense"):
            device.flush()


STATUS_NONSENSE = {
    "another context": struct.pack(">III", 8, 4096, 0), "no extent": struct.pack(">I", 7), "nothing": b"",
    "an extent of no length": struct.pack(">III", 7, 0, 0), "half an extent": struct.pack(">IIIH", 7, 4096, 0, 1),
}


@pytest.mark.parametrize("what", STATUS_NONSENSE)
def test_a_block_status_that_makes_no_sense_is_no_extent(shm_path, what):
    body = STATUS_NONSENSE[what]
    with fake_server(shm_path / "fake.sock", corrupt(lambda k: chunk(k, c.REPLY_TYPE_BLOCK_STATUS, body))) as uri:
        with NbdDevice(uri, timeout=20) as device, pytest.raises(OSError, match="block status .* makes no sense"):
            device.extents()


@pytest.mark.parametrize("kind", [c.REPLY_TYPE_NONE, c.REPLY_TYPE_OFFSET_DATA])
def test_a_block_status_answered_by_something_else_is_no_extent(shm_path, kind):
    body = struct.pack(">Q", 0) + b"1" if kind == c.REPLY_TYPE_OFFSET_DATA else b""
    with fake_server(shm_path / "fake.sock", corrupt(lambda k: chunk(k, kind, body))) as uri:
        with NbdDevice(uri, timeout=20) as device, pytest.raises(OSError, match="makes no sense"):
            device.extents()


@pytest.mark.parametrize("seed", range(6))
def test_mutated_replies_never_reach_beyond_the_buffers(shm_path, seed):
    source = random.Random(seed)
    refused = 0

    def mutated(stream):
        stream = bytearray(stream)
        for _ in range(source.choice((0, 1, 1, 2, 5))):
            at = source.randrange(min(len(stream), 80))
            stream[at] = source.choice((0, 1, 0x7F, 0x80, 0xFF, source.randrange(256)))
        if source.random() < 0.1:
            del stream[source.randrange(len(stream)) :]
        if source.random() < 0.1:
            stream += source.randbytes(source.randrange(100))
        return stream

    def serve(peer):
        while True:
            request = peer.request()
            k, offset, length = request.cookie, request.offset, request.length
            if request.kind == c.CMD_READ:
                cut = source.randrange(1, length)
                stream = source.choice((
                    lambda: data(k, offset, length),
                    lambda: data(k, offset, cut, False) + hole(k, offset + cut, length - cut),
                    lambda: hole(k, offset, cut, False) + data(k, offset + cut, length - cut, False) + chunk(k, 0),
                    lambda: chunk(k, c.REPLY_TYPE_ERROR, struct.pack(">IH", 5, 4) + b"text"),
                ))()
            elif request.kind == c.CMD_BLOCK_STATUS:
                stream = chunk(k, c.REPLY_TYPE_BLOCK_STATUS, struct.pack(">IIIII", 7, 512, 3, length, 0))
            else:
                stream = struct.pack(">IIQ", c.SIMPLE_REPLY_MAGIC, source.choice((0, 5)), k)
            peer.sock.sendall(mutated(stream))
            if source.random() < 0.2:
                return

    def use(device, n):
        mine = random.Random(seed * 100 + n)
        for _ in range(4):
            match mine.choice(("read", "read", "read", "status", "write")):
                case "read":
                    read_guarded(device, mine.randrange(4096), mine.randrange(2, 20000))
                case "status":
                    device.extents(0, 4096)
                case "write":
                    device.write(mine.randrange(4096), bytes(mine.randrange(1, 3000)))

    with fake_server(shm_path / "fake.sock", serve, flags=ALL_FLAGS) as uri:
        for _ in range(60):
            with NbdDevice(uri, timeout=0.5) as device:
                for result in together(*(functools.partial(use, device, n) for n in range(3))):
                    assert result is None or isinstance(result, OSError), result
                    refused += result is not None
    assert refused > 20
