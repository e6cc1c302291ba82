"""Increments: 1 % of a disk into a full backup, beside the bare copy of the same ranges and QEMU's sync=incremental; and whether
time follows what is dirty or the disk.
"""

import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time

import pytest
from peers import Qemu

import fastcbw
from fastcbw.block.file import FileDevice
from fastcbw.export.nbd.client import Client
from fastcbw.qmp.client import QmpClient

MIB = 1 << 20
PIECE = 65536


@pytest.fixture
def folder():
    path = tempfile.mkdtemp(dir="/dev/shm", prefix="fastcbw-bench-")
    yield path
    shutil.rmtree(path)


def made(path, length):
    """A file of LENGTH bytes of data."""
    block = random.Random(3).randbytes(MIB)
    with open(path, "wb") as file:
        for _ in range(length // MIB):
            file.write(block)
    return path


class QemuIncrements(Qemu):
    """qemu-storage-daemon with a target and a monitor."""

    def command(self):
        self.qmp = os.path.join(self.folder, "qemu.qmp")
        return super().command() + [
            "--blockdev", f"driver=file,node-name=bfile,filename={self.folder}/qemu.backup", "--blockdev", "driver=raw,node-name=backup,file=bfile",
            "--chardev", f"socket,id=monitor,path={self.qmp},server=on,wait=off", "--monitor", "chardev=monitor"]

    def increment(self, client, number):
        begin = time.perf_counter()
        client.execute("blockdev-backup", job_id=f"j{number}", device="disk", target="backup", sync="incremental", bitmap="b")
        while True:
            message = client.next_event()
            if message["event"] == "BLOCK_JOB_COMPLETED":
                assert "error" not in message["data"], message
                return time.perf_counter() - begin


def test_one_percent(folder, full, note):
    """Goal: 2.5 times as fast as QEMU. The floor reads and writes the same ranges with one thread and nothing else."""
    length = 2048 * MIB if full else 64 * MIB
    rounds = 9 if full else 2
    rng = random.Random(4)
    pieces = length // PIECE // 100
    image, theirs = made(f"{folder}/disk", length), made(f"{folder}/qemu.disk", length)
    shutil.copy(image, f"{folder}/backup")
    shutil.copy(image, f"{folder}/qemu.backup")
    times = {"fastcbw": [], "bare copy": [], "qemu": []}
    with QemuIncrements(theirs, folder) as qemu, fastcbw.open(image, lock=False) as disk, Client(qemu.socket, "disk") as guest, \
            QmpClient(qemu.qmp) as monitor, FileDevice(f"{folder}/disk", lock=False) as source, FileDevice(f"{folder}/backup") as target:
        disk.add_bitmap("b")
        monitor.execute("block-dirty-bitmap-add", node="disk", name="b", granularity=PIECE)
        for number in range(rounds):
            offsets = sorted(rng.sample(range(length // PIECE), pieces))
            data = rng.randbytes(4096)
            for piece in offsets:
                disk.write(piece * PIECE, data)
                guest.write(piece * PIECE, data)
            begin = time.perf_counter()
            for piece in offsets:
                target.write(piece * PIECE, source.read(piece * PIECE, PIECE))
            times["bare copy"].append(time.perf_counter() - begin)
            begin = time.perf_counter()
            disk.backup(target, bitmap="b").wait()
            times["fastcbw"].append(time.perf_counter() - begin)
            times["qemu"].append(qemu.increment(monitor, number))
        assert disk.bitmaps["b"].report()["count"] == 0
    for backup, original in (("backup", "disk"), ("qemu.backup", "qemu.disk")):
        subprocess.run(["cmp", f"{folder}/{backup}", f"{folder}/{original}"], check=True)
    medians = {name: statistics.median(values) * 1000 for name, values in times.items()}
    note(f"1 % of {length // MIB} MiB, {pieces} pieces of 64 KiB: " + ", ".join(f"{name} {value:.1f} ms" for name, value in medians.items()))
    note(f"    {medians['qemu'] / medians['fastcbw']:8.2f} x qemu sync=incremental, goal 2.5")
    note(f"    {medians['bare copy'] / medians['fastcbw']:8.2f} x bare copy")


@pytest.mark.parametrize("piece", [4096, 65536], ids=["4K", "64K"])
def test_time_follows_what_is_dirty(folder, full, note, piece):
    """The same 1000 pieces of a disk of 64 GiB and of 64 TiB, 512 bytes per bit; goal: at most 1.2 times as long.

    Evenly spread, which is the worst that can be for the larger disk: each piece touches pages of its own in every bitmap, where 30 or more share them
    on the smaller one. Fresh pages are what the rest of the difference is; a walk over what is not dirty is none of it.
    """
    pieces = 1000 if full else 50
    medians = {}
    for length in (64 << 30, 64 << 40):
        times = []
        with FileDevice(f"{folder}/{length}", create_length=length) as device, FileDevice(f"{folder}/{length}.backup", create_length=length) as target, \
                fastcbw.open(device, name="large") as disk:
            disk.snapshot("warm-up").close()
            disk.add_bitmap("b", granularity=512)
            for _ in range(15 if full else 2):
                for i in range(pieces):
                    disk.write(i * (length // pieces) // piece * piece, b"x" * piece)
                begin = time.perf_counter()
                disk.backup(target, bitmap="b").wait()
                times.append(time.perf_counter() - begin)
        medians[length] = statistics.median(times) * 1000
    note(f"increment of {pieces} x {piece >> 10} KiB: 64 GiB {medians[64 << 30]:.1f} ms, 64 TiB {medians[64 << 40]:.1f} ms")
    note(f"    {medians[64 << 40] / medians[64 << 30]:8.2f} x as long at 64 TiB, goal at most 1.2")
