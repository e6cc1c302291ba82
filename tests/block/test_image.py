"""Opening images: formats that must not be taken as raw, what is no path, files that are the same."""

import os
import re
import subprocess

import pytest

from fastcbw.block.direct import DirectDevice
from fastcbw.block.file import FileDevice
from fastcbw.block.image import as_device, open_image, same_file, same_image
from fastcbw.block.memory import MemoryDevice
from fastcbw.block.nbd import NbdDevice
from fastcbw.block.probe import probe_format
from fastcbw.block.python import Device, PythonDevice
from fastcbw.errors import FormatRefused, ImageLocked


def probe(path):
    with FileDevice(path, read_only=True) as device:
        return probe_format(device)


@pytest.mark.parametrize(("format", "options"), [
    ("qcow2", []), ("qcow2", ["-o", "compat=0.10"]), ("vmdk", []), ("vmdk", ["-o", "subformat=monolithicFlat"]),
    ("vhdx", []), ("vdi", []), ("vpc", []), ("vpc", ["-o", "subformat=fixed"]), ("qed", []), ("parallels", []),
])
def test_what_qemu_img_makes_is_recognised_and_refused_unless_raw_is_asked_for(tmp_path, format, options):
    path = tmp_path / "vm.img"
    subprocess.run(["qemu-img", "create", "-q", "-f", format, *options, str(path), "2M"], check=True, timeout=60)
    assert probe(path) == format
    before = path.read_bytes()
    with pytest.raises(FormatRefused, match=f"vm.img: the image is in format {format}, not raw .*qemu-img convert.*--format raw"):
        open_image(path)
    with open_image(path, format="raw") as device:      # and the refused one left no lock
        assert device.read(0, 256) == before[:256]
    assert path.read_bytes() == before


def test_raw_bytes_of_any_length_are_raw(tmp_path):
    path = tmp_path / "vm.img"
    for content in (b"\0", b"QFI", b"Q" * 63, b"\0" * 511, b"\0" * 513, b"\0" * 4097, b"LUKS\xba\xbe" + bytes(506),
                    b"-QFI\xfb" + bytes(1000)):
        path.write_bytes(content)
        assert probe(path) is None
        with open_image(path) as device:
            assert device.length == len(content)


def test_a_format_that_is_not_built_is_refused_by_name(tmp_path):
    (tmp_path / "vm.img").write_bytes(b"x")
    with pytest.raises(ValueError, match="format: 'qcow2' is not built yet .there is raw."):
        open_image(tmp_path / "vm.img", format="qcow2")


@pytest.mark.parametrize("uri", ["nbd:unix:/run/s", "nbds://host", "nbd+vsock://3/disk"])
def test_uris_of_kinds_that_are_not_built_are_refused_with_what_exists(uri):
    with pytest.raises(ValueError, match=f"{re.escape(uri)}: .* .there is nbd://HOST.*nbd.unix:///NAME.socket=PATH"):
        open_image(uri)


def test_an_nbd_uri_is_opened_as_a_device_and_probed_like_a_file(served):
    uri = served("vm", MemoryDevice("1M"))
    with open_image(uri, name="disk") as device:
        assert isinstance(device, NbdDevice) and device.name == "disk" and not device.read_only
        device.write(0, b"QFI\xfb\x00\x00\x00\x03")
    with pytest.raises(FormatRefused, match="vm.socket=.*the image is in format qcow2, not raw"):
        open_image(uri)
    with open_image(uri, format="raw", read_only=True) as device:
        assert device.read(0, 3) == b"QFI" and device.read_only


def test_the_same_export_is_found_by_any_uri_of_it(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "sock")
    one = f"nbd+unix:///a%20b?socket={tmp_path}/sock"
    assert same_image(one, f"nbd+unix:///a b?socket={tmp_path}/link")
    assert not same_image(one, f"nbd+unix:///a?socket={tmp_path}/sock")
    assert same_image("nbd://Host/x", "nbd://host:10809/x") and not same_image("nbd://host/x", "nbd://host:10810/x")
    assert not same_image(one, "nbd://host/x") and not same_image(one, tmp_path / "sock") and not same_image(0, one)


def test_a_file_named_like_a_uri_can_be_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nbd:disk").write_bytes(b"x")
    with open_image("./nbd:disk") as device:
        assert device.read(0, 1) == b"x"


def test_images_are_locked_unless_asked_not_to(tmp_path):
    (tmp_path / "vm.img").write_bytes(b"x")
    with open_image(tmp_path / "vm.img", name="disk"):
        with pytest.raises(ImageLocked, match="vm.img"):
            open_image(tmp_path / "vm.img", read_only=True)
        open_image(tmp_path / "vm.img", lock=False).close()


def test_devices_pass_as_they_are_and_python_devices_are_adapted(tmp_path):
    class Fives(Device):
        length = 10

        def read(self, offset, length):
            return b"5" * length

    memory = MemoryDevice(10)
    assert as_device(memory) is memory
    adapted = as_device(Fives(), name="mine")
    assert isinstance(adapted, PythonDevice) and adapted.name == "mine"
    (tmp_path / "vm.img").write_bytes(b"x")
    with as_device(tmp_path / "vm.img", read_only=True) as device:
        assert isinstance(device, FileDevice) and device.read_only
    with pytest.raises(ValueError, match="read_only: memory"):
        as_device(memory, read_only=True)
    with pytest.raises(ValueError, match="direct: memory"):
        as_device(memory, direct=True)


def test_an_image_is_probed_and_opened_directly_too(tmp_path):
    path = tmp_path / "vm.img"
    path.write_bytes(b"x" * 1300)
    with as_device(path, direct=True) as device:
        assert isinstance(device, DirectDevice) and device.read(0, 1300) == b"x" * 1300
    path.write_bytes(b"QFI\xfb" + bytes(1000))
    with pytest.raises(FormatRefused, match="vm.img: the image is in format qcow"):
        open_image(path, direct=True)


def test_the_same_file_is_found_by_any_name(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"x")
    other.write_bytes(b"x")
    os.symlink(one, tmp_path / "link")
    os.link(one, tmp_path / "hard")
    with FileDevice(one) as device:
        assert same_file(device.fileno(), tmp_path / "link")
    assert same_file(one, tmp_path / "hard")
    assert not same_file(one, other)
    with pytest.raises(FileNotFoundError, match="missing"):
        same_file(one, tmp_path / "missing")
