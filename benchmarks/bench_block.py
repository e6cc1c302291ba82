"""Block devices: the door from Python, the file device, the memory device; each beside its floors.

Files are on tmpfs, so that what is seen is ours and not the disk's.
"""

import os
import tempfile

import numpy as np
import pytest

from fastcbw.block import vectors
from fastcbw.block.delay import DelayDevice
from fastcbw.block.fault import FaultDevice
from fastcbw.block.file import FileDevice
from fastcbw.block.memory import MemoryDevice

LENGTH = 16 << 20
DATA = np.random.default_rng(1).integers(0, 256, 1 << 20, dtype=np.uint8).tobytes()
PAGE = DATA[:4096]


@pytest.fixture
def path():
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="fastcbw-bench-") as folder:
        with open(f"{folder}/image", "wb") as file:
            for _ in range(LENGTH >> 20):
                file.write(DATA)
        yield f"{folder}/image"


@pytest.fixture
def device(path):
    with FileDevice(path) as device:
        yield device


def test_write_4k_through_the_door(beside, device):
    fd = device.fileno()
    # At most 0.2 us over a bare os.pwrite, which takes a little over 1 us where the goals were set.
    beside(lambda: device.write(8192, PAGE), {"os.pwrite": lambda: os.pwrite(fd, PAGE, 8192)}, {"os.pwrite": 0.84}, bytes=4096)
    assert os.pread(fd, 4096, 8192) == PAGE


def test_write_4k_through_two_idle_filters(beside, device):
    above = DelayDevice(FaultDevice(device))
    beside(lambda: above.write(8192, PAGE), {"the file device": lambda: device.write(8192, PAGE)}, bytes=4096)
    assert device.read(8192, 4096) == PAGE


def test_write_4k_to_memory(beside):
    target = bytearray(LENGTH)
    with MemoryDevice(LENGTH) as device:
        def copy():
            target[8192:12288] = PAGE

        beside(lambda: device.write(8192, PAGE), {"a slice of a bytearray": copy}, bytes=4096)
        assert device.read(8192, 4096) == PAGE


@pytest.mark.parametrize("pieces", [1, 256])
def test_read_1m(beside, device, pieces):
    fd, buffer, bare = device.fileno(), bytearray(1 << 20), bytearray(1 << 20)
    cut = [(1 << 20) // pieces] * pieces
    beside(lambda: vectors.readv(device, 0, buffer, cut), {"os.preadv": lambda: os.preadv(fd, [bare], 0)},
           {"os.preadv": 0.9} if pieces == 1 else None, bytes=1 << 20)
    assert buffer == bare == DATA


def test_read_1m_from_memory(beside):
    source, target, bare = np.frombuffer(DATA, np.uint8).copy(), bytearray(1 << 20), np.ones(1 << 20, np.uint8)
    with MemoryDevice(LENGTH) as device:
        device.write(0, DATA)
        beside(lambda: device.readinto(0, target), {"memcpy": lambda: np.copyto(bare, source)}, {"memcpy": 0.9}, bytes=1 << 20)
    assert target == DATA
