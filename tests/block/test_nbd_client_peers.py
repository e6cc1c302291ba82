"""The NBD client device on other people's servers: qemu-nbd, qemu-storage-daemon, nbdkit. A missing one is a failure, not a skip."""

import contextlib
import errno
import functools
import json
import random

import pytest
from nbd_fake import together
from nbd_servers import process
from test_conformance import apply

from fastcbw.block import vectors
from fastcbw.block.device import ZERO
from fastcbw.block.image import open_image
from fastcbw.block.nbd import NbdDevice

MIB = 1 << 20


@pytest.fixture
def image(shm_path):
    """16 MiB and one sector, all hole."""
    with open(shm_path / "image", "wb") as file:
        file.truncate(16 * MIB + 512)
    return shm_path / "image"


@contextlib.contextmanager
def qemu_nbd(image, *options):
    path = image.with_name("qemu.sock")
    with process("qemu-nbd", "-t", "-f", "raw", "-k", path, "-x", "vm", *options, image, answers=path):
        yield f"nbd+unix:///vm?socket={path}"


@contextlib.contextmanager
def storage_daemon(image, **options):
    path = image.with_name("qsd.sock")
    export = {"type": "nbd", "id": "e", "node-name": "n", "name": "vm", "writable": True, **options}
    with process("qemu-storage-daemon", "--blockdev", json.dumps({"driver": "file", "node-name": "n", "filename": str(image), "discard": "unmap"}),
                 "--nbd-server", f"addr.type=unix,addr.path={path},max-connections=0", "--export", json.dumps(export), answers=path):
        yield f"nbd+unix:///vm?socket={path}"


@contextlib.contextmanager
def nbdkit(image, *options):
    path = image.with_name("kit.sock")
    with process("nbdkit", "-f", "-U", path, *options, answers=path):
        yield f"nbd+unix:///?socket={path}"


SERVERS = {
    "qemu-nbd": functools.partial(qemu_nbd), "qemu-nbd for many": lambda image: qemu_nbd(image, "-e", "8", "--discard=unmap"),
    "qemu-storage-daemon": storage_daemon, "nbdkit": lambda image: nbdkit(image, "file", str(image)),
}


@pytest.mark.parametrize("server", SERVERS)
def test_random_requests_do_to_the_image_what_they_do_to_a_bytearray(image, server):
    source = random.Random(3)
    length = image.stat().st_size
    model = bytearray(length)
    with SERVERS[server](image) as uri, NbdDevice(uri) as device:
        assert device.length == length and device.structured
        for _ in range(200):
            kind = source.choice(("write", "write", "zero", "discard", "read", "flush"))
            offset = source.randrange(length)
            size = min(source.choice((1, 511, 512, 4096, 70000, 3 * MIB)), length - offset)
            cuts = sorted(source.randrange(size + 1) for _ in range(source.randrange(4)))
            pieces = [b - a for a, b in zip([0, *cuts], [*cuts, size])]
            flags = source.choice((0, vectors.FUA, vectors.MAY_UNMAP, vectors.MAY_UNMAP | vectors.FAST_ONLY))
            apply(device, model, (kind, offset, size, pieces, flags, source.randrange(1 << 30)))
        assert device.read(0, length) == model
        device.flush()
    assert image.read_bytes() == model


@pytest.mark.parametrize("server", SERVERS)
def test_several_threads_write_and_read_their_own(image, server):
    with SERVERS[server](image) as uri, NbdDevice(uri) as device:
        def work(n):
            source = random.Random(n)
            for _ in range(40):
                offset, data = n * MIB + source.randrange(MIB - 70000), source.randbytes(source.choice((1, 4096, 70000)))
                device.write(offset, data)
                if device.read(offset, len(data)) != data:
                    return "other data"

        assert together(*(functools.partial(work, n) for n in range(8))) == [None] * 8


@pytest.mark.parametrize("server", SERVERS)
def test_block_status_tells_data_from_holes(image, server):
    with open(image, "r+b") as file:
        file.seek(4 * MIB)
        file.write(b"\x11" * MIB)
    with SERVERS[server](image) as uri, NbdDevice(uri) as device:
        extents = device.extents().tolist()
        assert [(offset, length) for offset, length, flags in extents if not flags & ZERO] == [(4 * MIB, MIB)]
        assert sum(length for _, length, _ in extents) == device.length


def test_qemus_promises_decide_the_number_of_connections(image):
    with qemu_nbd(image, "-e", "8") as uri, NbdDevice(uri) as device:
        assert device.connections == 4
    with qemu_nbd(image, "-r") as uri:
        with pytest.raises(PermissionError, match="the server exports it read-only"):
            NbdDevice(uri)
        NbdDevice(uri, read_only=True, connections=1).close()
    with nbdkit(image, "--filter=multi-conn", "memory", "1M", "multi-conn-mode=disable") as uri, NbdDevice(uri) as device:
        assert device.connections == 1


def test_errors_that_nbdkit_injects_arrive(image):
    with nbdkit(image, "--filter=error", "memory", "1M", "error-pwrite=ENOSPC", "error-pwrite-rate=100%") as uri:
        with NbdDevice(uri) as device:
            with pytest.raises(OSError, match="No space left|write 0.4096") as caught:
                device.write(0, bytes(4096))
            assert caught.value.errno == errno.ENOSPC
            assert device.read(0, 10) == bytes(10)


def test_servers_without_structured_replies_are_served_with_simple_ones(image):
    with nbdkit(image, "--no-sr", "memory", "4M") as uri, NbdDevice(uri) as device:
        assert not device.structured
        data = random.Random(4).randbytes(3 * MIB)
        device.write(77, data)
        assert device.read(77, len(data)) == data
        assert device.extents().tolist() == [(0, 4 * MIB, 0)]


def test_a_server_that_wants_tls_is_refused_by_name(image, shm_path):
    (shm_path / "keys.psk").write_text("user:00112233445566778899aabbccddeeff\n")
    with nbdkit(image, "--tls=require", f"--tls-psk={shm_path}/keys.psk", "memory", "1M") as uri:
        with pytest.raises(PermissionError, match="the server wants TLS, which is not built yet"):
            NbdDevice(uri)


def test_an_unknown_export_of_qemu_is_told_with_its_words(image):
    with qemu_nbd(image) as uri, pytest.raises(FileNotFoundError, match="the server has no export 'other': .*other"):
        open_image(uri.replace("vm?", "other?"))
