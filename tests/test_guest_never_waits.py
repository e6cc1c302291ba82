"""The sentence that rules it all, one trouble at a time: whatever goes wrong with a snapshot, the guest writes on.

Each trouble is made with a gate or a rule on the device concerned, so it is there for certain and for as long as the guest
writes; then the gates open, and everything that was held must come back.
"""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest
from leaks import nothing_left_behind  # noqa: F401 - autouse

import fastcbw
from fastcbw.block.delay import DelayDevice
from fastcbw.block.fault import FaultDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.export.nbd.client import Client

K = 4096
LENGTH = 512 * K
TIMEOUT_MS = 400
#: For two busy cores. A guest that waited for a gate would wait for ever, so this decides nothing else.
MARGIN_S = 1.5

STALLED_CLIENT = """
import sys
from fastcbw.wire import constants as c
from fastcbw.export.nbd.client import Client
client = Client(sys.argv[1], sys.argv[2])
for i in range(int(sys.argv[3])):
    client.send(c.CMD_READ, 0, 2 << 20)       # asked for, and never received
print("asked", flush=True)
sys.stdin.read()
"""


class World:
    """A disk of two devices for trouble (late, failing), filled with old data, and the guest."""

    def __init__(self, tmp_path):
        self.folder = tmp_path
        self.faults = FaultDevice(MemoryDevice(LENGTH))
        self.late = DelayDevice(self.faults)
        self.log_faults = FaultDevice(MemoryDevice(LENGTH * 2))
        self.log_late = DelayDevice(self.log_faults)
        self.old = bytes(i // K % 251 + 1 for i in range(LENGTH))
        self.late.write(0, self.old)
        self.disk = fastcbw.open(self.late, name="disk")
        self.new = bytearray(self.old)
        self.write = self.disk.write
        self.slowest_s = 0.0
        self.troubles = ExitStack()

    def snapshot(self, **options):
        return self.disk.snapshot("s", cbw_timeout=TIMEOUT_MS, cluster_size=K, **options)

    def guest(self):
        """Overwrite all of the disk: single clusters, then large writes, then once more what is settled by now."""
        spans = [(i * K, K) for i in range(0, 256)] + [(i * K, 64 * K) for i in range(256, 512, 64)] + [(i * K + 100, K) for i in range(40)]
        for n, (offset, length) in enumerate(spans):
            data = bytes([n % 250 + 2]) * length
            began = time.monotonic()
            self.write(offset, data)
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            self.new[offset : offset + length] = data

    def run_guest(self):
        outcome = []

        def main():
            try:
                self.guest()
                outcome.append("done")
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=main, daemon=True)
        thread.start()
        thread.join(30)
        assert outcome == ["done"], "the guest hangs" if not outcome else f"the guest failed: {outcome[0]!r}"
        assert self.slowest_s < TIMEOUT_MS / 1000 + MARGIN_S


# Each trouble begins, takes the snapshot, and gives it; after the yield the guest has written, and what holds is let go.


@contextmanager
def both_tiers_full(world):
    yield world.snapshot(ram=4 * K, spill="/dev/shm", spill_limit=5 * K)


@contextmanager
def spill_write_hangs(world):
    with world.log_late.hold("write"):
        yield world.snapshot(ram=4 * K, spill=world.log_late)


@contextmanager
def spill_discard_hangs(world):
    """Old data that is zeroes and data in turns: room in the log is taken and given back."""
    world.late.write_zeroes(0, 64 * K)
    world.old = bytes(64 * K) + world.old[64 * K :]
    with world.log_late.hold("discard"):
        yield world.snapshot(ram=0, spill=world.log_late, spill_limit=64 * K)


@contextmanager
def spill_flush_hangs(world):
    with world.log_late.hold("flush"):
        yield world.snapshot(ram=4 * K, spill=world.log_late)


@contextmanager
def spill_fails(world, code):
    with world.log_faults.fail_on("write", errno=code, after=3):
        yield world.snapshot(ram=4 * K, spill=world.log_late)


@contextmanager
def flusher_hangs(world, operation):
    """In the write of its first batch, or in the discard of the first segment that comes free; RAM has room for what is written."""
    with world.log_late.hold(operation):
        yield world.snapshot(ram=LENGTH, spill=world.log_late, spill_limit=LENGTH)


@contextmanager
def flusher_fails(world, code):
    """Every write of the disk tier fails, and RAM has room for all: nothing breaks, and what failed is tried again."""
    with world.log_faults.fail_on("write", errno=code):
        snapshot = world.snapshot(ram=LENGTH, spill=world.log_late)
        yield snapshot
        end = time.monotonic() + 10
        while snapshot.status()["disk_error"] is None and time.monotonic() < end:
            time.sleep(0.001)
        assert snapshot.status()["disk_error"] == os.strerror(code)


