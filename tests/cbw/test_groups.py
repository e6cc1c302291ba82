"""Groups: writes that depend on each other across disks keep their order in every snapshot of the group.

Each writer writes n to disk A, waits for the answer, then writes n to disk B: at any instant A is at n or n + 1 when B is at n.
Thousands of groups are taken meanwhile, and every one is looked at. The time between the flips of two disks, nanoseconds by
itself, is stretched for half of them, so that a group that did not hold its guests would be seen at once: without the hold, or with
a hold taken disk by disk, these tests fail within some ten groups.
"""

import random
import struct
import threading

import pytest

from fastcbw.block.memory import MemoryDevice
from fastcbw.cbw.engine import Engine, take_snapshots
from fastcbw.cbw.lifecycle import pause_between_flips
from fastcbw.cbw.options import SnapshotOptions
from fastcbw.disk import group
from fastcbw.disk import open as open_disk
from fastcbw.export.nbd.client import Client

K = 4096
PAUSE_NS = 100_000


@pytest.fixture(autouse=True)
def no_pause_afterwards():
    yield
    pause_between_flips(0)


class Dependent:
    """Writers over two disks, each in a cluster of its own. write(i, disk, number): by whatever way the disks are reached."""

    def __init__(self, writers, write):
        self.write = write
        self.done = [0] * writers           # what was acknowledged by both disks
        self.stopping = False
        self.errors = []
        self.threads = [threading.Thread(target=self.main, args=(i,)) for i in range(writers)]

    def main(self, i):
        number = 0
        try:
            while not self.stopping:
                number += 1
                self.write(i, 0, number)
                self.write(i, 1, number)
                self.done[i] = number
        except BaseException as error:
            self.errors.append(error)

    def check(self, views, before):
        for i in range(len(self.done)):
            a, b = (struct.unpack("<q", view.read(i * K, 8))[0] for view in views)
            assert b <= a <= b + 1, f"writer {i}: disk A has {a}, disk B has {b}"
            assert b >= before[i], f"writer {i}: {before[i]} was acknowledged before the group, and is not in it"

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *exc):
        self.stopping = True
        for thread in self.threads:
            thread.join(60)
        assert self.errors == []


@pytest.mark.parametrize("seed", range(2))
def test_two_thousand_groups_never_hold_a_dependent_write_without_its_cause(seed):
    rng = random.Random(seed)
    engines = [Engine(MemoryDevice(4 * K)) for _ in range(2)]
    options = SnapshotOptions.parse(ram="64K")
    devices = [engine.device for engine in engines]
    with Dependent(3, lambda i, disk, number: devices[disk].write(i * K, struct.pack("<q", number))) as guest:
        for turn in range(1000):
            pause_between_flips(PAUSE_NS if turn % 2 else 0)
            order = [0, 1] if rng.random() < 0.5 else [1, 0]
            before = list(guest.done)
            taken = take_snapshots([engines[i] for i in order], "g", options)
            guest.check([taken[order.index(0)], taken[order.index(1)]], before)
            for engine in engines:
                engine.delete("g")
    assert min(guest.done) > 100
    for engine in engines:
        engine.close()


def test_groups_hold_over_nbd_too(tmp_path):
    """The same with the disks served, two clients for each writer, and the public API."""
    disks = [open_disk(MemoryDevice(4 * K), name=name) for name in "ab"]
    for disk in disks:
        disk.serve(tmp_path / disk.name)
    clients = [[Client(str(tmp_path / disk.name), disk.name) for disk in disks] for _ in range(2)]
    with Dependent(2, lambda i, disk, number: clients[i][disk].write(i * K, struct.pack("<q", number))) as guest:
        for turn in range(200):
            pause_between_flips(PAUSE_NS if turn % 2 else 0)
            before = list(guest.done)
            with group(disks).snapshot("g", ram="64K") as views:
                guest.check(views, before)
    assert min(guest.done) > 20
    for pair in clients:
        for client in pair:
            client.close()
    for disk in disks:
        disk.close()
