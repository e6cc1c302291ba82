"""A place where devices are exchanged: requests under way are waited for, new ones wait, at the bound nothing has changed."""

import errno
import threading

import pytest

from fastcbw.block.delay import DelayDevice
from fastcbw.block.fault import FaultDevice
from fastcbw.block.file import FileDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.block.queued import QueuedDevice
from fastcbw.block.switch import SwitchDevice
from fastcbw.cbw.notifier import WriteNotifier

LENGTH = 1 << 20


def started(call, *arguments):
    thread = threading.Thread(target=call, args=arguments)
    thread.start()
    return thread


def ended(*threads):
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_requests_go_to_the_device_that_was_put_there():
    first, second = MemoryDevice(LENGTH), MemoryDevice(LENGTH)
    switch = SwitchDevice(first)
    switch.write(0, b"first")
    switch.hold(1)
    assert switch.put(second) is first
    switch.release()
    switch.write(0, b"other")
    assert (first.read(0, 5), second.read(0, 5), switch.child) == (b"first", b"other", second)


def test_requests_under_way_are_waited_for_and_new_ones_wait():
    first, second = DelayDevice(MemoryDevice(LENGTH)), MemoryDevice(LENGTH)
    switch = SwitchDevice(first)
    with first.hold("write", 0, 4096) as gate:
        write = started(switch.write, 0, b"under way")
        gate.wait_arrived()
        holding = started(switch.hold, 30)
        late = started(switch.write, 8192, b"new")
    ended(write, holding)
    assert first.read(0, 9) == b"under way"
    switch.put(second)
    switch.release()
    ended(late)
    assert b"new" in (first.read(8192, 3), second.read(8192, 3))


@pytest.mark.parametrize("operation, request_", [
    ("write", lambda device: device.write(0, b"x")), ("read", lambda device: device.read(0, 1)), ("flush", lambda device: device.flush()),
    ("zero", lambda device: device.write_zeroes(0, 512)), ("discard", lambda device: device.discard(0, 512))])
def test_at_the_bound_requests_go_on_as_before(operation, request_):
    child = DelayDevice(MemoryDevice(LENGTH))
    switch = SwitchDevice(child, name="place")
    with child.hold(operation) as gate:
        thread = started(request_, switch)
        gate.wait_arrived()
        with pytest.raises(TimeoutError, match=r"place: requests under way did not end within 0.01 s \(nothing was changed\)"):
            switch.hold(0.01)
        switch.extents(0, 4096)         # others pass
        with pytest.raises(RuntimeError, match="put without hold"):
            switch.put(MemoryDevice(LENGTH))
    ended(thread)
    assert switch.child is child


def test_what_waits_in_a_queue_goes_on_afterwards(tmp_path):
    """A queue's requests are counted from their beginning to their end, whoever does them."""
    with FileDevice(tmp_path / "a", create_length=LENGTH, io="uring") as first, FileDevice(tmp_path / "b", create_length=LENGTH) as second:
        switch = SwitchDevice(first)
        queue = QueuedDevice(switch, "uring")
        threads = [started(lambda i=i: [queue.write(i * 65536 + n * 512, bytes([i + 1]) * 512) for n in range(100)]) for i in range(4)]
        for _ in range(50):
            switch.hold(30)
            before = switch.put(second if switch.child is first else first)
            # What was there is idle: what it holds does not change any more until it is put back.
            assert before.read(0, LENGTH) == before.read(0, LENGTH)
            switch.release()
        ended(*threads)
        for i in range(4):
            a, b = first.read(i * 65536, 51200), second.read(i * 65536, 51200)
            assert bytes(x | y for x, y in zip(a, b)) == bytes([i + 1]) * 51200
        queue.close()


@pytest.mark.parametrize("other, words", [(MemoryDevice(100), "100 bytes are not the 1048576"), (MemoryDevice(LENGTH, read_only=True), "is read-only")])
def test_a_device_that_is_another_disk_is_refused(other, words):
    switch = SwitchDevice(MemoryDevice(LENGTH))
    switch.hold(1)
    with pytest.raises(ValueError, match=words):
        switch.put(other)
    switch.release()
    switch.write(0, b"x")


def test_what_a_code_means_is_told_while_the_place_is_held():
    """Who asks holds the interpreter, or is who holds the place: it must not wait."""
    target = SwitchDevice(FaultDevice(MemoryDevice(LENGTH), name="target"))
    notifier = WriteNotifier(MemoryDevice(LENGTH), target)
    notifier.write(0, b"old")
    notifier.begin()
    with target.child.fail_on("write", errno=errno.ENOSPC):
        notifier.write(0, b"x")
    target.hold(1)
    assert notifier.error.endswith("No space left on device")
    target.release()
    assert notifier.error.endswith("No space left on device")
