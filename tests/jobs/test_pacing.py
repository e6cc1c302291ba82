"""Rate, pause, bytes in flight and the guest's share of a job."""

import pathlib
import statistics
import tempfile
import threading
import time

import numpy as np
import pytest

import fastcbw
from fastcbw.block.delay import DelayDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.block.python import Device, PythonDevice
from fastcbw.cbw.latency import KINDS, LIMITS_NS, bucket_of
from fastcbw.cbw.pace import Pace
from fastcbw.errors import JobCancelled
from fastcbw.jobs.pacing import RATE_FIRST, RATE_FLOOR, Governor, make_pace

K = 4096
MIB = 1 << 20
LENGTH = 4 * MIB


def filled(length):
    device = MemoryDevice(length)
    for offset in range(0, length, MIB):
        device.write(offset, bytes([offset // MIB % 250 + 1]) * min(MIB, length - offset))
    return device


@pytest.fixture
def disk():
    with fastcbw.open(filled(LENGTH), name="disk") as disk:
        yield disk


@pytest.fixture
def snapshot(disk):
    return disk.snapshot("s", ram="16M")


def same(target, device):
    return target.read(0, LENGTH) == device.read(0, LENGTH)


def test_a_rate_is_kept_and_the_copy_is_right(snapshot):
    target = MemoryDevice(LENGTH)
    result = snapshot.backup(target, rate="16M", workers=3).wait(30)
    assert same(target, snapshot)
    assert result["seconds"] >= 0.9 * LENGTH / (16 * MIB) - 0.05        # a burst of 50 ms is allowed


def test_a_rate_can_be_changed_while_the_job_runs(snapshot):
    job = snapshot.backup(MemoryDevice(LENGTH), rate=1000)              # an hour
    assert job.rate == 1000 and job.pacing["rate"] == 1000
    for bad in (0, "x", -1):
        with pytest.raises(ValueError, match="rate"):
            job.rate = bad
    assert job.rate == 1000
    job.rate = None
    job.wait(30)
    assert job.rate is None


def test_a_job_that_its_rate_holds_back_is_cancelled_at_once(snapshot):
    job = snapshot.backup(MemoryDevice(LENGTH), rate=1)
    job.cancel()
    with pytest.raises(JobCancelled):
        job.wait(10)


def test_a_paused_job_moves_nothing_until_it_is_resumed(snapshot):
    target = DelayDevice(MemoryDevice(LENGTH))
    with target.hold("write") as gate:
        job = snapshot.backup(target, workers=2, in_flight="128K")
        gate.wait_arrived(2)
        job.pause()
        job.pause()
        assert job.paused
    with pytest.raises(TimeoutError):
        job.wait(0.05)
    done = job.progress["done"]
    assert done <= 2 * 64 * K
    with target.hold("write") as gate:
        with pytest.raises(TimeoutError):
            gate.wait_arrived(1, timeout=0.05)
        job.resume()
        gate.wait_arrived(1)
    job.wait(30)
    assert not job.paused and same(target, snapshot)


def test_a_paused_job_can_be_cancelled(snapshot):
    job = snapshot.backup(MemoryDevice(LENGTH), rate=1000)
    job.pause()
    job.cancel()
    with pytest.raises(JobCancelled):
        job.wait(10)


def test_a_target_with_latency_gets_more_in_flight_and_a_slow_one_little():
    with fastcbw.open(filled(64 * MIB), name="large") as disk:
        snapshot = disk.snapshot("s")

        def to(**trouble):
            return in_flight(snapshot, DelayDevice(MemoryDevice(64 * MIB), **trouble))

        assert now_and_then(lambda: max(to(write_ms=8)) >= 4 * 256 * 1024)
        assert statistics.median(to(bytes_per_s=100 * MIB)) <= 4 * 256 * 1024


def in_flight(snapshot, target):
    """Return the bytes in flight of a backup to TARGET, as they were asked for until it had ended."""
    job = snapshot.backup(target)
    seen = []
    while job.status != "concluded":
        seen.append(job.pacing["in_flight"])
        time.sleep(0.002)
    job.wait()
    return seen


def now_and_then(shows):
    """Whether a job SHOWS what it should in one of some tries: where the machine gives its threads no processor, more in flight gains nothing."""
    return any(shows() for _ in range(5))


class Recorder(Device):
    """Writes that are late: how long each was, and how many had begun when sixteen were under way for the first time."""

    LATENCY_S = 0.03

    def __init__(self, length):
        self.length, self.lengths = length, []
        self.begun_at_sixteen = None
        self._lock, self._under_way = threading.Lock(), 0

    def read(self, offset, length):
        return bytes(length)

    def write(self, offset, data):
        with self._lock:
            self.lengths.append(len(data))
            self._under_way += 1
            if self._under_way == 16 and self.begun_at_sixteen is None:
                self.begun_at_sixteen = len(self.lengths)
        time.sleep(self.LATENCY_S)
        with self._lock:
            self._under_way -= 1


def test_latency_is_hidden_after_a_few_round_trips():
    """One worker, four, sixteen: not several round trips for each doubling, by which 75 writes had begun."""
    with fastcbw.open(filled(48 * MIB), name="large") as disk:
        snapshot = disk.snapshot("s")

        def begun_at_sixteen():
            recorder = Recorder(48 * MIB)
            snapshot.backup(PythonDevice(recorder)).wait(60)
            return recorder.begun_at_sixteen or 1000

        assert now_and_then(lambda: begun_at_sixteen() <= 60)


class Filling(Recorder):
    """Late as a Recorder for what its buffer holds, then as slow as what is below it, whatever is under way."""

    BUFFER = 24 * MIB
    LATENCY_S = 0.005

    def write(self, offset, data):
        if sum(self.lengths) < self.BUFFER:
            super().write(offset, data)
        else:
            with self._lock:
                self.lengths.append(len(data))
                time.sleep(len(data) / 40e6)


def test_what_a_full_buffer_does_not_need_is_not_kept_under_way():
    length = Filling.BUFFER + 64 * MIB
    with fastcbw.open(filled(length), name="large") as disk:
        seen = in_flight(disk.snapshot("s"), PythonDevice(Filling(length)))
    assert max(seen) >= MIB and seen[-1] <= MIB // 2


def test_what_the_guest_scatters_goes_in_large_writes_where_much_is_under_way():
    """Every 128 KiB have a touched cluster, which goes first: with its neighbours, else each would cost a latency."""
    length = 64 * MIB
    recorder = Recorder(length)
    with fastcbw.open(filled(length), name="large") as disk:
        snapshot = disk.snapshot("s", ram="16M")
        for offset in range(0, length, 32 * K):
            disk.write(offset, b"new")
        snapshot.backup(PythonDevice(recorder)).wait(60)
    assert sum(recorder.lengths) == length
    assert sorted(recorder.lengths)[len(recorder.lengths) // 2] >= 64 * K


def test_what_is_in_flight_has_a_limit():
    for limit in (K, 100 * K, 3 * MIB, 64 * MIB):
        pace = make_pace(DelayDevice(MemoryDevice(K)), None, limit)
        status = pace.status()
        assert status["workers"] == 1 and status["in_flight"] <= limit
        assert pace.workers_max * K <= limit and pace.workers_max <= 16
    assert make_pace(MemoryDevice(K), 5, 100 * K).status()["in_flight"] == 100 * K


@pytest.fixture
def tmpfs():
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="fastcbw-test-") as path:
        yield pathlib.Path(path)


@pytest.mark.parametrize("processors, options, workers, by_kernel", [
    ({0}, {}, 1, True), ({0, 1}, {}, 2, False), ({0, 1, 2, 3}, {}, 2, False), ({0, 1}, {"workers": 1}, 1, True), ({0, 1}, {"in_flight": "1M"}, None, None),
    ({0, 1}, {"verify": True}, 2, False)])
def test_to_a_file_in_memory_two_workers_copy_or_the_kernel_does(tmpfs, monkeypatch, processors, options, workers, by_kernel):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: processors)
    source = tmpfs / "disk.img"
    source.write_bytes(bytes(range(1, 251)) * 4096)
    with fastcbw.open(source, name="disk") as disk:
        job = disk.snapshot("s").backup(tmpfs / "backup.img", **options)
        copied_by_kernel = job._copier.offload is not None
        pacing = job.pacing
        job.wait()
    if workers is not None:
        assert (pacing["workers"], copied_by_kernel) == (workers, by_kernel)
    assert pacing["in_flight"] <= 2 * MIB and (tmpfs / "backup.img").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("levels, first", [([], 0), ([(0, K)], 0), ([(1, 100)], 0), ([(1, K)], 1), ([(1, K)] * 33, 0)])
def test_levels_that_make_no_sense_are_refused(levels, first):
    with pytest.raises(ValueError, match="pace"):
        Pace(levels, first)


class FakeMeter:
    """A guest whose writes took what the test says."""

    def __init__(self):
        self.counts = np.zeros((len(KINDS), len(LIMITS_NS)), np.uint64)
        self.closed = False

    def wrote(self, count, ms):
        self.counts[0, bucket_of(int(ms * 1e6))] += count

    def look(self):
        counts, self.counts = self.counts, np.zeros_like(self.counts)
        return counts

    def close(self):
        self.closed = True


class Watched:
    """A governor of a job that is always as fast as it may be."""

    def __init__(self, target_ms):
        self.pace = Pace([(1, K)])
        self.meter = FakeMeter()
        self.now_s = self.moved = 0.0
        self.governor = Governor(self.pace, self.meter, lambda: self.moved, target_ms)

    def tick(self, *writes):
        for count, ms in writes:
            self.meter.wrote(count, ms)
        self.now_s += 0.1
        self.moved += self.rate * 0.1
        self.governor.tick(self.now_s)
        return self.rate

    @property
    def rate(self):
        return self.pace.status()["guest_rate"]


def test_the_rate_rises_while_the_guest_is_well_and_halves_when_it_is_not():
    job = Watched(5)
    assert job.rate == RATE_FIRST
    assert job.tick((1000, 1)) == RATE_FIRST        # the first speed is not known yet
    assert job.tick((1000, 1)) == 2 * RATE_FIRST
    assert job.tick((980, 1), (20, 9)) <= RATE_FIRST * 1.01
    rates = [job.tick((1000, 1), (10, 9)) for _ in range(5)]        # one in a hundred may
    assert rates == sorted(rates) and rates[-1] < 2 * RATE_FIRST
    assert job.governor.p99_ms == pytest.approx(1, rel=0.13)


def test_the_rate_never_falls_below_its_floor():
    job = Watched(5)
    for _ in range(50):
        job.tick((1000, 50))
    assert job.rate == RATE_FLOOR and job.governor.p99_ms > 50


def test_few_writes_are_judged_after_a_while():
    job = Watched(5)
    job.tick()
    first = job.rate
    assert job.tick((1, 9)) == first                # one write says nothing yet
    for _ in range(5):
        job.tick((1, 9))
    assert job.rate < first


def test_without_a_target_nothing_limits_the_rate():
    job = Watched(None)
    job.tick((1000, 500))
    assert job.rate == 0 and job.governor.p99_ms > 500
    job.governor.close()
    assert job.meter.closed


def test_guest_p99_is_reported_and_the_job_ends(disk, snapshot):
    stop = threading.Event()

    def guest():
        while not stop.is_set():
            disk.write(0, b"x" * K)

    writer = threading.Thread(target=guest)
    writer.start()
    try:
        target = DelayDevice(MemoryDevice(LENGTH))
        with target.hold("write") as gate:
            job = snapshot.backup(target, guest_p99=50)
            gate.wait_arrived()
            end = time.monotonic() + 10
            while job.pacing["guest_p99_now"] is None:
                assert time.monotonic() < end
                time.sleep(0.01)
            assert job.pacing["guest_p99"] == 50 and job.pacing["guest_p99_now"] < 1000
        job.wait(30)
    finally:
        stop.set()
        writer.join()
    assert same(target, snapshot)


def test_guest_p99_needs_a_guest(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(b"x" * 8 * K)
    with fastcbw.open(path, read_only=True) as disk:
        with pytest.raises(ValueError, match="guest_p99: .*disk@s: no guest writes"):
            disk.snapshot("s").backup(tmp_path / "b.img", guest_p99=5)
    assert not list(tmp_path.glob("b.img*"))