@contextmanager
def flusher_is_slow(world):
    world.log_late.set(write_ms=TIMEOUT_MS / 4)
    yield world.snapshot(ram=32 * K, spill=world.log_late, spill_limit=LENGTH * 2)
    world.log_late.set(write_ms=0)


@contextmanager
def waiting_for_room(world):
    """The consumer that a guest was told to wait for reads nothing: cbw-timeout ends the wait."""
    snapshot = world.snapshot(ram=16 * K, on_full="wait")
    world.disk._engine.consumer_begin(snapshot.device)
    yield snapshot
    world.disk._engine.consumer_end(snapshot.device)


@contextmanager
def limits_change(world):
    """RAM and disk tier grow and shrink under load, never below what is needed in all."""
    snapshot = world.snapshot(ram=LENGTH, spill=world.log_late, spill_limit=LENGTH * 2)
    stopping, errors = threading.Event(), []

    def main():
        try:
            while not stopping.is_set():
                for ram in (0, K, LENGTH // 8, LENGTH):
                    snapshot.set_limits(ram=ram)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=main)
    thread.start()
    try:
        yield snapshot
    finally:
        stopping.set()
        thread.join(20)
    assert errors == []


@contextmanager
def source_read_hangs(world, after):
    with world.late.hold("read", 10 * K, K, after=after):
        yield world.snapshot(ram="16M")


@contextmanager
def source_read_hangs_everywhere(world):
    """More clusters than the pool has threads."""
    with world.late.hold("read"):
        yield world.snapshot(ram="16M")


@contextmanager
def source_read_hangs_under_many_snapshots(world):
    """Each older snapshot is asked for when the one before is given up: all within one time limit."""
    older = [world.disk.snapshot(f"older{i}", ram="16M", cbw_timeout=TIMEOUT_MS) for i in range(5)]
    with world.late.hold("read", 10 * K, K):
        yield world.snapshot(ram="16M")
    for snapshot in older:
        assert "cbw-timeout" in snapshot.status()["reason"]
        snapshot.close()


@contextmanager
def source_read_fails(world):
    with world.faults.fail_on("read", 20 * K, 100 * K):
        yield world.snapshot(ram="16M")


@contextmanager
def source_reads_are_slow(world):
    world.late.set(read_ms=TIMEOUT_MS * 3, offset=0, length=3 * K)
    yield world.snapshot(ram="16M")
    world.late.set(read_ms=0)


@contextmanager
def snapshot_reader_hangs(world):
    """A reader stuck in the device, in the very clusters that the guest overwrites."""
    snapshot = world.snapshot(ram="16M")
    def read():
        with pytest.raises(fastcbw.SnapshotBroken):
            snapshot.read(0, LENGTH)

    with world.late.hold("read", after=True) as gate:
        reader = threading.Thread(target=read)
        reader.start()
        gate.wait_arrived()
        # It is held in its first batch; copies of other clusters by the guest read the same device.
        yield snapshot
    reader.join(10)


