"""Fixtures of the engine's tests."""

import pathlib
import tempfile

import pytest
from leaks import nothing_left_behind  # noqa: F401 - autouse

from fastcbw.block.delay import DelayDevice
from fastcbw.block.fault import FaultDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.cbw.engine import Engine


@pytest.fixture
def shm_path():
    """A folder in memory (tmpfs)."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="fastcbw-test-") as path:
        yield pathlib.Path(path)


@pytest.fixture
def faults(request):
    """A disk of the test file's LENGTH bytes, all `o`, that counts and fails."""
    length = request.module.LENGTH
    device = FaultDevice(MemoryDevice(length))
    device.write(0, b"o" * length)
    return device


@pytest.fixture
def disk(faults):
    """The same with gates and delays in front."""
    return DelayDevice(faults)


@pytest.fixture
def engine(disk):
    """An engine on it; gates that a test has left closed are opened at its end."""
    engine = Engine(disk)
    yield engine
    disk.open_all()
    engine.close()
