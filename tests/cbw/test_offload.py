"""Copies that the kernel makes from file to file: each range is the point in time, or is written again from the store."""

import errno
import os
import random
import threading

import pytest

from fastcbw.block.delay import DelayDevice
from fastcbw.block.direct import DirectDevice
from fastcbw.block.fault import FaultDevice
from fastcbw.block.file import FileDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.cbw.copier import Copier
from fastcbw.cbw.engine import Engine
from fastcbw.cbw.offload import behind_for, offload_for

K = 4096
CLUSTERS = 64
LENGTH = CLUSTERS * K + 700


def old_data():
    return b"".join(bytes([c + 1]) * K for c in range(CLUSTERS + 1))[:LENGTH]


class World:
    """A disk in a file with a snapshot of it, a target in a file, and a gate between the look-up of a range and its copy."""

    def __init__(self, folder, cluster):
        self.disk = FileDevice(folder / "disk", create_length=LENGTH)
        self.disk.write(0, old_data())
        self.engine = Engine(self.disk)
        self.snapshot = self.engine.snapshot("s", cluster_size=cluster, ram="16M")
        self.target = FileDevice(folder / "target", create_length=LENGTH)
        self.gate = DelayDevice(MemoryDevice(LENGTH))
        self.guest = self.engine.device

    def copier(self, **options):
        offload = offload_for(self.snapshot, self.target, self.gate)
        assert offload is not None
        return Copier(self.snapshot, self.target, offload=offload, **({"target_is_zero": True, "chunk": 16 * K} | options))

    def copied(self):
        return self.target.read(0, LENGTH)

    def close(self):
        self.engine.close()
        for device in (self.target, self.disk, self.gate):
            device.close()


@pytest.fixture(params=["4K", "64K"])
def world(shm_path, request):
    world = World(shm_path, request.param)
    yield world
    world.close()


