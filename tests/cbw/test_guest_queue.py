"""Guest writes in the stages of a queue: what is preserved, what fails, what is late; and many under way at once."""

import errno
import os
import random

import numpy as np
import pytest
from engine_disks import QUEUE_KINDS, make_disk, wait_until
from test_concurrency import SECTOR, Guest, take
from test_invariants import Task

from fastcbw.block.delay import DelayDevice
from fastcbw.block.direct import DirectDevice
from fastcbw.block.fault import FaultDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.block.queue import IoQueue
from fastcbw.block.queued import HungDevice
from fastcbw.block.switch import SwitchDevice
from fastcbw.block.throttle import ThrottleDevice
from fastcbw.cbw.engine import Engine
from fastcbw.errors import SnapshotBroken

K = 4096
CLUSTERS = 64
LENGTH = CLUSTERS * K


def block(byte, count=1):
    """COUNT aligned blocks of BYTE, as direct I/O wants them."""
    room = np.zeros((count + 1) * K, np.uint8)
    start = -room.ctypes.data % K
    room[:] = byte[0]
    return room[start : start + count * K]


@pytest.fixture
def image(shm_path):
    path = shm_path / "image"
    path.write_bytes(b"o" * LENGTH)
    return path


@pytest.fixture
def faults(image):
    with FaultDevice(DirectDevice(image, io="uring")) as device:
        yield device


@pytest.fixture
def engine(faults):
    engine = Engine(faults)
    yield engine
    engine.close()


@pytest.fixture
def queue():
    with IoQueue("uring", 32) as queue:
        yield queue


def threads():
    return len([task for task in os.listdir("/proc/self/task") if not open(f"/proc/self/task/{task}/comm").read().startswith("iou-")])


def write(queue, device, cluster, byte, count=1):
    """Write through the queue; 0 or -errno."""
    queue.submit_write_from(device, cluster * K, block(byte, count), 1)
    ((_, code),) = queue.wait(1, 20)
    return code


def test_old_data_is_read_and_the_write_made_by_the_kernel_alone(engine, faults, queue):
    view = engine.snapshot("s")
    before = threads()
    for cookie in range(8):
        queue.submit_write_from(engine.device, cookie * 2 * K, block(b"n"), cookie)
    assert sorted(queue.wait(8, 20)) == [(cookie, 0) for cookie in range(8)]
    assert threads() == before and engine.counters()["waits"] == 0
    assert (engine.report("s")["preserved_clusters"], engine.counters()["touches"], engine.counters()["writes"]) == (8, 8, 8)
    assert view.read(0, LENGTH) == b"o" * LENGTH
    assert faults.child.read(0, 16 * K) == (b"n" * K + b"o" * K) * 8
    reads = faults.requests["read"]
    assert write(queue, engine.device, 0, b"m") == 0        # settled: nothing is read
    assert faults.requests["read"] == reads and view.read(0, K) == b"o" * K


@pytest.mark.parametrize("size", [K, 8 * K])
def test_a_write_over_preserved_and_unpreserved_clusters_takes_one_stage_for_each_run(engine, faults, queue, size):
    view = engine.snapshot("s", cluster_size=size)
    for cluster in (8, 24, 25):
        assert write(queue, engine.device, cluster, b"a") == 0
    assert write(queue, engine.device, 1, b"n", 62) == 0
    assert view.read(0, LENGTH) == b"o" * LENGTH
    assert faults.child.read(0, LENGTH) == b"o" * K + b"n" * 62 * K + b"o" * K
    assert engine.report("s")["preserved_clusters"] == (62 if size == K else 8)


def test_a_write_that_several_snapshots_need_data_of_serves_each(engine, faults, queue):
    first = engine.snapshot("s1")
    assert write(queue, engine.device, 3, b"a") == 0
    second = engine.snapshot("s2")
    assert write(queue, engine.device, 2, b"b", 3) == 0
    assert first.read(0, LENGTH) == b"o" * LENGTH
    assert second.read(0, LENGTH) == b"o" * 3 * K + b"a" * K + b"o" * (LENGTH - 4 * K)


