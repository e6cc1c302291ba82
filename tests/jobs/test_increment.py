"""Increments: what arrives, what becomes of the bitmap, and what the file is called at each end."""

import os
import pathlib
import re

import pytest

import fastcbw
from fastcbw.block.delay import DelayDevice
from fastcbw.block.fault import FaultDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.errors import JobCancelled, JobFailed

LENGTH = (1 << 20) + 777


@pytest.fixture
def disk():
    with fastcbw.open(MemoryDevice(LENGTH), name="vm") as disk:
        disk.write(0, os.urandom(LENGTH))
        yield disk


@pytest.fixture
def full(disk, tmp_path):
    """A full backup; the bitmap b begins with it."""
    with disk.snapshot("s", new_bitmap="b", new_bitmap_granularity=512) as snapshot:
        snapshot.backup(tmp_path / "backup").wait()
    return tmp_path / "backup"


@pytest.mark.parametrize("options", [{}, {"verify": True, "workers": 3}, {"order": "ram-first"}])
def test_increments_make_the_backup_what_the_disk_is(disk, full, options):
    for i in range(3):
        before = disk.read(0, LENGTH)
        disk.write(i * 70_000 + 100, b"%d" % i * 70_000)
        disk.write_zeroes(900_000 - i * 5000, 4096)
        disk.write(LENGTH - 1, b"%d" % i)
        image = disk.read(0, LENGTH)
        assert image != before
        job = disk.backup(full, bitmap="b", force=True, **options)
        disk.write(500_000, b"later")
        result = job.wait()
        assert full.read_bytes() == image
        assert disk.bitmaps["b"].extents().tolist() == [(499_712, 512)] and not disk.bitmaps["b"].report()["busy"]
        assert result["data_bytes"] < 200_000 * (2 if options.get("verify") else 1) and job.progress["done"] == job.progress["total"]
        assert disk.snapshots == {} and os.listdir(full.parent) == ["backup"]
        disk.bitmaps["b"].clear()
        disk.write(500_000, image[500_000:500_005])
        disk.bitmaps["b"].clear()


def test_a_backup_of_a_snapshot_of_a_bitmap_leaves_the_bitmap(disk, full):
    disk.write(4096, b"x" * 4096)
    image = disk.read(0, LENGTH)
    with disk.snapshot("s", bitmap="b") as snapshot:
        disk.write(0, b"y" * LENGTH)
        snapshot.backup(full, force=True).wait()
    assert full.read_bytes() == image
    assert disk.bitmaps["b"].report()["count"] == LENGTH


def test_to_a_device_only_what_is_marked_is_written(disk, full):
    disk.write(65536, b"x" * 4096)
    target = MemoryDevice(LENGTH)
    target.write(0, b"\xee" * LENGTH)
    disk.backup(target, bitmap="b").wait()
    assert target.read(0, LENGTH) == b"\xee" * 65536 + b"x" * 4096 + b"\xee" * (LENGTH - 65536 - 4096)


def test_a_failed_increment_gives_the_bitmap_back_and_the_next_one_mends_the_file(disk, full):
    disk.write(0, b"x" * 4096)
    disk.write(1 << 20, b"y" * 700)
    target = FaultDevice(MemoryDevice(LENGTH))
    target.fail_on("write", 0, 4096, errno=28)
    with pytest.raises(JobFailed, match="is incomplete"):
        disk.backup(target, bitmap="b").wait()
    assert [tuple(row) for row in disk.bitmaps["b"].extents()] == [(0, 4096), (1 << 20, 777)]
    assert disk.snapshots == {}
    disk.backup(full, bitmap="b", force=True).wait()
    assert full.read_bytes() == disk.read(0, LENGTH)


def test_a_cancelled_increment_leaves_the_file_under_the_name_that_says_incomplete(tmp_path):
    device = DelayDevice(MemoryDevice(LENGTH))
    with fastcbw.open(device, name="vm") as disk:
        disk.add_bitmap("b")
        disk.write(0, b"x" * LENGTH)
        full = tmp_path / "backup"
        full.write_bytes(bytes(LENGTH))
        gate = device.hold("read")
        job = disk.backup(full, bitmap="b", force=True)
        gate.wait_arrived()
        assert os.listdir(tmp_path) == ["backup.incomplete"]
        job.cancel()
        gate.open()
        with pytest.raises(JobCancelled, match="give it its name back"):
            job.wait()
        assert os.listdir(tmp_path) == ["backup.incomplete"]
        assert disk.bitmaps["b"].report()["count"] == LENGTH
        with pytest.raises(FileNotFoundError, match="backup.incomplete is there: give it its name back"):
            disk.backup(full, bitmap="b", force=True)
        os.rename(tmp_path / "backup.incomplete", full)
        disk.backup(full, bitmap="b", force=True).wait()
        assert full.read_bytes() == b"x" * LENGTH


def test_what_is_in_the_way_is_refused_and_nothing_changes(disk, full, tmp_path):
    disk.write(0, b"x")
    short = tmp_path / "short"
    short.write_bytes(bytes(LENGTH - 1))
    for target, options, error, words in (
        (full, {}, FileExistsError, "--force"),
        (tmp_path / "none", {"force": True}, FileNotFoundError, "must exist"),
        (short, {"force": True}, ValueError, f"{LENGTH - 1} bytes are less"),
        (tmp_path, {"force": True}, IsADirectoryError, "folder"),
        (full, {"force": True, "order": "sideways"}, ValueError, "sideways"),
    ):
        before = full.read_bytes()
        with pytest.raises(error, match=words):
            disk.backup(target, bitmap="b", **options)
        assert full.read_bytes() == before and not list(tmp_path.glob("*.incomplete"))
        assert disk.bitmaps["b"].extents().tolist() == [(0, 512)] and not disk.bitmaps["b"].report()["busy"]
    (tmp_path / "backup.incomplete").write_bytes(b"left")
    with pytest.raises(FileExistsError, match="in the way"):
        disk.backup(full, bitmap="b", force=True)
    with pytest.raises(fastcbw.Error, match="'c': not found"):
        disk.backup(full, bitmap="c", force=True)
    assert (tmp_path / "backup.incomplete").read_bytes() == b"left" and disk.snapshots == {}


def test_the_example_of_the_documentation_runs_as_it_stands(tmp_path, monkeypatch):
    page = (pathlib.Path(__file__).parents[2] / "docs" / "incremental.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    pathlib.Path("vm.img").write_bytes(b"monday" * 100_000)
    exec(compile(example, "incremental.md", "exec"), {"__name__": "__main__"})
    assert pathlib.Path("backup.img").read_bytes() == pathlib.Path("vm.img").read_bytes()
    assert b"tuesday" in pathlib.Path("backup.img").read_bytes()
