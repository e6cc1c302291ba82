"""Disks for engines to sit on, calls in threads of their own, and a wait for what another thread does by itself."""

import threading
import time

from fastcbw.block.direct import DirectDevice
from fastcbw.block.file import FileDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.block.python import Device, PythonDevice
from fastcbw.block.queued import QueuedDevice


class Bytes(Device):
    """A disk written in Python; every copy of its old data goes through the pool, since it can't promise not to wait."""

    def __init__(self, length):
        self.length = length
        self.data = bytearray(length)

    def read(self, offset, length):
        return self.data[offset : offset + length]

    def write(self, offset, data):
        self.data[offset : offset + len(data)] = data

    def discard(self, offset, length):
        self.data[offset : offset + length] = bytes(length)


class Task(threading.Thread):
    """A call in a thread of its own, with its outcome."""

    def __init__(self, function, *arguments, **keywords):
        super().__init__(daemon=True)
        self.function, self.arguments, self.keywords = function, arguments, keywords
        self.start()

    def run(self):
        try:
            self.value, self.error = self.function(*self.arguments, **self.keywords), None
        except BaseException as error:
            self.value, self.error = None, error

    def result(self):
        self.join(20)
        assert not self.is_alive(), "it hangs"
        if self.error is not None:
            raise self.error
        return self.value


def wait_until(condition, seconds=10):
    """Return when CONDITION() is true. For what another thread does by itself (the keeper), not for making races."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {condition}"
        time.sleep(0.0005)


KINDS = ("memory", "tmpfs file", "python")
#: Disks whose guest's requests go through a queue: its engine, and whether past the page cache.
QUEUE_KINDS = ("queue threads file", "queue uring file", "queue threads direct", "queue uring direct")


def make_disk(kind, length, folder):
    """A fresh disk of LENGTH bytes; every kind reads zeroes after a discard."""
    match kind:
        case "memory":
            return MemoryDevice(length)
        case "tmpfs file":
            (folder / "image").unlink(missing_ok=True)
            return FileDevice(folder / "image", create_length=length)
        case "python":
            return PythonDevice(Bytes(length))
    if kind in QUEUE_KINDS:
        _, engine, how = kind.split()
        (folder / "image").unlink(missing_ok=True)
        return {"file": FileDevice, "direct": DirectDevice}[how](folder / "image", create_length=length, io=engine)
    raise AssertionError(kind)


def guest_of(kind, engine):
    """What the guest writes to: the engine's device, or that by way of a queue of its own."""
    return QueuedDevice(engine.device, engine.device.io) if kind in QUEUE_KINDS else engine.device
