"""qemu:dirty-bitmap:NAME: what it says, to whom, beside other contexts; nbdinfo and qemu-img are the judges."""

import json
import subprocess

import pytest

import fastcbw
from fastcbw.block.memory import MemoryDevice
from fastcbw.errors import Error
from fastcbw.export.nbd.client import Client, NbdError, meta_query
from fastcbw.wire import constants as c

LENGTH = (4 << 20) + 512
DIRTY = "qemu:dirty-bitmap:"


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def disk(path):
    with fastcbw.open(MemoryDevice(LENGTH), name="vm") as disk:
        disk.serve(path)
        yield disk


def status(path, export, contexts, offset=0, length=LENGTH, **options):
    with Client(path, export, contexts=contexts) as client:
        return client.block_status(offset, length, **options)


def test_a_live_bitmap_is_what_was_written(disk, path):
    disk.add_bitmap("fine", granularity=512)
    disk.add_bitmap("coarse")
    disk.write(65536 + 512, b"x" * 513)
    found = status(path, "vm", [DIRTY + "fine", DIRTY + "coarse"])
    assert found == {DIRTY + "fine": [(66048, 0), (1024, 1), (LENGTH - 67072, 0)],
                     DIRTY + "coarse": [(65536, 0), (65536, 1), (LENGTH - 131072, 0)]}
    with Client(path, "vm", contexts=[DIRTY + "fine"]) as client:
        disk.write(LENGTH - 1, b"x")         # seen by a client that is there already
        assert client.block_status(0, LENGTH)[DIRTY + "fine"][-1] == (512, 1)
        disk.bitmaps["fine"].remove()
        with pytest.raises(NbdError, match="block status"):
            client.block_status(0, LENGTH)


def test_a_snapshot_has_the_bitmap_that_it_was_made_of_as_it_was_then(disk, path):
    bitmap = disk.add_bitmap("b", granularity=512)
    disk.write(512, b"x")
    disk.snapshot("s", bitmap="b")
    disk.write(4096, b"x")
    bitmap.clear()
    bitmap.remove()
    found = status(path, "vm@s", ["base:allocation", DIRTY + "b"])
    assert found[DIRTY + "b"] == [(512, 0), (512, 1), (LENGTH - 1024, 0)]
    # What is not in the snapshot is allocation 0, and EINVAL to read.
    assert sum(length for length, _ in found["base:allocation"]) == LENGTH
    with Client(path, "vm@s") as client:
        assert client.read(0, 4096)[:1024] == bytes(512) + b"x" + bytes(511)
        with pytest.raises(NbdError, match="not in the snapshot") as caught:
            client.read(0, 4097)
        assert caught.value.errno == 22


def test_every_context_of_a_request_covers_the_same_bytes(disk, path):
    """base:allocation in one piece, a bitmap of more extents than a reply holds, one of few."""
    names = [f"b{i}" for i in range(15)]
    for name in names:
        disk.add_bitmap(name, granularity=512)
    for offset in range(0, LENGTH - 512, 1024):
        disk.write(offset, b"x")
    disk.add_bitmap("few", granularity=65536)
    disk.write(3 << 20, b"x")
    contexts = ["base:allocation", *(DIRTY + name for name in names), DIRTY + "few"]
    done, asked = 0, 0
    while done < LENGTH:
        found = status(path, "vm", contexts, done, LENGTH - done)
        covered = {sum(length for length, _ in rows) for rows in found.values()}
        assert len(found) == len(contexts) and len(covered) == 1, covered
        assert found[DIRTY + "b0"][:2] == [(512, 1), (512, 0)]
        done += covered.pop()
        asked += 1
    assert 4 < asked < 20
    found = status(path, "vm", contexts[:2], one=True)
    assert found == {"base:allocation": [(512, 0)], contexts[1]: [(512, 1)]}


@pytest.mark.parametrize("queries, listed", [
    ([], ["base:allocation", "qemu:allocation-depth", DIRTY + "b", DIRTY + "c"]),
    (["qemu:"], ["qemu:allocation-depth", DIRTY + "b", DIRTY + "c"]),
    ([DIRTY], [DIRTY + "b", DIRTY + "c"]),
    ([DIRTY + "c"], [DIRTY + "c"]),
    ([DIRTY + "d", "qemu", "base:"], ["base:allocation"]),
])
def test_list_answers_names_and_prefixes(disk, path, queries, listed):
    disk.add_bitmap("b")
    disk.add_bitmap("c")
    with Client(path, "vm", begin=False) as client:
        client.structured_replies()
        replies = client.option(c.OPT_LIST_META_CONTEXT, meta_query("vm", queries))
        assert [data[4:].decode() for kind, data in replies if kind == c.REP_META_CONTEXT] == listed


def test_set_takes_exact_names_only(disk, path):
    disk.add_bitmap("b")
    with Client(path, "vm", contexts=["qemu:", DIRTY, DIRTY + "b", DIRTY + "d"]) as client:
        assert list(client.contexts) == [DIRTY + "b"]


def test_nbdinfo_and_qemu_img_read_the_same_map(disk, path):
    disk.add_bitmap("b")
    disk.write(1 << 20, b"x")
    disk.write((2 << 20) + 65536, b"x" * 65537)
    expected = [(0, 1 << 20, 0), (1 << 20, 65536, 1), ((1 << 20) + 65536, 1 << 20, 0), ((2 << 20) + 65536, 131072, 1),
                ((2 << 20) + 3 * 65536, LENGTH - (2 << 20) - 3 * 65536, 0)]
    rows = json.loads(run("nbdinfo", f"--map={DIRTY}b", "--json", f"nbd+unix:///vm?socket={path}"))
    assert [(row["offset"], row["length"], row["type"]) for row in rows] == expected
    image = f"driver=nbd,server.type=unix,server.path={path},export=vm,x-dirty-bitmap={DIRTY}b"
    rows = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", image))
    # QEMU shows a dirty range as not data (bit 0 of base:allocation is "hole").
    assert [(row["start"], row["length"], int(not row["data"])) for row in rows] == expected


def test_a_bitmap_that_a_snapshot_has_is_still_shown_whole(disk, path):
    disk.add_bitmap("b", granularity=512)
    disk.write(0, b"x")
    snapshot = disk.snapshot("s", bitmap="b", bitmap_for="a job")
    disk.write(512, b"x")
    assert status(path, "vm", [DIRTY + "b"]) == {DIRTY + "b": [(1024, 1), (LENGTH - 1024, 0)]}
    with pytest.raises(Error, match="in use by a job"):
        disk.bitmaps["b"].clear()
    snapshot.close()         # no backup has succeeded: all of it again
    assert disk.bitmaps["b"].extents().tolist() == [(0, 1024)]
