"""Push: a backup job from a snapshot of a file into a new file, beside bare loops over the same bytes.

On tmpfs the kernel copies (cbw/offload.py); --verify, and anything but two plain files, passes through the process. The floors make a new
file, too, and end with the same fdatasync.
"""

import os
import shutil
import tempfile

import numpy as np
import pytest

import fastcbw
from fastcbw.block.delay import DelayDevice
from fastcbw.block.memory import MemoryDevice

MIB = 1 << 20
DATA = np.random.default_rng(3).integers(0, 256, MIB, dtype=np.uint8).tobytes()


class Push:
    """A file of random data, and where it is copied to."""

    def __init__(self, folder, length):
        self.folder, self.length = folder, length
        self.source = os.path.join(folder, "source")
        with open(self.source, "wb") as file:
            for i in range(length // MIB):
                file.write(i.to_bytes(8, "little") + DATA[8:])
        self.disk = fastcbw.open(self.source)
        self.snapshot = self.disk.snapshot("s", ram="64M")

    def ours(self, **options):
        path = os.path.join(self.folder, "ours")
        result = self.snapshot.backup(path, **options).wait()
        assert result["data_bytes"] == self.length
        os.unlink(path)

    def bare(self, copy, piece):
        path = os.path.join(self.folder, "bare")
        source, target = os.open(self.source, os.O_RDONLY), os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.ftruncate(target, self.length)
        for offset in range(0, self.length, piece):
            copy(source, target, piece, offset)
        os.fdatasync(target)
        os.close(source)
        os.close(target)
        os.unlink(path)

    def copy_file_range(self):
        self.bare(lambda source, target, piece, offset: os.copy_file_range(source, target, piece, offset, offset), MIB)

    def pread_pwrite(self):
        buffer = bytearray(256 << 10)

        def copy(source, target, piece, offset):
            os.preadv(source, [buffer], offset)
            os.pwrite(target, buffer, offset)

        self.bare(copy, len(buffer))

    def check(self):
        """The copy is the disk as it was, whatever the guest has written since."""
        path = os.path.join(self.folder, "checked")
        self.disk.write(5 * MIB, bytes(MIB))
        self.snapshot.backup(path).wait()
        with open(path, "rb") as file:
            for i in range(self.length // MIB):
                assert file.read(MIB) == i.to_bytes(8, "little") + DATA[8:]
        os.unlink(path)

    def close(self):
        self.disk.close()
        shutil.rmtree(self.folder)


@pytest.fixture(params=["/dev/shm", "/var/tmp"], ids=["tmpfs", "disk"])
def push(request, full):
    push = Push(tempfile.mkdtemp(dir=request.param, prefix="fastcbw-bench-"), (512 if full else 16) * MIB)
    yield push
    push.close()


def test_push_to_a_new_file(beside, push):
    beside(push.ours, {"bare copy_file_range": push.copy_file_range, "bare pread and pwrite": push.pread_pwrite}, bytes=push.length)
    push.check()


def test_push_to_a_device_with_latency(beside, full):
    """A target that takes 2 ms for each write: one worker, and as many as the job finds to be worth it."""
    length = (256 if full else 16) * MIB
    source = MemoryDevice(length)
    for offset in range(0, length, MIB):
        source.write(offset, DATA)
    target = DelayDevice(MemoryDevice(length), write_ms=2)
    with fastcbw.open(source, name="disk") as disk:
        snapshot = disk.snapshot("s", ram="64M")
        beside(lambda: snapshot.backup(target).wait(), {"one worker": lambda: snapshot.backup(target, workers=1).wait()}, bytes=length)
    assert target.read(length - MIB, MIB) == DATA