def run_held(world, copier, meanwhile, offset):
    """Run COPIER; when it is about to copy the piece of OFFSET, having found that no store holds it, do MEANWHILE."""
    with world.gate.hold("read", offset // copier.chunk * copier.chunk, 1) as gate:
        thread = threading.Thread(target=copier.run)
        thread.start()
        gate.wait_arrived()
        meanwhile()
    thread.join(20)
    assert not thread.is_alive()


def test_what_no_store_holds_is_copied_by_the_kernel(world):
    copier = world.copier()
    copier.run()
    assert copier.error is None and world.copied() == old_data()
    assert copier.offload.copied_bytes == copier.counters()["data"] == LENGTH and copier.offload.rewritten_bytes == 0


def test_what_a_store_holds_comes_from_it(world):
    world.guest.write(3 * K, b"\xff" * 2 * K)
    world.guest.write(LENGTH - 5, b"\xff" * 5)
    copier = world.copier()
    copier.run()
    assert copier.error is None and world.copied() == old_data()
    assert 0 < copier.offload.copied_bytes < LENGTH and copier.offload.rewritten_bytes == 0
    assert copier.counters()["data"] == LENGTH


@pytest.mark.parametrize("offset, length", [(0, K), (16 * K, 16 * K), (18 * K + 5, 3), (20 * K, 2 * K), (31 * K, 2 * K), (LENGTH - 9, 9)],
                         ids=["head", "all of a piece", "inside a block", "body", "tail and the next piece", "the last bytes"])
def test_a_range_that_the_guest_overwrote_during_its_copy_is_written_again(world, offset, length):
    copier = world.copier()
    run_held(world, copier, lambda: world.guest.write(offset, b"\xff" * length), offset)
    assert world.disk.read(offset, length) == b"\xff" * length
    assert copier.error is None and world.copied() == old_data()
    assert copier.offload.rewritten_bytes > 0


def test_zeroes_that_were_overwritten_during_their_copy_are_zeroes_again(shm_path):
    """The target is known to be zero, but no longer where something was copied too late."""
    world = World(shm_path, "4K")
    world.disk.write(20 * K, bytes(2 * K))      # allocated: no hole, so a range to copy
    copier = world.copier()
    run_held(world, copier, lambda: world.guest.write(20 * K, b"\xff" * 2 * K), 20 * K)
    assert copier.error is None
    assert world.copied() == old_data()[: 20 * K] + bytes(2 * K) + old_data()[22 * K :]
    assert copier.offload.rewritten_bytes == 2 * K
    world.close()


def test_holes_stay_holes(shm_path):
    world = World(shm_path, "4K")
    world.disk.discard(8 * K, 24 * K)
    copier = world.copier()
    copier.run()
    assert copier.error is None and world.copied() == old_data()[: 8 * K] + bytes(24 * K) + old_data()[32 * K :]
    assert copier.counters()["zero"] == 24 * K
    assert os.stat(world.target.fileno()).st_blocks * 512 <= LENGTH - 24 * K + K
    world.close()


def test_a_snapshot_that_breaks_during_a_copy_is_an_error(world):
    copier = world.copier()
    run_held(world, copier, lambda: world.engine.break_snapshot("s"), 20 * K)
    assert "snapshot broken" in copier.error
    assert copier.done < LENGTH


def test_a_snapshot_deleted_during_a_copy_is_an_error(world):
    copier = world.copier()
    run_held(world, copier, lambda: world.engine.delete("s"), 20 * K)
    assert "the snapshot was deleted" in copier.error


def test_a_newer_snapshot_that_gets_the_old_data_is_looked_in(world):
    copier = world.copier()

    def meanwhile():
        world.engine.snapshot("newer", ram="16M")
        world.guest.write(20 * K, b"\xff" * 3 * K)

    run_held(world, copier, meanwhile, 20 * K)
    assert copier.error is None and world.copied() == old_data() and copier.offload.rewritten_bytes > 0


def test_an_image_that_somebody_shrank_is_an_error(world):
    os.ftruncate(world.disk.fileno(), 32 * K)
    copier = world.copier()
    copier.run()
    assert copier.error is not None and "Input/output error" in copier.error
    os.ftruncate(world.disk.fileno(), LENGTH)


def test_an_error_of_the_copy_is_an_error_and_not_a_fallback(world):
    faults = FaultDevice(MemoryDevice(LENGTH))
    world.gate = DelayDevice(faults)
    copier = world.copier()
    with faults.fail_on("read", 16 * K, K, errno=errno.EIO):
        copier.run()
    assert f"copy to the target at offset {16 * K}" in copier.error and copier.offload.copied_bytes == 16 * K


def test_random_overwrites_during_a_copy_never_show(shm_path):
    """Four workers, a guest that overwrites all the time: whatever interleaving there is, the target is the point in time."""
    for seed in range(6):
        folder = shm_path / str(seed)
        folder.mkdir()
        world = World(folder, "4K")
        stop = threading.Event()

        def guest(world=world, rng=random.Random(seed), stop=stop):
            while not stop.is_set():
                offset = rng.randrange(LENGTH - 1)
                length = min(rng.choice([1, 700, K, 5 * K]), LENGTH - offset)
                world.guest.write(offset, b"\xff" * length)

        writer = threading.Thread(target=guest)
        copier = world.copier(chunk=2 * K)
        workers = [threading.Thread(target=copier.run) for _ in range(4)]
        for thread in (writer, *workers):
            thread.start()
        for thread in workers:
            thread.join()
        stop.set()
        writer.join()
        assert copier.error is None and world.copied() == old_data()
        world.close()


def test_only_a_plain_file_into_a_plain_file_is_copied_by_the_kernel(world, shm_path, tmp_path):
    plain = world.snapshot, world.target
    assert offload_for(*plain) is not None
    assert offload_for(world.snapshot, MemoryDevice(LENGTH)) is None
    assert offload_for(world.snapshot, DelayDevice(MemoryDevice(LENGTH))) is None
    assert offload_for(world.disk, world.target) is None        # no snapshot: nobody could say what was copied
    engine = Engine(MemoryDevice(LENGTH))
    assert offload_for(engine.snapshot("m"), world.target) is None
    engine.close()
    with DirectDevice(tmp_path / "direct", create_length=64 * K) as direct:
        assert offload_for(world.snapshot, direct) is None
        assert behind_for(direct, K) is None
    assert behind_for(world.target, K) is None          # in memory: no device to write back to


def test_a_target_on_a_device_is_written_back_on_the_way(world, tmp_path):
    """tmp_path is on a disk where these tests are run; where it is not, there is nothing to write back."""
    with FileDevice(tmp_path / "target", create_length=LENGTH) as target:
        copier = Copier(world.snapshot, target, chunk=4 * K, target_is_zero=True)
        copier.run()
        assert copier.error is None and target.read(0, LENGTH) == old_data()
