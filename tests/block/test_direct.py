"""DirectDevice: requests of any alignment on a file that takes only aligned ones, and no neighbour lost."""

import ctypes
import errno
import mmap
import os
import subprocess
import threading

import numpy as np
import pytest

from fastcbw.block import vectors
from fastcbw.block.direct import DirectDevice
from fastcbw.block.file import FileDevice

BLOCK = 4096
LENGTHS = (1, 511, 512, 513, 4095, 4096, 4097, 4608, 65536, 65536 + 512, 65536 + 700, 600001)


def aligned(length, skew=0):
    """A buffer of LENGTH bytes whose address is SKEW past a multiple of 4096."""
    room = np.zeros(length + 2 * BLOCK, np.uint8)
    start = -room.ctypes.data % BLOCK + skew
    return room[start:start + length]


def is_cached(file, offset):
    """Whether the page cache has the page of FILE at OFFSET."""
    resident = ctypes.c_ubyte()
    with mmap.mmap(file.fileno(), BLOCK, access=mmap.ACCESS_COPY, offset=offset) as pages:
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(BLOCK), ctypes.byref(resident)) == 0
    return bool(resident.value & 1)


@pytest.fixture(params=[None, BLOCK], ids=["as the file wants", "4096"])
def alignment(request):
    return request.param


@pytest.fixture
def make(tmp_path, alignment):
    """make(length) -> a direct device of random bytes, the bytes, the path."""
    made = []

    def make(length, **options):
        data = bytearray(np.random.default_rng(length).bytes(length))
        path = tmp_path / f"vm{len(made)}.img"
        path.write_bytes(data)
        made.append(DirectDevice(path, alignment=alignment, **options))
        return made[-1], data, path

    yield make
    for device in made:
        device.close()


