"""FileDevice: what is special to files."""

import contextlib
import errno
import os
import resource
import signal
import subprocess

import numpy as np
import pytest

from fastcbw.block import vectors
from fastcbw.block.file import FileDevice


CONTENT = bytes(range(256)) * 4096      # of the fixture's image


@contextlib.contextmanager
def files_limited_to(length):
    """Let no write or truncate of this process go past LENGTH (EFBIG): the nearest thing to a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (length, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture(params=["tmpfs", "disk"])
def folder(request, tmp_path, shm_path):
    return shm_path if request.param == "tmpfs" else tmp_path


@pytest.fixture
def image(folder):
    path = folder / "vm.img"
    path.write_bytes(CONTENT)
    return path


def test_what_is_written_is_in_the_file(image):
    with FileDevice(image) as device:
        device.write(1000, b"guest")
        device.write(2000, b"durable", fua=True)
        device.flush()
    data = image.read_bytes()
    assert len(data) == 1 << 20
    assert data[1000:1005] == b"guest" and data[2000:2007] == b"durable"


def test_a_missing_image_is_named(folder):
    with pytest.raises(FileNotFoundError) as caught:
        FileDevice(folder / "missing.img")
    assert caught.value.filename == str(folder / "missing.img")


def test_a_folder_is_refused_by_name(folder):
    with pytest.raises(IsADirectoryError, match="is a directory") as caught:
        FileDevice(folder, read_only=True)
    assert caught.value.filename == str(folder)


def test_a_fifo_is_refused_without_waiting_for_its_writer(folder):
    os.mkfifo(folder / "fifo")
    with pytest.raises(OSError, match="is a fifo") as caught:
        FileDevice(folder / "fifo", read_only=True)
    assert caught.value.filename == str(folder / "fifo")


def test_a_character_device_is_refused():
    with pytest.raises(OSError, match="is a character device.*'/dev/null'"):
        FileDevice("/dev/null")


def test_an_empty_file_is_refused(folder):
    (folder / "empty").touch()
    with pytest.raises(OSError, match="is empty.*empty'"):
        FileDevice(folder / "empty")


def test_created_files_are_holes_and_never_replace_what_is_there(folder):
    with FileDevice(folder / "new", create_length="1M") as device:
        assert device.length == 1 << 20
        assert os.stat(folder / "new").st_blocks == 0
    (folder / "new").write_bytes(b"precious")
    with pytest.raises(FileExistsError) as caught:
        FileDevice(folder / "new", create_length="1M")
    assert caught.value.filename == str(folder / "new")
    assert (folder / "new").read_bytes() == b"precious"


def test_a_file_that_cannot_get_its_length_is_not_left_behind(folder):
    with files_limited_to(4096), pytest.raises(OSError, match="cannot be made 8192 bytes long.*new'") as caught:
        FileDevice(folder / "new", create_length=8192)
    assert caught.value.errno == errno.EFBIG
    assert not (folder / "new").exists()


@pytest.mark.parametrize(("options", "message"), [({"create_length": 0}, "at least one byte"),
                                                  ({"create_length": "5X"}, "create_length: '5X'"),
                                                  ({"create_length": 5, "read_only": True}, "read_only")])
def test_options_without_sense_create_nothing(folder, options, message):
    with pytest.raises(ValueError, match=message):
        FileDevice(folder / "new", **options)
    assert not (folder / "new").exists()


def test_a_read_only_device_does_not_write(image):
    before = image.read_bytes()
    with FileDevice(image, read_only=True) as device:
        assert device.read_only
        for call in (lambda: device.write(0, b"x"), lambda: device.write_zeroes(0, 1), lambda: device.discard(0, 1)):
            with pytest.raises(PermissionError, match="vm.img: opened read-only"):
                call()
        assert vectors.writev(device, 0, b"x", [1]) == -errno.EBADF     # the kernel says no as well
        assert device.read(0, 256) == bytes(range(256))
    assert image.read_bytes() == before


def test_a_shrunk_image_is_an_error_that_says_so_and_never_zeroes(image):
    with FileDevice(image) as device:
        os.truncate(image, 5000)
        assert device.read(4000, 1000) == CONTENT[4000:5000]
        for offset, length in ((4000, 1001), (5000, 1), (100000, 65536), (0, 1 << 20)):
            with pytest.raises(OSError, match="the image is shorter than announced, 5000 of 1048576 bytes") as caught:
                device.read(offset, length)
            assert caught.value.errno == errno.EIO
            assert vectors.readv(device, offset, bytearray(length), [length // 2, length - length // 2]) == -errno.EIO
            assert vectors.readv(device, offset, bytearray(length), [length], nowait=True) in (-errno.EIO, -errno.EAGAIN)


def test_a_shrunk_image_is_not_reported_as_zeroes(image):
    with FileDevice(image) as device:
        os.truncate(image, 4096)
        assert vectors.block_status(device, 4096, 8192) == (8192, 0)
        assert vectors.block_status(device, 500000, 1) == (1, 0)


@pytest.mark.parametrize("end", ["discard", "write_zeroes"])
def test_a_hole_made_after_the_status_was_asked_is_seen(shm_path, end):
    """What is data is remembered, so that the file system is asked once for each extent; a new hole ends that."""
    with FileDevice(shm_path / "file", create_length="1M") as device:
        device.write(0, b"x" * (1 << 20))
        assert [vectors.block_status(device, offset, 65536) for offset in (0, 65536)] == [(65536, 0)] * 2
        assert vectors.block_status(device, (1 << 20) - 5, 5) == (5, 0)
        getattr(device, end)(131072, 65536)
        assert vectors.block_status(device, 0, 1 << 20) == (131072, 0)
        assert vectors.block_status(device, 131072, 1 << 19) == (65536, 3)
        assert vectors.block_status(device, 196608, 4096) == (4096, 0)


def test_holes_are_seen(shm_path):
    with FileDevice(shm_path / "sparse", create_length="1M") as device:
        assert device.extents().tolist() == [(0, 1 << 20, 3)]
        device.write(65536, b"x" * 4096)
        device.write((1 << 20) - 1, b"y")
        assert device.extents().tolist() == [
            (0, 65536, 3), (65536, 4096, 0), (69632, (1 << 20) - 4096 - 69632, 3), ((1 << 20) - 4096, 4096, 0)]
        assert device.extents(65000, 1000).tolist() == [(65000, 536, 3), (65536, 464, 0)]
        device.discard(65536, 4096)
        assert device.extents(0, 131072).tolist() == [(0, 131072, 3)]


def test_zeroes_leave_a_hole_only_when_allowed(shm_path):
    path = shm_path / "image"
    with FileDevice(path, create_length="1M") as device:
        device.write(0, b"x" * (1 << 20))
        device.write_zeroes(0, 1 << 19, unmap=False)
        assert os.stat(path).st_blocks * 512 == 1 << 20
        device.write_zeroes(0, 1 << 19)
        assert os.stat(path).st_blocks * 512 == 1 << 19
        assert device.read(0, 1 << 20) == bytes(1 << 19) + b"x" * (1 << 19)


def test_zeroes_are_refused_at_once_where_they_would_not_be_fast(shm_path):
    with FileDevice(shm_path / "image", create_length="1M") as device:
        device.write(0, b"x" * 8192)
        # tmpfs punches holes but has no zero range
        assert vectors.write_zeroes_at(device, 0, 4096, vectors.FAST_ONLY) == -errno.EOPNOTSUPP
        assert device.read(0, 4096) == b"x" * 4096
        assert vectors.write_zeroes_at(device, 0, 4096, vectors.FAST_ONLY | vectors.MAY_UNMAP) == 0
        assert device.read(0, 8192) == bytes(4096) + b"x" * 4096


def test_reads_without_waiting_answer_from_memory_or_eagain(image):
    with FileDevice(image) as device:
        device.flush()
        os.posix_fadvise(device.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = bytearray(8192)
        code = vectors.readv(device, 256, buffer, [4096, 4096], nowait=True)
        assert code == -errno.EAGAIN or code == 0 and buffer == bytes(range(256)) * 32
        device.read(0, 1 << 20)
        code = vectors.readv(device, 256, buffer, [1] * 4096 + [4096], nowait=True)
        assert code == -errno.EAGAIN or code == 0 and buffer == bytes(range(256)) * 32


def test_reads_without_waiting_never_fail_to_answer_on_tmpfs(shm_path):
    with FileDevice(shm_path / "image", create_length=10000) as device:
        device.write(0, b"x" * 10000)
        buffer = bytearray(10000)
        assert vectors.readv(device, 0, buffer, [10000], nowait=True) == 0
        assert buffer == b"x" * 10000


@pytest.mark.parametrize("fua", [False, True])
def test_a_write_that_finds_no_room_is_an_error_and_the_device_goes_on(image, fua):
    with FileDevice(image) as device:
        with files_limited_to(4096), pytest.raises(OSError, match="write 8192.100") as caught:
            device.write(8192, b"x" * 100, fua=fua)
        assert caught.value.errno == errno.EFBIG
        device.write(8192, b"y" * 100, fua=True)    # nothing was lost that a flush had to report
        device.flush()
        assert device.read(8192, 100) == b"y" * 100


def test_a_flush_that_failed_once_fails_for_good(image, folder):
    # The kernel reports a lost write-back once. A pipe in the descriptor's place stands for the disk that fails.
    with FileDevice(image) as device:
        fd = device.fileno()
        good, (reader, writer) = os.dup(fd), os.pipe()
        os.dup2(writer, fd)
        with pytest.raises(OSError) as caught:
            device.flush()
        first = caught.value.errno
        os.dup2(good, fd, inheritable=False)
        for other in (good, reader, writer):
            os.close(other)
        for call in (device.flush, lambda: device.write(0, b"x", fua=True), lambda: device.write_zeroes(0, 1, fua=True)):
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == first
        device.write(0, b"plain writes and reads go on")
        assert device.read(0, 5) == b"plain"


def test_the_descriptor_is_not_inherited(image):
    with FileDevice(image) as device:
        assert not os.get_inheritable(device.fileno())
        assert os.fstat(device.fileno()).st_ino == os.stat(image).st_ino
    with pytest.raises(ValueError, match="is closed"):
        device.fileno()


def test_a_device_that_nobody_closed_gives_its_descriptor_back(image):
    device = FileDevice(image)
    fd = device.fileno()
    del device
    with pytest.raises(OSError) as caught:
        os.fstat(fd)
    assert caught.value.errno == errno.EBADF


def test_paths_may_be_bytes_and_names_are_for_messages(image):
    with FileDevice(os.fsencode(image), name="root-disk") as device:
        assert device.path == str(image)
        assert device.name == "root-disk"
        with pytest.raises(ValueError, match="^root-disk: range"):
            device.read(1 << 20, 1)


@pytest.fixture
def block_device(tmp_path):
    """A loop device of 4 MiB. It takes privileges that a container may not have, not a program that is missing."""
    (tmp_path / "backing").write_bytes(bytes(4 << 20))
    made = subprocess.run(["losetup", "--find", "--show", str(tmp_path / "backing")], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no loop device to be had here: {made.stderr.strip()}")
    yield made.stdout.strip()
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


def test_a_block_device_does_what_a_bytearray_does(block_device):
    random, model = np.random.default_rng(1), bytearray(4 << 20)
    with FileDevice(block_device) as device:
        assert device.length == len(model)
        for _ in range(200):
            offset = int(random.integers(len(model)))
            length = int(random.integers(1, min(100000, len(model) - offset) + 1))
            part = slice(offset, offset + length)
            match random.integers(4):
                case 0:
                    model[part] = random.bytes(length)
                    device.write(offset, model[part])
                case 1:
                    flags = int(random.choice([0, vectors.FUA, vectors.MAY_UNMAP, vectors.MAY_UNMAP | vectors.FAST_ONLY]))
                    code = vectors.write_zeroes_at(device, offset, length, flags)
                    if code == 0:
                        model[part] = bytes(length)
                    else:
                        assert code == -errno.EOPNOTSUPP and flags & vectors.FAST_ONLY
                case 2:
                    device.discard(offset, length)
                    model[part] = device.read(offset, length)
                case 3:
                    assert device.read(offset, length) == model[part]
        device.flush()
        assert device.read(0, len(model)) == model
        assert device.extents().tolist() == [(0, len(model), 0)]


def test_zeroes_on_a_block_device_are_fast_only_for_whole_sectors_that_may_unmap(block_device):
    with FileDevice(block_device) as device:
        device.write(0, b"x" * 8192)
        fast = vectors.FAST_ONLY | vectors.MAY_UNMAP
        assert vectors.write_zeroes_at(device, 1, 4096, fast) == -errno.EOPNOTSUPP
        assert vectors.write_zeroes_at(device, 0, 4096, vectors.FAST_ONLY) == -errno.EOPNOTSUPP
        assert device.read(0, 8192) == b"x" * 8192
        assert vectors.write_zeroes_at(device, 0, 4096, fast) == 0
        assert device.read(0, 8192) == bytes(4096) + b"x" * 4096
