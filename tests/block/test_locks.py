"""Image locks: we and QEMU, and we and we, refuse each other, by name."""

import subprocess
import sys

import pytest

from fastcbw.block.file import FileDevice
from fastcbw.errors import ImageLocked


@pytest.fixture
def image(shm_path):
    path = shm_path / "vm.img"
    path.write_bytes(bytes(1 << 20))
    return path


class QemuIo:
    """A qemu-io that keeps IMAGE open until the end of the `with` block."""

    def __init__(self, image, *options):
        self.process = subprocess.Popen(["qemu-io", "-f", "raw", *options, str(image)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def __enter__(self):
        self.process.stdin.write("length\n")
        self.process.stdin.flush()
        answer = ""
        while "1 MiB" not in answer:    # it has the image open: commands come after
            line = self.process.stdout.readline()
            assert line, f"qemu-io ended: {answer}"
            answer += line
        return self

    def __exit__(self, *exc):
        self.process.communicate("quit\n", timeout=30)


def run_qemu_io(image, *options):
    return subprocess.run(["qemu-io", "-f", "raw", "-c", "length", *options, str(image)], capture_output=True, text=True,
                          timeout=30)


def open_elsewhere(image, options):
    """Open a FileDevice in another process; return its stderr, empty when that worked."""
    code = f"from fastcbw.block.file import FileDevice; FileDevice({str(image)!r}, {options}).close()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stderr


def test_an_image_that_qemu_writes_is_refused_by_name(image):
    with QemuIo(image):
        for options in ({}, {"read_only": True}, {"exclusive": True}):
            with pytest.raises(ImageLocked, match=r'vm.img: the image is in use: .*permission "') as caught:
                FileDevice(image, **options)
            assert str(caught.value).startswith(str(image))
        with pytest.raises(ImageLocked, match='holds the permission "write"'):
            FileDevice(image)
    FileDevice(image).close()


def test_an_image_that_we_write_is_refused_to_a_writing_qemu(image):
    with FileDevice(image):
        result = run_qemu_io(image)
        assert result.returncode != 0
        assert 'Failed to get "write" lock' in result.stderr and "vm.img" in result.stderr
    assert run_qemu_io(image).returncode == 0


def test_an_image_that_we_read_is_refused_to_a_writing_qemu_but_not_to_a_reading_one(image):
    with FileDevice(image, read_only=True):
        assert 'Failed to get "write" lock' in run_qemu_io(image).stderr
        assert run_qemu_io(image, "-r").returncode == 0


def test_a_target_is_refused_to_qemu_even_for_reading(shm_path):
    target = shm_path / "target"
    with FileDevice(target, create_length="1M", exclusive=True):
        for options in ((), ("-r",)):
            result = run_qemu_io(target, *options)
            assert result.returncode != 0
            assert 'Failed to get "consistent read" lock' in result.stderr
    assert run_qemu_io(target).returncode == 0


def test_a_target_that_qemu_only_reads_is_refused(image):
    with QemuIo(image, "-r"):
        with pytest.raises(ImageLocked, match='holds the permission "consistent read"'):
            FileDevice(image, exclusive=True)
        FileDevice(image).close()      # readers are welcome at an image


@pytest.mark.parametrize(("ours", "theirs", "refused"), [
    ({}, "", True),
    ({}, "read_only=True", True),
    ({"read_only": True}, "", True),
    ({"read_only": True}, "read_only=True", False),
    ({"exclusive": True}, "", True),
    ({"exclusive": True}, "read_only=True", True),
    ({"read_only": True}, "exclusive=True", True),
    ({}, "lock=False", False),
    ({"lock": False}, "", False),
])
def test_a_second_process_of_ours_is_refused_where_one_writes(image, ours, theirs, refused):
    with FileDevice(image, **ours):
        error = open_elsewhere(image, theirs)
    if refused:
        assert "ImageLocked" in error and "vm.img: the image is in use" in error
    else:
        assert error == ""


def test_a_second_open_in_the_same_process_is_refused_too(image):
    with FileDevice(image) as device:
        device.write(0, b"kept")
        with pytest.raises(ImageLocked, match="vm.img"):
            FileDevice(image)
        with pytest.raises(ImageLocked, match="vm.img"):    # the failed open took no lock of the first away
            FileDevice(image)
        assert device.read(0, 4) == b"kept"


def test_the_locks_lie_on_the_bytes_that_qemu_uses(image):
    def locked():
        inode = f":{image.stat().st_ino} "
        held = set()
        with open("/proc/locks") as table:
            for line in table:
                if inode in line and "OFDLCK" in line:
                    first, last = line.split()[-2:]
                    held |= set(range(int(first), int(last) + 1))
        return held

    with FileDevice(image):
        assert locked() == {100, 101, 102, 201, 203}
    with FileDevice(image, read_only=True):
        assert locked() == {100, 201, 203}
    with FileDevice(image, exclusive=True):
        assert locked() == {100, 101, 200, 201, 202, 203}
    assert locked() == set()
