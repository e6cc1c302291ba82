"""Exports of snapshots whose clients say what they have done with: trims, and reads that consume."""

import socket
import subprocess

import pytest

import fastcbw
from fastcbw.block.delay import DelayDevice
from fastcbw.block.fault import FaultDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.cbw.engine import Engine
from fastcbw.export.nbd.client import Client, NbdError
from fastcbw.wire import constants as c

K = 4096
LENGTH = 8 << 20


@pytest.fixture
def faults():
    device = FaultDevice(MemoryDevice(LENGTH, name="vm"))
    device.write(0, b"o" * LENGTH)
    return device


@pytest.fixture
def delay(faults):
    return DelayDevice(faults)


@pytest.fixture
def disk(delay, path):
    with fastcbw.open(delay, name="vm") as disk:
        disk.serve(path)
        yield disk
        delay.open_all()


def connect(path, **options):
    return Client(path, "vm@s", **options)


def refused(code, text, call, *arguments):
    with pytest.raises(NbdError, match=text) as caught:
        call(*arguments)
    assert caught.value.errno == code
    return True


@pytest.mark.parametrize("kind, read_only, trim", [("ro", True, False), ("discard", False, True), ("read-once", False, True)])
def test_flags_are_flags_that_work(disk, path, kind, read_only, trim):
    disk.snapshot("s", export=kind)
    with connect(path) as client:
        assert bool(client.flags & c.FLAG_READ_ONLY) == read_only
        assert bool(client.flags & c.FLAG_SEND_TRIM) == trim
        assert not client.flags & (c.FLAG_SEND_WRITE_ZEROES | c.FLAG_SEND_FAST_ZERO)
        refused(1, "read-only" if read_only else "can be trimmed, not written", client.write, 0, b"x" * 512)
        refused(1, "read-only" if read_only else "can be trimmed, not written", client.zero, 0, 512)
        if not trim:
            refused(1, "read-only", client.trim, 0, K)
        client.flush()
        assert client.read(0, K) == b"o" * K


def test_a_trim_drops_and_tells_everybody(disk, path):
    snap = disk.snapshot("s", export="discard")
    disk.write(0, b"n" * 3 * K)
    with connect(path) as client:
        client.trim(K, K)
        refused(22, "not in the snapshot", client.read, 0, 3 * K)
        assert client.read(0, K) == b"o" * K == client.read(2 * K, K)
        client.trim(4 * K + 512, 512)
        refused(22, "not in the snapshot", client.read, 4 * K, K)
        refused(22, "multiples of 512 bytes", client.trim, 100, 512)
        assert client.block_status(0, LENGTH)[c.BASE_ALLOCATION] == [(LENGTH, 0)]
    assert snap.status()["discarded_bytes"] == K + 512
    with pytest.raises(fastcbw.NotInSnapshot):
        snap.read(K, 1)


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("length", [512, K, 100 * K, 1 << 20, (5 << 20) + 512])
def test_a_read_consumes_what_it_delivered(disk, path, length, structured):
    snap = disk.snapshot("s", export="read-once")
    disk.write(0, b"n" * LENGTH)
    with connect(path, structured=structured) as client:
        assert client.read(0, length) == b"o" * length
        client.flush()      # answered after the reply went out and was consumed
        assert refused(22, "not in the snapshot" if structured else "Invalid argument", client.read, length - 512, 512)
        assert client.read(length, 512) == b"o" * 512
        client.flush()
    assert snap.status()["discarded_bytes"] == length + 512


def test_cache_never_consumes(disk, path):
    snap = disk.snapshot("s", export="read-once")
    with connect(path) as client:
        client.cache(0, 64 * K)
        assert client.read(0, K) == b"o" * K
        client.flush()
    assert snap.status()["discarded_bytes"] == K


def test_a_read_that_is_too_fine_to_be_consumed_is_refused_and_delivers_nothing(disk, path):
    snap = disk.snapshot("s", export="read-once")
    with connect(path) as client:
        refused(22, "multiples of 512 bytes", client.read, 0, 100)
        assert client.read(0, 512) == b"o" * 512
        client.flush()
    assert snap.status()["discarded_bytes"] == 512


