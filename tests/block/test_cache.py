"""The RAM cache: what it keeps, what a flush covers, what happens when the child fails; many threads in little room."""

import errno
import threading

import numpy as np
import pytest

from fastcbw.block.cache import CacheDevice
from fastcbw.block.delay import DelayDevice
from fastcbw.block.fault import FaultDevice
from fastcbw.block.memory import MemoryDevice

BLOCK = 32 << 10
LENGTH = 64 * BLOCK + 5000      # twice the cache, and an odd end


@pytest.fixture
def child():
    device = MemoryDevice(LENGTH)
    device.write(0, np.random.default_rng(3).integers(1, 256, LENGTH, dtype=np.uint8).tobytes())
    return DelayDevice(FaultDevice(device))


def cache(child, **options):
    return CacheDevice(child, size="1M", **options)


def test_what_was_read_is_read_once(child):
    device = cache(child)
    old = child.read(0, LENGTH)
    child.child.reset_counts()
    for _ in range(3):
        assert device.read(1000, 3 * BLOCK) == old[1000 : 1000 + 3 * BLOCK]
    assert child.child.bytes["read"] == 3 * BLOCK + 512      # whole sectors
    assert device.read(LENGTH - 1, 1) == old[-1:]


def test_a_device_larger_than_the_cache_is_read_and_written_whole(child):
    device, data = cache(child, writeback=True), bytes(range(256)) * (LENGTH // 256) + bytes(LENGTH % 256)
    device.write(0, data)
    assert device.read(0, LENGTH) == data
    assert device.counters()["used"] <= 1 << 20
    device.flush()
    assert child.read(0, LENGTH) == data and device.counters()["dirty"] == 0


def test_writes_of_whole_sectors_read_nothing_and_wait_for_the_flush(child):
    device, old = cache(child, writeback=True), child.read(0, LENGTH)
    child.child.reset_counts()
    device.write(5 * 512, b"n" * 1024)
    device.write(BLOCK - 512, b"n" * 1024)
    assert child.child.requests == dict.fromkeys(child.child.requests, 0)
    assert child.read(0, LENGTH) == old and device.counters()["dirty"] == 2048
    device.flush()
    assert child.child.requests["flush"] == 1 and child.child.bytes["write"] == 2048
    assert child.read(5 * 512, 1024) == b"n" * 1024


def test_parts_of_sectors_are_read_first(child):
    device, old = cache(child, writeback=True), bytearray(child.read(0, LENGTH))
    for offset, length in ((3, 5), (511, 2), (BLOCK - 1, 2), (LENGTH - 3, 3), (4096, 700)):
        device.write(offset, b"n" * length)
        old[offset : offset + length] = b"n" * length
    assert device.read(0, LENGTH) == old
    device.flush()
    assert child.read(0, LENGTH) == old


@pytest.mark.parametrize("writeback", [False, True])
def test_fua_is_in_the_child_at_the_return(child, writeback):
    device = cache(child, writeback=writeback)
    device.write(512, b"n" * 512, fua=True)
    assert child.read(512, 512) == b"n" * 512
    assert child.child.requests["flush"] == 1 if writeback else child.child.requests["fua"] == 1


def test_zeroes_take_what_was_dirty_along(child):
    device = cache(child, writeback=True)
    device.write(0, b"n" * 4 * BLOCK)
    device.write_zeroes(1000, 3 * BLOCK)
    assert device.read(0, 4 * BLOCK) == b"n" * 1000 + bytes(3 * BLOCK) + b"n" * (BLOCK - 1000)
    assert child.read(BLOCK, 2 * BLOCK) == bytes(2 * BLOCK)
    device.flush()
    assert child.read(0, 4 * BLOCK) == b"n" * 1000 + bytes(3 * BLOCK) + b"n" * (BLOCK - 1000)


def test_zeroes_that_fail_lose_nothing_that_was_acknowledged(child):
    device = cache(child, writeback=True)
    device.write(0, b"n" * 4 * BLOCK)
    with child.child.fail_on("zero"), pytest.raises(OSError):
        device.write_zeroes(0, 2 * BLOCK)
    assert device.read(0, 4 * BLOCK) == b"n" * 4 * BLOCK
    device.flush()
    assert child.read(0, 4 * BLOCK) == b"n" * 4 * BLOCK


@pytest.mark.parametrize("writeback", [False, True])
def test_zeroes_that_fail_leave_nothing_to_be_believed(child, writeback):
    """The child may have zeroed a part: to go on showing what was there before would be a lie, until the block's room is wanted."""
    device = cache(child, writeback=writeback)
    device.read(0, 2 * BLOCK)
    device.write(512, b"n" * 512)
    child.child.fail_on("zero", errno=errno.EIO, count=1)
    with pytest.raises(OSError):
        device.write_zeroes(0, 2 * BLOCK)
    memory = child.child.child
    memory.write(BLOCK, bytes(BLOCK))       # what it did before it failed
    assert device.read(BLOCK, BLOCK) == bytes(BLOCK)
    assert device.read(0, 2048) == memory.read(0, 512) + b"n" * 512 + memory.read(1024, 1024)


def test_a_flush_beside_zeroes_does_not_bring_old_data_back(child):
    device = cache(child, writeback=True)
    device.write(0, b"n" * 2 * BLOCK)
    with child.hold("zero") as gate:
        zeroing = threading.Thread(target=device.write_zeroes, args=(0, BLOCK))
        zeroing.start()
        gate.wait_arrived()
        flushing = threading.Thread(target=device.flush)
        flushing.start()
        reader = threading.Thread(target=device.read, args=(0, 1))
        reader.start()
    for thread in (zeroing, flushing, reader):
        thread.join(30)
        assert not thread.is_alive()
    device.flush()
    assert child.read(0, 2 * BLOCK) == bytes(BLOCK) + b"n" * BLOCK == device.read(0, 2 * BLOCK)


def fill_with_what_is_dirty(device):
    """From here on room is made by writing something back."""
    for block in range(32):
        device.write(block * BLOCK, b"d" * 512)
    assert device.counters()["dirty"] == 32 * 512


def test_two_that_make_room_for_one_block_end_up_with_one_of_it(child):
    device = cache(child, writeback=True)
    fill_with_what_is_dirty(device)
    with child.hold("write") as gate:
        writers = [threading.Thread(target=device.write, args=(40 * BLOCK + 512 * i, bytes([i + 1]) * 512)) for i in range(2)]
        for writer in writers:
            writer.start()
        gate.wait_arrived(2)        # each has a slot of its own in view
    for writer in writers:
        writer.join(30)
    assert device.read(40 * BLOCK, 1024) == b"\1" * 512 + b"\2" * 512
    device.flush()
    assert child.read(40 * BLOCK, 1024) == b"\1" * 512 + b"\2" * 512


def test_who_has_made_room_for_a_block_that_is_being_zeroed_waits(child):
    device = cache(child, writeback=True)
    fill_with_what_is_dirty(device)
    with child.hold("zero") as zeroes:
        with child.hold("write") as gate:
            writer = threading.Thread(target=device.write, args=(40 * BLOCK, b"n" * 512))
            writer.start()
            gate.wait_arrived()
            zeroing = threading.Thread(target=device.write_zeroes, args=(40 * BLOCK, BLOCK))
            zeroing.start()
            zeroes.wait_arrived()
        writer.join(0.2)            # it would be a moment
        assert writer.is_alive()
    for thread in (writer, zeroing):
        thread.join(30)
        assert not thread.is_alive()
    assert device.read(40 * BLOCK, 1024) == b"n" * 512 + bytes(512)


def test_what_the_child_does_not_take_stays_dirty_and_the_flush_says_so(child):
    device = cache(child, writeback=True)
    device.write(0, b"n" * 3 * BLOCK)
    with child.child.fail_on("write", BLOCK, BLOCK, errno=errno.ENOSPC), pytest.raises(OSError, match="No space left") as caught:
        device.flush()
    assert caught.value.errno == errno.ENOSPC and device.counters()["dirty"] == BLOCK
    assert child.read(2 * BLOCK, BLOCK) == b"n" * BLOCK     # the others were tried
    assert child.child.requests["flush"] == 0
    device.flush()
    assert child.read(0, 3 * BLOCK) == b"n" * 3 * BLOCK


def test_a_write_that_finds_no_room_because_the_child_fails_is_told(child):
    device = cache(child, writeback=True)
    device.write(0, b"n" * (1 << 20))
    with child.child.fail_on("write", errno=errno.EIO):
        with pytest.raises(OSError):
            device.write(1 << 20, b"m" * BLOCK)
        assert device.read(0, 1 << 20) == b"n" * (1 << 20)
    device.write(1 << 20, b"m" * BLOCK)
    device.flush()
    assert child.read(0, (1 << 20) + BLOCK) == b"n" * (1 << 20) + b"m" * BLOCK


def test_a_read_that_finds_no_room_because_the_child_fails_is_served(child):
    """What fails are writes: the guest's reads have nothing to do with it."""
    device, old = cache(child, writeback=True), child.read(0, LENGTH)
    device.write(0, b"n" * (1 << 20))       # all of the room
    with child.child.fail_on("write", errno=errno.ENOSPC):
        assert device.read(40 * BLOCK - 700, BLOCK) == old[40 * BLOCK - 700 : 41 * BLOCK - 700]
        assert device.read(0, BLOCK) == b"n" * BLOCK
        with pytest.raises(OSError):
            device.write(40 * BLOCK, b"x")
    device.flush()
    assert child.read(0, LENGTH) == b"n" * (1 << 20) + old[1 << 20 :]


def test_a_failed_write_through_is_not_believed(child):
    device, old = cache(child), child.read(0, LENGTH)
    device.read(0, BLOCK)
    with child.child.fail_on("write"), pytest.raises(OSError):
        device.write(512, b"n" * 512)
    assert device.read(0, BLOCK) == old[:BLOCK]


def test_a_failed_read_leaves_nothing_behind(child):
    device, old = cache(child), child.read(0, LENGTH)
    with child.child.fail_on("read"), pytest.raises(OSError):
        device.read(0, BLOCK)
    assert device.counters()["used"] == 0 and device.read(0, BLOCK) == old[:BLOCK]


def test_what_is_dirty_is_data_to_block_status(child):
    device = CacheDevice(MemoryDevice(LENGTH), size="1M", writeback=True)
    device.write(2 * BLOCK, bytes(512))
    assert device.extents(0, 4 * BLOCK).tolist() == [(0, 2 * BLOCK, 2), (2 * BLOCK, BLOCK, 0), (3 * BLOCK, BLOCK, 2)]


def test_close_writes_back(child):
    device = cache(child, writeback=True)
    device.write(0, b"n" * 4096)
    device.close()
    device.close()
    assert child.child.requests["flush"] == 1 and child.child.requests["write"] == 1
    with pytest.raises(ValueError, match="closed"):
        device.read(0, 1)


@pytest.mark.parametrize("size", [0, 4096, "2T"])
def test_a_size_that_makes_no_sense_is_refused(child, size):
    with pytest.raises(ValueError, match="size"):
        CacheDevice(child, size=size)


@pytest.mark.parametrize("writeback", [False, True])
def test_many_threads_in_little_room_lose_nothing(writeback):
    """Each has sectors of its own in every block, and a model of them; all fight for 32 slots, with flushes and zeroes beside."""
    length = 80 * BLOCK
    child = MemoryDevice(length)
    device = CacheDevice(child, size="1M", writeback=writeback)
    failures = []

    def work(number):
        random = np.random.default_rng(number)
        model = {}
        for step in range(1500):
            place = int(random.integers(0, 78)) * BLOCK + (number * 12 + int(random.integers(0, 12))) * 512
            kind = random.integers(0, 8)
            if kind < 4:
                data = random.bytes(512)
                device.write(place, data)
                model[place] = data
            elif kind < 5 and number == 0:
                device.write_zeroes(78 * BLOCK, 2 * BLOCK)
            elif kind < 5:
                device.write_zeroes(place, 512)
                model[place] = bytes(512)
            elif step % 200 == 0:
                device.flush()
            elif device.read(place, 512) != model.get(place, bytes(512)):
                failures.append((number, step, place))
        for place, data in model.items():
            if device.read(place, 512) != data:
                failures.append((number, "end", place))
        models.append(model)

    models = []
    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures and len(models) == 5
    device.flush()
    for model in models:
        for place, data in model.items():
            assert child.read(place, 512) == data
