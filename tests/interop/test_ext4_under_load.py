"""A real file system under a real load: an ext4 image of 1 GiB, fio writing to it over NBD, and a backup of the snapshot.

The witness is independent of the code under test: cp copies the image while nothing writes, and cmp compares. fio writes
all over the blocks of one large file (debugfs says where they lie), so the file system itself stays clean.

Where the snapshot is taken under the load as well, what the guest had written at that instant is not known; but outside the
file everything is, inside it each sector is the old one or fio's pattern, and a pull and a push must agree to the byte.
"""

import os
import pathlib
import re
import subprocess
import tempfile
import time

import numpy as np
import pytest

import fastcbw

MIB = 1 << 20
BIG = 96 * MIB
PATTERN = 0x74736575


def run(*command, **keywords):
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True, timeout=100, **keywords).stdout


@pytest.fixture(scope="module")
def pristine():
    """An ext4 image of 1 GiB with 160 MiB of real files, one of them of 96 MiB; and where that one lies."""
    # On tmpfs: the test is about the bytes, not about the machine's disk.
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="fastcbw-ext4-") as name:
        folder = pathlib.Path(name)
        tree = folder / "tree"
        (tree / "many").mkdir(parents=True)
        for i in range(512):
            (tree / "many" / f"file{i}").write_bytes(os.urandom(128 * 1024 - i))
        with open(tree / "big", "wb") as big:
            for _ in range(BIG // MIB):
                big.write(os.urandom(MIB))
        image = folder / "pristine.img"
        run("truncate", "-s", "1G", image)
        run("mkfs.ext4", "-q", "-b", "4096", "-d", tree, image)
        run("e2fsck", "-fn", image)
        text = run("debugfs", "-R", "dump_extents /big", image)
        extents = []
        for line in text.splitlines():
            # level/depth  entry/entries  logical - logical  physical - physical  length; only leaves are data
            found = re.match(r"\s*(\d+)/\s*(\d+)\s+\d+/\s*\d+\s+\d+\s*-\s*\d+\s+(\d+)\s*-\s*(\d+)\s+\d+", line)
            if found and found[1] == found[2]:
                extents.append((int(found[3]) * 4096, (int(found[4]) - int(found[3]) + 1) * 4096))
        assert sum(length for _, length in extents) == BIG
        for path in list((tree / "many").iterdir()) + [tree / "big"]:
            path.unlink()
        yield image, extents


def fio(socket, extents, seconds, pattern=PATTERN):
    """Start fio: random writes of 4 to 64 KiB within the largest extents, one job for each."""
    jobs = []
    for n, (offset, length) in enumerate(sorted(extents, key=lambda e: -e[1])[:4]):
        jobs += [f"--name=extent{n}", f"--offset={offset}", f"--size={length // 65536 * 65536}"]
    return subprocess.Popen(
        ["fio", "--ioengine=nbd", f"--uri=nbd+unix:///disk?socket={socket}", "--rw=randwrite", "--bsrange=4k-64k", "--iodepth=8",
         f"--buffer_pattern=0x{pattern.to_bytes(4, 'little').hex()}", "--time_based", f"--runtime={seconds}", "--thread", "--group_reporting", *jobs],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def writes(disk):
    return disk.status()["guest"]["writes"]


def wait_for_writes(disk, more):
    least = writes(disk) + more
    end = time.monotonic() + 20
    while writes(disk) < least:
        assert time.monotonic() < end, "fio does not write"
        time.sleep(0.005)


@pytest.mark.parametrize("way", ["nbdcopy pulls", "the job pushes"])
def test_backup_of_an_ext4_image_under_load_is_byte_for_byte_the_image_at_the_snapshot(way, pristine):
    image, extents = pristine
    folder = image.parent
    socket, live, copy, expected = folder / "s", folder / "live.img", folder / "backup.img", folder / "expected.img"
    for path in (live, copy, expected):
        path.unlink(missing_ok=True)
    run("cp", "--sparse=always", image, live)
    with fastcbw.open(live, name="disk") as disk:
        disk.serve(socket)
        # A first load, ended and flushed: what it left is part of the point in time. Copied by cp, not by us.
        first = fio(socket, extents, 1)
        _, errors = first.communicate(timeout=60)
        assert first.returncode == 0, errors
        disk.flush()
        run("cp", "--sparse=always", live, expected)
        assert subprocess.run(["cmp", "-s", image, expected]).returncode == 1       # it did write

        snapshot = disk.snapshot("snap", ram="32M", spill=folder, spill_limit="512M")
        load = fio(socket, extents, 30, PATTERN + 1)       # other bytes than the first load's
        try:
            wait_for_writes(disk, 500)
            during = writes(disk)
            if way == "nbdcopy pulls":
                run("nbdcopy", f"nbd+unix:///disk@snap?socket={socket}", copy)
            else:
                snapshot.backup(copy, order="ram-first", verify=True).wait(100)
            assert writes(disk) > during + 100      # the load went on all the while
            wait_for_writes(disk, 100)
        finally:
            load.terminate()
            load.communicate(timeout=60)
        facts = snapshot.status()
        assert facts["state"] == "live" and facts["preserved_clusters"] > 500
        assert facts["disk_bytes"] > 0              # more than the RAM tier holds
        run("cmp", copy, expected)
        run("e2fsck", "-fn", copy)
        assert subprocess.run(["cmp", "-s", live, expected]).returncode == 1        # the guest has gone on
        # Outside of what fio wrote, the live disk is untouched; inside, the last word is the guest's.
        run("e2fsck", "-fn", live)


def test_snapshot_taken_under_load_is_constant_and_holds_only_what_was_written(pristine):
    image, extents = pristine
    folder = image.parent
    socket, live, pulled, pushed = folder / "s", folder / "live.img", folder / "backup.img", folder / "pushed.img"
    for path in (live, pulled, pushed):
        path.unlink(missing_ok=True)
    run("cp", "--sparse=always", image, live)
    with fastcbw.open(live, name="disk") as disk:
        disk.serve(socket)
        load = fio(socket, extents, 30)
        try:
            wait_for_writes(disk, 500)
            snapshot = disk.snapshot("snap", ram="32M", spill=folder, spill_limit="512M")
            job = snapshot.backup(pushed, order="ram-first")
            run("nbdcopy", f"nbd+unix:///disk@snap?socket={socket}", pulled)
            job.wait(100)
            wait_for_writes(disk, 100)
        finally:
            load.terminate()
            load.communicate(timeout=60)
        assert snapshot.status()["state"] == "live"
    run("cmp", pulled, pushed)
    run("e2fsck", "-fn", pulled)
    old, new = np.memmap(image, np.uint8, "r"), np.memmap(pulled, np.uint8, "r")
    at = written = 0
    for offset, length in sorted(extents):
        assert (old[at:offset] == new[at:offset]).all(), "changed outside of what was written"
        before, after = (a[offset : offset + length].view("<u4").reshape(-1, 128) for a in (old, new))
        same = (before == after).all(axis=1)
        fresh = (after == PATTERN).all(axis=1)
        assert (same | fresh).all(), "a sector that is neither old nor written"
        written += int(fresh.sum())
        at = offset + length
    assert (old[at:] == new[at:]).all()
    assert 0 < written * 512 < BIG
