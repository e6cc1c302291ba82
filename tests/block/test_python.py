"""Device and PythonDevice: a device written in Python."""

import errno
import logging
import threading

import pytest

from fastcbw.block import vectors
from fastcbw.block.delay import DelayDevice
from fastcbw.block.python import HOLE, ZERO, Device, PythonDevice


class Recorder(Device):
    """Remembers the calls, raises what it is told to."""

    length = 10000

    def __init__(self):
        self.calls = []
        self.raises = None
        self.data = bytearray(b"r" * self.length)

    def note(self, *call):
        self.calls.append(call)
        if self.raises is not None:
            raise self.raises

    def read(self, offset, length):
        self.note("read", offset, length)
        return memoryview(self.data)[offset : offset + length]

    def write(self, offset, data):
        self.note("write", offset, data)
        self.data[offset : offset + len(data)] = data

    def write_zeroes(self, offset, length, *, unmap=True):
        self.note("zero", offset, length, unmap)
        self.data[offset : offset + length] = bytes(length)

    def discard(self, offset, length):
        self.note("discard", offset, length)

    def flush(self):
        self.note("flush")

    def extents(self, offset, length):
        self.note("extents", offset, length)
        yield 4096, 0
        yield 8192, HOLE | ZERO

    def close(self):
        self.note("close")


@pytest.fixture
def user():
    return Recorder()


@pytest.fixture
def device(user):
    return PythonDevice(user)


def test_each_request_is_one_call(device, user):
    assert vectors.writev(device, 5, b"abcdef", [1, 0, 3, 2]) == 0
    buffer = bytearray(6)
    assert vectors.readv(device, 5, buffer, [4, 2]) == 0
    device.write_zeroes(7, 3)
    device.write_zeroes(7, 3, unmap=False)
    device.discard(1, 2)
    device.flush()
    device.close()
    device.close()
    assert buffer == b"abcdef"
    assert user.calls == [("write", 5, b"abcdef"), ("read", 5, 6), ("zero", 7, 3, True), ("zero", 7, 3, False),
                          ("discard", 1, 2), ("flush",), ("close",)]


def test_fua_is_a_flush_after_the_request(device, user):
    device.write(0, b"x", fua=True)
    device.write_zeroes(0, 1, fua=True)
    assert vectors.discard_at(device, 0, 1, vectors.FUA) == 0
    assert [call[0] for call in user.calls] == ["write", "flush", "zero", "flush", "discard", "flush"]


def test_what_the_device_keeps_is_its_own(device, user):
    data = bytearray(b"before")
    device.write(0, data)
    data[:] = b"after!"
    assert user.calls[0][2] == b"before" and type(user.calls[0][2]) is bytes
    got = device.read(0, 6)
    user.data[0:6] = b"change"
    assert got == b"before"


def test_the_smallest_device_is_read_only_and_all_data():
    class Fives(Device):
        length = 100

        def read(self, offset, length):
            return b"5" * length

    with PythonDevice(Fives()) as device:
        assert device.read_only and device.name == "Fives" and device.read(0, 100) == b"5" * 100
        assert device.extents().tolist() == [(0, 100, 0)]
        device.flush()
        with pytest.raises(PermissionError, match="Fives: opened read-only"):
            device.write(0, b"x")
        assert vectors.writev(device, 0, b"x", [1]) == -errno.EROFS


def test_zeroes_fall_back_to_writes_where_the_device_has_none():
    class Plain(Recorder):
        write_zeroes = Device.write_zeroes

    user = Plain()
    device = PythonDevice(user)
    assert vectors.write_zeroes_at(device, 10, 20, vectors.FAST_ONLY) == -errno.EOPNOTSUPP
    assert user.calls == []
    device.write_zeroes(10, 20)
    assert user.calls == [("write", 10, bytes(20))]


def test_zeroes_fall_back_to_writes_where_the_device_says_so(device, user):
    def refuse(offset, length, *, unmap=True):
        raise OSError(errno.EOPNOTSUPP, "not today")

    user.write_zeroes = refuse
    assert vectors.write_zeroes_at(device, 10, 20, vectors.FAST_ONLY) == -errno.EOPNOTSUPP
    device.write_zeroes(10, 20)
    assert user.calls == [("write", 10, bytes(20))]


