"""Requests and replies, one behaviour each."""

import errno
import os
import random
import struct

import pytest

import fastcbw
from fastcbw.block.fault import FaultDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.export.nbd.client import Client, NbdError
from fastcbw.export.nbd.contexts import AllocationContext
from fastcbw.wire import constants as c

MIB = 1 << 20

#: The boundaries of the loop: small and large reads (128K), whole writes (256K), receive buffer (512K), the maximum.
LENGTHS = [1, 511, 4096, 131071, 131072, 131073, 262143, 262144, 262145, 524260, 524288, 524289, MIB + 1, 32 * MIB]


def pattern(length, seed=1):
    return random.Random(seed).randbytes(length)


@pytest.fixture
def fault(disk):
    return FaultDevice(disk)


@pytest.fixture
def faulty(path, server, fault):
    """A client of a disk that can be made to fail."""
    server.add_export("faulty", fault)
    with Client(path, "faulty") as client:
        yield client


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("offset", [0, 65535, 3 * MIB + 7])
def test_a_write_of_any_length_is_what_the_disk_then_holds(client, disk, offset, length):
    disk.write(offset + length, b"after")
    data = pattern(length)
    client.write(offset, data)
    assert disk.read(offset, length) == data
    assert disk.read(offset + length, 5) == b"after"


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("structured", [True, False])
def test_a_read_of_any_length_is_what_the_disk_holds(path, export, disk, length, structured):
    data = pattern(length)
    disk.write(65535, data)
    with Client(path, "disk", structured=structured) as client:
        assert client.read(65535, length) == data
        assert client.read(0, 1) == b"\0"


def test_an_unfragmented_read_is_one_chunk_and_a_large_one_is_several(client, disk):
    disk.write(0, pattern(2 * MIB))
    assert client.call(c.CMD_READ, 0, 2 * MIB, c.CMD_FLAG_DF).chunks == 1
    assert client.call(c.CMD_READ, 0, 2 * MIB).chunks == 8
    assert client.read(0, 2 * MIB, unfragmented=True) == pattern(2 * MIB)


def test_replies_come_in_order_for_many_requests_at_once(client, disk):
    cookies = []
    for i in range(500):
        cookies.append(client.send(c.CMD_WRITE, i * 4096, 4096, payload=bytes([i & 255]) * 4096))
        cookies.append(client.send(c.CMD_READ, i * 4096, 512))
        if i % 20 == 19:        # a client must read its replies now and then
            replies = [client.receive_reply() for _ in cookies]
            assert [reply.cookie for reply in replies] == cookies
            assert [reply.data[0][1][:1] for reply in replies[1::2]] == [bytes([j & 255]) for j in range(i - 19, i + 1)]
            cookies = []


def test_requests_cut_at_any_byte_are_put_together(client, disk):
    requests = b"".join(
        struct.pack(">IHHQQI", c.REQUEST_MAGIC, 0, c.CMD_WRITE, i, i * 100, 100) + bytes([i]) * 100 for i in range(1, 40))
    source = random.Random(7)
    while requests:
        cut = source.randrange(1, 90)
        client.sock.sendall(requests[:cut])
        requests = requests[cut:]
    assert [client.receive_reply().cookie for _ in range(39)] == list(range(1, 40))
    assert disk.read(100, 3900) == b"".join(bytes([i]) * 100 for i in range(1, 40))


def test_a_mix_of_sizes_streams_through_the_buffer(path, export, disk):
    source = random.Random(11)
    model = bytearray(8 * MIB)
    with Client(path, "disk") as client:
        for i in range(300):
            length = source.choice([1, 512, 4096, 65536, 100_000, 262_144, 300_000, 700_000])
            offset = source.randrange(len(model) - length)
            data = source.randbytes(length)
            model[offset : offset + length] = data
            client.send(c.CMD_WRITE, offset, length, payload=data)
            if i % 20 == 19:        # a client that never reads its replies blocks the server, and then itself
                assert [client.receive_reply().error for _ in range(20)] == [0] * 20
    assert disk.read(0, len(model)) == bytes(model)


