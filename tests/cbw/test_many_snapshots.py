"""Snapshots come and go for as long as an older one lives: what it needs of them stays, and nothing else does."""

import os

import pytest

from fastcbw.block.memory import MemoryDevice
from fastcbw.cbw.engine import Engine

K = 4096


def open_files():
    return len(os.listdir("/proc/self/fd"))


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_a_snapshot_that_lives_long_keeps_no_other_from_being_taken(tier, shm_path):
    """Each leaves it one cluster, in a store that stays for that."""
    count = 150
    disk = MemoryDevice(count * K)
    content = b"".join(bytes([i % 255 + 1]) * K for i in range(count))
    disk.write(0, content)
    engine = Engine(disk)
    before = open_files()
    old = engine.snapshot("old", cluster_size=K, ram="1M")
    for i in range(count):
        view = engine.snapshot("s", **({"ram": "64K"} if tier == "ram" else {"ram": 0, "spill": shm_path, "spill_limit": "64K"}))
        engine.device.write(i * K, b"n" * K)
        assert view.read(i * K, K) == content[i * K : (i + 1) * K]
        engine.delete("s")
    assert old.read(0, count * K) == content
    assert engine.inherited() == {f"inherited_{name}_bytes": count * K if name == tier else 0 for name in ("ram", "disk")}
    engine.delete("old")
    assert set(engine.inherited().values()) == {0}
    engine.snapshot("s", ram="64K")         # starts no thread any more that others did not
    engine.delete("s")
    assert open_files() <= before + 2       # the keeper's
    engine.close()


def test_of_a_store_that_stays_for_an_older_snapshot_only_what_that_reads_is_in_memory():
    length = 48 << 20
    disk = MemoryDevice(length)
    disk.write(0, b"o" * length)
    engine = Engine(disk)
    engine.bitmaps.add("b", granularity=K)
    engine.device.write(5 * K, b"m" * K)
    old = engine.snapshot("old", cluster_size=K, ram="1M", bitmap="b")
    engine.snapshot("s", ram="64M")
    engine.device.write(0, b"n" * length)
    full = resident()
    engine.delete("s")
    assert full - resident() >= 40 << 20
    assert old.read(5 * K, K) == b"m" * K and engine.inherited()["inherited_ram_bytes"] == K
    engine.close()
