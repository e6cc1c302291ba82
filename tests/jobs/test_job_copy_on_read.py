"""A job of a copy-on-read snapshot: what it reads ahead of its target stays in RAM while slots are free."""

import pathlib
import tempfile

import pytest

import fastcbw
from fastcbw.block.fault import FaultDevice
from fastcbw.block.file import FileDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.cbw.copier import Copier
from fastcbw.cbw.engine import Engine
from fastcbw.cbw.offload import offload_for

K = 4096
CLUSTERS = 256
LENGTH = CLUSTERS * K
DATA = b"".join(bytes([c % 255 + 1]) * K for c in range(CLUSTERS))


@pytest.fixture
def shm_path():
    """A folder in memory: there the kernel copies from file to file."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield pathlib.Path(folder)


def test_a_job_reads_each_cluster_once_and_leaves_it_in_ram():
    counted = FaultDevice(MemoryDevice(LENGTH))
    counted.write(0, DATA)
    engine = Engine(counted)
    view = engine.snapshot("s", ram="2M", copy_on_read=True)
    target = MemoryDevice(LENGTH)
    copier = Copier(view, target, chunk=64 * K)
    copier.run()
    assert copier.error is None and target.read(0, LENGTH) == DATA
    assert counted.bytes["read"] == LENGTH and engine.report("s")["kept_clusters"] == CLUSTERS
    requests = counted.requests["read"]
    assert engine.device.read(0, LENGTH) == DATA                # the guest, from RAM
    engine.device.write(0, b"n" * LENGTH)                       # copies nothing
    assert counted.requests["read"] == requests and view.read(0, LENGTH) == DATA
    engine.close()


def test_a_job_beyond_the_free_slots_copies_all_and_keeps_what_fits():
    disk = MemoryDevice(LENGTH)
    disk.write(0, DATA)
    engine = Engine(disk)
    view = engine.snapshot("s", ram=64 * K, copy_on_read=True)
    target = MemoryDevice(LENGTH)
    Copier(view, target, chunk=64 * K).run()
    assert target.read(0, LENGTH) == DATA and engine.report("s")["kept_clusters"] == 56
    engine.close()


def test_the_kernel_does_not_copy_past_the_ram_of_a_copy_on_read_snapshot(shm_path):
    disk = FileDevice(shm_path / "disk", create_length=LENGTH)
    disk.write(0, DATA)
    with fastcbw.open(disk) as opened, FileDevice(shm_path / "target", create_length=LENGTH) as target:
        plain = opened.snapshot("p", ram="2M")
        assert offload_for(plain.device, target) is not None
        plain.close()
        snap = opened.snapshot("s", ram="2M", copy_on_read=True)
        assert offload_for(snap.device, target) is None
        job = snap.backup(shm_path / "copy")
        job.wait()
        assert (shm_path / "copy").read_bytes() == DATA and snap.status()["kept_clusters"] == CLUSTERS
        opened.write(0, b"n" * LENGTH)
        assert snap.status()["copies_avoided"] == CLUSTERS and snap.read(0, LENGTH) == DATA
        snap.close()
    disk.close()