def test_zeroes_and_trim_reach_the_device_with_their_flags(faulty, fault):
    faulty.write(0, b"x" * 65536)
    faulty.zero(0, 4096, hole=False, fua=True)
    faulty.zero(4096, 4096, fast=True)
    faulty.trim(8192, 4096)
    assert fault.read(0, 8192) == bytes(8192)
    assert fault.requests["zero"] == 2
    assert fault.requests["discard"] == 1


def test_a_fast_zero_that_the_device_cannot_do_is_unsupported(faulty, fault):
    with fault.fail_on("zero", errno=errno.EOPNOTSUPP):
        with pytest.raises(NbdError) as caught:
            faulty.zero(0, 4096, fast=True)
    assert caught.value.errno == c.ENOTSUP


def test_flush_reaches_the_device(faulty, fault):
    faulty.flush()
    assert fault.requests["flush"] == 1


def test_a_large_write_with_fua_is_flushed_once_at_its_end(faulty, fault):
    faulty.write(0, pattern(4 * MIB), fua=True)
    assert fault.requests["flush"] == 1
    assert fault.bytes["write"] == 4 * MIB


def test_cache_succeeds_and_length_zero_does_nothing(client):
    client.cache(0, 32 * MIB)
    client.write(0, b"")
    client.zero(0, 0)
    client.trim(0, 0)
    assert client.read(4096, 0) == b""
    with pytest.raises(NbdError):
        client.block_status(0, 0)


def test_a_simple_read_of_nothing_succeeds(path, export):
    with Client(path, "disk", structured=False) as client:
        assert client.read(0, 0) == b""
        assert client.read(0, 1) == b"\0"


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (c.CMD_READ, c.EINVAL), (c.CMD_WRITE, c.ENOSPC), (c.CMD_WRITE_ZEROES, c.ENOSPC), (c.CMD_TRIM, c.EINVAL),
        (c.CMD_CACHE, c.EINVAL), (c.CMD_BLOCK_STATUS, c.EINVAL),
    ],
)
@pytest.mark.parametrize("where", ["over the end", "at the end", "negative", "overflowing"])
def test_a_range_beyond_the_end_is_refused(client, disk, kind, error, where):
    offset = {
        "over the end": disk.length - 511, "at the end": disk.length, "negative": -1, "overflowing": (1 << 63) - 1,
    }[where]
    with pytest.raises(NbdError, match="beyond the end") as caught:
        client.call(kind, offset, 512, payload=bytes(512) if kind == c.CMD_WRITE else b"")
    assert caught.value.errno == error
    assert client.read(disk.length - 512, 512) == bytes(512)


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        (c.CMD_READ, c.CMD_FLAG_NO_HOLE), (c.CMD_WRITE, c.CMD_FLAG_DF), (c.CMD_TRIM, c.CMD_FLAG_NO_HOLE),
        (c.CMD_WRITE_ZEROES, c.CMD_FLAG_DF), (c.CMD_FLUSH, 1 << 15), (c.CMD_BLOCK_STATUS, c.CMD_FLAG_DF), (c.CMD_CACHE, 1 << 5),
    ],
)
def test_a_flag_that_the_request_does_not_have_is_refused_and_the_stream_goes_on(client, disk, kind, flags):
    with pytest.raises(NbdError) as caught:
        client.call(kind, 0, 512, flags, b"x" * 512 if kind == c.CMD_WRITE else b"")
    assert caught.value.errno == c.EINVAL
    assert client.read(0, 512) == bytes(512)


def test_fua_is_accepted_and_ignored_where_nothing_is_written(client):
    assert client.call(c.CMD_READ, 0, 512, c.CMD_FLAG_FUA).data[0][1] == bytes(512)


def test_unfragmented_without_structured_replies_is_refused(path, export):
    with Client(path, "disk", structured=False) as client:
        with pytest.raises(NbdError) as caught:
            client.read(0, 512, unfragmented=True)
        assert caught.value.errno == c.EINVAL


