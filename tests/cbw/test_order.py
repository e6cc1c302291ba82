"""Copy orders: what a list of policies means, which clusters come when, and that each comes once, whatever the guest does."""

import random
import threading

import numpy as np
import pytest

from fastcbw.block.file import FileDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.block.python import Device, PythonDevice
from fastcbw.cbw.copier import Copier
from fastcbw.cbw.engine import Engine
from fastcbw.cbw.order import Order
from fastcbw.cbw.policies import KINDS, classes_of, parse_order

K = 4096
POLICIES = ["sequential", "ram-first", "disk-last", "disk-early", "zero-last", "hot-first", "ram-first,zero-last",
            "hot-first,ram-first", "zero-last,disk-last,ram-first", "disk-early,hot-first,zero-last,sequential"]


@pytest.mark.parametrize("order, classes", [
    ("sequential", "0 0 0 0 0"),
    ("ram-first", "0 1 1 1 1"),
    ("disk-early", "0 1 2 2 2"),
    ("ram-first,disk-early", "0 1 2 2 2"),
    ("disk-last", "0 1 0 0 0"),
    ("zero-last", "0 0 1 0 0"),
    ("hot-first", "1 1 1 0 1"),
    ("ram-first,hot-first", "0 2 2 1 2"),
    ("hot-first,ram-first", "1 2 2 0 2"),
    ("ram-first,zero-last", "0 1 2 1 1"),
    ("zero-last,ram-first", "0 1 2 1 1"),
    ("hot-first,ram-first,disk-last,zero-last", "1 4 3 0 2"),
    ("ram-first,sequential", "0 1 1 1 1"),
])
def test_a_list_of_policies_is_a_class_for_each_kind(order, classes):
    assert classes_of(order) == tuple(map(int, classes.split()))


@pytest.mark.parametrize("order, words", [
    ("", "'' is unknown"), ("up", "'up' is unknown"), ("ram-first,", "'' is unknown"), ("ram-first, hot-first", "' hot-first' is unknown"),
    ("ram-first,ram-first", "'ram-first' is named twice"), ("disk-last,disk-early", "contradict"), ("disk-early,ram-first,disk-last", "contradict"),
    ("sequential,ram-first", "'ram-first' comes after 'sequential'"), (None, "None is no text"), (["ram-first"], "is no text"),
])
def test_a_list_that_makes_no_sense_is_refused(order, words):
    with pytest.raises(ValueError, match=f"^order: .*{words}"):
        parse_order(order)
    if isinstance(order, str):
        with pytest.raises(ValueError, match=words):
            Order(MemoryDevice(K), order)


