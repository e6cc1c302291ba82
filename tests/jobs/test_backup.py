"""The backup job: what arrives at the target, in which order, and what is left after each kind of end."""

import asyncio
import errno
import functools
import os
import threading

import pytest

import fastcbw
from fastcbw.block.delay import DelayDevice
from fastcbw.block.fault import FaultDevice
from fastcbw.block.file import FileDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.block.python import Device, PythonDevice
from fastcbw.errors import JobCancelled, JobFailed

K = 4096
LENGTH = 300 * K + 777


class Recorder(Device):
    """A target that remembers where it was written, and may lie when it is read."""

    def __init__(self, length, lie_at=None):
        self.length = length
        self.data = bytearray(length)
        self.writes = []
        self.zeroes = []
        self.lie_at = lie_at

    def read(self, offset, length):
        data = bytearray(self.data[offset : offset + length])
        if self.lie_at is not None and offset <= self.lie_at < offset + length:
            data[self.lie_at - offset] ^= 1
        return data

    def write(self, offset, data):
        self.writes.append((offset, len(data)))
        self.data[offset : offset + len(data)] = data

    def write_zeroes(self, offset, length, *, unmap=True):
        self.zeroes.append((offset, length))
        self.data[offset : offset + length] = bytes(length)


@functools.cache
def image(length=LENGTH):
    """Data with holes: every third block of ten clusters is zeroes."""
    return b"".join(bytes(K) if i // 10 % 3 == 0 else bytes([i % 255 + 1]) * K for i in range(length // K + 1))[:length]


@pytest.fixture
def disk(tmp_path):
    """A disk on a file, with data and holes."""
    path = tmp_path / "disk.img"
    with FileDevice(path, create_length=LENGTH) as device:
        for offset in range(0, LENGTH, K):
            data = image()[offset : offset + K]
            if any(data):
                device.write(offset, data)
    with fastcbw.open(path) as disk:
        yield disk


@pytest.fixture
def snapshot(disk):
    return disk.snapshot("s", cluster_size="4K", ram="16M")


@pytest.mark.parametrize("order", ["sequential", "hot-first,ram-first,zero-last"])
@pytest.mark.parametrize("workers, in_flight", [(1, 4096), (1, "1M"), (3, "36K"), (8, "2M"), (64, "1M")])
@pytest.mark.parametrize("cluster", ["4K", "64K", "1M"])
def test_backup_is_the_snapshot_with_any_workers_chunk_and_cluster(disk, tmp_path, order, workers, in_flight, cluster):
    snapshot = disk.snapshot("s", cluster_size=cluster, ram="16M")
    disk.write(5 * K + 100, b"new" * 30_000)
    disk.discard(200 * K, 50 * K)
    job = snapshot.backup(tmp_path / "b.img", order=order, workers=workers, in_flight=in_flight, verify=True)
    result = job.wait(30)
    assert (tmp_path / "b.img").read_bytes() == image()
    assert result["bytes"] == LENGTH and result["verified"]
    assert job.status == "concluded" and job.error is None
    assert job.progress["done"] == job.progress["total"] == 2 * LENGTH
    assert not (tmp_path / "b.img.incomplete").exists()


def test_a_sparse_target_stays_sparse(snapshot, tmp_path):
    snapshot.backup(tmp_path / "b.img", in_flight=4 * K).wait(30)
    data = sum(bool(any(image()[i : i + K])) for i in range(0, LENGTH, K)) * K
    assert os.stat(tmp_path / "b.img").st_blocks * 512 <= data + 16 * K        # some for the file system's own maps
    assert os.path.getsize(tmp_path / "b.img") == LENGTH


def test_a_target_device_with_old_data_gets_its_zeroes_written(snapshot):
    target = MemoryDevice(LENGTH + 3)
    target.write(0, b"\xff" * (LENGTH + 3))
    snapshot.backup(target).wait(30)
    assert target.read(0, LENGTH) == image()
    assert target.read(LENGTH, 3) == b"\xff" * 3


def test_ram_first_writes_what_is_in_ram_before_the_rest(disk, snapshot):
    touched = [250, 30 + 10, 110, 111, 112]
    for cluster in touched:
        disk.write(cluster * K, b"n" * K)
    recorder = Recorder(LENGTH)
    snapshot.backup(PythonDevice(recorder), order="ram-first", workers=1, in_flight=8 * K).wait(30)
    assert bytes(recorder.data) == image()
    first = [c for offset, length in recorder.writes for c in range(offset // K, -(-(offset + length) // K))][: len(touched)]
    assert first == [c for c in sorted(touched) if any(image()[c * K : c * K + K])] + first[len([c for c in touched if any(image()[c * K : c * K + K])]):]
    rest = [offset for offset, _ in recorder.writes][len(touched) :]
    assert rest == sorted(rest)


def test_sequential_with_one_worker_ascends(disk, snapshot):
    disk.write(200 * K, b"n" * K)
    recorder = Recorder(LENGTH)
    snapshot.backup(PythonDevice(recorder), order="sequential", workers=1).wait(30)
    assert recorder.writes == sorted(recorder.writes)


@pytest.mark.parametrize("lie_at", [0, 12 * K + 5, LENGTH - 1])
def test_verify_names_the_offset_at_which_the_target_differs(snapshot, lie_at):
    target = PythonDevice(Recorder(LENGTH, lie_at), name="liar")
    job = snapshot.backup(target, verify=True)
    with pytest.raises(JobFailed, match=rf"liar: compare the target at offset {lie_at}: it differs"):
        job.wait(30)
    assert "incomplete" in job.error


def test_without_verify_a_lying_target_is_not_read(snapshot):
    snapshot.backup(PythonDevice(Recorder(LENGTH, 12 * K)), verify=False).wait(30)


@pytest.mark.parametrize("operation, what", [("write", "write to the target"), ("zero", "write zeroes to the target")])
def test_an_error_of_the_target_names_the_operation_and_the_offset(snapshot, operation, what):
    target = FaultDevice(MemoryDevice(LENGTH), name="target")
    # block 10..29 is data, 30..39 zeroes
    with target.fail_on(operation, 32 * K if operation == "zero" else 12 * K, K, errno=errno.ENOSPC):
        job = snapshot.backup(target, workers=1, in_flight=K)
        with pytest.raises(JobFailed, match=rf"target: {what} at offset \d+, length \d+: No space left"):
            job.wait(30)


def test_an_error_of_the_source_names_the_offset_and_leaves_the_incomplete_target(tmp_path):
    source = FaultDevice(MemoryDevice(64 * K), name="source")
    source.write(0, b"x" * 64 * K)
    with fastcbw.open(source, name="d") as disk:
        snapshot = disk.snapshot("s")
        (tmp_path / "b.img").write_bytes(b"old backup")
        with source.fail_on("read", 8 * K, K):
            job = snapshot.backup(tmp_path / "b.img", workers=1, in_flight=K, force=True)
            with pytest.raises(JobFailed, match=rf"read from the source at offset {8 * K}, length {K}: Input/output error.*b.img.incomplete"):
                job.wait(30)
        assert job.incomplete_name == str(tmp_path / "b.img.incomplete")
        assert (tmp_path / "b.img.incomplete").read_bytes()[: 8 * K] == b"x" * 8 * K
        assert (tmp_path / "b.img").read_bytes() == b"old backup"       # replaced at the end only
        snapshot.backup(tmp_path / "b.img", force=True).wait(30)        # the stale one is no obstacle
        assert (tmp_path / "b.img").read_bytes() == b"x" * 64 * K
        assert not (tmp_path / "b.img.incomplete").exists()


def test_snapshot_that_breaks_during_a_backup_fails_the_job_by_name(disk, tmp_path):
    snapshot = disk.snapshot("s", ram=K)
    target = DelayDevice(MemoryDevice(LENGTH))
    with target.hold("write") as gate:
        job = snapshot.backup(target, workers=2, in_flight=2 * K)
        gate.wait_arrived(2)
        disk.write(10 * K, b"n" * 4 * K)
    with pytest.raises(JobFailed, match=r"disk@s: .*snapshot broken: its store is full"):
        job.wait(30)
    snapshot.close()        # the job holds it no more


def test_cancel_removes_the_incomplete_target(disk, snapshot, tmp_path):
    reads = DelayDevice(MemoryDevice(LENGTH))
    reads.write(0, b"x" * LENGTH)
    with fastcbw.open(reads, name="slow") as slow:
        view = slow.snapshot("s")
        with reads.hold("read", 100 * K) as gate:
            job = view.backup(tmp_path / "b.img", in_flight=16 * K)
            gate.wait_arrived()
            job.cancel()
            job.cancel()
            with pytest.raises(TimeoutError, match=f"{job.id}: still running"):
                job.wait(0.01)
            with pytest.raises(fastcbw.Error, match="in use"):
                view.close()
        with pytest.raises(JobCancelled, match="cancelled after"):
            job.wait(30)
    assert not [name for name in os.listdir(tmp_path) if name.startswith("b.img")]
    assert job.error and job.status == "concluded"


def test_cancel_after_the_end_changes_nothing(snapshot, tmp_path):
    job = snapshot.backup(tmp_path / "b.img")
    result = job.wait(30)
    job.cancel()
    assert job.wait() == result and not job.cancelled
    assert (tmp_path / "b.img").exists()


def test_progress_only_grows(snapshot):
    seen = []

    class Watcher(Recorder):
        def write(self, offset, data):
            super().write(offset, data)
            seen.append(job.progress["done"])

    ready = threading.Event()
    target = DelayDevice(PythonDevice(Watcher(LENGTH)))
    with target.hold("write") as gate:
        job = snapshot.backup(target, workers=1, in_flight=8 * K, verify=True)
        gate.wait_arrived()
        ready.set()
    job.wait(30)
    assert seen == sorted(seen) and seen[0] < seen[-1] <= job.progress["total"] == 2 * LENGTH
    assert job.progress["bytes_per_s"] > 0


def test_an_existing_target_needs_force(snapshot, tmp_path):
    (tmp_path / "b.img").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="b.img"):
        snapshot.backup(tmp_path / "b.img")
    assert (tmp_path / "b.img").read_bytes() == b"precious"
    assert not (tmp_path / "b.img.incomplete").exists()
    snapshot.close()        # not held by a job that never was


@pytest.mark.parametrize("way", ["itself", "symlink", "hard link"])
def test_the_source_as_target_is_refused_and_unchanged(disk, snapshot, tmp_path, way):
    target = tmp_path / "disk.img"
    if way == "symlink":
        target = tmp_path / "link"
        target.symlink_to("disk.img")
    elif way == "hard link":
        target = tmp_path / "hard"
        target.hardlink_to(tmp_path / "disk.img")
    with pytest.raises(ValueError, match="is the source itself"):
        snapshot.backup(target, force=True)
    assert (tmp_path / "disk.img").read_bytes() == image()


def test_the_source_as_target_device_is_refused(disk, snapshot, tmp_path):
    with FileDevice(tmp_path / "disk.img", lock=False) as same:
        for target in (disk.device, snapshot.device, same):
            with pytest.raises(ValueError, match="is the source itself"):
                snapshot.backup(target)
    assert disk.read(0, LENGTH) == image()


def test_a_source_named_like_the_temporary_target_is_not_removed(tmp_path):
    path = tmp_path / "b.img.incomplete"
    path.write_bytes(b"x" * K)
    with fastcbw.open(path, lock=False) as disk:
        with pytest.raises(ValueError, match="is the source itself"):
            disk.snapshot("s").backup(tmp_path / "b.img")
    assert path.read_bytes() == b"x" * K


def test_a_smaller_target_is_refused(snapshot):
    target = MemoryDevice(LENGTH - 1, name="small")
    with pytest.raises(ValueError, match=f"small: its {LENGTH - 1} bytes are less than the source's {LENGTH}"):
        snapshot.backup(target)


def test_a_second_backup_to_the_same_target_is_refused_while_the_first_runs(tmp_path):
    source = DelayDevice(MemoryDevice(64 * K))
    source.write(0, b"x" * 64 * K)
    with fastcbw.open(source, name="d") as disk:
        snapshot = disk.snapshot("s")
        with source.hold("read") as gate:
            job = snapshot.backup(tmp_path / "b.img")
            gate.wait_arrived()
            with pytest.raises(fastcbw.ImageLocked, match="another backup is writing"):
                snapshot.backup(tmp_path / "b.img")
        job.wait(30)
    assert (tmp_path / "b.img").read_bytes() == b"x" * 64 * K


def test_a_target_made_by_somebody_else_meanwhile_is_not_replaced(tmp_path):
    source = DelayDevice(MemoryDevice(64 * K))
    source.write(0, b"x" * 64 * K)
    with fastcbw.open(source, name="d") as disk:
        with source.hold("read") as gate:
            job = disk.snapshot("s").backup(tmp_path / "b.img")
            gate.wait_arrived()
            (tmp_path / "b.img").write_bytes(b"precious")
        with pytest.raises(JobFailed, match="File exists"):
            job.wait(30)
    assert (tmp_path / "b.img").read_bytes() == b"precious"


def test_file_systems_without_hard_links_are_targets_too(snapshot, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    snapshot.backup(tmp_path / "b.img").wait(30)
    assert sorted(name for name in os.listdir(tmp_path) if name.startswith("b.img")) == ["b.img"]
    assert (tmp_path / "b.img").read_bytes() == image()


def test_several_backups_of_one_snapshot_at_once(disk, snapshot, tmp_path):
    jobs = [snapshot.backup(tmp_path / f"{i}.img", order=order) for i, order in enumerate(("sequential", "ram-first") * 3)]
    disk.write(0, b"n" * LENGTH)
    for i, job in enumerate(jobs):
        job.wait(30)
        assert (tmp_path / f"{i}.img").read_bytes() == image()


def test_a_job_can_be_awaited(snapshot, tmp_path):
    async def main():
        result = await snapshot.backup(tmp_path / "a.img")
        assert result["bytes"] == LENGTH
        with pytest.raises(JobFailed):
            target = FaultDevice(MemoryDevice(LENGTH))
            with target.fail_on("write"):
                await snapshot.backup(target)

    asyncio.run(main())


@pytest.mark.parametrize("options, error, words", [
    ({"order": "random"}, ValueError, "order: 'random' is unknown"),
    ({"order": "disk-last,disk-early"}, ValueError, "order: 'disk-early' and 'disk-last' contradict each other"),
    ({"order": None}, ValueError, "order"),
    ({"workers": 0}, ValueError, "workers: 0"),
    ({"workers": 65}, ValueError, "workers: 65"),
    ({"workers": "4"}, TypeError, "workers: expected an int"),
    ({"workers": True}, TypeError, "workers"),
    ({"in_flight": "1K"}, ValueError, "in_flight"),
    ({"in_flight": "1X"}, ValueError, "in_flight"),
    ({"in_flight": -1}, ValueError, "in_flight"),
    ({"rate": 0}, ValueError, "rate: 0"),
    ({"rate": -1}, ValueError, "rate: -1 is negative"),
    ({"rate": "1X"}, ValueError, "rate: '1X'"),
    ({"rate": 1.5}, TypeError, "rate"),
    ({"guest_p99": 0}, ValueError, "guest_p99: 0"),
    ({"guest_p99": -5}, ValueError, "guest_p99: -5"),
    ({"guest_p99": float("nan")}, ValueError, "guest_p99: nan"),
    ({"guest_p99": "5"}, TypeError, "guest_p99"),
    ({"guest_p99": True}, TypeError, "guest_p99"),
    ({"consume": True, "verify": True}, ValueError, "consume: not with verify"),
    ({"resume": True}, ValueError, "resume"),
    ({"unknown": 1}, TypeError, "unknown"),
])
def test_bad_options_name_themselves_and_make_nothing(snapshot, tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        snapshot.backup(tmp_path / "b.img", **options)
    assert not [name for name in os.listdir(tmp_path) if name.startswith("b.img")]
    snapshot.close()


def test_bad_targets_name_themselves(snapshot, tmp_path):
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        snapshot.backup(tmp_path, force=True)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        snapshot.backup(tmp_path / "nowhere" / "b.img")
    with pytest.raises(OSError, match="nbd"):
        snapshot.backup(f"nbd+unix:///x?socket={tmp_path}/nobody")
    with pytest.raises(ValueError, match="nbds://host/x: TLS"):
        snapshot.backup("nbds://host/x")
    with pytest.raises(TypeError):
        snapshot.backup(7.5)
    snapshot.close()