@pytest.mark.parametrize("kind", [8, 9, 255, 65535])
def test_an_unknown_request_is_refused_and_the_stream_goes_on(client, kind):
    with pytest.raises(NbdError, match="no such request"):
        client.call(kind, 0, 512)
    assert client.read(0, 1) == b"\0"


def test_a_write_that_is_too_long_is_received_dropped_and_refused(client, disk):
    length = 32 * MIB + 1
    client.sock.sendall(struct.pack(">IHHQQI", c.REQUEST_MAGIC, 0, c.CMD_WRITE, 9, 0, length))
    for _ in range(33):
        client.sock.sendall(b"x" * min(MIB, length))
        length -= min(MIB, length)
    reply = client.receive_reply()
    assert (reply.cookie, reply.error) == (9, c.EINVAL)
    assert "32 MiB" in reply.message
    assert client.read(0, 4096) == bytes(4096)


def test_a_read_that_is_too_long_is_refused(client):
    with pytest.raises(NbdError, match="32 MiB") as caught:
        client.read(0, 32 * MIB + 1)
    assert caught.value.errno == c.EINVAL
    with pytest.raises(NbdError, match="32 MiB") as caught:
        client.read(0, 32 * MIB + 1, unfragmented=True)
    assert caught.value.errno == c.EOVERFLOW


@pytest.mark.parametrize("length", [512, 256 * 1024, 3 * MIB])
def test_a_read_only_export_refuses_writes_and_stays_in_step(path, server, disk, length):
    server.add_export("ro", disk, read_only=True)
    with Client(path, "ro") as client:
        for attempt in (
            lambda: client.write(0, b"x" * length), lambda: client.zero(0, length), lambda: client.trim(0, length)):
            with pytest.raises(NbdError, match="read-only") as caught:
                attempt()
            assert caught.value.errno == c.EPERM
        client.flush()
        assert client.read(0, 4096) == bytes(4096)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.EIO, c.EIO), (errno.EPERM, c.EPERM), (errno.EROFS, c.EPERM), (errno.EACCES, c.EPERM), (errno.ENOMEM, c.ENOMEM),
        (errno.EINVAL, c.EINVAL), (errno.ENOSPC, c.ENOSPC), (errno.EDQUOT, c.ENOSPC), (errno.EFBIG, c.ENOSPC),
        (errno.EOVERFLOW, c.EOVERFLOW), (errno.EOPNOTSUPP, c.ENOTSUP), (errno.ESHUTDOWN, c.ESHUTDOWN),
        (errno.EBADF, c.EIO), (errno.ETIMEDOUT, c.EIO),
    ],
)
def test_errors_of_the_device_become_errors_of_the_protocol(faulty, fault, code, expected):
    with fault.fail_on("write", errno=code):
        with pytest.raises(NbdError) as caught:
            faulty.write(4096, b"x" * 512)
    assert caught.value.errno == expected
    assert str(caught.value).endswith(f"faulty: write 4096+512: {os.strerror(code)}")


@pytest.mark.parametrize("length", [512, 131072, 2 * MIB])
@pytest.mark.parametrize("flags", [0, c.CMD_FLAG_DF])
def test_a_failed_read_names_its_offset_and_the_stream_goes_on(faulty, fault, length, flags):
    with fault.fail_on("read", MIB + length - 100, 1):
        reply_to = faulty.send(c.CMD_READ, MIB, length, flags)
        reply = faulty.receive_reply()
    assert (reply.cookie, reply.error) == (reply_to, c.EIO)
    assert MIB <= reply.error_offset <= MIB + length - 100
    assert faulty.read(MIB, length) == bytes(length)


@pytest.mark.parametrize("length", [512, 2 * MIB])
def test_a_failed_simple_read_is_an_error_without_data(path, server, fault, length):
    server.add_export("faulty", fault)
    with Client(path, "faulty", structured=False) as client:
        with fault.fail_on("read", length - 1, 1):
            with pytest.raises(NbdError) as caught:
                client.read(0, length)
        assert caught.value.errno == c.EIO
        assert client.read(0, length) == bytes(length)