def test_the_alignment_is_a_power_of_two_that_the_file_wants(make, alignment):
    device, _, _ = make(8192)
    assert device.alignment in (512, 4096) and device.alignment >= (alignment or 0)
    fd, block = device.fileno(), device.alignment
    assert os.preadv(fd, [aligned(block)], block) == block
    if alignment is None and block > 1:
        with pytest.raises(OSError) as caught:
            os.preadv(fd, [aligned(block // 2)], 0)
        assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("length", LENGTHS)
def test_any_mixture_of_requests_is_what_a_bytearray_does(make, length):
    random = np.random.default_rng(length)
    device, model, path = make(length)
    for _ in range(150):
        offset = int(random.integers(length))
        size = int(random.integers(1, min(length - offset, random.choice([3, 600, 5000, 400000])) + 1))
        if random.integers(2):
            offset, size = offset // 512 * 512, min(-(-size // 512) * 512, length - offset // 512 * 512)
        part, skew = slice(offset, offset + size), int(random.choice([0, 1, 512]))
        pieces = np.diff([0, *sorted(random.integers(0, size + 1, random.integers(4))), size]).tolist()
        match random.integers(4):
            case 0:
                memory = aligned(size, skew)
                memory[:] = np.frombuffer(random.bytes(size), np.uint8)
                model[part] = memory.tobytes()
                assert vectors.writev(device, offset, memory, pieces, int(random.choice([0, 0, 0, vectors.FUA]))) == 0
            case 1:
                flags = int(random.choice([0, vectors.MAY_UNMAP, vectors.FAST_ONLY | vectors.MAY_UNMAP]))
                code = vectors.write_zeroes_at(device, offset, size, flags)
                if code == 0:
                    model[part] = bytes(size)
                else:
                    assert code == -errno.EOPNOTSUPP and flags & vectors.FAST_ONLY
            case 2:
                device.discard(offset, size)
                model[part] = device.read(offset, size)
            case 3:
                memory = aligned(size, skew)
                assert vectors.readv(device, offset, memory, pieces) == 0
                assert memory.tobytes() == model[part]
    assert device.read(0, length) == model
    device.close()
    assert path.stat().st_size == length
    assert path.read_bytes() == model


def race(device, works):
    """Run the WORKS at once; raise the first of their errors."""
    barrier, errors = threading.Barrier(len(works)), []

    def run(work):
        try:
            barrier.wait()
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("share", [512, 500])
def test_writers_of_neighbouring_bytes_of_one_block_lose_nothing(make, share):
    device, _, _ = make(3 * BLOCK)
    first, rounds = BLOCK, 2000

    def writer(n):
        def work():
            for i in range(rounds):
                mine = bytes([(n * 31 + i) % 256]) * share
                device.write(first + n * share, mine)
                assert device.read(first + n * share, share) == mine

        return work

    race(device, [writer(n) for n in range(3)])
    for n in range(3):
        assert device.read(first + n * share, share) == bytes([(n * 31 + rounds - 1) % 256]) * share


def test_a_write_of_part_of_a_block_does_not_bring_back_what_a_whole_write_replaced(make):
    device, _, _ = make(2 * BLOCK)
    whole, stop = aligned(BLOCK), threading.Event()

    def parts():
        while not stop.is_set():
            device.write(100, b"part")

    def wholes():
        try:
            for i in range(2000):
                whole[:] = i % 251
                device.write(0, whole)
                got = device.read(0, BLOCK)
                assert got[:100] + got[104:] == bytes([i % 251]) * (BLOCK - 4)
                assert got[100:104] in (b"part", bytes([i % 251]) * 4)
        finally:
            stop.set()

    race(device, [parts, wholes])


def test_zeroes_beside_a_write_of_part_of_a_block_stay_zeroes(make):
    device, _, _ = make(4 * BLOCK)
    stop = threading.Event()

    def parts():
        while not stop.is_set():
            device.write(BLOCK + 100, b"part")
            device.write(BLOCK - 7, b"a" * 14)

    def zeroes():
        try:
            for i in range(1000):
                device.write(BLOCK + 200, b"x" * 1000)
                device.write_zeroes(BLOCK, BLOCK)
                assert device.read(BLOCK + 200, 1000) == bytes(1000)
        finally:
            stop.set()

    race(device, [parts, zeroes])


def test_neighbours_across_the_last_whole_block_lose_nothing(make):
    length = 2 * BLOCK + 700
    device, _, path = make(length)

    def writer(offset, size, seed):
        def work():
            for i in range(1000):
                mine = bytes([(seed + i) % 256]) * size
                device.write(offset, mine)
                assert device.read(offset, size) == mine

        return work

    race(device, [writer(2 * BLOCK - 300, 300, 1), writer(2 * BLOCK, 512, 2), writer(2 * BLOCK + 512, 188, 3)])
    device.close()
    assert path.stat().st_size == length
    assert path.read_bytes()[2 * BLOCK - 300:] == bytes([232]) * 300 + bytes([233]) * 512 + bytes([234]) * 188


def test_more_unaligned_writers_than_bounce_buffers_all_get_their_turn(make):
    device, _, _ = make(1 << 20)

    def writer(n):
        def work():
            for i in range(20):
                mine = bytes([n * 20 + i & 255]) * 30001
                device.write(n * 30001 + 13, mine)
                assert device.read(n * 30001 + 13, 30001) == mine

        return work

    race(device, [writer(n) for n in range(24)])


def test_a_read_that_may_not_wait_says_so(make):
    device, _, _ = make(BLOCK)
    assert vectors.readv(device, 0, aligned(BLOCK), [BLOCK], nowait=True) == -errno.EAGAIN


def test_the_page_cache_is_left_alone(make):
    device, data, path = make(1 << 20)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert device.read(0, 1 << 20) == data
        device.write(4096, bytes(data[:300000]))
        # Not asked by RWF_NOWAIT: it makes recent kernels read the page ahead, and has it when the disk is fast.
        assert not is_cached(file, 65536)
        assert os.preadv(file.fileno(), [bytearray(4096)], 65536) == 4096
        assert is_cached(file, 65536)


def test_a_shrunk_image_is_an_error_that_says_so(make):
    device, data, path = make(1 << 20)
    os.truncate(path, 5000)
    assert device.read(3000, 1000) == data[3000:4000]
    for offset, length in ((4000, 1001), (5000, 1), (100000, 65536), (0, 1 << 20)):
        with pytest.raises(OSError, match="the image is shorter than announced, 5000 of 1048576 bytes") as caught:
            device.read(offset, length)
        assert caught.value.errno == errno.EIO
        assert vectors.readv(device, offset // BLOCK * BLOCK, aligned(1 << 17), [1 << 17]) == -errno.EIO
    with pytest.raises(OSError) as caught:
        device.write(100001, b"part of a block that is not there")
    assert caught.value.errno == errno.EIO


def test_a_read_only_direct_device_does_not_write(make):
    device, data, path = make(BLOCK + 100, read_only=True)
    with pytest.raises(PermissionError, match="opened read-only"):
        device.write(0, b"x")
    for offset in (0, 1, BLOCK + 1):
        assert vectors.writev(device, offset, b"x", [1]) == -errno.EBADF
    assert device.read(0, len(data)) == data == path.read_bytes()


def test_a_file_system_without_direct_io_is_refused_by_name_and_nothing_is_left():
    with pytest.raises(OSError, match="no direct I/O.*open the image without direct.*'/proc/version'"):
        DirectDevice("/proc/version", read_only=True, lock=False)


def test_a_created_file_is_not_left_behind_by_an_option_without_sense(tmp_path):
    for alignment in (0, 3, 1 << 20):
        with pytest.raises(ValueError, match=f"alignment: {alignment} is no power of two"):
            DirectDevice(tmp_path / "new", create_length=4096, alignment=alignment)
        assert not (tmp_path / "new").exists()


def test_direct_and_buffered_devices_have_the_same_locks(make):
    device, _, path = make(BLOCK)
    from fastcbw.errors import ImageLocked
    with pytest.raises(ImageLocked):
        FileDevice(path)
    device.close()
    FileDevice(path).close()


def test_memory_file_systems_take_direct_io_or_say_that_they_do_not(shm_path):
    try:
        device = DirectDevice(shm_path / "new", create_length=5000)
    except OSError as error:
        assert "no direct I/O" in str(error) and not (shm_path / "new").exists()
        return
    with device:
        device.write(4090, b"0123456789")
        assert device.read(4089, 12) == b"\0" + b"0123456789" + b"\0"


@pytest.fixture(params=[512, 4096])
def loop_device(tmp_path, request):
    """A loop device with that sector. It takes privileges that a container may not have, not a program that is missing."""
    (tmp_path / "backing").write_bytes(bytes(4 << 20))
    made = subprocess.run(["losetup", "--find", "--show", "--sector-size", str(request.param), str(tmp_path / "backing")],
                          capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no loop device to be had here: {made.stderr.strip()}")
    yield made.stdout.strip(), request.param
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


def test_a_block_device_does_what_a_bytearray_does(loop_device):
    path, sector = loop_device
    random, model = np.random.default_rng(1), bytearray(4 << 20)
    with DirectDevice(path) as device:
        assert device.alignment == sector and device.length == len(model)
        for _ in range(200):
            offset = int(random.integers(len(model)))
            length = int(random.integers(1, min(100000, len(model) - offset) + 1))
            part = slice(offset, offset + length)
            match random.integers(4):
                case 0:
                    model[part] = random.bytes(length)
                    device.write(offset, model[part])
                case 1:
                    model[part] = bytes(length)
                    device.write_zeroes(offset, length, unmap=bool(random.integers(2)))
                case 2:
                    device.discard(offset, length)
                    model[part] = device.read(offset, length)
                case 3:
                    assert device.read(offset, length) == model[part]
        device.flush()
        assert device.read(0, len(model)) == model


def test_a_disk_opened_directly_is_snapshotted_and_backed_up(tmp_path):
    import fastcbw

    data = np.random.default_rng(1).bytes((1 << 20) + 700)
    (tmp_path / "vm.img").write_bytes(data)
    with fastcbw.open(tmp_path / "vm.img", direct=True) as disk, disk.snapshot("s") as snapshot:
        disk.write(100, b"new" * 5000)
        disk.write(len(data) - 3, b"end")
        assert snapshot.read(0, len(data)) == data
        snapshot.backup(tmp_path / "backup.img", verify=True).wait(timeout=60)
        assert disk.read(100, 15000) == b"new" * 5000
    assert (tmp_path / "backup.img").read_bytes() == data
    assert (tmp_path / "vm.img").read_bytes() == data[:100] + b"new" * 5000 + data[15100:-3] + b"end"
