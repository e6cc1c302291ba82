"""The check that a test leaves nothing behind; a conftest that imports it has it for all its tests."""

import gc
import os
import threading

import pytest


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """Fail a test that leaves a thread or a descriptor."""
    gc.collect()
    descriptors, threads = len(os.listdir("/proc/self/fd")), set(threading.enumerate())
    yield
    gc.collect()
    for thread in set(threading.enumerate()) - threads:
        thread.join(10)         # on a busy machine one that ends may need a moment; one that stays is a leak
    assert set(threading.enumerate()) <= threads
    assert len(os.listdir("/proc/self/fd")) <= descriptors
