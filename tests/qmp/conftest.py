"""A running daemon of two disks, and the way to it."""

import threading

import pytest

from fastcbw.block.memory import MemoryDevice
from fastcbw.disk import open as open_disk
from fastcbw.qmp.daemon import Daemon
from fastcbw.qmp.remote import connect

LENGTH = 1 << 20


@pytest.fixture
def daemon(tmp_path):
    """A daemon that serves the disks a and b, 1 MiB each, on tmp_path/nbd and tmp_path/qmp."""
    before = set(threading.enumerate())
    daemon = Daemon()
    for name in "ab":
        daemon.add_disk(open_disk(MemoryDevice(LENGTH, name=name), name=name))
        daemon.disks[name].write(0, name.encode() * 4096)
    daemon.listen_nbd(str(tmp_path / "nbd"))
    daemon.listen_qmp(str(tmp_path / "qmp"))
    yield daemon
    daemon.close()
    assert {thread for thread in threading.enumerate() if not thread.daemon} <= before
    assert list(tmp_path.glob("nbd*")) == list(tmp_path.glob("qmp*")) == []


@pytest.fixture
def remote(daemon, tmp_path):
    """The same daemon over its QMP socket."""
    with connect(tmp_path / "qmp") as remote:
        yield remote
