"""Fixtures of the engine's tests."""

import pathlib
import tempfile

import pytest
from leaks import nothing_left_behind  # noqa: F401 - autouse


@pytest.fixture
def shm_path():
    """A folder in memory (tmpfs)."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="fastcbw-test-") as path:
        yield pathlib.Path(path)
