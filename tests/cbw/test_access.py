"""Access and maps: what is said of each cluster, beside what the engine's reads and accounts say."""

import random

import numpy as np
import pytest

from fastcbw.block.file import FileDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.cbw.access import CHANGED, IN_RAM, IS_ZERO, ON_DISK, READABLE, map_extents
from fastcbw.cbw.engine import Engine
from fastcbw.cbw.order import Order, order_page

K = 4096


def by_cluster(rows, clusters):
    """The access bits of each cluster, from rows that must cover the disk once, in order."""
    assert rows["offset"][0] == 0 and (rows["offset"][1:] == (rows["offset"] + rows["length"])[:-1]).all()
    bits = np.zeros(clusters, np.uint32)
    for offset, length, _, access in rows:
        bits[offset // K : -(-(offset + length) // K)] = access
    return bits


def test_a_map_says_where_each_cluster_is_and_whether_it_changed(shm_path):
    rng = random.Random(5)
    clusters = 500
    disk = MemoryDevice(clusters * K - 100)
    disk.write(0, b"x" * 300 * K)
    engine = Engine(disk)
    views, changed = {}, {}
    # One tier each: nothing moves meanwhile.
    for name, tier in (("old", {"ram": "8M"}), ("new", {"ram": 0, "spill": str(shm_path), "spill_limit": "8M"})):
        views[name] = engine.snapshot(name, **tier)
        changed[name] = set()
        for _ in range(60):
            c = rng.randrange(clusters - 1)
            engine.device.write(c * K + 5, b"n")
            for other in changed.values():
                other.add(c)
    for name, view in views.items():
        rows, resume = map_extents(view)
        assert resume is None
        bits = by_cluster(rows, clusters)
        assert (bits & READABLE).all()
        assert set(np.flatnonzero(bits & CHANGED)) == changed[name]
        stored = bits & (IN_RAM | ON_DISK | IS_ZERO)
        assert set(np.flatnonzero(stored)) == changed[name], "here each change preserved its cluster"
        assert np.isin(stored, [0, IN_RAM, ON_DISK, IS_ZERO]).all()
    new = engine.report("new")
    bits = by_cluster(map_extents(views["new"])[0], clusters)
    assert (bits & IN_RAM > 0).sum() == 0 < new["disk_bytes"] == (bits & ON_DISK > 0).sum() * K
    old = by_cluster(map_extents(views["old"])[0], clusters)
    assert (old & IN_RAM > 0).sum() * K == engine.report("old")["ram_bytes"] > 0
    assert (bits & IS_ZERO > 0).sum() == new["zero_clusters"] > 0
    live = by_cluster(map_extents(engine.device)[0], clusters)
    assert set(np.flatnonzero(live & CHANGED)) == changed["new"] and (live & READABLE).all()
    engine.delete("new")
    engine.delete("old")
    assert set(map_extents(engine.device)[0]["access"]) == {READABLE}
    engine.close()


def test_pages_of_a_map_are_the_map():
    disk = MemoryDevice(200 * K)
    engine = Engine(disk)
    view = engine.snapshot("s", ram="1M")
    disk.write(0, b"x" * 200 * K)
    for c in range(0, 200, 3):
        engine.device.write(c * K, b"n")
    whole, _ = map_extents(view)
    pages, at = [], 0
    while at is not None:
        rows, at = map_extents(view, at, limit=7)
        assert 0 < len(rows) <= 7
        pages.append(rows)
    assert (np.concatenate(pages) == whole).all() and len(whole) == 134
    part, resume = map_extents(view, 5 * K + 1, 2 * K)
    assert part["offset"].tolist() == [5 * K + 1, 6 * K, 7 * K] and part["length"].sum() == 2 * K and resume is None
    with pytest.raises(ValueError, match="not within"):
        map_extents(view, 0, 201 * K)
    with pytest.raises(TypeError, match="has no map"):
        map_extents(disk)
    engine.close()


def test_of_a_broken_snapshot_nothing_is_readable():
    engine = Engine(MemoryDevice(64 * K))
    view = engine.snapshot("s", ram="1M")
    engine.break_snapshot("s")
    assert map_extents(view)[0].tolist() == [(0, 64 * K, 0, 0)]
    engine.close()


def test_what_a_bitmap_left_out_is_not_readable_and_in_no_order(shm_path):
    disk = MemoryDevice(256 * K)
    disk.write(0, b"x" * 256 * K)
    engine = Engine(disk)
    engine.bitmaps.add("b", granularity=K)
    engine.device.write(40 * K, b"y" * 8 * K)
    engine.device.write(200 * K, b"y" * K)
    view = engine.snapshot("s", ram="1M", bitmap="b")
    engine.device.write(0, b"z" * 256 * K)
    bits = by_cluster(map_extents(view)[0], 256)
    inside = list(range(40, 48)) + [200]
    assert set(np.flatnonzero(bits & READABLE)) == set(inside) == set(np.flatnonzero(bits & IN_RAM))
    expected = [(40 * K, 8 * K, 0), (200 * K, K, 0)]
    assert np.concatenate(list(Order(view, "ram-first"))).tolist() == expected
    assert order_page(view, "ram-first")[0].tolist() == expected
    engine.close()


def test_pages_of_an_order_are_the_order(shm_path):
    rng = random.Random(3)
    disk = MemoryDevice(1000 * K - 9)
    disk.write(0, b"x" * 600 * K)
    engine = Engine(disk)
    view = engine.snapshot("s", ram="8M")
    for _ in range(75):
        engine.device.write(rng.randrange(999) * K, b"n")
    engine.snapshot("newer", ram=0, spill=str(shm_path), spill_limit="8M")
    for _ in range(75):
        engine.device.write(rng.randrange(999) * K, b"n")
    for policy in ("sequential", "ram-first", "disk-last,zero-last", "hot-first,ram-first"):
        whole = np.concatenate(list(Order(view, policy, chunk=K)))
        pages, start = [], 0
        while start is not None:
            rows, start = order_page(view, policy, start, 13)
            assert len(rows) <= 13
            pages.append(rows)
        pages = np.concatenate(pages)
        assert pages["length"].sum() == disk.length
        assert (np.diff(pages["class"]) >= 0).all()
        if "hot" not in policy:     # there the regions come by their heat, here by their offset
            merged = [list(pages[0])]
            for offset, length, of_class in pages[1:].tolist():
                if merged[-1][2] == of_class and merged[-1][0] + merged[-1][1] == offset:
                    merged[-1][1] += length
                else:
                    merged.append([offset, length, of_class])
            assert [tuple(row) for row in merged] == whole.tolist()
        else:
            for of_class in range(3):
                assert whole["length"][whole["class"] == of_class].sum() == pages["length"][pages["class"] == of_class].sum()
    for start in (-1, 10**9):
        with pytest.raises(ValueError, match="start: "):
            order_page(view, "sequential", start)
    engine.close()


def test_a_map_of_64_tib_costs_what_is_used(shm_path):
    disk = FileDevice(shm_path / "disk", create_length="64T")
    engine = Engine(disk)
    view = engine.snapshot("s", ram="1M")
    for offset in (0, 1 << 40, (64 << 40) - K):
        engine.device.write(offset, b"n" * K)
    rows, _ = map_extents(view)
    assert rows["access"].tolist() == [READABLE | IS_ZERO | CHANGED, READABLE] * 2 + [READABLE | IS_ZERO | CHANGED]
    assert len(order_page(view, "zero-last")[0]) == 5
    engine.close()
    disk.close()