def test_zeroes_take_no_room(engine, faults, queue):
    faults.child.write_zeroes(0, 8 * K)
    view = engine.snapshot("s")
    assert write(queue, engine.device, 0, b"n", 9) == 0
    assert engine.report("s")["zero_clusters"] == 8 and engine.report("s")["ram_bytes"] == K
    assert view.read(0, 9 * K) == bytes(8 * K) + b"o" * K


def test_without_a_free_slot_the_log_takes_it_and_without_room_the_snapshot_breaks(engine, shm_path, queue):
    view = engine.snapshot("s", ram=2 * K, spill=shm_path, spill_limit=K + 4 * K)
    for cluster in range(6):
        assert write(queue, engine.device, cluster, b"n") == 0
    assert view.read(0, LENGTH) == b"o" * LENGTH and engine.report("s")["disk_bytes"] == 4 * K
    assert write(queue, engine.device, 6, b"n") == 0
    with pytest.raises(SnapshotBroken, match="full"):
        view.read(0, K)


def test_a_read_of_old_data_that_the_kernel_fails_breaks_the_snapshot_and_the_write_succeeds(engine, faults, image, queue):
    view = engine.snapshot("s")
    os.truncate(image, 32 * K)          # from here on the kernel has nothing to read
    assert write(queue, engine.device, 40, b"n") == 0
    with pytest.raises(SnapshotBroken, match="could not be read"):
        view.read(0, K)
    assert faults.child.read(40 * K, K) == b"n" * K
    wait_until(lambda: engine.cluster_size is None)
    os.truncate(image, LENGTH)
    again = engine.snapshot("t")        # the claim was given back: the same cluster is preserved as any other
    assert write(queue, engine.device, 40, b"m") == 0
    assert again.read(40 * K, K) == b"n" * K


def test_a_rule_on_the_read_fails_it_in_the_method_and_the_write_succeeds(engine, faults, queue):
    view = engine.snapshot("s")
    with faults.fail_on("read", 5 * K, K, count=1) as rule:
        assert write(queue, engine.device, 5, b"n") == 0
        assert rule.hits == 1
    with pytest.raises(SnapshotBroken, match="could not be read"):
        view.read(0, K)


def test_a_write_that_fails_has_its_own_error_and_the_snapshot_is_whole(engine, faults, queue):
    view = engine.snapshot("s")
    with faults.fail_on("write", 5 * K, K, errno=errno.ENOSPC, count=1):
        assert write(queue, engine.device, 5, b"n") == -errno.ENOSPC
    assert view.read(0, LENGTH) == b"o" * LENGTH
    assert write(queue, engine.device, 5, b"n") == 0 and view.read(5 * K, K) == b"o" * K


def test_writes_to_one_cluster_at_once_copy_it_once(engine, faults, queue):
    view = engine.snapshot("s", cluster_size=65536)
    for cookie in range(16):
        queue.submit_write_from(engine.device, cookie * K, block(bytes([cookie + 1])), cookie)
    assert sorted(queue.wait(16, 20)) == [(cookie, 0) for cookie in range(16)]
    assert engine.report("s")["preserved_clusters"] == 1
    assert view.read(0, LENGTH) == b"o" * LENGTH
    assert faults.child.read(0, 16 * K) == b"".join(bytes([i + 1]) * K for i in range(16))


def test_a_snapshot_waits_for_queued_writes_and_their_thread_for_neither(engine, faults, queue):
    """Until its thread polls, the writes of the instant are counted; a write of that thread after it does not wait in it."""
    for cookie in range(8):
        queue.submit_write_from(engine.device, cookie * K, block(b"a"), cookie)
    creation = Task(engine.snapshot, "s", cbw_timeout=60_000)
    creation.join(0.05)
    assert creation.is_alive()
    queue.submit_write_from(engine.device, 60 * K, block(b"n"), 60)     # may have to wait for the eight: not here
    assert sorted(queue.wait(9, 20)) == [(cookie, 0) for cookie in [*range(8), 60]]
    view = creation.result()
    assert view.read(0, 60 * K) == b"a" * 8 * K + b"o" * 52 * K
    assert view.read(60 * K, K) in (b"o" * K, b"n" * K) and view.read(61 * K, 3 * K) == b"o" * 3 * K


