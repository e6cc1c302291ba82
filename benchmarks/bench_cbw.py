"""Copy-before-write: each path of the engine beside what it would cost without an engine, on memory and on tmpfs.

The floor of a first touch is the least that any copy-before-write does: read the old data, keep it, write the new.
"""

import os
import shutil
import tempfile

import numpy as np
import pytest

from fastcbw.block.memory import MemoryDevice
from fastcbw.cbw.copier import Copier
from fastcbw.cbw.engine import Engine
from fastcbw.block.file import FileDevice

MIB = 1 << 20
DATA = np.random.default_rng(2).integers(0, 256, MIB, dtype=np.uint8).tobytes()
PAGE = DATA[:4096]


def filled(length):
    device = MemoryDevice(length)
    for offset in range(0, length, MIB):
        device.write(offset, DATA)
    return device


@pytest.fixture
def engine():
    child = filled(64 * MIB)
    engine = Engine(child)
    yield engine
    engine.close()
    child.close()


def test_write_4k_without_a_snapshot(beside, engine):
    child = filled(MIB)
    beside(lambda: engine.device.write(8192, PAGE), {"the bare device": lambda: child.write(8192, PAGE)}, bytes=4096)
    assert engine.device.read(8192, 4096) == PAGE and engine.counters()["touches"] == 0


def test_write_4k_that_is_settled(beside, engine):
    """The goal is 15 ns over the bare device; the door from Python is in both."""
    child = filled(MIB)
    engine.snapshot("s")
    beside(lambda: engine.device.write(8192, PAGE), {"the bare device": lambda: child.write(8192, PAGE)}, bytes=4096)
    assert engine.counters()["touches"] == 1


@pytest.mark.parametrize("size", ["4K", "64K"])
def test_first_touch_of_4k(beside, engine, size):
    """A thousand first touches, one per 64 KiB, and the snapshot that they are made under."""
    offsets = range(0, 64 * MIB, 65536)
    cluster = 4096 if size == "4K" else 65536
    bare, kept = filled(64 * MIB), MemoryDevice(64 * MIB)
    buffer = bytearray(cluster)

    def touch():
        snapshot = engine.snapshot("s", ram="64M", cluster_size=size)
        for offset in offsets:
            engine.device.write(offset, PAGE)
        assert engine.report("s")["preserved_clusters"] == len(offsets)
        del snapshot
        engine.delete("s")

    def floor():
        for offset in offsets:
            bare.readinto(offset, buffer)
            kept.write(offset, buffer)
            bare.write(offset, PAGE)

    beside(touch, {"read, keep, write": floor}, bytes=len(offsets) * 4096)


def test_snapshot_read_1m_untouched(beside, engine):
    snapshot = engine.snapshot("s")
    child, ours, bare = filled(MIB), bytearray(MIB), bytearray(MIB)
    beside(lambda: snapshot.readinto(0, ours), {"the bare device": lambda: child.readinto(0, bare)}, bytes=MIB)
    assert ours == bare == DATA


@pytest.mark.parametrize("size", ["4K", "64K"])
def test_snapshot_read_1m_preserved(beside, engine, size):
    snapshot = engine.snapshot("s", cluster_size=size)
    engine.device.write(0, bytes(MIB))
    child, ours, bare = filled(MIB), bytearray(MIB), bytearray(MIB)
    beside(lambda: snapshot.readinto(0, ours), {"the bare device": lambda: child.readinto(0, bare)}, bytes=MIB)
    assert ours == bare == DATA


@pytest.mark.parametrize("length", ["1G", "64T"])
def test_take_and_end_a_snapshot(beside, full, length):
    """The cost must not follow the length of the disk: the floor is the same on a disk of 1 MiB."""
    with tempfile.TemporaryDirectory(dir="/var/tmp" if length == "1G" else "/dev/shm") as folder:
        path = os.path.join(folder, "disk")
        large, small = FileDevice(path, create_length=length), MemoryDevice(MIB)
        engines = [Engine(large), Engine(small)]

        def cycle(engine):
            engine.snapshot("s")
            engine.delete("s")

        beside(lambda: cycle(engines[0]), {"a disk of 1 MiB": lambda: cycle(engines[1])})
        for engine in engines:
            engine.close()
        large.close()


def test_copy_out_64m_to_a_new_file(beside, full):
    """One worker on tmpfs beside a loop of os.preadv and os.pwrite with the same buffer."""
    length = (256 if full else 16) * MIB
    folder = tempfile.mkdtemp(dir="/dev/shm", prefix="fastcbw-bench-")
    try:
        source = FileDevice(os.path.join(folder, "source"), create_length=length)
        for offset in range(0, length, MIB):
            source.write(offset, DATA)
        buffer = bytearray(1 << 18)

        def ours():
            with FileDevice(os.path.join(folder, "ours"), create_length=length) as target:
                copier = Copier(source, target, chunk=1 << 18, target_is_zero=True)
                copier.run()
                assert copier.error is None and copier.counters()["data"] == length
            os.unlink(os.path.join(folder, "ours"))

        def floor():
            fd = os.open(os.path.join(folder, "bare"), os.O_RDWR | os.O_CREAT)
            for offset in range(0, length, len(buffer)):
                os.preadv(source.fileno(), [buffer], offset)
                os.pwrite(fd, buffer, offset)
            os.close(fd)
            os.unlink(os.path.join(folder, "bare"))

        beside(ours, {"os.preadv and os.pwrite": floor}, bytes=length)
        source.close()
    finally:
        shutil.rmtree(folder)