@contextmanager
def nbd_client(world, kill):
    """The guest, too, is a client of the server whose other client is stopped with replies under way, or killed."""
    path = str(world.folder / "s.sock")
    server = world.disk.serve(path)
    snapshot = world.snapshot(ram="16M")
    guest = Client(path, "disk")
    world.write = guest.write
    stalled = [subprocess.Popen([sys.executable, "-c", STALLED_CLIENT, path, "disk@s", "40"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
               for _ in range(3)]
    try:
        for client in stalled:
            assert client.stdout.readline() == b"asked\n"
            client.send_signal(signal.SIGKILL if kill else signal.SIGSTOP)
        yield snapshot
        guest.flush()
        if not kill:
            with pytest.raises(fastcbw.Error, match="in use by 3"):
                snapshot.close()
    finally:
        guest.close()
        for client in stalled:
            client.kill()
            client.wait()
            client.stdin.close()
            client.stdout.close()
    server.close()
    world.disk._server = None


@contextmanager
def backup_target_hangs(world, order):
    snapshot = world.snapshot(ram="16M")
    target = DelayDevice(MemoryDevice(LENGTH))
    with target.hold("write", LENGTH // 2) as gate:
        job = snapshot.backup(target, order=order, in_flight=K * 4)
        gate.wait_arrived()
        yield snapshot
        job.cancel()
        with pytest.raises(TimeoutError):
            job.wait(0.01)
    with pytest.raises(fastcbw.JobCancelled):
        job.wait(10)


@contextmanager
def backup_target_fails(world, code):
    snapshot = world.snapshot(ram="16M")
    target = FaultDevice(MemoryDevice(LENGTH))
    with target.fail_on("write", LENGTH // 2, errno=code):
        job = snapshot.backup(target, in_flight=K * 4)
        yield snapshot
        with pytest.raises(fastcbw.JobFailed, match=os.strerror(code)):
            job.wait(10)


@contextmanager
def snapshots_come_and_go(world):
    """Creation and deletion under load, hand-over included."""
    snapshot = world.snapshot(ram="16M")
    stopping, errors = threading.Event(), []

    def main():
        try:
            n = 0
            while not stopping.is_set():
                n += 1
                one, two = (world.disk.snapshot(f"n{n}{i}", ram="64K", cbw_timeout=TIMEOUT_MS) for i in "ab")
                (one if n % 2 else two).close()
                (two if n % 2 else one).close()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=main)
    thread.start()
    try:
        yield snapshot
    finally:
        stopping.set()
        thread.join(20)
    assert errors == []


TROUBLES = {
    "both tiers full": both_tiers_full,
    "spill hangs in a write": spill_write_hangs,
    "spill hangs in a discard": spill_discard_hangs,
    "spill hangs in a flush": spill_flush_hangs,
    "spill fails with EIO": lambda world: spill_fails(world, errno.EIO),
    "spill fails with ENOSPC": lambda world: spill_fails(world, errno.ENOSPC),
    "flusher hangs in a write": lambda world: flusher_hangs(world, "write"),
    "flusher hangs in a discard": lambda world: flusher_hangs(world, "discard"),
    "flusher fails with EIO": lambda world: flusher_fails(world, errno.EIO),
    "flusher fails with ENOSPC": lambda world: flusher_fails(world, errno.ENOSPC),
    "flusher is slow": flusher_is_slow,
    "guest waits for room": waiting_for_room,
    "limits change": limits_change,
    "source read hangs before": lambda world: source_read_hangs(world, False),
    "source read hangs after": lambda world: source_read_hangs(world, True),
    "source read hangs everywhere": source_read_hangs_everywhere,
    "source read hangs under many snapshots": source_read_hangs_under_many_snapshots,
    "source read fails": source_read_fails,
    "source reads are slow": source_reads_are_slow,
    "snapshot reader hangs": snapshot_reader_hangs,
    "NBD client stopped": lambda world: nbd_client(world, False),
    "NBD client killed": lambda world: nbd_client(world, True),
    "backup target hangs": lambda world: backup_target_hangs(world, "sequential"),
    "backup target hangs, ram-first": lambda world: backup_target_hangs(world, "ram-first"),
    "backup target fails": lambda world: backup_target_fails(world, errno.EIO),
    "backup target full": lambda world: backup_target_fails(world, errno.ENOSPC),
    "snapshots come and go": snapshots_come_and_go,
}
#: Those in which the snapshot must be given up, with what its reason says.
BREAKS = {
    "both tiers full": "full",
    "guest waits for room": "cbw-timeout",
    "spill hangs in a write": "cbw-timeout",
    "spill fails with EIO": "Input/output error",
    "spill fails with ENOSPC": "No space left",
    "source read hangs before": "cbw-timeout",
    "source read hangs after": "cbw-timeout",
    "source read hangs everywhere": "cbw-timeout",
    "source read hangs under many snapshots": "cbw-timeout",
    "source read fails": "could not be read",
    "source reads are slow": "cbw-timeout",
    "snapshot reader hangs": "cbw-timeout",
}
MAY_BREAK = {"spill hangs in a discard", "flusher is slow"}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_no_snapshot_backup_full_cache_or_crash_of_a_backup_client_can_make_a_guest_write_fail_or_wait_longer_than_cbw_timeout(trouble, tmp_path):
    world = World(tmp_path)
    disk = world.disk
    with TROUBLES[trouble](world) as snapshot:
        world.run_guest()
        assert world.faults.child.read(0, LENGTH) == world.new          # acknowledged is on the disk, whatever happened
    if trouble in BREAKS:
        assert BREAKS[trouble] in snapshot.status()["reason"]
        with pytest.raises(fastcbw.SnapshotBroken, match=BREAKS[trouble]):
            snapshot.read(0, LENGTH)
    elif trouble not in MAY_BREAK:
        assert snapshot.status()["reason"] is None
        assert snapshot.read(0, LENGTH) == world.old

    # Everything is back: room, claims, threads; and a new snapshot is as good as the first.
    end = time.monotonic() + 10
    while disk._engine.copies_abandoned and time.monotonic() < end:
        time.sleep(0.001)
    assert disk._engine.copies_abandoned == 0
    while True:
        try:
            snapshot.close()
            break
        except fastcbw.Error:       # killed clients are noticed by the server, not by us
            assert time.monotonic() < end
            time.sleep(0.001)
    assert disk._engine.cluster_size is None
    again = disk.snapshot("again", ram=0, spill=world.log_late, cbw_timeout=5000, cluster_size=K)
    disk.write(0, bytes(LENGTH))
    assert again.read(0, LENGTH) == world.new
    assert (again.status()["disk_bytes"], again.status()["ram_bytes"]) == (LENGTH, 0)
    again.close()
    assert disk.status()["snapshots"] == {}
    disk.close()
