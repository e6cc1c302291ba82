"""What a first user did to targets: nodes, names, and files that others put in the way."""

import os
import socket
import stat
import threading

import pytest

import fastcbw
from fastcbw.block.delay import DelayDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.jobs.target import Target

MIB = 1 << 20


@pytest.fixture
def disk():
    source = MemoryDevice(MIB)
    source.write(0, b"data" * (MIB // 4))
    with fastcbw.open(DelayDevice(source), name="d") as disk:
        yield disk


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


@pytest.mark.parametrize("make", [make_fifo, make_socket])
@pytest.mark.parametrize("suffix", ["", ".incomplete"])
def test_what_is_no_file_is_not_replaced_by_one(disk, tmp_path, make, suffix):
    make(tmp_path / f"out{suffix}")
    kind = stat.S_IFMT(os.lstat(tmp_path / f"out{suffix}").st_mode)
    with disk.snapshot("s") as snapshot, pytest.raises((ValueError, FileExistsError), match="out"):
        snapshot.backup(tmp_path / "out", force=True)
    assert stat.S_IFMT(os.lstat(tmp_path / f"out{suffix}").st_mode) == kind and len(os.listdir(tmp_path)) == 1


def test_a_target_without_a_name_is_refused(disk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with disk.snapshot("s") as snapshot, pytest.raises(ValueError, match="names no file"):
        snapshot.backup("")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("force", [False, True])
def test_a_file_that_somebody_put_in_its_place_is_not_published(disk, tmp_path, force):
    snapshot = disk.snapshot("s")
    with disk._child.hold("read") as gate:
        job = snapshot.backup(tmp_path / "out", force=force)
        gate.wait_arrived()
        os.unlink(tmp_path / "out.incomplete")
        (tmp_path / "out.incomplete").write_bytes(b"somebody else's")
    with pytest.raises(fastcbw.JobFailed, match="replaced by somebody else"):
        job.wait(30)
    assert os.listdir(tmp_path) == ["out.incomplete"] and (tmp_path / "out.incomplete").read_bytes() == b"somebody else's"


def test_a_cancel_removes_no_file_of_somebody_else(disk, tmp_path):
    snapshot = disk.snapshot("s")
    with disk._child.hold("read") as gate:
        job = snapshot.backup(tmp_path / "out")
        gate.wait_arrived()
        os.replace(_written(tmp_path / "theirs"), tmp_path / "out.incomplete")
        job.cancel()
    with pytest.raises(fastcbw.JobCancelled):
        job.wait(30)
    assert (tmp_path / "out.incomplete").read_bytes() == b"theirs"


def _written(path):
    path.write_bytes(b"theirs")
    return path


def test_the_lock_is_kept_until_the_target_has_its_name(tmp_path, monkeypatch):
    target = Target(tmp_path / "out", MIB)
    refused = []
    link = os.link

    def second_backup_then_link(source, name):
        def second():
            with pytest.raises(fastcbw.ImageLocked, match="another backup") as caught:
                Target(tmp_path / "out", MIB)
            refused.append(caught.value)

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        link(source, name)

    monkeypatch.setattr(os, "link", second_backup_then_link)
    target.complete()
    assert len(refused) == 1 and os.listdir(tmp_path) == ["out"]


def test_a_block_device_needs_force(tmp_path, monkeypatch):
    path = tmp_path / "node"
    path.write_bytes(bytes(MIB))
    monkeypatch.setattr(stat, "S_ISBLK", lambda mode: True)
    with pytest.raises(FileExistsError, match="block device"):
        Target(path, MIB)
    assert path.read_bytes() == bytes(MIB)
