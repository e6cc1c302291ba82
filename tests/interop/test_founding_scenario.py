"""The scenario of the founding discussion's own test, driven by qemu-io over NBD, with its exact numbers."""

import subprocess

import pytest

import fastcbw
from fastcbw.block.file import FileDevice

K, M = 1 << 10, 1 << 20
BEFORE = [(0x5D, 0, 64 * K), (0xD5, 1 * M, 64 * K), (0xDC, 32 * M, 64 * K), (0xCD, 0x3FF0000, 64 * K)]
AFTER = [(0xAB, 0, 64 * K), (0xAD, 0xF8000, 64 * K), (0x1D, 0x2008000, 64 * K), (0xEA, 0x3FE0000, 64 * K)]
ZEROES = [(0, 0xF8000, 32 * K), (0, 0x2010000, 32 * K), (0, 0x3FE0000, 64 * K)]
UNTOUCHED = [(0xD5, 0x108000, 32 * K), (0xDC, 32 * M, 32 * K), (0xCD, 0x3FF0000, 64 * K)]


def qemu_io(socket, export, command, patterns):
    """Run one qemu-io over all patterns; a read checks what it reads."""
    lines = [argument for pattern, offset, length in patterns for argument in ("-c", f"{command} -P {pattern} {offset} {length}")]
    done = subprocess.run(["qemu-io", *(["-r"] if command == "read" else []), "-f", "raw", *lines, f"nbd+unix:///{export}?socket={socket}"],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "failed" not in done.stdout.lower(), done.stdout + done.stderr
    assert done.stdout.count(f"{'wrote' if command == 'write' else 'read'} ") == len(patterns), done.stdout


@pytest.mark.parametrize("tiers", [{"ram": "256M"}, {"ram": 0, "spill": True}, {"ram": "64K", "spill": True}])
def test_the_founding_scenario_with_its_exact_numbers(tiers, tmp_path):
    if "spill" in tiers:
        tiers = tiers | {"spill": tmp_path, "spill_limit": "1M"}
    with FileDevice(tmp_path / "disk.img", create_length="64M"):
        pass
    socket = tmp_path / "s"
    with fastcbw.open(tmp_path / "disk.img") as disk:
        disk.serve(socket)
        qemu_io(socket, "disk", "write", BEFORE)
        snapshot = disk.snapshot("snap", cluster_size="64K", **tiers)
        qemu_io(socket, "disk@snap", "read", BEFORE + ZEROES)
        qemu_io(socket, "disk", "write", AFTER)
        qemu_io(socket, "disk@snap", "read", BEFORE + ZEROES)

        facts = snapshot.status()
        assert (facts["preserved_clusters"], facts["preserved_bytes"], facts["zero_clusters"]) == (6, 393216, 3)
        assert facts["ram_bytes"] + facts["disk_bytes"] == 196608
        qemu_io(socket, "disk", "read", AFTER + UNTOUCHED)

        job = snapshot.backup(tmp_path / "backup.img", verify=True)
        assert job.wait(60)["verified"]
        snapshot.close()
        qemu_io(socket, "disk", "read", AFTER + UNTOUCHED)
    qemu_io_offline = subprocess.run(["qemu-io", "-r", "-f", "raw", "-c", f"read -P {0xCD} {0x3FF0000} {64 * K}", tmp_path / "backup.img"],
                                     capture_output=True, text=True, timeout=60)
    assert qemu_io_offline.returncode == 0 and "failed" not in qemu_io_offline.stdout.lower()
    data = (tmp_path / "backup.img").read_bytes()
    assert len(data) == 64 * M
    for pattern, offset, length in BEFORE + ZEROES:
        assert data[offset : offset + length] == bytes([pattern]) * length
