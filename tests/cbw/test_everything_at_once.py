"""Everything at once: seeded threads that do to one disk all that the engine can, beside the exact oracle of test_concurrency.

    guest writers ── sync and by way of a queue ─┐                 ┌─ readers, CACHE: what was read first, or NotInSnapshot
    guest readers ── never older than acked ─────┼─ disk ─ engine ─┼─ discard, take: afterwards gone for every read
    drop, limits, policies, bitmaps ─────────────┘                 └─ backup jobs, plain and consuming: the image, or an error

A guest read is linearisable: each sector of it has a version that is at least the last one acknowledged before the read began, and was
issued before it ended. A snapshot is an instant and constant; what was discarded of it is an error from then on, what was
not is never one. In the end everything is discarded of what still lives: no slot and no place in a log is left, and a snapshot of the same
geometry preserves every cluster, so that no claim is left either.

FASTCBW_SECONDS=N lets each run take N seconds, FASTCBW_SEEDS=N runs N seeds of each disk.
"""

import errno
import os
import random
import sys
import threading
import time

import numpy as np
import pytest
from engine_disks import make_disk, wait_until
from test_concurrency import SECTOR, Bitmaps, Guest

from fastcbw.block.delay import DelayDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.block.queued import QueuedDevice
from fastcbw.cbw.engine import Engine
from fastcbw.errors import JobFailed, LimitReached, NotInSnapshot, SnapshotBroken
from fastcbw.jobs.backup import BackupJob

SECONDS = float(os.environ.get("FASTCBW_SECONDS", 1.5))
SEEDS = int(os.environ.get("FASTCBW_SEEDS", 1))
LENGTH = (1 << 20) - 333
POLICIES = ("break-snapshot", "break-guest-write", "wait")


@pytest.fixture(autouse=True)
def many_switches():
    """Make the interpreter switch threads all the time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def disk_of(kind, folder):
    return DelayDevice(MemoryDevice(LENGTH), read_ms=0.2, write_ms=0.1) if kind == "delay" else make_disk(kind, LENGTH, folder)


class Refused(Exception):
    """A guest write failed as a policy says; its version may be on the disk or not."""


class Either:
    """The guest's way to the disk: straight or by way of a queue, at random."""

    def __init__(self, ways, length):
        self.ways, self.length = ways, length

    def call(self, name, *arguments):
        try:
            return getattr(random.choice(self.ways), name)(*arguments)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise Refused from error

    def write(self, *arguments):
        self.call("write", *arguments)

    def write_zeroes(self, *arguments):
        self.call("write_zeroes", *arguments)

    def discard(self, *arguments):
        self.call("discard", *arguments)