def engine_with(rng, clusters, folder, snapshots=2):
    """An engine whose oldest snapshot has clusters of every kind, some of them in newer snapshots' stores.

    Each snapshot has one tier only, in turns, so that no flusher moves anything meanwhile.
    """
    disk = MemoryDevice(clusters * K - 777)
    for c in range(clusters - 1):
        if c // 16 % 3:
            disk.write(c * K, bytes([c % 255 + 1]) * K)
    engine = Engine(disk)
    tiers = [{"ram": "64M"}, {"ram": 0, "spill": str(folder), "spill_limit": "64M"}]
    view = engine.snapshot("s0", **tiers[0])
    for i in range(snapshots):
        for _ in range(clusters // 8):
            first = rng.randrange(clusters - 1)
            engine.device.write(first * K, b"n" * K * min(rng.choice([1, 1, 1, 5, 40]), clusters - 1 - first))
        if i + 1 < snapshots:
            engine.snapshot(f"s{i + 1}", **tiers[(i + 1) % 2])
    return engine, disk, view


def all_rows(order):
    return np.concatenate(list(order))


def test_rows_cover_the_disk_once_and_the_classes_ascend(shm_path):
    rng = random.Random(1)
    engine, disk, view = engine_with(rng, 3000, shm_path)
    kinds = set()
    for policy in POLICIES:
        rows = all_rows(Order(view, policy, chunk=K))
        ascending = np.sort(rows, order="offset")
        assert ascending["offset"][0] == 0 and ascending["length"].sum() == disk.length
        assert (ascending["offset"][1:] == (ascending["offset"] + ascending["length"])[:-1]).all()
        assert (np.diff(rows["class"]) >= 0).all() and rows["class"].min() == 0, policy
        assert set(rows["class"]) <= set(classes_of(policy))
        for c in set(rows["class"]) - {classes_of(policy)[KINDS.index("hot")]}:
            assert (np.diff(rows["offset"][rows["class"] == c]) > 0).all(), "within a class the order ascends"
        kinds |= set(rows["class"])
    assert {0, 1, 2} <= kinds
    engine.close()


@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_the_class_of_a_row_is_that_of_its_kind(shm_path, tier):
    """Against the accounts of the engine: so many clusters in RAM, on disk and zero as the report says."""
    disk = MemoryDevice(2000 * K - 777)
    disk.write(0, b"x" * 1000 * K)
    engine = Engine(disk)
    view = engine.snapshot("s", **({"ram": "64M"} if tier == "ram" else {"ram": 0, "spill": str(shm_path), "spill_limit": "64M"}))
    rng = random.Random(2)
    for _ in range(300):
        engine.device.write(rng.randrange(1999) * K, b"n" * K)
    facts = engine.report("s")
    rows = all_rows(Order(view, "disk-early,zero-last", chunk=K))
    ram, on_disk, nowhere, zero = (rows["length"][rows["class"] == c].sum() for c in range(4))
    assert (ram, on_disk) == (facts["ram_bytes"], facts["disk_bytes"]) and facts[f"{tier}_bytes"] > 0
    assert zero == facts["zero_clusters"] * K > 0
    assert nowhere == disk.length - (facts["preserved_clusters"] * K)
    engine.close()


class Recorder(Device):
    """A target that notes in which order it is written, and each byte's count."""

    def __init__(self, length, on_write=None):
        self.length = length
        self.data = bytearray(length)
        self.count = np.zeros(length, np.uint8)
        self.begins, self.lengths = [], []
        self.on_write = on_write

    def read(self, offset, length):
        return self.data[offset : offset + length]

    def write(self, offset, data):
        self.note(offset, data)

    def write_zeroes(self, offset, length, *, unmap=True):
        self.note(offset, bytes(length))

    def note(self, offset, data):
        self.data[offset : offset + len(data)] = data
        self.count[offset : offset + len(data)] += 1
        self.begins.append(offset)
        self.lengths.append(len(data))
        if self.on_write is not None:
            self.on_write(offset)


def run_by_three(copier, seconds):
    threads = [threading.Thread(target=copier.run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("chunk", [K, 3 * K, 16 * K])
@pytest.mark.parametrize("cluster", ["4K", "64K"])
def test_every_byte_is_copied_once_while_the_guest_writes(policy, chunk, cluster, shm_path):
    """Three workers, and a guest that writes between any two of the target's writes: kinds change all the time."""
    rng = random.Random(f"{policy} {chunk}")
    length = 700 * K + 99
    disk = MemoryDevice(length)
    disk.write(0, bytes(i // 512 % 255 + 1 for i in range(0, 300 * K)))
    before = disk.read(0, length)
    engine = Engine(disk)
    view = engine.snapshot("s", cluster_size=cluster, ram="256K", spill=str(shm_path), spill_limit="64M")
    lock = threading.Lock()

    def guest(offset):
        with lock:
            at = rng.randrange(length - 2 * K)
            engine.device.write(at, b"new" * rng.randrange(1, 2000))

    for _ in range(20):
        guest(0)
    recorder = Recorder(length, guest)
    copier = Copier(view, PythonDevice(recorder), chunk=chunk, order=policy)
    run_by_three(copier, 60)
    assert copier.error is None and copier.done == length
    assert bytes(recorder.data) == before
    assert (recorder.count == 1).all()
    assert max(recorder.lengths) > 256 * K or chunk >= K       # known zeroes come in long pieces
    engine.close()


def written_clusters(view, policy, chunk=K):
    recorder = Recorder(view.length)
    copier = Copier(view, PythonDevice(recorder), chunk=chunk, order=policy)
    copier.run()
    assert copier.error is None
    return [c for begin, length in zip(recorder.begins, recorder.lengths) for c in range(begin // K, (begin + length - 1) // K + 1)]


@pytest.fixture
def mixed(shm_path):
    """Sixty clusters of data: 10..13 in RAM, 20..23 on disk, 30..33 zero, the rest nowhere."""
    disk = MemoryDevice(60 * K)
    disk.write(0, b"x" * 60 * K)
    disk.write(30 * K, bytes(4 * K))
    engine = Engine(disk)
    view = engine.snapshot("s", ram="1M")
    engine.device.write(10 * K, b"n" * 4 * K)
    engine.snapshot("newer", ram=0, spill=str(shm_path), spill_limit="1M")
    for first in (20, 30):
        engine.device.write(first * K, b"n" * 4 * K)
    yield view
    engine.close()


RAM, DISK, ZERO = [list(range(first, first + 4)) for first in (10, 20, 30)]
REST = [c for c in range(60) if c not in RAM + DISK + ZERO]


@pytest.mark.parametrize("policy, expected", [
    ("sequential", list(range(60))),
    ("ram-first", RAM + sorted(DISK + ZERO + REST)),
    ("disk-last", sorted(RAM + ZERO + REST) + DISK),
    ("disk-early", RAM + DISK + sorted(ZERO + REST)),
    ("zero-last", sorted(RAM + DISK + REST) + ZERO),
    ("ram-first,zero-last", RAM + sorted(DISK + REST) + ZERO),
    ("zero-last,disk-last", sorted(RAM + REST) + DISK + ZERO),
    ("disk-last,zero-last", sorted(RAM + REST) + ZERO + DISK),
    ("ram-first,disk-last,zero-last", RAM + REST + ZERO + DISK),
])
def test_clusters_come_in_the_order_of_the_policies(mixed, policy, expected):
    assert written_clusters(mixed, policy) == expected


def test_a_first_touch_is_copied_next_under_ram_first():
    disk = MemoryDevice(100 * K)
    disk.write(0, b"x" * 100 * K)
    engine = Engine(disk)
    view = engine.snapshot("s", ram="1M")
    touches = {3: 80, 7: 40, 8: 60}         # after so many writes of the target the guest touches that cluster

    def guest(offset):
        if len(recorder.begins) in touches:
            engine.device.write(touches[len(recorder.begins)] * K, b"n" * K)

    recorder = Recorder(disk.length, guest)
    Copier(view, PythonDevice(recorder), chunk=K, order="ram-first").run()
    order = [begin // K for begin in recorder.begins]
    assert order[:12] == [0, 1, 2, 80, 3, 4, 5, 40, 60, 6, 7, 8] and sorted(order) == list(range(100))
    engine.close()


@pytest.mark.parametrize("policy", ["disk-last", "zero-last"])
def test_a_first_touch_waits_for_its_turn_where_ram_has_no_class_of_its_own(policy):
    disk = MemoryDevice(100 * K)
    disk.write(0, b"x" * 100 * K)
    engine = Engine(disk)
    view = engine.snapshot("s", ram="1M")
    recorder = Recorder(disk.length, lambda offset: engine.device.write(80 * K, b"n" * K))
    Copier(view, PythonDevice(recorder), chunk=K, order=policy).run()
    assert recorder.begins == sorted(recorder.begins)
    engine.close()


def test_hot_first_copies_around_recent_writes_before_the_rest():
    """A disk of 64 MiB; the guest has written at 20 and at 50 MiB, there more often: both regions come first, the hotter before."""
    mib = 1 << 20
    disk = MemoryDevice(64 * mib)
    disk.write(0, b"x" * 64 * mib)
    engine = Engine(disk)
    view = engine.snapshot("s", ram="16M")
    for i in range(4):
        engine.device.write(50 * mib + i * 8 * K, b"n" * K)
    engine.device.write(20 * mib, b"n" * K)
    rows = all_rows(Order(view, "hot-first", chunk=mib))
    hot = rows[rows["class"] == 0]
    regions = list(dict.fromkeys(hot["offset"] // mib))
    assert regions[0] == 50 and set(regions) == {50, 51, 20, 21}
    assert hot["length"].sum() == 4 * mib - 5 * K, "all of the four regions but what is preserved already"
    assert (rows["class"][len(hot):] == 1).all()
    engine.close()


def test_a_short_run_takes_its_neighbours_along():
    """One cluster in RAM, chunks of 16: an eighth of a chunk around it, aligned, goes in one write."""
    disk = MemoryDevice(64 * K)
    disk.write(0, b"x" * 64 * K)
    engine = Engine(disk)
    view = engine.snapshot("s", ram="1M")
    engine.device.write(41 * K, b"n" * K)
    recorder = Recorder(disk.length)
    Copier(view, PythonDevice(recorder), chunk=16 * K, order="ram-first").run()
    assert (recorder.begins[0], recorder.lengths[0]) == (40 * K, 2 * K)
    assert bytes(recorder.data) == b"x" * 64 * K and (recorder.count == 1).all()
    engine.close()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_walk_over_64_tib_of_holes_costs_what_is_used(policy, shm_path):
    disk = FileDevice(shm_path / "disk", create_length="64T")
    engine = Engine(disk)
    view = engine.snapshot("s", ram="1M")
    touched = [0, 7 * K, (1 << 40) + 5 * K, (63 << 40), (64 << 40) - K]
    for offset in touched[:4]:
        disk.write(offset, b"x" * K)        # beside the engine: data, of which the first two are preserved below
    for offset in touched[:2] + touched[4:]:
        engine.device.write(offset, b"n" * K)
    writes = []

    class Sink(Device):
        length = disk.length

        def read(self, offset, length):
            return bytes(length)

        def write(self, offset, data):
            writes.append((offset, len(data)))

    copier = Copier(view, PythonDevice(Sink()), chunk=64 * K, order=policy, target_is_zero=True)
    copier.run()
    assert copier.error is None and copier.done == disk.length
    assert {offset for offset, _ in writes} == set(touched[:4])
    assert len(all_rows(Order(view, policy))) < 64
    engine.close()
    disk.close()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("marked", [False, True])
def test_what_a_walk_looks_at_follows_what_is_there_and_not_the_disk(policy, marked, shm_path):
    """A piece in each of 64 pages of the bitmap of what was handed out, of the whole disk or of what a bitmap marks: no page is looked at word by word."""
    disk = FileDevice(shm_path / "disk", create_length="64T")
    engine = Engine(disk)
    engine.bitmaps.add("b", granularity=512)
    touched = [i << 40 for i in range(64)]
    for offset in touched:
        engine.device.write(offset + 5 * K, b"x" * K)
    view = engine.snapshot("s", ram="1M", **({"bitmap": "b"} if marked else {}))
    order = Order(view, policy)
    pieces = []
    while (piece := order.next_piece()) is not None:
        pieces.append(piece)
    for begin in touched:
        assert sum(offset <= begin + 5 * K < offset + length <= offset + 256 * K for offset, length in pieces) == 1
    assert not marked or sum(length for _, length in pieces) == 64 * K
    assert order.stretches <= 64 * 20
    engine.close()
    disk.close()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("chunk", [K, 16 * K])
def test_what_a_bitmap_marks_is_copied_once_and_nothing_else_while_the_guest_writes(policy, chunk, shm_path):
    """The rest of the disk counts as dealt with from the beginning, where the order has more than one class."""
    rng = random.Random(f"{policy} {chunk}")
    length = 700 * K + 99
    disk = MemoryDevice(length)
    disk.write(0, bytes(i // 512 % 255 + 1 for i in range(length)))
    engine = Engine(disk)
    engine.bitmaps.add("b", granularity=K)
    inside = {700, *(rng.randrange(700) for _ in range(150)), *range(300, 380)}
    for cluster in inside:
        engine.device.write(cluster * K, b"m" * min(K, length - cluster * K))
    before = disk.read(0, length)
    view = engine.snapshot("s", bitmap="b", cluster_size=K, ram="256K", spill=str(shm_path), spill_limit="64M")
    lock = threading.Lock()

    def guest(offset):
        with lock:
            engine.device.write(rng.randrange(length - 2 * K), b"n" * rng.randrange(1, 2 * K))

    recorder = Recorder(length, guest)
    copier = Copier(view, PythonDevice(recorder), chunk=chunk, order=policy)
    outside = length - sum(min(K, length - cluster * K) for cluster in inside)
    assert copier.done == (outside if policy != "sequential" else 0)
    run_by_three(copier, 30)
    assert copier.error is None and copier.done == length
    for cluster in range(701):
        at = slice(cluster * K, min((cluster + 1) * K, length))
        assert (recorder.count[at] == (cluster in inside)).all(), cluster
        assert recorder.data[at] == (before[at] if cluster in inside else bytes(at.stop - at.start))
    engine.close()


def test_the_order_of_what_is_no_snapshot_is_sequential():
    disk = MemoryDevice(10 * K + 5)
    rows = all_rows(Order(disk, "hot-first,ram-first"))
    assert rows.tolist() == [(0, 10 * K + 5, 0)]


def test_an_iterator_of_a_closed_snapshot_raises_and_an_ended_one_stays_ended():
    engine = Engine(MemoryDevice(64 * K))
    view = engine.snapshot("s", ram="1M")
    order = Order(view, "ram-first")
    assert len(list(order)) == 1 and list(order) == []
    order = Order(view, "ram-first")
    engine.delete("s")
    with pytest.raises(ValueError, match="closed"):
        next(order)
    engine.close()