def test_a_large_write_that_fails_is_received_to_its_end(faulty, fault):
    with fault.fail_on("write", MIB, 1):
        with pytest.raises(NbdError) as caught:
            faulty.write(0, pattern(8 * MIB))
    assert caught.value.errno == c.EIO
    assert fault.bytes["write"] < 8 * MIB
    assert faulty.read(32 * MIB, 512) == bytes(512)


def test_a_broken_snapshot_is_an_io_error_that_says_why(path, server):
    disk = fastcbw.open(MemoryDevice("1M", name="vm"), name="vm")
    disk.write(0, b"old" * 100_000)
    snapshot = disk.snapshot("s", ram="64K")
    server.add_export("snap", snapshot.device)
    with Client(path, "snap") as client:
        assert client.read(0, 3) == b"old"
        disk.write(0, b"new" * 100_000)         # more than the RAM tier holds, and there is no other
        with pytest.raises(NbdError, match="snapshot broken: its store is full") as caught:
            client.read(0, 512)
        assert caught.value.errno == c.EIO
        with pytest.raises(NbdError, match="snapshot broken: its store is full"):
            client.block_status(0, 4096)
    disk.close()


def test_block_status_merges_neighbours_and_stays_within_the_request(client, disk):
    disk.write(MIB, b"x" * 8192)
    assert client.block_status(4096, 2 * MIB) == {"base:allocation": [(MIB - 4096, 2), (8192, 0), (MIB - 4096, 2)]}
    assert client.block_status(4096, 2 * MIB, one=True) == {"base:allocation": [(MIB - 4096, 2)]}
    assert client.block_status(MIB + 1, 1) == {"base:allocation": [(1, 0)]}


def test_block_status_has_a_bounded_number_of_extents(client, disk):
    for i in range(5000):
        disk.write(i * 8192, b"x")
    extents = client.block_status(0, 5000 * 8192)["base:allocation"]
    assert len(extents) == 4096
    assert {length for length, _ in extents} == {4096}


def test_block_status_answers_every_negotiated_context(path, server, disk):
    more = MemoryDevice(disk.length)
    more.write(0, b"x" * 4096)
    server.add_export("disk", disk, contexts={"x-test:more": AllocationContext(more)})
    with Client(path, "disk", contexts=["x-test:more", "base:allocation"]) as client:
        assert client.block_status(0, 8192) == {"base:allocation": [(8192, 2)], "x-test:more": [(4096, 0), (4096, 2)]}


def test_block_status_of_a_failing_device_is_an_error(faulty, fault):
    with fault.fail_on("status"):
        with pytest.raises(NbdError) as caught:
            faulty.block_status(0, 4096)
    assert caught.value.errno == c.EIO


def test_counters_can_be_read_while_the_connection_runs(client, export):
    client.write(0, b"x" * 4096)
    client.read(0, 512)
    client.zero(0, 1024)
    client.trim(0, 2048)
    client.flush()
    client.block_status(0, 512)
    with pytest.raises(NbdError):
        client.read(export.length, 1)
    counters = export.status()["counters"]
    assert counters.pop("receives") >= 7
    assert counters == {
        "requests": 7, "reads": 1, "writes": 1, "zeroes": 1, "trims": 1, "flushes": 1, "caches": 0, "statuses": 1,
        "bytes_read": 512, "bytes_written": 4096, "bytes_zeroed": 1024, "bytes_trimmed": 2048, "errors": 1}


def test_a_batch_of_small_writes_is_received_in_fewer_calls(client, export):
    requests = b"".join(
        struct.pack(">IHHQQI", c.REQUEST_MAGIC, 0, c.CMD_WRITE, i, 0, 512) + bytes(512) for i in range(1, 65))
    client.sock.sendall(requests)
    assert [client.receive_reply().error for _ in range(64)] == [0] * 64
    counters = export.status()["counters"]
    assert counters["writes"] == 64
    assert counters["receives"] < 32