def test_old_data_that_comes_too_late_breaks_the_snapshot_and_the_write_goes_on(queue):
    disk = HungDevice(MemoryDevice(LENGTH))
    disk.write(0, b"o" * LENGTH)
    engine = Engine(disk)
    view = engine.snapshot("s", cbw_timeout=100)
    assert write(queue, engine.device, 5, b"n") == 0        # the kernel still reads
    assert disk.child.read(5 * K, K) == b"n" * K
    with pytest.raises(SnapshotBroken, match="longer than cbw-timeout"):
        view.read(0, K)
    assert write(queue, engine.device, 5, b"m") == 0        # its claim is still held; nobody needs it
    engine.delete("s")
    second = engine.snapshot("t", cbw_timeout=60_000)
    disk.feed(b"x" * K)                                     # too late: of no snapshot
    queue.submit_write_from(engine.device, 5 * K, block(b"p"), 1)
    disk.feed(b"m" * K)
    assert queue.wait(1, 20) == [(1, 0)]
    assert second.read(5 * K, K) == b"m" * K and disk.child.read(5 * K, K) == b"p" * K
    engine.close()
    disk.close()


def test_a_claim_of_a_stage_that_hangs_times_out_for_others(queue):
    disk = HungDevice(MemoryDevice(LENGTH))
    disk.write(0, b"o" * LENGTH)
    engine = Engine(disk)
    view = engine.snapshot("s", cbw_timeout=300)
    queue.submit_write_from(engine.device, 5 * K, block(b"n"), 1)
    queue.wait(0)
    Task(engine.device.write, 5 * K, b"m" * K).result()     # another thread, for the same cluster
    with pytest.raises(SnapshotBroken, match="longer than cbw-timeout"):
        view.read(0, K)
    assert queue.wait(1, 20) == [(1, 0)]
    disk.feed(b"x" * K)
    queue.close()
    engine.close()
    disk.close()


@pytest.mark.parametrize("above", [FaultDevice, SwitchDevice, ThrottleDevice])
def test_a_stage_that_is_late_is_late_through_a_filter_too(queue, above):
    """Else the write would be counted for ever, and the next change of the snapshots would never end."""
    disk = HungDevice(MemoryDevice(LENGTH))
    disk.write(0, b"o" * LENGTH)
    engine = Engine(disk)
    view = engine.snapshot("s", cbw_timeout=100)
    filter = above(engine.device)
    assert write(queue, filter, 5, b"n") == 0
    with pytest.raises(SnapshotBroken, match="longer than cbw-timeout"):
        view.read(0, K)
    Task(engine.delete, "s").result()
    disk.feed(b"x" * K)
    queue.close()           # what was late has ended, too
    if isinstance(filter, SwitchDevice):
        filter.hold(20)
        filter.release()
    assert disk.child.read(4 * K, 3 * K) == b"o" * K + b"n" * K + b"o" * K
    engine.close()
    disk.close()


@pytest.mark.parametrize("operation", ["discard", "zero"])
def test_zeroes_and_discards_preserve_in_the_threads(engine, faults, queue, operation):
    view = engine.snapshot("s")
    submit = queue.submit_discards if operation == "discard" else queue.submit_zeroes
    submit(engine.device, 0, 32 * K, 1)
    assert queue.wait(1, 20) == [(1, 0)]
    assert view.read(0, LENGTH) == b"o" * LENGTH
    if operation == "zero":
        assert faults.child.read(0, 33 * K) == bytes(32 * K) + b"o" * K


