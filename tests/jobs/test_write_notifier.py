"""The old scheme: what the guest overwrites goes to the target first, the job copies the rest."""

import errno
import threading

import numpy as np
import pytest

import fastcbw
from fastcbw.block.delay import DelayDevice
from fastcbw.block.fault import FaultDevice
from fastcbw.block.file import FileDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.cbw.notifier import WriteNotifier
from fastcbw.export.nbd.client import Client
from fastcbw.export.nbd.server import Server
from fastcbw.jobs.write_notifier import WriteNotifierJob

K = 4096
CLUSTER = 16 * K
LENGTH = 20 * CLUSTER + 777     # the last cluster is a part of one


@pytest.fixture
def disk():
    """The disk, behind what fails and what is late."""
    device = MemoryDevice(LENGTH, name="vm")
    device.write(0, np.random.default_rng(1).integers(1, 256, LENGTH, dtype=np.uint8).tobytes())
    device.write_zeroes(3 * CLUSTER, 2 * CLUSTER)
    return DelayDevice(FaultDevice(device))


@pytest.fixture
def target():
    device = MemoryDevice(LENGTH + K, name="target")
    device.write(0, b"\xff" * (LENGTH + K))      # zeroes have to be written, too
    return DelayDevice(FaultDevice(device))


def started(call, *arguments, **options):
    """Run it in a thread of its own; join() returns when it has, raising what it raised."""
    outcome = []

    def run():
        try:
            outcome.append((call(*arguments, **options), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()

    def join():
        thread.join(30)
        assert not thread.is_alive()
        if outcome[0][1] is not None:
            raise outcome[0][1]
        return outcome[0][0]

    return join


def test_the_target_is_the_disk_at_the_instant_whatever_the_guest_does(disk, target):
    old, notifier = disk.read(0, LENGTH), WriteNotifier(disk, target, cluster_size=CLUSTER)
    notifier.begin()
    model = bytearray(old)
    for offset, length, zero in ((5, 3, False), (CLUSTER - 1, 2, False), (7 * CLUSTER, 5 * CLUSTER, True), (LENGTH - 1, 1, False)):
        if zero:
            notifier.write_zeroes(offset, length)
        else:
            notifier.write(offset, b"n" * length)
        model[offset : offset + length] = bytes(length) if zero else b"n" * length
    assert notifier.read(0, LENGTH) == model
    assert target.read(0, 2 * CLUSTER) == old[: 2 * CLUSTER]
    assert target.read(2 * CLUSTER, 5 * CLUSTER) == b"\xff" * 5 * CLUSTER      # untouched, and so far nobody's
    touched = 2 * CLUSTER + 5 * CLUSTER + 777
    assert notifier.counters()["guest"] == notifier.counters()["done"] == touched
    job = WriteNotifierJob(notifier, workers=3, chunk=2 * CLUSTER).start()
    result = job.wait(30)
    assert target.read(0, LENGTH) == old and target.read(LENGTH, K) == b"\xff" * K
    assert notifier.read(0, LENGTH) == model
    assert result["guest_bytes"] == touched and result["zero_bytes"] == 2 * CLUSTER and result["data_bytes"] == LENGTH - 2 * CLUSTER
    assert job.progress["done"] == job.progress["total"] == LENGTH
    before = target.child.requests
    notifier.write(0, b"m" * LENGTH)
    assert target.child.requests == before       # the backup has ended, and costs nothing any more


def test_a_guest_discard_is_intercepted_too(disk, target):
    old, notifier = disk.read(0, LENGTH), WriteNotifier(disk, target, cluster_size=CLUSTER)
    notifier.begin()
    notifier.discard(CLUSTER, CLUSTER)
    assert target.read(CLUSTER, CLUSTER) == old[CLUSTER : 2 * CLUSTER]
    WriteNotifierJob(notifier).start().wait(30)
    assert target.read(0, LENGTH) == old


def test_nothing_is_intercepted_before_it_begins(disk, target):
    notifier = WriteNotifier(disk, target)
    notifier.write(0, b"before")
    assert target.child.requests["write"] == 0 and not notifier.has_begun
    WriteNotifierJob(notifier).start().wait(30)
    assert target.read(0, 6) == b"before"


def test_the_guests_write_waits_for_the_target_and_for_nothing_else(disk, target):
    old, notifier = disk.read(0, LENGTH), WriteNotifier(disk, target, cluster_size=CLUSTER)
    notifier.begin()
    notifier.write(5 * CLUSTER, b"settled")
    with target.hold("write", 0, CLUSTER) as gate:
        write = started(notifier.write, 100, b"new")
        gate.wait_arrived()
        assert disk.read(0, LENGTH)[:200] == old[:200]      # the old data is in no other place yet
        notifier.write(5 * CLUSTER, b"again ")              # this one is, and does not wait
        assert notifier.read(100, 3) == old[100:103]
    write()
    assert notifier.read(100, 3) == b"new" and target.read(0, CLUSTER) == old[:CLUSTER]


def test_guest_and_job_never_copy_the_same_cluster_twice(disk, target):
    """The job has the cluster and its target is slow: the guest's write there waits for the job's copy and makes none."""
    old, notifier = disk.read(0, LENGTH), WriteNotifier(disk, target, cluster_size=CLUSTER)
    with target.hold("write", 0, CLUSTER) as gate, disk.hold("write", 0, CLUSTER) as landing:
        job = WriteNotifierJob(notifier).start()
        gate.wait_arrived()
        write = started(notifier.write, 0, b"new")
        other = started(notifier.write, 2 * CLUSTER, b"new")        # nobody's yet: it copies
        other()
        assert landing.arrived == 0
        gate.open()
        landing.wait_arrived()
    write()
    job.wait(30)
    assert target.read(0, LENGTH) == old
    assert target.child.bytes["write"] + target.child.bytes["zero"] == disk.child.bytes["read"] - 2 * LENGTH + LENGTH == LENGTH


def test_writes_under_way_are_waited_for_and_new_ones_wait_meanwhile(disk, target):
    notifier = WriteNotifier(disk, target, cluster_size=CLUSTER)
    with disk.hold("write", 0, CLUSTER) as gate:
        write = started(notifier.write, 0, b"under way")
        gate.wait_arrived()
        with pytest.raises(TimeoutError, match="nothing has begun"):
            notifier.begin(timeout=0.01)
        assert not notifier.has_begun
        notifier.write(CLUSTER, b"free again")
        begin = started(notifier.begin)
    write()
    begin()
    notifier.write(0, b"new after")
    WriteNotifierJob(notifier).start().wait(30)
    assert target.read(0, 9) == b"under way"


@pytest.mark.parametrize("where", ["source", "target"])
def test_a_failed_copy_ends_the_backup_and_the_guest_goes_on(disk, target, where):
    notifier = WriteNotifier(disk, target, cluster_size=CLUSTER)
    device, operation = (disk, "read") if where == "source" else (target, "write")
    with target.hold("write", CLUSTER, CLUSTER) as gate, device.child.fail_on(operation, 0, CLUSTER, errno=errno.ENOSPC):
        first = started(notifier.write, CLUSTER, b"waits for its own copy") if not notifier.begin() else None
        gate.wait_arrived()
        second = started(notifier.write, CLUSTER + 100, b"waits for the other's")
        notifier.write(10, b"new")          # fails to be preserved: nobody waits for anything from here on
        second()
    first()
    assert notifier.read(10, 3) == b"new" and notifier.read(CLUSTER + 100, 5) == b"waits"
    assert f"{operation} at offset 0, length {CLUSTER}: No space left" in notifier.error
    with pytest.raises(ValueError, match="has ended"):
        WriteNotifierJob(notifier).start()


def test_a_failure_ends_a_job_that_runs(disk, target):
    notifier = WriteNotifier(disk, target, cluster_size=CLUSTER)
    job = WriteNotifierJob(notifier, rate=1).start()              # it waits, for a day
    with target.child.fail_on("write", 9 * CLUSTER, CLUSTER):
        notifier.write(9 * CLUSTER, b"new")
    with pytest.raises(fastcbw.JobFailed, match="target: write at offset 589824"):
        job.wait(30)
    assert notifier.read(9 * CLUSTER, 3) == b"new"


def test_the_guests_write_fails_when_the_policy_says_so_and_the_job_gets_there_later(disk, target):
    old, notifier = disk.read(0, LENGTH), WriteNotifier(disk, target, cluster_size=CLUSTER, on_cbw_error="break-guest-write")
    notifier.begin()
    with target.child.fail_on("write", CLUSTER, CLUSTER, errno=errno.ENOSPC, count=2):
        with pytest.raises(OSError, match="No space left") as caught:
            notifier.write(0, b"n" * 3 * CLUSTER)
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(OSError):
            notifier.discard(CLUSTER + 5, 1)
    assert notifier.read(0, LENGTH) == old and notifier.counters()["guest_refused"] == 2
    assert notifier.error is None
    WriteNotifierJob(notifier).start().wait(30)
    assert target.read(0, LENGTH) == old


def test_the_jobs_own_failure_ends_the_backup_whatever_the_policy(disk, target):
    notifier = WriteNotifier(disk, target, cluster_size=CLUSTER, on_cbw_error="break-guest-write")
    with target.child.fail_on("write", 2 * CLUSTER, CLUSTER, errno=errno.EIO):
        with pytest.raises(fastcbw.JobFailed, match="target: write at offset 131072, length 65536: Input/output error"):
            WriteNotifierJob(notifier).start().wait(30)
    notifier.write(0, b"free")


def test_a_job_that_sleeps_ends_when_the_guest_has_copied_all(disk, target):
    old, notifier = disk.read(0, LENGTH), WriteNotifier(disk, target, cluster_size=CLUSTER)
    notifier.begin()
    job = WriteNotifierJob(notifier, rate=1).start()
    notifier.write(0, b"n" * LENGTH)
    job.wait(30)
    assert target.read(0, LENGTH) == old


def test_a_job_is_paused_cancelled_and_paced(disk, target):
    notifier = WriteNotifier(disk, target, cluster_size=CLUSTER)
    with target.hold("write", 0, CLUSTER) as gate:
        job = WriteNotifierJob(notifier, rate="1M").start()
        gate.wait_arrived()
        job.pause()
        assert job.paused and job.pacing["rate"] == 1 << 20
        job.rate = 1
    job.resume()
    job.cancel()
    with pytest.raises(fastcbw.JobCancelled, match="cancelled after"):
        job.wait(30)
    requests = target.child.requests
    notifier.write(0, b"n" * LENGTH)
    assert target.child.requests == requests


@pytest.mark.parametrize("options, error, words", [
    ({"cluster_size": 5000}, ValueError, "no power of two"),
    ({"cluster_size": "2M"}, ValueError, "from 4096 to 1048576"),
    ({"on_cbw_error": "panic"}, ValueError, "'panic' does not exist .there are break-snapshot, break-guest-write"),
    ({"target": MemoryDevice(100)}, ValueError, "100 bytes are less than the disk's"),
    ({"target": MemoryDevice(LENGTH, read_only=True)}, ValueError, "is read-only"),
    ({"target": None}, TypeError, "target"),
])
def test_wrong_arguments_are_refused(disk, options, error, words):
    with pytest.raises(error, match=words):
        WriteNotifier(disk, **{"target": MemoryDevice(LENGTH)} | options)
    with pytest.raises(ValueError, match="is the disk itself"):
        WriteNotifier(disk, disk)


@pytest.mark.parametrize("options, words", [({"workers": 0}, "workers: 0"), ({"chunk": 5000}, "chunk: 5000 is no multiple"),
                                            ({"chunk": "2M"}, "up to 1048576"), ({"rate": 0}, "would never end")])
def test_a_wrong_job_begins_nothing(disk, target, options, words):
    notifier = WriteNotifier(disk, target, cluster_size=CLUSTER)
    with pytest.raises(ValueError, match=words):
        WriteNotifierJob(notifier, **options).start()
    assert not notifier.has_begun


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_under_load_over_nbd_the_target_is_one_instant(tmp_path, kind):
    """Clients write versions; the instant lies between two rounds of which the first is whole and the second is not begun."""
    length = 256 * K
    if kind == "memory":
        child, target = MemoryDevice(length), MemoryDevice(length)
    else:
        child, target = FileDevice(tmp_path / "a", create_length=length), FileDevice(tmp_path / "b", create_length=length)
    notifier = WriteNotifier(child, target, cluster_size=K)
    acknowledged = [0] * 4
    stop = threading.Event()

    def guest(number):
        with Client(tmp_path / "sock", "vm") as client:
            version = 0
            while not stop.is_set() or version < 3:
                version += 1
                for page in range(number, 256, 4):
                    client.write(page * K, version.to_bytes(4, "little") * (K // 4))
                acknowledged[number] = version

    with Server(tmp_path / "sock") as server:
        server.add_export("vm", notifier)
        guests = [threading.Thread(target=guest, args=(number,)) for number in range(4)]
        for thread in guests:
            thread.start()
        while min(acknowledged) < 1:
            stop.wait(0.001)
        least = list(acknowledged)
        notifier.begin()
        most = list(acknowledged)
        job = WriteNotifierJob(notifier, workers=2).start()
        job.wait(30)
        stop.set()
        for thread in guests:
            thread.join(30)
        pages = np.frombuffer(target.read(0, length), dtype="<u4").reshape(256, K // 4)
        final = np.frombuffer(notifier.read(0, length), dtype="<u4").reshape(256, K // 4)
    assert (pages == pages[:, :1]).all()            # no page is torn
    for number in range(4):
        versions = pages[number::4, 0].astype(int)
        assert versions.min() >= least[number] and versions.max() <= most[number] + 1
        assert (np.diff(versions) <= 0).all() and versions[0] - versions[-1] <= 1      # a prefix of the newest round
        assert (final[number::4] == acknowledged[number]).all()
    notifier.close()
    target.close()
