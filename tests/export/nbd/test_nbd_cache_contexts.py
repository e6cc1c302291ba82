"""Meta contexts of a snapshot's cache: access, copy order, allocation depth, over the wire."""

import json
import subprocess

import pytest

from fastcbw.block.memory import MemoryDevice
from fastcbw.cbw.engine import Engine
from fastcbw.export.nbd.client import Client
from fastcbw.export.nbd.server import Server

K = 4096
ACCESS, ORDER, DEPTH = "x-fastcbw:access", "x-fastcbw:order", "qemu:allocation-depth"
READABLE, RAM, DISK, ZERO, CHANGED = 1, 2, 4, 8, 16


@pytest.fixture
def served(folder, path):
    """A disk and its snapshot: of 64 clusters 10..13 are in RAM, 20..23 on disk, 30..33 zero."""
    disk = MemoryDevice(64 * K, name="disk")
    disk.write(0, b"x" * 64 * K)
    disk.write(30 * K, bytes(4 * K))
    engine = Engine(disk)
    spill = folder / "spill"
    spill.mkdir()
    view = engine.snapshot("s", ram="1M", cluster_size=K)
    engine.device.write(10 * K, b"n" * 4 * K)
    engine.snapshot("newer", ram=0, spill=str(spill), spill_limit="1M")
    for first in (20, 30):
        engine.device.write(first * K, b"n" * 4 * K)
    with Server(path) as server:
        server.add_export("disk", engine.device)
        server.add_export("disk@s", view, read_only=True)
        yield engine
    engine.close()


def test_access_tells_where_each_cluster_is(served, path):
    with Client(path, "disk@s", contexts=("base:allocation", ACCESS, DEPTH)) as client:
        status = client.block_status(0, 64 * K)
        assert status[ACCESS] == [(10 * K, READABLE), (4 * K, READABLE | RAM | CHANGED), (6 * K, READABLE), (4 * K, READABLE | DISK | CHANGED),
                                  (6 * K, READABLE), (4 * K, READABLE | ZERO | CHANGED), (30 * K, READABLE)]
        assert status[DEPTH] == [(10 * K, 2), (4 * K, 1), (6 * K, 2), (4 * K, 1), (6 * K, 2), (4 * K, 1), (30 * K, 2)]
        # A part of a cluster, and one extent only.
        assert client.block_status(11 * K + 5, K, one=True)[ACCESS] == [(K, READABLE | RAM | CHANGED)]


def test_order_is_the_class_of_the_default_order(served, path):
    with Client(path, "disk@s", contexts=(ORDER,)) as client:
        rows = client.block_status(0, 64 * K)[ORDER]
    assert sum(length for length, _ in rows) == 64 * K
    from fastcbw.cbw.policies import KINDS, ORDER_DEFAULT, classes_of
    of = dict(zip(KINDS, classes_of(ORDER_DEFAULT)))
    by_cluster = [of_class for length, of_class in rows for _ in range(length // K)]
    # The touches heated all of this small disk.
    assert by_cluster == ([of["hot"]] * 10 + [of["ram"]] * 4 + [of["hot"]] * 6 + [of["disk"]] * 4 + [of["hot"]] * 6 + [of["zero"]] * 4 + [of["hot"]] * 30)


def test_a_disk_has_the_depth_of_one_layer_and_no_access(served, path):
    with Client(path, "disk", contexts=(ACCESS, ORDER, DEPTH)) as client:
        assert client.block_status(0, 64 * K) == {DEPTH: [(64 * K, 1)]}


def test_of_a_broken_snapshot_access_is_nothing(served, path):
    with Client(path, "disk@s", contexts=(ACCESS,)) as client:
        served.break_snapshot("s")
        assert client.block_status(0, 64 * K)[ACCESS] == [(64 * K, 0)]


def test_nbdinfo_maps_it(served, path):
    done = subprocess.run(["nbdinfo", "--json", f"--map={ACCESS}", f"nbd+unix:///disk@s?socket={path}"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [(row["offset"], row["type"]) for row in json.loads(done.stdout)][:3] == [(0, READABLE), (10 * K, READABLE | RAM | CHANGED), (14 * K, READABLE)]
