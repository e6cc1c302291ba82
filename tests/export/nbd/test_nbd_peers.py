"""The clients that people use: libnbd's tools, QEMU's tools, fio. A missing one is a failure, not a skip."""

import json
import random
import subprocess

import pytest

from fastcbw.block.file import FileDevice
from fastcbw.block.memory import MemoryDevice

MIB = 1 << 20


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=100, **options)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def image(folder):
    """64 MiB in a file: data at the start, in the middle (unaligned) and at the end, holes between."""
    path = folder / "image.raw"
    source = random.Random(5)
    with open(path, "wb") as file:
        file.truncate(64 * MIB)
        for offset, length in ((0, 3 * MIB), (20 * MIB + 4096, MIB), (64 * MIB - 65536, 65536)):
            file.seek(offset)
            file.write(source.randbytes(length))
    return path


@pytest.fixture
def uri(server, image, path):
    device = FileDevice(image)
    server.add_export("vm", device)
    yield f"nbd+unix:///vm?socket={path}"
    server.remove_export("vm", force=True)
    device.close()


def test_nbdinfo_shows_what_the_export_can(uri):
    (export,) = json.loads(run("nbdinfo", "--json", uri))["exports"]
    assert export["export-size"] == 64 * MIB
    assert export["contexts"] == ["base:allocation", "qemu:allocation-depth"]
    assert export["block_size_maximum"] == 32 * MIB
    for what in ("can_cache", "can_df", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero"):
        assert export[what] is True, what
    assert not export["is_read_only"] and not export["is_rotational"]


def test_nbdinfo_lists_all_exports(uri, server, path):
    server.add_export("vm@snap", MemoryDevice("1M"), read_only=True, description="a snapshot")
    exports = json.loads(run("nbdinfo", "--list", "--json", f"nbd+unix://?socket={path}"))["exports"]
    assert [(export["export-name"], export["is_read_only"]) for export in exports] == [("vm", False), ("vm@snap", True)]
    assert exports[1]["description"] == "a snapshot"


def test_nbdinfo_maps_the_holes_of_the_image(uri, image):
    extents = json.loads(run("nbdinfo", "--map", "--json", uri))
    assert sum(extent["length"] for extent in extents) == 64 * MIB
    assert [(extent["offset"], extent["length"]) for extent in extents if extent["type"] == 0] == [
        (0, 3 * MIB), (20 * MIB + 4096, MIB), (64 * MIB - 65536, 65536)]
    assert {extent["type"] for extent in extents} == {0, 3}


@pytest.mark.parametrize("connections", [1, 4])
def test_nbdcopy_pulls_the_image_exactly(uri, image, folder, connections):
    target = folder / "copy.raw"
    run("nbdcopy", f"--connections={connections}", uri, target)
    assert target.read_bytes() == image.read_bytes()


def test_nbdcopy_pushes_an_image_exactly(uri, image, folder):
    source = folder / "source.raw"
    source.write_bytes(random.Random(6).randbytes(40 * MIB) + bytes(24 * MIB))
    run("nbdcopy", "--connections=4", "--flush", source, uri)
    assert image.read_bytes() == source.read_bytes()


def test_qemu_img_compares_converts_and_maps(uri, image, folder):
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, image)
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, folder / "converted.raw")
    assert (folder / "converted.raw").read_bytes() == image.read_bytes()
    extents = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", uri))
    assert [(extent["start"], extent["length"]) for extent in extents if extent["data"]] == [
        (0, 3 * MIB), (20 * MIB + 4096, MIB), (64 * MIB - 65536, 65536)]
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", folder / "converted.raw", uri)
    assert (folder / "converted.raw").read_bytes() == image.read_bytes()


def test_qemu_io_writes_zeroes_trims_and_flushes(uri, image):
    output = run(
        "qemu-io", "-f", "raw", "-c", "write -P 0x5d 0 64k", "-c", "write -f -P 0xab 1M 33M", "-c", "write -z -u 4M 1M",
        "-c", "discard 8M 1M", "-c", "flush", "-c", "read -P 0x5d 0 64k", "-c", "read -P 0xab 5M 3M", "-c", "read -P 0 4M 1M",
        "-c", "aio_write -P 1 100k 3k", "-c", "aio_read -P 0xab 10M 2M", "-c", "aio_flush", uri)
    assert "fail" not in output
    data = image.read_bytes()
    assert data[: 64 << 10] == b"\x5d" * (64 << 10)
    assert data[4 * MIB : 5 * MIB] == bytes(MIB)
    assert data[33 * MIB : 34 * MIB] == b"\xab" * MIB


def test_qemu_io_opens_a_read_only_export_only_for_reading(server, path):
    server.add_export("ro", MemoryDevice("1M"), read_only=True)
    uri = f"nbd+unix:///ro?socket={path}"
    done = subprocess.run(["qemu-io", "-f", "raw", "-c", "write 0 64k", uri], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Permission denied" in done.stderr
    assert "read 65536/65536" in run("qemu-io", "-r", "-f", "raw", "-c", "read -P 0 0 64k", uri)


@pytest.mark.parametrize("block", ["4k", "64k", "1m"])
def test_fio_verifies_what_it_wrote_over_several_connections(server, path, folder, block):
    server.add_export("fio", MemoryDevice("64M"))
    output = run(
        "fio", "--name=job", "--ioengine=nbd", f"--uri=nbd+unix:///fio?socket={path}", "--rw=randwrite", f"--bs={block}",
        "--iodepth=16", "--numjobs=3", "--size=16M", "--offset_increment=16M", "--verify=crc32c", "--do_verify=1",
        "--verify_fatal=1", "--output-format=json", f"--output={folder / 'fio.json'}", "--group_reporting")
    text = (folder / "fio.json").read_text()
    (job,) = json.loads(text[text.index("{") :])["jobs"]
    assert job["error"] == 0, output
    assert job["write"]["io_bytes"] == 48 * MIB
    assert job["read"]["io_bytes"] == 48 * MIB