CALLS = {
    "read": lambda device: device.read(10, 10),
    "write": lambda device: device.write(10, bytes(10)),
    "write zeroes": lambda device: device.write_zeroes(10, 10),
    "discard": lambda device: device.discard(10, 10),
    "flush": lambda device: device.flush(),
    "block status": lambda device: device.extents(10, 10),
}


@pytest.mark.parametrize("operation", CALLS)
def test_an_oserror_keeps_its_errno_and_is_the_cause(device, user, operation, caplog):
    user.raises = OSError(errno.ENOSPC, "pool empty")
    with pytest.raises(OSError, match=f"Recorder: {operation} ") as caught:
        CALLS[operation](device)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.__cause__ is user.raises and device.last_error is user.raises
    assert caplog.records == []


@pytest.mark.parametrize("operation", CALLS)
def test_any_other_exception_is_eio_and_logged_and_the_cause(device, user, operation, caplog):
    user.raises = KeyError("bug")
    with caplog.at_level(logging.ERROR, "fastcbw.block"), pytest.raises(OSError) as caught:
        CALLS[operation](device)
    assert caught.value.errno == errno.EIO
    assert caught.value.__cause__ is user.raises and device.last_error is user.raises
    assert len(caplog.records) == 1 and f"Recorder: {operation} " in caplog.text and "KeyError" in caplog.text


def test_an_oserror_without_an_errno_is_eio(device, user):
    user.raises = OSError("just text")
    with pytest.raises(OSError) as caught:
        device.read(0, 1)
    assert caught.value.errno == errno.EIO


def test_ctrl_c_in_the_device_reaches_the_caller(device, user):
    user.raises = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        device.read(0, 1)
    user.raises = None
    assert device.read(0, 1) == b"r"


@pytest.mark.parametrize("answer", [b"", b"123", b"12345", None, "text", 5])
def test_a_read_that_returns_something_else_is_an_error_and_never_zeroes(device, user, answer):
    user.read = lambda offset, length: answer
    buffer = bytearray(b"keep")
    with pytest.raises(OSError) as caught:
        device.readinto(0, buffer)
    assert caught.value.errno == errno.EIO
    assert isinstance(caught.value.__cause__, (ValueError, TypeError))


@pytest.mark.parametrize("answer", [[], [(0, 0)], [(-1, 0)], [(5, 4)], [5], None])
def test_extents_without_sense_are_an_error(device, user, answer):
    user.extents = lambda offset, length: answer
    with pytest.raises(OSError) as caught:
        device.extents()
    assert caught.value.errno == errno.EIO


def test_extents_are_asked_for_piece_by_piece_and_cut_to_the_range(device, user):
    assert device.extents(0, 5000).tolist() == [(0, 5000, 0)]     # the first extent of each answer counts
    assert user.calls == [("extents", 0, 5000), ("extents", 4096, 904)]
    user.extents = lambda offset, length: [(1 << 40, ZERO)]
    assert device.extents(3, 10).tolist() == [(3, 10, 2)]


@pytest.mark.parametrize("length", [0, -1, 1.5, "1M", True, None, 1 << 63])
def test_a_length_without_sense_is_refused(length):
    user = Recorder()
    user.length = length
    with pytest.raises(ValueError, match="Recorder: length"):
        PythonDevice(user)


def test_what_is_no_device_is_refused():
    with pytest.raises(TypeError, match="expected a fastcbw.Device, got object"):
        PythonDevice(object())


def test_requests_run_in_the_thread_that_makes_them_below_other_devices(device, user):
    seen = []
    user.read = lambda offset, length: seen.append(threading.get_ident()) or bytes(length)
    above = DelayDevice(device, read_ms=1)
    threads = [threading.Thread(target=above.read, args=(0, 1)) for _ in range(4)]
    for thread in threads:
        thread.start()
    idents = {thread.ident for thread in threads}
    for thread in threads:
        thread.join()
    assert set(seen) <= idents and len(seen) == 4


def test_the_cause_is_told_through_the_devices_above(device, user):
    user.raises = OSError(errno.ETIMEDOUT, "bus")
    with pytest.raises(TimeoutError) as caught:
        DelayDevice(device).read(0, 1)
    assert caught.value.__cause__ is user.raises
