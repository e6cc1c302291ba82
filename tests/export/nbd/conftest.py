"""A server over a memory disk for each test, and the check that a test leaves no thread, descriptor or file."""

import gc
import os
import pathlib
import tempfile
import threading

import pytest

from fastcbw.block.memory import MemoryDevice
from fastcbw.export.nbd.client import Client
from fastcbw.export.nbd.server import Server

LENGTH = (96 << 20) + 512       # more than two requests of 32 MiB, no multiple of a page


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
def folder():
    """A folder with a path short enough for sockets, empty of sockets again at the end."""
    with tempfile.TemporaryDirectory(prefix="fastcbw-") as path:
        yield pathlib.Path(path)
        assert [entry.name for entry in pathlib.Path(path).iterdir() if entry.is_socket()] == []


@pytest.fixture
def path(folder):
    return str(folder / "nbd.sock")


@pytest.fixture
def disk():
    return MemoryDevice(LENGTH, name="disk")


@pytest.fixture
def server(path):
    with Server(path) as server:
        yield server


@pytest.fixture
def export(server, disk):
    return server.add_export("disk", disk)


@pytest.fixture
def client(path, export):
    with Client(path, "disk") as client:
        yield client