@pytest.mark.parametrize("length", [K, 1 << 20])
def test_a_read_that_fails_consumes_nothing(disk, path, faults, length):
    snap = disk.snapshot("s", export="read-once")
    with connect(path) as client:
        with faults.fail_on("read", 0, length):
            refused(5, "Input/output", client.read, 0, length)
        assert snap.status()["discarded_bytes"] == 0
        assert client.read(0, length) == b"o" * length


@pytest.mark.parametrize("length", [K, 64 * K, 4 << 20])
def test_a_reply_that_could_not_be_sent_consumes_nothing(disk, path, delay, length):
    """The client goes while the read is held at the disk: nobody has got the data, so it stays."""
    snap = disk.snapshot("s", export="read-once")
    client = connect(path)
    with delay.hold("read", 0, K) as gate:
        client.send(c.CMD_READ, 0, length)
        gate.wait_arrived()
        client.sock.shutdown(socket.SHUT_RDWR)
        client.sock.close()
    with connect(path) as again:
        assert again.read(0, length) == b"o" * length
        again.flush()
    assert snap.status()["discarded_bytes"] == length


@pytest.mark.parametrize("structured", [True, False])
def test_a_reply_of_which_a_part_was_sent_consumes_nothing(disk, path, structured):
    """The client takes the beginning of a reply that is larger than the socket holds, and goes: not even that part is gone."""
    snap = disk.snapshot("s", export="read-once")
    client = connect(path, structured=structured)
    client.send(c.CMD_READ, 0, LENGTH)
    assert len(client.sock.recv(K, socket.MSG_WAITALL)) == K
    client.sock.close()
    with connect(path) as again:
        assert again.read(0, LENGTH) == b"o" * LENGTH
        again.flush()
    assert snap.status()["discarded_bytes"] == LENGTH


def test_two_connections_consume_disjoint_parts(disk, path):
    snap = disk.snapshot("s", export="read-once")
    disk.write(0, b"n" * LENGTH)
    with connect(path) as one, connect(path) as two:
        for offset in range(0, LENGTH, 1 << 20):
            assert (one if offset >> 20 & 1 else two).read(offset, 1 << 20) == b"o" * (1 << 20)
        one.flush(), two.flush()
    assert snap.status()["discarded_bytes"] == LENGTH and snap.status()["ram_bytes"] == 0


def test_drops_of_an_export_are_checked(server, disk_of_memory):
    with pytest.raises(ValueError, match="drops: 'twice'"):
        server.add_export("x", disk_of_memory, drops="twice")


@pytest.fixture
def disk_of_memory():
    return MemoryDevice(K)


def test_an_engine_without_a_server_discards_as_well():
    child = MemoryDevice(64 * K)
    engine = Engine(child)
    view = engine.snapshot("s", export="read-once")
    assert view.export == "read-once" and view.read(0, K) == bytes(K) == view.read(0, K)       # the export consumes, not the device
    engine.close()


def test_qemu_io_trims_a_snapshot_and_parts_of_a_cluster_add_up(disk, path):
    """QEMU's own client against an export that may be trimmed: whole clusters, then one in three requests."""

    def qemu_io(*lines):
        commands = [part for line in lines for part in ("-c", line)]
        done = subprocess.run(["qemu-io", "-f", "raw", *commands, f"nbd+unix:///vm@s?socket={path}"], capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr

    snap = disk.snapshot("s", export="discard", cluster_size="64K")
    said = qemu_io("discard 64k 64k", "discard 128k 32k", "discard 160k 16k", "read -P 0x6f 0 64k", "read -P 0x6f 176k 16k")
    assert "fail" not in said and "verification" not in said, said
    assert snap.status()["discarded_bytes"] == 112 << 10
    assert "read failed: Invalid argument" in qemu_io("read 60k 8k")
    assert "read failed: Invalid argument" in qemu_io("read 128k 64k")
    disk.write(64 << 10, b"n" * (64 << 10))
    assert snap.status()["preserved_clusters"] == 0         # it has gone whole, and costs the guest nothing
    assert "fail" not in qemu_io("discard 176k 16k")
    disk.write(128 << 10, b"n" * (64 << 10))
    assert snap.status()["preserved_clusters"] == 0 and snap.status()["discarded_bytes"] == 128 << 10
    with connect(path) as client:
        refused(22, "multiples of 1024 bytes", client.trim, 1 << 20, 512)
    assert snap.read(0, 64 << 10) == b"o" * (64 << 10)
