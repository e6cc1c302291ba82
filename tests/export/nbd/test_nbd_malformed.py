"""Clients that stall, die and talk nonsense: nothing crashes, hangs or leaks, and others are served."""

import random
import socket
import struct
import subprocess
import sys
import threading

import pytest
from nbd_waiting import wait_for

from fastcbw.block.direct import DirectDevice
from fastcbw.export.nbd.client import Client, meta_query
from fastcbw.wire import constants as c

MIB = 1 << 20


def others_are_served(path, server):
    """A well-behaved client works, and after it nothing is left of anybody."""
    with Client(path, "disk") as client:
        client.write(MIB, b"fine" * 1000)
        assert client.read(MIB, 4000) == b"fine" * 1000
    wait_for(lambda: server.status()["connections"] == 0)
    assert server.pool.status()["used_bytes"] == 0


def header(kind, offset=0, length=0, flags=0, magic=c.REQUEST_MAGIC):
    return struct.pack(">IHHQQI", magic, flags, kind, 1, offset, length)


@pytest.mark.parametrize("magic", [0, 0xFFFFFFFF, c.SIMPLE_REPLY_MAGIC, 0x21E41C71])
def test_a_wrong_magic_ends_the_connection_after_what_was_asked_before(path, server, export, magic):
    client = Client(path, "disk")
    client.sock.sendall(header(c.CMD_FLUSH) + header(c.CMD_FLUSH, magic=magic) + header(c.CMD_FLUSH))
    assert client.receive_reply().error == 0
    with pytest.raises((EOFError, ConnectionError)):
        client.receive_reply()
    client.sock.close()
    others_are_served(path, server)


@pytest.mark.parametrize("length", [512, 256 * 1024, 32 * MIB])
@pytest.mark.parametrize("part", [0, 1, 500, 200_000])
def test_a_client_that_dies_in_the_middle_of_a_payload_leaves_nothing_behind(path, server, export, disk, length, part):
    client = Client(path, "disk")
    client.sock.sendall(header(c.CMD_WRITE, 0, length) + b"x" * min(part, length - 1))
    client.sock.close()
    others_are_served(path, server)
    assert disk.read(length - 1, 1) == b"\0"
    if length <= 256 * 1024:
        assert disk.read(0, length) == bytes(length)


@pytest.mark.parametrize("cut", [1, 4, 27])
def test_a_client_that_dies_in_the_middle_of_a_header_leaves_nothing_behind(path, server, export, cut):
    client = Client(path, "disk")
    client.sock.sendall(header(c.CMD_WRITE, 0, 512)[:cut])
    client.sock.close()
    others_are_served(path, server)


@pytest.mark.parametrize("read", [0, 1, 100_000])
def test_a_client_that_dies_while_it_is_answered_leaves_nothing_behind(path, server, export, read):
    client = Client(path, "disk")
    client.send(c.CMD_READ, 0, 32 * MIB)
    client.send(c.CMD_READ, 0, 32 * MIB, c.CMD_FLAG_DF)
    client.receive(read)
    client.sock.close()
    others_are_served(path, server)


def test_a_client_that_stalls_in_a_payload_holds_up_nobody(path, server, export):
    stalled = [Client(path, "disk") for _ in range(10)]
    for client in stalled:
        client.sock.sendall(header(c.CMD_WRITE, 0, 32 * MIB) + b"x" * 100_000)
    with Client(path, "disk") as client:
        client.write(40 * MIB, b"y" * 32 * MIB)
        assert client.read(40 * MIB, 32 * MIB) == b"y" * 32 * MIB
    for client in stalled:
        client.sock.close()
    others_are_served(path, server)


def test_a_client_killed_under_load_leaves_nothing_behind(path, server, export):
    code = (
        "import sys; from fastcbw.export.nbd.client import Client\n"
        "client = Client(sys.argv[1], 'disk'); print('begun', flush=True)\n"
        "while True: client.write(0, b'x' * 1000000)\n")
    process = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"begun\n"
    wait_for(lambda: export.status()["counters"]["writes"] > 3)
    process.kill()
    process.wait()
    process.stdout.close()
    others_are_served(path, server)


