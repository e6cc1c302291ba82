"""Devices to test, and the check that a test leaves nothing behind."""

import gc
import os
import pathlib
import tempfile
import time

import pytest
from nbd_servers import SERVERS, ServedDevices

from fastcbw.block.cache import CacheDevice
from fastcbw.block.delay import DelayDevice
from fastcbw.block.direct import DirectDevice
from fastcbw.block.fault import FaultDevice
from fastcbw.block.file import FileDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.block.python import HOLE, ZERO, Device, PythonDevice
from fastcbw.block.queued import QueuedDevice
from fastcbw.block.throttle import ThrottleDevice
from fastcbw.cbw.notifier import WriteNotifier
from fastcbw.export.nbd.server import Server


class Bytes(Device):
    """The device in Python that the tests use: a bytearray."""

    def __init__(self, length):
        self.length = length
        self.data = bytearray(length)
        self.flushes = 0

    def read(self, offset, length):
        return self.data[offset : offset + length]

    def write(self, offset, data):
        self.data[offset : offset + len(data)] = data

    def flush(self):
        self.flushes += 1

    def extents(self, offset, length):
        if any(self.data):
            yield length, 0
        else:
            yield length, HOLE | ZERO


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """Fail a test that leaves a thread, also one that Python knows nothing of, or a descriptor."""
    before = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    yield
    if len(os.listdir("/proc/self/fd")) > before[0] or len(os.listdir("/proc/self/task")) > before[1]:
        gc.collect()    # what hangs in a cycle, a traceback say, is not left behind
    deadline = time.monotonic() + 10    # a thread that was joined may be in the list for a moment
    while len(os.listdir("/proc/self/task")) > before[1] and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(os.listdir("/proc/self/task")) <= before[1]
    assert len(os.listdir("/proc/self/fd")) <= before[0]


@pytest.fixture
def shm_path():
    """A folder in memory (tmpfs)."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="fastcbw-test-") as path:
        yield pathlib.Path(path)


KINDS = ("memory", "tmpfs file", "disk file", "direct", "direct 4096", "delay", "fault", "python", "notifier", "throttle", "cache", "writeback cache", *SERVERS,
         *(f"queue {engine} {kind}" for engine in ("sync", "threads", "uring") for kind in ("file", "direct", "memory")))


@pytest.fixture(params=KINDS)
def make_device(request, tmp_path, shm_path):
    """make(length) -> a fresh device of the kind; it replaces (and closes) the one made before."""
    made = []

    def make(length):
        if made:
            made.pop().close()
        for folder in (tmp_path, shm_path):
            (folder / "image").unlink(missing_ok=True)
        match request.param.split(" ") if request.param.startswith("queue") else request.param:
            case ["queue", engine, kind]:
                match kind:
                    case "file":
                        child = FileDevice(tmp_path / "image", create_length=length, io=engine)
                    case "direct":
                        child = DirectDevice(tmp_path / "image", create_length=length, io=engine)
                    case "memory":
                        child = MemoryDevice(length)
                device = QueuedDevice(child, engine)
            case "memory":
                device = MemoryDevice(length)
            case "tmpfs file":
                device = FileDevice(shm_path / "image", create_length=length)
            case "disk file":
                device = FileDevice(tmp_path / "image", create_length=length)
            case "direct":
                device = DirectDevice(tmp_path / "image", create_length=length)
            case "direct 4096":
                device = DirectDevice(tmp_path / "image", create_length=length, alignment=4096)
            case "delay":
                device = DelayDevice(MemoryDevice(length))
            case "fault":
                device = FaultDevice(MemoryDevice(length))
            case "cache" | "writeback cache":
                device = CacheDevice(MemoryDevice(length), size="1M", writeback=request.param == "writeback cache")
            case "throttle":
                device = ThrottleDevice(MemoryDevice(length), bps_total=1 << 40, iops_total=1_000_000)
            case "notifier":
                device = WriteNotifier(MemoryDevice(length), MemoryDevice(length), cluster_size=4096)
                device.begin()
            case "python":
                device = PythonDevice(Bytes(length))
            case kind:
                made.append(ServedDevices(kind, shm_path)(length))
                return made[0].device
        made.append(device)
        return device

    yield make
    if made:
        made.pop().close()


@pytest.fixture
def served(shm_path):
    """served(name, device) -> the URI under which a server of ours has it; served.server is that server."""
    with Server(shm_path / "nbd.sock") as server:
        def serve(name, device, **options):
            server.add_export(name, device, **options)
            return f"nbd+unix:///{name}?socket={shm_path}/nbd.sock"

        serve.server = server
        yield serve