class Watched:
    """A snapshot, what was first read of it, and which of its sectors are gone: 0 no, 1 being discarded or it may have been, 2 yes."""

    def __init__(self, name, view, image, gone, full):
        self.name, self.view, self.image, self.gone, self.full = name, view, image, gone, full
        self.whole = not gone.any()
        self.ended = False
        self.by_hand = np.zeros(len(gone), bool)        # discarded by others than the job that consumes
        self.consuming = threading.Lock()
        self.reads = 0

    def is_over(self):
        try:
            return self.ended or self.view.broken is not None
        except ValueError:      # closed since we looked
            return self.ended

    def span(self, rng, unit=1):
        offset = rng.randrange(len(self.image)) // unit * unit
        end = min(offset + rng.choice([1, 700, 4096, 30_000, 200_000]), len(self.image))
        end = min(-(-end // unit) * unit, len(self.image))
        return offset, end - offset

    def sectors(self, offset, length):
        return slice(offset // SECTOR, -(-(offset + length) // SECTOR))

    def read(self, offset, length, call):
        """CALL reads the range: its data is right or it is an error for a reason. The data, None."""
        where = self.sectors(offset, length)
        before = self.gone[where].copy()
        try:
            data = call(offset, length)
        except NotInSnapshot:
            assert self.gone[where].any(), f"{self.name}: {length} bytes at {offset} are not in it, and were not discarded"
            return None
        assert not (before == 2).any(), f"{self.name}: {length} bytes at {offset} were read, and a part had been discarded"
        assert data == self.image[offset : offset + length], f"{self.name} changed at {offset}"
        self.reads += 1
        return data

    def read_again(self, rng):
        self.read(*self.span(rng), self.view.read)

    def cache(self, rng):
        offset, length = self.span(rng)
        try:
            self.view.cache(offset, length)
        except NotInSnapshot:
            assert self.gone[self.sectors(offset, length)].any()

    def mark(self, where, state):
        self.gone[where] = np.maximum(self.gone[where], state)

    def discard(self, rng, taking):
        offset, length = self.span(rng, self.view.granule)
        where = self.sectors(offset, length)
        self.by_hand[where] = True
        self.mark(where, 1)
        if taking:
            if self.read(offset, length, self.view.take) is not None:
                self.mark(where, 2)
        else:
            self.view.discard(offset, length)
            self.mark(where, 2)

    def backup(self, engine, rng, consume):
        """A job that succeeds has the image, or what was left of it."""
        target = MemoryDevice(len(self.image))
        target.write(0, b"\xee" * len(self.image))
        before = self.gone.copy()
        if consume:
            engine.consumer_begin(self.view)
        try:
            job = BackupJob(self.view, target, consume=consume, workers=2, in_flight=rng.choice(["16K", "256K"]),
                            order=rng.choice(["sequential", "ram-first", "ram-first,hot-first"]))
            if consume:
                self.mark(slice(None), 1)
            job.start().wait(60)
        except (ValueError, JobFailed) as error:
            assert self.is_over() or self.gone.any() or before.any(), error
            return
        finally:
            if consume:
                engine.consumer_end(self.view)
        if consume:
            self.mark(slice(None), 2)
        assert consume or not self.whole or not before.any()
        copied = np.frombuffer(target.read(0, len(self.image)), np.uint8)
        right = copied == np.frombuffer(self.image, np.uint8)
        present = np.repeat((before == 0) & ~self.by_hand, SECTOR)[: len(right)]
        assert (right | ~present).all(), f"{self.name}: a wrong copy (consume={consume}) at {np.flatnonzero(~right & present)[:3]}"


class Run:
    """One disk with all that goes on; every thread notes its first error and ends the run."""

    def __init__(self, kind, seed, folder):
        self.rng = random.Random(f"{kind}/{seed}")
        self.folder = folder
        self.disk = disk_of(kind, folder)
        self.engine = Engine(self.disk)
        ways = [self.engine.device] + [QueuedDevice(self.engine.device, io) for io in ("threads", "uring")]
        self.guest = Guest(Either(ways, LENGTH), 4, seed, stripe=self.rng.choice([3, 24, 160]), may_fail=Refused)
        self.watched, self.errors, self.counts = [], [], {}
        self.number = 0
        self.ways = ways
        self.threads = []
        for i in range(2):
            self.every(f"guest read {i}", self.guest_read)
            self.every(f"read {i}", lambda rng: self.some(rng).read_again(rng))
        self.every("cache", lambda rng: self.some(rng).cache(rng))
        self.every("discard", lambda rng: self.some(rng).discard(rng, rng.random() < 0.5), 0.005)
        self.every("drop", self.drop)
        self.every("limits", self.limits, 0.005)
        self.every("backup", self.backup, 0.01)

    def every(self, name, action, pause=0.001):
        rng = random.Random(f"{self.rng.random()}/{name}")

        def main():
            while not self.guest.stopping:
                try:
                    action(rng)
                    self.counts[name] = self.counts.get(name, 0) + 1
                except IndexError:              # there is no snapshot just now
                    pass
                except BaseException as error:
                    self.errors.append(error)
                    return
                time.sleep(pause)

        self.threads.append(threading.Thread(target=main, name=name))

    def some(self, rng):
        """A snapshot, as one that may end at any time."""
        return Ending(rng.choice(self.watched))

    # -- what the threads do

    def guest_read(self, rng):
        first = rng.randrange(self.guest.sectors)
        count = min(rng.choice([1, 3, 8, 9, 130]), self.guest.sectors - first)
        before = self.guest.acknowledged[first : first + count].copy()
        data = rng.choice(self.ways).read(first * SECTOR, count * SECTOR)
        after = self.guest.issued[first : first + count].copy()
        self.guest.check_versions(data, before, after, first)

    def drop(self, rng):
        try:
            offset = rng.randrange(LENGTH)
            self.engine.drop(rng.choice(list(self.engine.snapshots)), *rng.choice([(), (offset, min(50_000, LENGTH - offset))]))
        except (KeyError, SnapshotBroken):
            pass

    def limits(self, rng):
        name = rng.choice(list(self.engine.snapshots))
        try:
            size = self.engine.report(name)["cluster_size"]
            if rng.random() < 0.7:
                self.engine.set_limits(name, ram=rng.choice([1, 2, 5, 64]) * size)
            elif self.engine.report(name)["disk_limit"]:
                self.engine.set_limits(name, spill_limit=rng.choice([2 << 20, 4 << 20, 16 << 20]))
            self.engine.set_policy(name, on_full=rng.choice(POLICIES))
        except (KeyError, LimitReached, SnapshotBroken):
            pass

    def backup(self, rng):
        snapshot = rng.choice(self.watched)
        consume = rng.random() < 0.5
        if not consume or snapshot.consuming.acquire(blocking=False):     # one that consumes at a time: two would each have a part
            try:
                snapshot.backup(self.engine, rng, consume)
            except SnapshotBroken:
                assert snapshot.is_over()
            finally:
                if consume:
                    snapshot.consuming.release()

    # -- snapshots

    def take(self, **others):
        rng, engine, guest = self.rng, self.engine, self.guest
        size = engine.cluster_size or rng.choice([4096, 65536])
        ram, log = rng.choice([(0, 2), (1, 0), (2, 3), (5, 40), (16, 0), (64, 300), (1000, 0)])
        options = {"cluster_size": size, "ram": ram * size, "on_full": rng.choice(POLICIES), "cbw_timeout": rng.choice([50, 5000])}
        if ram:
            options["copy_on_read"] = rng.random() < 0.5
        if log:
            options |= {"spill": self.folder, "spill_limit": 4096 + log * size}
        if rng.random() < 0.2:
            options["bitmap"] = "kept"
        self.number += 1
        name = f"s{self.number}"
        before = guest.acknowledged.copy()
        view = engine.snapshot(name, **(options | others))
        after = guest.issued.copy()
        image, gone = bytearray(LENGTH), np.zeros(-(-LENGTH // SECTOR), np.int8)
        try:
            for offset, length, flags in view.extents().tolist():
                where = slice(offset // SECTOR, -(-(offset + length) // SECTOR))
                if flags == 4:
                    gone[where] = 2
                    continue
                image[offset : offset + length] = view.read(offset, length)
                known = slice(where.start, min(where.stop, guest.sectors))
                guest.check_versions(image[known.start * SECTOR : known.stop * SECTOR], before[known], after[known], known.start)
        except SnapshotBroken:
            assert view.broken
            return
        self.watched.append(Watched(name, view, bytes(image), gone, options.get("bitmap") is None))

    def end_one(self):
        name = self.rng.choice(list(self.engine.snapshots))
        if self.rng.random() < 0.2:
            self.engine.break_snapshot(name)
            return
        for snapshot in list(self.watched):
            if snapshot.name == name:
                snapshot.ended = True
                self.watched.remove(snapshot)
        self.engine.delete(name)

    def main(self):
        for thread in self.guest.threads + self.threads:
            thread.start()
        try:
            wait_until(lambda: self.guest.writes > 50)
            bitmaps = Bitmaps(self.engine, self.guest, self.rng)
            began = time.monotonic()
            # On a slow or busy machine longer, until everything has happened.
            while not (self.errors or self.guest.errors) and time.monotonic() < began + (SECONDS if self.is_enough(bitmaps) else 20 + SECONDS):
                if len(self.engine.snapshots) < 5 and self.rng.random() < 0.5:
                    self.take()
                bitmaps.do_something()
                if self.engine.snapshots and self.rng.random() < 0.3:
                    self.end_one()
                time.sleep(0.002)
        finally:
            self.guest.stopping = True
            for thread in self.guest.threads + self.threads:
                thread.join(60)
                assert not thread.is_alive(), f"{thread.name} hangs"
        for error in self.errors + self.guest.errors:
            raise error
        bitmaps.check()
        return bitmaps

    def is_enough(self, bitmaps):
        return self.number > 5 and bitmaps.number > 10 and all(self.counts.get(thread.name, 0) for thread in self.threads)

    def check_the_end(self):
        engine, guest = self.engine, self.guest
        for snapshot in self.watched:       # at rest, once more, all of it
            for offset in range(0, LENGTH, 4096):
                Ending(snapshot).read(offset, min(4096, LENGTH - offset), snapshot.view.read)
        guest.check_versions(self.disk.read(0, guest.sectors * SECTOR), guest.acknowledged, guest.issued)
        for name in [name for name in engine.snapshots if engine.report(name)["state"] == "broken"]:
            engine.delete(name)
        views = list(engine.snapshots.values())
        for view in self.rng.sample(views, len(views)):
            view.discard(0, LENGTH)
        for view in views:
            facts = engine.report(view.name.rpartition("@")[2])
            assert (facts["ram_bytes"], facts["disk_bytes"], facts["state"]) == (0, 0, "live"), facts
        engine.finish_discards()
        assert engine.counters()["lazy_bytes"] == 0
        guest.check_versions(self.disk.read(0, guest.sectors * SECTOR), guest.acknowledged, guest.issued)
        # Of the same geometry, if there was still one: each claim can be had.
        last = engine.snapshot("last", ram="8M", cbw_timeout=10_000)
        old = self.disk.read(0, LENGTH)
        engine.device.write(0, b"\xff" * LENGTH)
        assert last.broken is None and last.read(0, LENGTH) == old
        assert engine.report("last")["preserved_bytes"] == -(-LENGTH // engine.cluster_size) * engine.cluster_size
        assert engine.room_waiters == 0
        for name in self.rng.sample(sorted(engine.snapshots), len(engine.snapshots)):
            engine.delete(name)
        assert engine.cluster_size is None
        engine.close()
        assert self.disk.read(0, LENGTH) == b"\xff" * LENGTH
        self.disk.close()
        assert [name for name in os.listdir(self.folder) if name != "image"] == []


class Ending:
    """A snapshot that is broken or deleted gives errors, and these only then."""

    def __init__(self, snapshot):
        self._snapshot = snapshot

    def __getattr__(self, name):
        snapshot = self._snapshot

        def call(*arguments):
            try:
                return getattr(snapshot, name)(*arguments)
            except SnapshotBroken:
                assert snapshot.is_over()
            except ValueError as error:
                assert snapshot.ended and "closed" in str(error), error

        return call


@pytest.mark.parametrize("kind", ["memory", "tmpfs file", "queue uring file", "delay"])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_everything_at_once(kind, seed, shm_path):
    run = Run(kind, seed, shm_path)
    bitmaps = run.main()
    run.check_the_end()
    assert run.is_enough(bitmaps) and run.guest.writes > 100, run.counts
