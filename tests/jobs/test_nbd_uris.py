"""Backups from and to NBD URIs: verified copies, and what is refused or left when it fails."""

import random
import socket
import subprocess
import time

import pytest

import fastcbw
from fastcbw.block.fault import FaultDevice
from fastcbw.block.file import FileDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.block.nbd import NbdDevice
from fastcbw.export.nbd.server import Server

MIB = 1 << 20
LENGTH = 8 * MIB + 512


@pytest.fixture
def content():
    """Data at the start, in the middle (unaligned) and at the end, zeroes between."""
    source = random.Random(8)
    data = bytearray(LENGTH)
    for offset, length in ((0, MIB), (3 * MIB + 777, 2 * MIB), (LENGTH - 5000, 5000)):
        data[offset : offset + length] = source.randbytes(length)
    return bytes(data)


@pytest.fixture
def image(tmp_path, content):
    (tmp_path / "vm.img").write_bytes(content)
    return tmp_path / "vm.img"


@pytest.fixture
def server(tmp_path):
    with Server(tmp_path / "s.sock") as server:
        server.uri = lambda name: f"nbd+unix:///{name}?socket={tmp_path}/s.sock"
        yield server


@pytest.fixture
def served(server, image):
    """The URI of the image, which that server has as `vm`."""
    with FileDevice(image) as device:
        server.add_export("vm", device)
        yield server.uri("vm")
        server.close()


def test_a_uri_is_a_disk_with_snapshots_and_backups(tmp_path, served, image, content):
    with fastcbw.open(served) as disk:
        assert disk.name == "vm"
        snapshot = disk.snapshot("s")
        disk.write(0, b"\x99" * 3 * MIB)
        assert snapshot.read(0, LENGTH) == content
        snapshot.backup(tmp_path / "out.img", verify=True).wait(60)
        snapshot.close()
        disk.flush()
    assert (tmp_path / "out.img").read_bytes() == content
    assert image.read_bytes() == b"\x99" * 3 * MIB + content[3 * MIB :]


@pytest.mark.parametrize("full", [False, True])
def test_a_backup_to_a_uri_is_the_snapshot_whatever_was_there(server, image, content, full):
    target = MemoryDevice(LENGTH + 4096)
    if full:
        target.write(0, b"\x77" * target.length)
    counting = FaultDevice(target)
    server.add_export("target", counting)
    with fastcbw.open(image) as disk, disk.snapshot("s") as snapshot:
        snapshot.backup(server.uri("target"), verify=True, workers=6).wait(60)
    assert target.read(0, LENGTH) == content
    assert target.read(LENGTH, 4096) == (b"\x77" if full else b"\0") * 4096      # what is longer is not touched
    assert (counting.requests["zero"] > 0) == full                              # zeroes are told only where they are news
    assert counting.requests["flush"] > 0


def test_a_target_that_is_too_short_or_the_source_itself_is_refused_and_unchanged(tmp_path, server, served):
    short = MemoryDevice(LENGTH - 1)
    server.add_export("short", short)
    server.add_export("ro", MemoryDevice(LENGTH), read_only=True)
    (tmp_path / "alias.sock").symlink_to(tmp_path / "s.sock")
    with fastcbw.open(served) as disk, disk.snapshot("s") as snapshot:
        with pytest.raises(ValueError, match=f"target .*short.*: its {LENGTH - 1} bytes are less"):
            snapshot.backup(server.uri("short"))
        for uri in (served, f"nbd+unix:///%76m?socket={tmp_path}/alias.sock"):
            with pytest.raises(ValueError, match="is the source itself"):
                snapshot.backup(uri)
        with NbdDevice(served, read_only=True) as device, pytest.raises(ValueError, match="is the source itself"):
            snapshot.backup(device)
        with pytest.raises(PermissionError, match="the server exports it read-only"):
            snapshot.backup(server.uri("ro"))
        with pytest.raises(FileNotFoundError, match="the server has no export 'none'"):
            snapshot.backup(server.uri("none"))
        assert snapshot.status()["holds"] == 0
    assert short.read(0, LENGTH - 1) == bytes(LENGTH - 1)


def test_a_disk_is_not_backed_up_to_itself_through_its_own_server(tmp_path, image, content):
    with fastcbw.open(image, name="vm") as disk, disk.snapshot("s") as snapshot:
        disk.serve(tmp_path / "a b.sock")
        with pytest.raises(ValueError, match="is the source itself"):
            snapshot.backup(f"nbd+unix:///vm?socket={tmp_path}/a%20b.sock")
        assert disk.read(0, LENGTH) == content


def test_a_target_that_fails_is_called_incomplete_with_the_servers_words(server, image):
    target = FaultDevice(MemoryDevice(LENGTH))
    target.fail_on("write", 4 * MIB, 1, errno=28)
    server.add_export("target", target)
    uri = server.uri("target")
    with fastcbw.open(image) as disk, disk.snapshot("s") as snapshot:
        job = snapshot.backup(uri)
        with pytest.raises(fastcbw.JobFailed) as caught:
            job.wait(60)
    assert "the server says: target: write" in str(caught.value) and "No space left" in str(caught.value)
    assert str(caught.value).endswith(f"{uri} is incomplete")


def test_a_source_that_goes_away_fails_the_job_and_names_the_reason(tmp_path, server, served):
    with fastcbw.open(served, read_only=True) as disk, disk.snapshot("s") as snapshot:
        server.remove_export("vm", force=True)
        with pytest.raises(fastcbw.JobFailed, match="the server closed the connection"):
            snapshot.backup(tmp_path / "out.img").wait(60)
    assert not (tmp_path / "out.img").exists()


def test_a_snapshot_of_another_daemon_is_backed_up_over_nbd_while_its_guest_writes(tmp_path, image, content):
    with fastcbw.open(image, name="vm") as live:
        live.serve(tmp_path / "live.sock")
        snapshot = live.snapshot("monday")
        with fastcbw.open(f"nbd+unix:///vm@monday?socket={tmp_path}/live.sock", read_only=True) as remote:
            assert remote.name == "vm_monday"
            with remote.snapshot("copy") as copy:
                job = copy.backup(tmp_path / "out.img", verify=True)
                for offset in range(0, LENGTH - 65536, 65536):
                    live.write(offset, b"\xee" * 65536)
                job.wait(60)
        snapshot.close()
    assert (tmp_path / "out.img").read_bytes() == content


def test_qemu_img_sees_the_backup_that_was_made_to_qemu_nbd(tmp_path, image):
    (tmp_path / "copy.img").write_bytes(bytes(LENGTH))
    path = tmp_path / "q.sock"
    with subprocess.Popen(["qemu-nbd", "-t", "-f", "raw", "-k", path, tmp_path / "copy.img"]) as peer:
        try:
            deadline = time.monotonic() + 20
            with socket.socket(socket.AF_UNIX) as probe:
                while probe.connect_ex(str(path)) and time.monotonic() < deadline:
                    time.sleep(0.005)
            with fastcbw.open(image) as disk, disk.snapshot("s") as snapshot:
                snapshot.backup(f"nbd+unix:///?socket={path}", verify=True).wait(60)
        finally:
            peer.terminate()
    done = subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", image, tmp_path / "copy.img"], capture_output=True, text=True)
    assert "identical" in done.stdout, done
