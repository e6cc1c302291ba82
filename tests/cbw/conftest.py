"""Disks for engines to sit on, and the check that a test leaves nothing behind."""

import gc
import os
import pathlib
import sys
import tempfile
import threading
import time

import pytest

from fastcbw.block.file import FileDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.block.python import Device, PythonDevice

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))


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


def wait_until(condition, seconds=10):
    """Return when CONDITION() is true. For what another thread does by itself (the keeper), not for making races."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {condition}"
        time.sleep(0.0005)


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """Fail a test that leaves a thread or a descriptor."""
    gc.collect()
    descriptors, threads = len(os.listdir("/proc/self/fd")), set(threading.enumerate())
    yield
    gc.collect()
    assert set(threading.enumerate()) <= threads
    assert len(os.listdir("/proc/self/fd")) <= descriptors


@pytest.fixture
def shm_path():
    """A folder in memory (tmpfs)."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="fastcbw-test-") as path:
        yield pathlib.Path(path)


KINDS = ("memory", "tmpfs file", "python")


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
    raise AssertionError(kind)
