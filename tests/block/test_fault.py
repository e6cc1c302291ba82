"""FaultDevice: rules and counters."""

import errno
import threading

import pytest

from fastcbw.block import vectors
from fastcbw.block.fault import FaultDevice
from fastcbw.block.memory import MemoryDevice

CALLS = {
    "read": lambda device: device.read(100, 10),
    "write": lambda device: device.write(100, bytes(10)),
    "zero": lambda device: device.write_zeroes(100, 10),
    "discard": lambda device: device.discard(100, 10),
    "flush": lambda device: device.flush(),
    "status": lambda device: device.extents(100, 10),
}


@pytest.fixture
def fault():
    with FaultDevice(MemoryDevice(1 << 20)) as device:
        yield device


@pytest.mark.parametrize("operation", CALLS)
def test_a_rule_fails_its_operation_and_no_other(fault, operation):
    with fault.fail_on(operation, errno=errno.ENOSPC) as rule:
        for other, call in CALLS.items():
            if other == operation:
                with pytest.raises(OSError) as caught:
                    call(fault)
                assert caught.value.errno == errno.ENOSPC
            else:
                call(fault)
        assert rule.hits == 1
    CALLS[operation](fault)
    assert rule.hits == 1


def test_a_failed_request_does_not_reach_the_child(fault):
    fault.write(0, b"old")
    with fault.fail_on("write"), pytest.raises(OSError, match="write 0.3: Input/output error"):
        fault.write(0, b"new")
    assert fault.read(0, 3) == b"old"


def test_a_rule_has_a_range(fault):
    rule = fault.fail_on("read", 4096, 4096)
    fault.read(0, 4096)
    fault.read(8192, 4096)
    for offset, length in ((4095, 2), (8191, 1), (0, 1 << 20)):
        with pytest.raises(OSError):
            fault.read(offset, length)
    assert rule.hits == 3


def test_a_rule_fails_so_many_after_so_many(fault):
    fault.fail_on("write", after=2, count=3)
    results = []
    for _ in range(8):
        try:
            fault.write(0, b"x")
            results.append("ok")
        except OSError:
            results.append("failed")
    assert results == ["ok"] * 2 + ["failed"] * 3 + ["ok"] * 3


def test_of_several_rules_the_first_that_is_due_gives_the_error(fault):
    fault.fail_on("write", errno=errno.EIO, after=1, count=1)
    fault.fail_on("write", errno=errno.ENOSPC)
    codes = []
    for _ in range(3):
        with pytest.raises(OSError) as caught:
            fault.write(0, b"x")
        codes.append(caught.value.errno)
    assert codes == [errno.ENOSPC, errno.EIO, errno.ENOSPC]


def test_requests_and_bytes_are_counted(fault):
    for call in CALLS.values():
        call(fault)
    fault.write(0, b"x", fua=True)
    fault.write_zeroes(0, 5, fua=True)
    assert vectors.discard_at(fault, 0, 5, vectors.FUA) == 0
    assert fault.requests == {"read": 1, "write": 2, "zero": 2, "discard": 2, "flush": 1, "status": 1, "fua": 3}
    assert fault.bytes == {"read": 10, "write": 11, "zero": 15, "discard": 15, "flush": 0, "status": 10}
    fault.reset_counts()
    assert not any(fault.requests.values()) and not any(fault.bytes.values())


def test_failed_requests_count_too(fault):
    with fault.fail_on("flush"), pytest.raises(OSError):
        fault.flush()
    assert fault.requests["flush"] == 1


def test_a_read_without_waiting_meets_its_rule_on_the_waiting_path_only(fault):
    rule = fault.fail_on("read", 0, 4096, count=1)
    assert vectors.readv(fault, 0, bytearray(10), [10], nowait=True) == -errno.EAGAIN
    assert rule.hits == 0 and fault.requests["read"] == 0
    assert vectors.readv(fault, 0, bytearray(10), [10]) == -errno.EIO
    assert vectors.readv(fault, 0, bytearray(10), [10], nowait=True) == 0    # used up
    assert vectors.readv(fault, 8192, bytearray(10), [10], nowait=True) == 0
    assert fault.requests["read"] == 3


def test_arguments_without_sense_are_refused(fault):
    for wrong in ({"offset": 5, "length": 1 << 20}, {"errno": 0}, {"count": -2}, {"after": -1}):
        with pytest.raises(ValueError):
            fault.fail_on("read", **wrong)
    with pytest.raises(ValueError, match="'erase' does not exist"):
        fault.fail_on("erase")
    fault.read(0, 1)


def test_rules_are_limited_and_can_be_used_again(fault):
    rules = [fault.fail_on("read") for _ in range(32)]
    with pytest.raises(RuntimeError, match="all 32 rules"):
        fault.fail_on("read")
    for rule in rules:
        rule.remove()
        rule.remove()
    fault.read(0, 1)
    with fault.fail_on("read"), pytest.raises(OSError):
        fault.read(0, 1)


def test_threads_share_a_rules_count(fault):
    fault.fail_on("write", count=50)
    failed = []

    def work():
        for _ in range(100):
            try:
                fault.write(0, b"x")
            except OSError as error:
                failed.append(error.errno)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [errno.EIO] * 50
    assert fault.requests["write"] == 400
