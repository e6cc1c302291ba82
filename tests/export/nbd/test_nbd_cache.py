"""CACHE over the wire: offered where it does something, and never in the way of other requests of its connection."""

import pytest

from fastcbw.block.delay import DelayDevice
from fastcbw.block.file import FileDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.cbw.engine import Engine
from fastcbw.export.nbd.client import Client, NbdError
from fastcbw.wire import constants as c

K = 4096
LENGTH = 64 * K


@pytest.fixture
def late():
    """A disk whose requests wait at the gates of a test."""
    with DelayDevice(MemoryDevice(LENGTH), io="threads") as device:
        device.write(0, bytes(range(1, 65)) * K)
        yield device


@pytest.fixture
def engine(late):
    engine = Engine(late)
    yield engine
    late.open_all()
    engine.close()


def test_cache_is_offered_where_it_does_something(path, server, folder, engine):
    image = FileDevice(folder / "disk.raw", create_length=LENGTH)
    filtered = Engine(image)
    for name, device in (("memory", MemoryDevice(K)), ("late", engine.device), ("file", image), ("guest", filtered.device),
                         ("s", engine.snapshot("s", ram="1M")), ("without-ram", engine.snapshot("t", ram=0, spill=str(folder), spill_limit="1M"))):
        server.add_export(name, device, read_only=True)
    offered = {}
    for name in ("memory", "late", "file", "guest", "s", "without-ram"):
        with Client(path, name) as client:
            offered[name] = bool(client.flags & c.FLAG_SEND_CACHE)
            client.cache(0, K)                  # understood all the same
    assert offered == {"memory": False, "late": False, "file": True, "guest": True, "s": True, "without-ram": False}
    for name in offered:
        server.remove_export(name, force=True)
    filtered.close()
    image.close()


def test_a_cache_request_that_waits_for_the_disk_holds_up_no_other_of_its_connection(path, server, engine, late):
    view = engine.snapshot("s", ram="1M")
    view.cache(5 * K, K)
    server.add_export("s", view, read_only=True, background=True)
    with Client(path, "s") as client, late.hold("read", 0, K) as gate:
        slow = client.send(c.CMD_CACHE, 0, 8 * K)
        gate.wait_arrived()
        assert client.read(5 * K, K) == (bytes(range(1, 65)) * K)[5 * K : 6 * K]
        gate.open()
        reply = client.receive_reply()
        assert (reply.cookie, reply.error) == (slow, 0)
        assert engine.report("s")["kept_clusters"] == 8
        assert server.status()["exports"][0]["counters"]["caches"] == 1


def test_a_cache_request_that_fails_says_why(path, server, engine):
    view = engine.snapshot("s", ram="1M")
    server.add_export("s", view, read_only=True)
    with Client(path, "s") as client:
        engine.break_snapshot("s")
        with pytest.raises(NbdError, match="broken"):
            client.cache(0, K)
