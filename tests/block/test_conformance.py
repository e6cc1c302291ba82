"""What every BlockDevice does, run against each of them: the plain model is a bytearray."""

import errno
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastcbw.block import vectors
from fastcbw.block.device import ZERO

LENGTHS = (1, 511, 512, 4096, 4097, 65537, 200003)


def pattern(length, seed):
    """Bytes that are zero in places and differ with SEED."""
    data = np.random.default_rng(seed).integers(0, 256, length, dtype=np.uint8)
    if length > 8192:
        data[length // 4 : length // 2] = 0
    return data.tobytes()


@st.composite
def scripts(draw):
    """A device length and requests within it, with how each vector is cut."""
    length = draw(st.sampled_from(LENGTHS))
    requests = []
    for _ in range(draw(st.integers(1, 12))):
        offset = draw(st.integers(0, length - 1))
        size = draw(st.integers(1, length - offset))
        cuts = sorted(draw(st.lists(st.integers(0, size), max_size=4)))
        pieces = [b - a for a, b in zip([0, *cuts], [*cuts, size])]
        kind = draw(st.sampled_from(("write", "write", "zero", "discard", "read", "nowait", "flush")))
        flags = draw(st.sampled_from((0, vectors.FUA, vectors.MAY_UNMAP, vectors.MAY_UNMAP | vectors.FAST_ONLY)))
        requests.append((kind, offset, size, pieces, flags, draw(st.integers(0, 1 << 30))))
    return length, requests


def apply(device, model, request):
    """Do one request on both, and compare what it answers."""
    kind, offset, size, pieces, flags, seed = request
    part = slice(offset, offset + size)
    match kind:
        case "write":
            model[part] = pattern(size, seed)
            assert vectors.writev(device, offset, bytes(model[part]), pieces, flags & vectors.FUA) == 0
        case "zero":
            code = vectors.write_zeroes_at(device, offset, size, flags)
            if code == 0:
                model[part] = bytes(size)
            else:
                assert code == -errno.EOPNOTSUPP and flags & vectors.FAST_ONLY
        case "discard":
            assert vectors.discard_at(device, offset, size, flags & vectors.FUA) == 0
            model[part] = device.read(offset, size)     # undefined, but only there
        case "read" | "nowait":
            buffer = bytearray(b"\xaa" * size)
            code = vectors.readv(device, offset, buffer, pieces, nowait=kind == "nowait")
            assert code == 0 and buffer == model[part] or kind == "nowait" and code == -errno.EAGAIN
        case "flush":
            device.flush()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scripts())
def test_any_sequence_of_requests_is_what_a_bytearray_does(make_device, script):
    length, requests = script
    device, model = make_device(length), bytearray(length)
    for request in requests:
        apply(device, model, request)
    assert device.read(0, length) == model
    at = 0
    for offset, size, flags in device.extents().tolist():
        assert offset == at and size > 0
        at += size
        if flags & ZERO:
            assert not any(model[offset:at])
    assert at == length


def test_a_new_device_reads_as_zeroes(make_device):
    device = make_device(12345)
    assert device.read(0, 12345) == bytes(12345)
    assert len(device) == device.length == 12345


def test_vectors_longer_than_the_kernel_takes_are_done_whole(make_device):
    pieces = [(i * 7) % 23 for i in range(3000)]
    length = sum(pieces)
    device, data = make_device(length + 7), pattern(length, 1)
    assert vectors.writev(device, 5, data, pieces) == 0
    assert device.read(0, length + 7) == bytes(5) + data + bytes(2)
    assert vectors.writev(device, 5, data[::-1], pieces, vectors.FUA) == 0
    buffer = bytearray(length)
    assert vectors.readv(device, 5, buffer, [1] * 2000 + [0] * 100 + [length - 2000]) == 0
    assert buffer == data[::-1]


def test_empty_pieces_of_a_vector_are_skipped(make_device):
    device = make_device(100)
    assert vectors.writev(device, 1, b"abc", [0] * 1500 + [1, 0, 2] + [0] * 1500) == 0
    buffer = bytearray(3)
    assert vectors.readv(device, 1, buffer, [0] * 2000 + [3]) == 0
    assert buffer == b"abc"


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (0, 1001), (1000, 1), (1 << 62, 1 << 62)])
def test_ranges_outside_the_device_are_refused_and_change_nothing(make_device, offset, length):
    device = make_device(1000)
    for call in (device.read, device.write_zeroes, device.discard, device.extents):
        with pytest.raises(ValueError, match="not within the device's 1000 bytes"):
            call(offset, length)
    assert device.read(0, 1000) == bytes(1000)


def test_requests_of_no_bytes_do_nothing(make_device):
    device = make_device(1000)
    for offset in (0, 1000):
        device.write(offset, b"")
        device.write_zeroes(offset, 0)
        device.discard(offset, 0)
        assert device.read(offset, 0) == b""
        assert device.readinto(offset, bytearray()) == 0
        assert len(device.extents(offset, 0)) == 0
    assert device.read(0, 1000) == bytes(1000)


def test_what_is_no_buffer_is_a_type_error(make_device):
    device = make_device(1000)
    with pytest.raises(TypeError):
        device.write(0, "text")
    with pytest.raises(BufferError):
        device.readinto(0, b"read-only")


def test_readinto_fills_numpy_arrays_and_says_how_much(make_device):
    device = make_device(10000)
    device.write(0, pattern(10000, 3))
    array = np.empty((10, 100), dtype="<u4")
    assert device.readinto(17, array) == 4000
    assert array.tobytes() == pattern(10000, 3)[17:4017]


def test_a_closed_device_refuses_everything(make_device):
    device = make_device(1000)
    device.close()
    device.close()
    for call in (lambda: device.read(0, 1), lambda: device.write(0, b"1"), lambda: device.write_zeroes(0, 1),
                 lambda: device.discard(0, 1), device.flush, device.extents):
        with pytest.raises(ValueError, match="is closed"):
            call()


def test_threads_on_ranges_of_their_own_do_not_disturb_each_other(make_device):
    device, share, failures = make_device(8 * 5000), 5000, []

    def work(n):
        try:
            for i in range(30):
                data = pattern(share, n * 1000 + i)
                device.write(n * share, data)
                device.write_zeroes(n * share + 100, 1000)
                expected = data[:100] + bytes(1000) + data[1100:]
                assert device.read(n * share, share) == expected
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
