"""Seeded runs with many threads: guest writers, snapshots taken and deleted meanwhile, each read all the time.

Two things are checked of every snapshot. It is constant: whatever is read of it equals what was read first. And it is an
instant: every sector of it holds a version that the guest may have had on the disk when the snapshot was taken, that is
the last one acknowledged before the call began, or one issued before the call returned. Writers own sectors (each sector has
one writer), so the versions of a sector are ordered and the rule is exact. Caches are so small that slots are reused,
the log is used, both get full and snapshots break; a broken one gives errors and never data.
"""

import bisect
import random
import sys
import threading
import time

import numpy as np
import pytest
from engine_disks import KINDS, make_disk, wait_until

from fastcbw.block.delay import DelayDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.cbw.engine import Engine, take_snapshots
from fastcbw.cbw.options import SnapshotOptions
from fastcbw.errors import SnapshotBroken

SECTOR = 512
SECONDS = 2.0


@pytest.fixture(autouse=True)
def many_switches():
    """Make the interpreter switch threads all the time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class Guest:
    """Writers over one disk. A sector of version v holds its (sector, v) all over, or zeroes for a zeroing version.

    issued[s], acknowledged[s]: versions of sector s; zeroed[s]: the versions that were zeroes. A discarded sector may hold zeroes at any
    time from then on, or go on as it was: such a version is zeroes, and is never acknowledged. stripe: sectors that are one writer's.
    may_fail: errors after which a version is never acknowledged either.
    """

    def __init__(self, device, writers, seed, stripe=3, may_fail=()):
        self.stripe, self.may_fail = stripe, may_fail
        self.device = device
        self.sectors = device.length // SECTOR      # the disk's odd tail is not the guest's
        self.issued = np.zeros(self.sectors, np.int64)
        self.acknowledged = np.zeros(self.sectors, np.int64)
        self.zeroed = [[0] for _ in range(self.sectors)]         # each ascending: a sector has one writer
        self.stopping = False
        self.errors = []
        self.writes = 0
        self.threads = [threading.Thread(target=self.main, args=(i, writers, random.Random(f"{seed}/{i}"))) for i in range(writers)]

    def main(self, number, writers, rng):
        # Writer i owns the sectors s with s // stripe % writers == i: clusters are shared by all, sectors by none.
        stripe = self.stripe
        try:
            while not self.stopping:
                first = rng.randrange(self.sectors // (stripe * writers)) * stripe * writers + number * stripe
                count = rng.randint(1, stripe)
                first += rng.randint(0, stripe - count)
                mine = slice(first, first + count)
                kind = rng.random()
                self.issued[mine] += 1
                version = self.issued[mine].copy()
                if kind >= 0.75:
                    for i in range(count):
                        self.zeroed[first + i].append(int(version[i]))
                try:
                    if kind < 0.75:
                        sector = np.arange(first, first + count, dtype=np.int64)
                        data = np.repeat(np.stack((sector, version), axis=1), SECTOR // 16, axis=0).tobytes()
                        self.device.write(first * SECTOR, data)
                    else:
                        operation = self.device.write_zeroes if kind < 0.9 else self.device.discard
                        operation(first * SECTOR, count * SECTOR)
                except self.may_fail:
                    continue
                if kind < 0.9:
                    self.acknowledged[mine] = version
                self.writes += 1
        except BaseException as error:
            self.errors.append(error)

    def check_versions(self, data, before, after, first=0):
        """DATA, of the sectors from FIRST on, holds versions from BEFORE to AFTER; a sector may be torn between two of them."""
        words = np.frombuffer(data, np.int64).reshape(-1, SECTOR // 16, 2)
        number, version = words[:, :, 0], words[:, :, 1]
        sector = np.arange(first, first + len(words))[:, None]
        written = version > 0
        assert ((number == sector) | ~written).all(), "data of another sector"
        assert ((version >= before[:, None]) | ~written).all(), "an acknowledged write is missing"
        assert ((version <= after[:, None]) | ~written).all(), "a write from the future"
        for s in np.flatnonzero(~written.all(axis=1)):
            assert self.was_zero(first + s, before[s], after[s]), f"sector {first + s}: zeroes out of nowhere"

    def was_zero(self, sector, before, after):
        """Whether a version of SECTOR from BEFORE to AFTER was zeroes. What is only discarded is never acknowledged: there may be thousands."""
        versions = self.zeroed[sector]
        last = bisect.bisect_right(versions, after)
        return last > 0 and versions[last - 1] >= before

    def check_instant(self, image, before, after):
        """IMAGE is an instant between BEFORE (acknowledged when the call began) and AFTER (issued when it returned)."""
        words = np.frombuffer(image, np.int64, self.sectors * SECTOR // 8).reshape(self.sectors, SECTOR // 16, 2)
        assert (words == words[:, :1]).all(), "a torn sector"
        number, version = words[:, 0, 0], words[:, 0, 1]
        written = version > 0
        assert (number[written] == np.flatnonzero(written)).all(), "data of another sector"
        assert (version[written] >= before[written]).all(), "an acknowledged write is missing"
        assert (version[written] <= after[written]).all(), "a write from after the snapshot"
        for s in np.flatnonzero(~written):
            assert self.was_zero(s, before[s], after[s]), f"sector {s}: zeroes out of nowhere"


class Watched:
    """A snapshot with what was first read of it."""

    def __init__(self, name, view, image):
        self.name, self.view, self.image = name, view, image
        self.reads = 0

    def read_again(self, rng):
        offset = rng.randrange(len(self.image))
        length = min(rng.choice([1, 700, 4096, 30_000, 1 << 20]), len(self.image) - offset)
        assert self.view.read(offset, length) == self.image[offset : offset + length], f"{self.name} changed"
        self.reads += 1


class Bitmaps:
    """A bitmap that may lose nothing, whatever is done to it and to others while the guest writes."""

    def __init__(self, engine, guest, rng):
        self.engine, self.guest, self.rng = engine, guest, rng
        self.kept = engine.bitmaps.add("kept", granularity=SECTOR)
        self.issued = guest.issued.copy()
        self.number = 0

    def do_something(self):
        bitmaps = self.engine.bitmaps
        self.number += 1
        match self.rng.randrange(6):
            case 0:
                if "other" not in bitmaps.named:
                    bitmaps.add("other", granularity=self.rng.choice([512, 4096, 65536]))
            case 1 if "other" in bitmaps.named:
                self.rng.choice([bitmaps.named["other"].clear, bitmaps.named["other"].remove])()
            case 2 if "other" in bitmaps.named:
                bitmaps.named["other"].merge("kept")
                bitmaps.named["other"].disable()
                bitmaps.named["other"].enable()
            case 3 if "part" not in self.engine.snapshots and len(self.engine.snapshots) < 5:
                # Used by a snapshot or by a job that fails; the bitmap goes on as it was.
                handed = self.rng.choice([None, "a job"])
                view = self.engine.snapshot("part", bitmap="kept", bitmap_for=handed, ram="4M")
                try:
                    for offset, length, flags in view.extents():
                        if flags != 4:
                            view.read(int(offset), int(length))
                except SnapshotBroken:
                    pass
                if handed:
                    bitmaps.give_back("kept", False)
                self.engine.delete("part")

    def check(self):
        written = self.guest.acknowledged > self.issued
        marked = self.kept.view().to_bools()[: len(written)]
        assert written.any() and self.number > 10
        assert (marked | ~written).all(), f"sectors {np.flatnonzero(written & ~marked)} were written and are not marked"


def take(engine, guest, name, **options):
    before = guest.acknowledged.copy()
    view = engine.snapshot(name, **options)
    after = guest.issued.copy()
    try:
        image = view.read(0, view.length)
    except SnapshotBroken:
        return None
    guest.check_instant(image, before, after)
    return Watched(name, view, image)


def room(rng, folder):
    """Caches from far too small to enough, RAM only, disk only, both."""
    ram = rng.choice([0, "4K", "64K", "4M"])
    if ram == 0 or rng.random() < 0.7:
        return {"ram": ram, "spill": folder, "spill_limit": rng.choice(["16K", "256K", "8M"])}
    return {"ram": ram}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_snapshots_are_instants_and_constant_under_concurrent_writers(kind, seed, shm_path):
    rng = random.Random(seed)
    disk = make_disk(kind, (1 << 20) - 333, shm_path)
    engine = Engine(disk)
    guest = Guest(engine.device, 4, seed, stripe=24 if seed == 1 else 3)        # 24: whole clusters are discarded, and recorded
    watched, taken, broken, number = [], 0, 0, 0
    for thread in guest.threads:
        thread.start()
    bitmaps = Bitmaps(engine, guest, rng)
    try:
        began = time.monotonic()
        # On a slow or busy machine longer, until something has happened: snapshots, and one that its caches were too small for.
        while not guest.errors and time.monotonic() < began + (SECONDS if taken > 3 and broken else 10 * SECONDS):
            if len(engine.snapshots) < 5 and rng.random() < 0.3:
                number += 1
                new = take(engine, guest, f"s{number}", **room(rng, shm_path))
                watched += [new] if new else []
                broken += new is None
                taken += 1
            bitmaps.do_something()
            for snapshot in list(watched):
                try:
                    snapshot.read_again(rng)
                except SnapshotBroken:
                    watched.remove(snapshot)
                    broken += 1
            if engine.snapshots and rng.random() < 0.2:
                name = rng.choice(list(engine.snapshots))
                watched = [snapshot for snapshot in watched if snapshot.name != name]
                engine.delete(name)
    finally:
        guest.stopping = True
        for thread in guest.threads:
            thread.join(20)
    assert guest.errors == []
    assert taken > 3 and broken and guest.writes > 100
    bitmaps.check()
    for snapshot in watched:    # at rest, once more, all of it
        if snapshot.view.broken is None:
            assert snapshot.view.read(0, len(snapshot.image)) == snapshot.image
    # The guest's data is on the disk.
    guest.check_instant(disk.read(0, disk.length), guest.acknowledged, guest.issued)
    for name in list(engine.snapshots):
        engine.delete(name)
    engine.finish_discards()
    guest.check_instant(disk.read(0, disk.length), guest.acknowledged, guest.issued)
    assert engine.counters()["lazy_bytes"] == 0 and (engine.counters()["lazy_recorded"] > 0) == (guest.stripe == 24)
    engine.snapshot("last")
    assert engine.report("last")["ram_bytes"] == 0
    engine.close()
    disk.close()


@pytest.mark.parametrize("seed", range(4))
def test_readers_in_many_threads_see_one_image(seed, shm_path):
    """One pair of snapshots, with slots that are reused all the time by snapshots that come and go; four readers each."""
    rng = random.Random(seed)
    disk = DelayDevice(MemoryDevice(1 << 20))
    engine = Engine(disk)
    guest = Guest(engine.device, 3, seed)
    for thread in guest.threads:
        thread.start()
    wait_until(lambda: guest.writes > 50)
    options = {"ram": "128K", "spill": shm_path, "spill_limit": "4M", "cluster_size": rng.choice(["4K", "64K"])}
    snapshots = [take(engine, guest, name, **options) for name in ("a", "b")]
    errors, stopping = [], threading.Event()

    def read(snapshot, seed):
        rng = random.Random(seed)
        try:
            while not stopping.is_set():
                snapshot.read_again(rng)
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=read, args=(snapshot, i)) for snapshot in snapshots for i in range(4)]
    for reader in readers:
        reader.start()
    end = time.monotonic() + SECONDS / 2
    while time.monotonic() < end and not errors:
        # Words that both older ones read move through these.
        new = [take(engine, guest, f"n{i}", ram="64K", spill=shm_path, spill_limit="2M") for i in range(2)]
        for name in rng.sample(["n0", "n1"], 2):
            engine.delete(name)
        assert None not in new
    stopping.set()
    guest.stopping = True
    for thread in readers + guest.threads:
        thread.join(20)
    assert errors == [] and guest.errors == []
    assert all(snapshot.reads > 20 for snapshot in snapshots)
    engine.close()


@pytest.mark.parametrize("seed", range(3))
def test_group_never_holds_a_dependent_write_without_its_cause(seed):
    """Each thread writes n to disk A, then n to disk B, in its own sector: no instant has B ahead of A."""
    rng = random.Random(seed)
    disks = [DelayDevice(MemoryDevice(64 * 1024), write_ms=0) for _ in range(2)]
    engines = [Engine(disk) for disk in disks]
    stopping, errors, turns = threading.Event(), [], [0] * 6

    def write(thread):
        n = 0
        try:
            while not stopping.is_set():
                n += 1
                for engine in engines:
                    engine.device.write(thread * SECTOR, n.to_bytes(8, "little") * 64)
                turns[thread] = n
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    groups = 0
    began = time.monotonic()
    while not errors and time.monotonic() < began + (SECONDS / 2 if groups > 5 else 10 * SECONDS):
        low = list(turns)
        order = rng.sample(engines, 2)
        views = dict(zip(order, take_snapshots(order, "g", SnapshotOptions.parse(ram="1M"))))
        for i in range(6):
            a, b = (int.from_bytes(views[engine].read(i * SECTOR, 8), "little") for engine in engines)
            assert low[i] <= b <= a <= b + 1, f"thread {i}: A has {a}, B has {b}"
        for engine in engines:
            engine.delete("g")
        groups += 1
    stopping.set()
    for thread in threads:
        thread.join(20)
    assert errors == [] and groups > 5
    for engine in engines:
        engine.close()


def test_more_threads_than_counters_lines_share_one_and_stay_right():
    """300 guest threads: those beyond 255 share a line of counters, whose range stands for the whole disk."""
    disk = MemoryDevice(300 * 4096)
    engine = Engine(disk)
    ready, go = threading.Barrier(301), threading.Event()

    def write(i):
        engine.device.write(i * 4096, b"a" * 4096)
        ready.wait(60)
        go.wait(60)
        engine.device.write(i * 4096, b"b" * 4096)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(300)]
    for thread in threads:
        thread.start()
    ready.wait(60)
    view = engine.snapshot("s", ram="4M")
    go.set()
    for thread in threads:
        thread.join(60)
    assert view.read(0, disk.length) == b"a" * disk.length
    assert disk.read(0, disk.length) == b"b" * disk.length
    assert 255 * 2 <= engine.counters()["writes"] <= 600        # a shared line may lose some
    engine.close()
