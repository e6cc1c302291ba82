"""The NBD client device beside nbdcopy: an image of random bytes in memory, pulled into nothing over a unix socket.

Both sides have four connections; ours has four threads with a request of 512 KiB each, nbdcopy 64 requests of 256 KiB on each
connection, its default. nbdcopy's time includes the start of its process.
"""

import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from fastcbw.block.nbd import NbdDevice

CHUNK = 512 << 10
THREADS = 4
GOAL = 1.0

OUR_SERVER = """
import sys
from fastcbw.block.file import FileDevice
from fastcbw.export.nbd.server import Server
with FileDevice(sys.argv[2], read_only=True) as device, Server(sys.argv[1]) as server:
    server.add_export("disk", device)
    sys.stdin.read()
"""


@pytest.fixture(params=["fastcbw", "nbdkit"])
def uri(request, full):
    """The URI of an image that a server of its own process has; `full`: 1 GiB, else 64 MiB."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="fastcbw-bench-") as folder:
        image, path = pathlib.Path(folder, "image"), pathlib.Path(folder, "sock")
        part = os.urandom(1 << 20)
        with open(image, "wb") as file:
            for _ in range(1024 if full else 64):
                file.write(part)
        command = {"fastcbw": [sys.executable, "-c", OUR_SERVER, path, image], "nbdkit": ["nbdkit", "-f", "-U", path, "file", image]}
        with subprocess.Popen(command[request.param], stdin=subprocess.PIPE) as server:
            try:
                while not answers(path):
                    assert server.poll() is None
                    time.sleep(0.01)
                yield f"nbd+unix:///?socket={path}"
            finally:
                server.terminate()


def answers(path):
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def pull(device):
    """Read all of the device with THREADS threads; return the bytes that they got."""
    offsets, lock, got = iter(range(0, device.length, CHUNK)), threading.Lock(), []

    def work():
        buffer = memoryview(bytearray(CHUNK))
        while True:
            with lock:
                offset = next(offsets, None)
            if offset is None:
                return
            got.append(device.readinto(offset, buffer[: min(CHUNK, device.length - offset)]))

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(got)


def test_pull_into_nothing_beside_nbdcopy(beside, uri):
    def nbdcopy():
        subprocess.run(["nbdcopy", "--connections=4", uri, "null:"], check=True)

    with NbdDevice(uri, read_only=True, connections=4) as device:
        assert pull(device) == device.length
        beside(lambda: pull(device), {"nbdcopy": nbdcopy}, {"nbdcopy": GOAL}, device.length)