class QueueGuest(Guest):
    """Writers with eight writes under way each, never two to one sector."""

    def main(self, number, writers, rng):
        under_way = {}
        try:
            with IoQueue(self.device.io, 8) as queue:
                cookie = 0
                while not self.stopping or under_way:
                    first = rng.randrange(self.sectors // (3 * writers)) * 3 * writers + number * 3
                    count = rng.randint(1, 3)
                    first += rng.randint(0, 3 - count)
                    mine = slice(first, first + count)
                    busy = any(first < other.stop and other.start < first + count for other, *_ in under_way.values())
                    if not self.stopping and not busy and len(under_way) < 8:
                        self.issued[mine] += 1
                        version = self.issued[mine].copy()
                        cookie += 1
                        kind = rng.random()
                        if kind < 0.8:
                            sector = np.arange(first, first + count, dtype=np.int64)
                            data = np.repeat(np.stack((sector, version), axis=1), SECTOR // 16, axis=0).tobytes()
                            queue.submit_write_from(self.device, first * SECTOR, data, cookie)
                        else:
                            for i in range(count):
                                self.zeroed[first + i].append(int(version[i]))
                            # A discarded sector may go on as it was: such a version is zeroes, and is never acknowledged (see Guest).
                            submit = queue.submit_zeroes if kind < 0.9 else queue.submit_discards
                            submit(self.device, first * SECTOR, count * SECTOR, cookie)
                        under_way[cookie] = mine, version if kind < 0.9 else self.acknowledged[mine].copy()
                    full = self.stopping or busy or len(under_way) == 8
                    for ended, code in queue.wait(1 if full and under_way else 0, 20):
                        assert code == 0
                        mine, version = under_way.pop(ended)
                        self.acknowledged[mine] = version
                        self.writes += 1
        except BaseException as error:
            self.errors.append(error)


@pytest.mark.parametrize("kind", QUEUE_KINDS)
def test_snapshots_are_instants_and_constant_while_queues_are_full(kind, shm_path):
    rng = random.Random(1)
    disk = make_disk(kind, (1 << 20) - 333, shm_path)
    engine = Engine(disk)
    guest = QueueGuest(engine.device, 3, 1)
    for thread in guest.threads:
        thread.start()
    watched = []
    try:
        for number in range(12):
            snapshot = take(engine, guest, f"s{number}", ram=rng.choice(["64K", "8M", "8M"]), spill=shm_path, spill_limit="8M")
            watched += [snapshot] if snapshot else []
            for snapshot in watched:
                snapshot.read_again(rng)
            if len(engine.snapshots) > 3:
                name = rng.choice(list(engine.snapshots))
                watched = [snapshot for snapshot in watched if snapshot.name != name]
                engine.delete(name)
    finally:
        guest.stopping = True
        for thread in guest.threads:
            thread.join(20)
    assert guest.errors == [] and guest.writes > 100
    for snapshot in watched:
        assert snapshot.view.read(0, len(snapshot.image)) == snapshot.image
    guest.check_instant(disk.read(0, disk.length), guest.acknowledged, guest.issued)
    engine.close()
    disk.close()


def test_a_filter_above_a_filter_has_no_stages_of_its_own(shm_path):
    disk = make_disk("queue uring file", LENGTH, shm_path)
    lower = Engine(disk)
    upper = Engine(lower.device)
    assert (lower.device.queueable, upper.device.queueable) == (True, False)
    one, other = lower.snapshot("l"), upper.snapshot("u")
    upper.device.write(0, b"n" * K)
    assert one.read(0, K) == other.read(0, K) == bytes(K)
    for closing in (upper, lower, disk):
        closing.close()


def test_a_slow_copy_holds_up_its_own_write_only(shm_path):
    disk = DelayDevice(MemoryDevice(LENGTH), io="threads")
    engine = Engine(disk)
    view = engine.snapshot("s", cbw_timeout=60_000)
    with IoQueue("threads", 16) as queue:
        with disk.hold("read", 3 * K, K) as gate:
            queue.submit_write_from(engine.device, 3 * K, block(b"n"), 3)
            gate.wait_arrived()
            others = [cookie for cookie in range(10) if cookie != 3]
            for cookie in others:
                queue.submit_write_from(engine.device, cookie * K, block(b"n"), cookie)
            assert sorted(queue.wait(9, 20)) == [(cookie, 0) for cookie in others]
        assert queue.wait(1, 20) == [(3, 0)]
    assert view.read(0, LENGTH) == bytes(LENGTH)
    engine.close()
