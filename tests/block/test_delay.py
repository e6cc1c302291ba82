"""DelayDevice: delays, the bandwidth limit, gates."""

import errno
import threading
import time

import pytest

from fastcbw.block import vectors
from fastcbw.block.delay import DelayDevice
from fastcbw.block.fault import FaultDevice
from fastcbw.block.memory import MemoryDevice


@pytest.fixture
def delay():
    device = DelayDevice(FaultDevice(MemoryDevice(1 << 20)))
    yield device
    device.close()


def ms(call, *arguments):
    """Milliseconds that the call took."""
    start = time.monotonic()
    call(*arguments)
    return (time.monotonic() - start) * 1000


def start(call, *arguments):
    thread = threading.Thread(target=call, args=arguments)
    thread.start()
    return thread


OPERATIONS = {
    "read": lambda device: device.read(0, 4096),
    "write": lambda device: device.write(0, bytes(4096)),
    "zero": lambda device: device.write_zeroes(0, 4096),
    "discard": lambda device: device.discard(0, 4096),
    "flush": lambda device: device.flush(),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_has_a_delay_of_its_own_set_live(delay, operation):
    delay.set(**{f"{operation}_ms": 20})
    assert ms(OPERATIONS[operation], delay) >= 20
    delay.set(**{f"{operation}_ms": 0}, **{f"{other}_ms": 60000 for other in OPERATIONS if other != operation})
    assert ms(OPERATIONS[operation], delay) < 10000
    assert delay.child.requests[operation] == 2


def test_delays_apply_to_their_range_only(delay):
    delay.set(write_ms=20, offset=65536, length=4096)
    assert ms(delay.write, 65535, b"ab") >= 20
    assert ms(delay.write, 69631, b"a") >= 20
    delay.set(write_ms=60000)
    assert ms(delay.write, 69632, b"a") < 10000
    assert ms(delay.write, 65535, b"a") < 10000


def test_the_bandwidth_limit_is_kept_by_all_threads_together(delay):
    delay.set(bytes_per_s=10 << 20)
    began = time.monotonic()
    threads = [start(delay.write, n * 65536, bytes(65536)) for n in range(8)]
    for thread in threads:
        thread.join()
    assert time.monotonic() - began >= 0.05     # 512 KiB at 10 MiB/s
    delay.set(bytes_per_s=0)
    assert ms(delay.write, 0, bytes(1 << 20)) < 10000


def test_arguments_without_sense_change_nothing(delay):
    for wrong in ({"read_ms": -1}, {"offset": 1, "length": 1 << 20}, {"length": 5}, {"bytes_per_s": -1}):
        with pytest.raises(ValueError):
            delay.set(write_ms=60000, **wrong)
    assert ms(delay.write, 0, b"x") < 10000
    with pytest.raises(ValueError, match="'erase' does not exist"):
        delay.hold("erase")
    with pytest.raises(ValueError, match="not within"):
        delay.hold("read", 1, 1 << 20)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_gate_holds_requests_before_the_child(delay, operation):
    with delay.hold(operation) as gate:
        threads = [start(OPERATIONS[operation], delay) for _ in range(3)]
        gate.wait_arrived(3)
        assert gate.arrived == 3
        assert delay.child.requests[operation] == 0
        assert all(thread.is_alive() for thread in threads)
    for thread in threads:
        thread.join()
    assert gate.arrived == 3
    assert delay.child.requests[operation] == 3
    OPERATIONS[operation](delay)    # open: nobody waits


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_gate_may_hold_requests_after_the_child(delay, operation):
    gate = delay.hold(operation, after=True)
    thread = start(OPERATIONS[operation], delay)
    gate.wait_arrived()
    assert delay.child.requests[operation] == 1
    assert thread.is_alive()
    gate.open()
    gate.open()
    thread.join()


def test_a_gate_lets_other_ranges_and_operations_pass(delay):
    with delay.hold("write", 65536, 4096) as gate:
        delay.write(65535, b"a")
        delay.write(69632, b"a")
        delay.read(0, 1 << 20)
        assert gate.arrived == 0
        threads = [start(delay.write, 65535, b"ab"), start(delay.write, 69631, b"a")]
        gate.wait_arrived(2)
    for thread in threads:
        thread.join()
    assert delay.read(65535, 2) == b"ab"


def test_waiting_for_requests_that_do_not_come_ends(delay):
    with delay.hold("read") as gate, pytest.raises(TimeoutError, match="0 of 2 requests"):
        gate.wait_arrived(2, timeout=0.01)


def test_a_gate_that_nobody_can_open_any_more_opens(delay):
    gate = delay.hold("write")
    thread = start(delay.write, 0, b"a")
    gate.wait_arrived()
    del gate
    thread.join()
    assert delay.read(0, 1) == b"a"


def test_closing_opens_the_gates(delay):
    gate = delay.hold("read")
    thread = start(delay.read, 0, 1)
    gate.wait_arrived()
    delay.close()
    thread.join()
    assert gate.arrived == 1


def test_gates_are_limited_and_can_be_used_again(delay):
    gates = [delay.hold("read") for _ in range(16)]
    with pytest.raises(RuntimeError, match="all 16 gates"):
        delay.hold("read")
    gates.pop().open()
    gates.append(delay.hold("write", 5, 5))
    assert gates[-1].arrived == 0
    for gate in gates:
        gate.open()
    delay.write(5, b"x")
    assert delay.read(5, 1) == b"x"


def test_a_request_passes_all_gates_that_it_meets(delay):
    first, second = delay.hold("write"), delay.hold("write", after=True)
    thread = start(delay.write, 0, b"x")
    first.wait_arrived()
    assert second.arrived == 0
    first.open()
    second.wait_arrived()
    assert delay.child.requests["write"] == 1
    second.open()
    thread.join()


def test_reads_without_waiting_do_not_wait(delay):
    def nowait():
        return vectors.readv(delay, 4096, bytearray(4096), [4096], nowait=True)

    assert nowait() == 0
    with delay.hold("read", 8191, 1), delay.hold("write"):
        assert nowait() == -errno.EAGAIN
    with delay.hold("read", 8192), delay.hold("write"):
        assert nowait() == 0
    delay.set(read_ms=1)
    assert nowait() == -errno.EAGAIN
    delay.set(read_ms=0, bytes_per_s=1)
    assert nowait() == -errno.EAGAIN


def test_all_else_is_the_childs(delay):
    delay.write(0, b"x", fua=True)
    delay.flush()
    assert delay.child.requests["fua"] == 1 and delay.child.requests["flush"] == 1
    assert delay.extents().tolist() == delay.child.child.extents().tolist()
    assert vectors.write_zeroes_at(delay, 0, 4096, vectors.FUA | vectors.MAY_UNMAP) == 0
    assert vectors.discard_at(delay, 0, 4096, vectors.FUA) == 0
    assert delay.child.requests["fua"] == 3
    with pytest.raises(TypeError):
        DelayDevice(None)