def drained(sock):
    """Read what the server sends until it closes; it must, as our side is shut."""
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionError:
        pass


@pytest.mark.parametrize("seed", range(25))
def test_any_stream_of_requests_ends_in_an_orderly_way(path, server, export, seed):
    """Seeded: valid and broken requests in any mixture, cut anywhere."""
    source = random.Random(seed)
    stream = bytearray()
    for _ in range(source.randrange(1, 60)):
        kind = source.choice([0, 1, 1, 1, 3, 4, 5, 6, 7, 8, 200, source.randrange(65536)])
        length = source.choice([0, 1, 512, 4096, 70_000, 300_000, source.randrange(1 << 20)])
        offset = source.choice([0, source.randrange(96 * MIB), 96 * MIB, source.randrange(1 << 64)])
        flags = source.choice([0, 0, 1, 2, 4, 8, 16, source.randrange(65536)])
        stream += struct.pack(">IHHQQI", c.REQUEST_MAGIC, flags, kind, source.randrange(1 << 64), offset, length)
        if kind == c.CMD_WRITE:
            stream += source.randbytes(length)
    for _ in range(source.choice([0, 0, 1, 3])):
        stream[source.randrange(len(stream))] ^= 1 << source.randrange(8)
    if source.random() < 0.5:
        del stream[source.randrange(len(stream)) :]
    client = Client(path, "disk", structured=source.random() < 0.7)
    ours, theirs = client.sock, client.sock.dup()
    ours.setblocking(True)
    sender = send_in_pieces(theirs, bytes(stream), source)
    drained(ours)
    sender.join(20)
    assert not sender.is_alive()
    ours.close()
    others_are_served(path, server)


@pytest.mark.parametrize("engine", ["threads", "uring"])
@pytest.mark.parametrize("seed", range(100, 108))
def test_any_stream_of_requests_that_wait_for_a_disk_ends_in_an_orderly_way(path, server, folder, disk, seed, engine):
    with DirectDevice(folder / "image", create_length=disk.length, io=engine) as image:
        server.add_export("disk", image)
        test_any_stream_of_requests_ends_in_an_orderly_way(path, server, None, seed)
        server.remove_export("disk")


def send_in_pieces(sock, stream, source):
    """Send STREAM in pieces from a thread, then shut our side; the server may close at any time."""
    sizes = [source.randrange(1, 200_000) for _ in range(50)]

    def send():
        nonlocal stream
        try:
            for size in sizes:
                sock.sendall(stream[:size])
                stream = stream[size:]
            sock.sendall(stream)
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        finally:
            sock.close()

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize("seed", range(25))
def test_any_stream_of_options_ends_in_an_orderly_way(path, server, export, seed):
    """Seeded: valid options, changed at random places."""
    source = random.Random(1000 + seed)
    name = struct.pack(">I4sHH", 4, b"disk", 1, 3)
    choices = [
        (c.OPT_LIST, b""), (c.OPT_STRUCTURED_REPLY, b""), (c.OPT_INFO, name), (c.OPT_GO, name), (c.OPT_STARTTLS, b""),
        (c.OPT_SET_META_CONTEXT, meta_query("disk", ["base:allocation"])), (c.OPT_LIST_META_CONTEXT, meta_query("disk", [])),
        (source.randrange(1 << 32), source.randbytes(100)), (c.OPT_EXPORT_NAME, b"disk"), (c.OPT_EXPORT_NAME, b"\xff"),
    ]
    stream = bytearray(struct.pack(">I", 3))
    for _ in range(source.randrange(1, 30)):
        option, data = source.choice(choices)
        stream += struct.pack(">QII", c.OPTION_MAGIC, option, len(data)) + data
    for _ in range(source.choice([0, 1, 2, 5])):
        stream[source.randrange(len(stream))] ^= 1 << source.randrange(8)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(path)
        try:
            sock.sendall(stream)
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        drained(sock)
    others_are_served(path, server)
