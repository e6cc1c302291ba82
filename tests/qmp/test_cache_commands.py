"""Maps, copy orders, latencies and metrics over QMP: pages that any client can read, and refusals."""

import asyncio
import re

import pytest
from qemu.qmp import QMPClient

from fastcbw.errors import Error

K = 4096


@pytest.fixture
def snapshot(daemon):
    daemon.disks["a"].write(0, b"a" * (1 << 20))
    snapshot = daemon.create_snapshot("s", ["a"], ram="1M", cluster_size="4K")[0]
    for cluster in range(0, 256, 2):
        daemon.disks["a"].write(cluster * K, b"n")
    return snapshot


def test_a_map_has_the_keys_of_qemu_img_and_the_state(remote, snapshot):
    rows = remote.map("a", "s")
    assert rows[0] == {"start": 0, "length": K, "depth": 0, "present": True, "zero": False, "data": True, "state": "ram", "changed": True}
    assert rows[1] == {"start": K, "length": K, "depth": 1, "present": True, "zero": False, "data": True, "state": "active", "changed": False}
    assert len(rows) == 256 and sum(row["length"] for row in rows) == 1 << 20
    live = remote.map("a")
    assert [row["state"] for row in live[:2]] == ["changed", "unchanged"] and "changed" not in live[0]
    assert {row["state"] for row in remote.map("b")} == {"plain"}


def test_pages_join_to_the_whole(remote, snapshot):
    pages, start = [], 0
    while start is not None:
        page = remote.client.execute("fastcbw-map", disk="a", snapshot="s", start=start, limit=100)
        assert len(page["extents"]) <= 100
        pages += page["extents"]
        start = page.get("next")
    assert pages == remote.map("a", "s")
    part = remote.client.execute("fastcbw-map", disk="a", snapshot="s", start=3 * K, length=2 * K)
    assert [row["start"] for row in part["extents"]] == [3 * K, 4 * K] and "next" not in part


def test_an_order_comes_in_pages_with_its_classes(remote, snapshot):
    rows = remote.order("a", "s", "ram-first")
    assert [row["class"] for row in rows] == [0] * 128 + [1] * 128
    assert rows[0] == {"offset": 0, "length": K, "class": 0}
    page = remote.client.execute("fastcbw-order", disk="a", snapshot="s", order="ram-first", limit=128)
    assert page["extents"] == rows[:128]
    rest = remote.client.execute("fastcbw-order", disk="a", snapshot="s", order="ram-first", start=page["next"])
    assert rest["extents"] == rows[128:] and "next" not in rest
    assert sum(row["length"] for row in remote.order("a", "s")) == 1 << 20


@pytest.mark.parametrize("command, arguments, words", [
    ("fastcbw-map", {"disk": "x"}, "disk 'x': not found"),
    ("fastcbw-map", {"disk": "a", "snapshot": "x"}, "snapshot a@x: not found"),
    ("fastcbw-map", {"disk": "a", "start": 1 << 20}, "'start'"),
    ("fastcbw-map", {"disk": "a", "start": -1}, "'start'"),
    ("fastcbw-map", {"disk": "a", "length": 0}, "'length'"),
    ("fastcbw-map", {"disk": "a", "limit": 0}, "'limit'"),
    ("fastcbw-map", {"disk": "a", "limit": 20001}, "'limit'"),
    ("fastcbw-order", {"disk": "a"}, "'snapshot' is missing"),
    ("fastcbw-order", {"disk": "a", "snapshot": "s", "order": "up"}, "order: 'up' is unknown"),
    ("fastcbw-order", {"disk": "a", "snapshot": "s", "start": 1 << 60}, "start: "),
    ("fastcbw-order", {"disk": "a", "snapshot": "s", "limit": -4}, "'limit'"),
])
def test_what_makes_no_sense_is_refused_by_name(remote, snapshot, command, arguments, words):
    with pytest.raises(Error, match=re.escape(words)):
        remote.client.execute(command, **arguments)


def test_a_default_page_fits_the_read_limit_of_an_unmodified_client(daemon, tmp_path):
    """A map of a thousand extents, by a client that accepts lines of 64 KiB: all of its pages arrive."""
    from fastcbw.block.memory import MemoryDevice
    from fastcbw.disk import open as open_disk

    daemon.add_disk(open_disk(MemoryDevice(8 << 20, name="c"), name="c"))
    daemon.disks["c"].write(0, b"c" * (8 << 20))
    daemon.create_snapshot("s", ["c"], ram="8M", cluster_size="4K")
    for cluster in range(0, 2048, 2):
        daemon.disks["c"].write(cluster * K, b"n")

    class Client(QMPClient):
        readbuflen = 64 << 10

    async def session():
        client = Client("test")
        await client.connect(str(tmp_path / "qmp"))
        try:
            for command in ("fastcbw-map", "fastcbw-order"):
                start, rows = 0, 0
                while start is not None:
                    page = await client.execute(command, {"disk": "c", "snapshot": "s", "start": start})
                    rows += len(page["extents"])
                    start = page.get("next")
                assert rows >= (2048 if command == "fastcbw-map" else 1)
        finally:
            await client.disconnect()

    asyncio.run(session())


def test_latencies_are_measured_once_asked_for_and_add_up(daemon, remote, snapshot):
    assert remote.latencies()["a"]["settled"] == []
    for _ in range(10):
        daemon.disks["a"].write(0, b"settled")
    daemon.disks["a"].write(K, b"preserves")
    first = remote.latencies()
    assert sum(count for _, count in first["a"]["settled"]) == 10
    assert sum(count for _, count in first["a"]["preserving"]) == 1
    assert remote.latencies() == first, "sums, for any number of askers"
    assert first["b"]["settled"] == first["b"]["preserving"] == []


def test_metrics_are_text_that_prometheus_reads(daemon, remote, snapshot):
    remote.latencies()
    daemon.disks["a"].write(K, b"preserves")
    text = remote.metrics()
    seen, typed = set(), {}
    for line in text.splitlines():
        if line.startswith("#"):
            _, what, name, rest = line.split(" ", 3)
            assert what in ("HELP", "TYPE") and rest
            if what == "TYPE":
                assert name not in typed, "one TYPE a metric, and its samples together"
                typed[name] = rest
            continue
        sample = re.fullmatch(r'(\w+)(\{(?:\w+="(?:[^"\\]|\\.)*",?)*\})? (\S+)', line)
        assert sample, line
        float(sample[3])
        base = re.sub("_(bucket|sum|count)$", "", sample[1])
        assert typed.get(sample[1]) or typed[base] == "histogram"
        assert (sample[1], sample[2]) not in seen
        seen.add((sample[1], sample[2]))
    assert ("fastcbw_disk_guest_preserving_total", '{disk="a"}') in seen
    assert ("fastcbw_snapshot_ram_bytes", '{disk="a",snapshot="s"}') in seen
    assert 'fastcbw_disk_guest_write_seconds_count{disk="a",kind="preserving"} 1\n' in text
    assert "fastcbw_snapshot_preserved_clusters_total{disk=\"a\",snapshot=\"s\"} 129\n" in text


def test_metrics_say_what_each_feature_saved_in_bytes(daemon, remote):
    disk = daemon.disks["a"]
    disk.write(0, b"a" * (64 * K))          # and zeroes behind it
    snapshot = daemon.create_snapshot("s", ["a"], ram="1M", cluster_size="4K", copy_on_read=True)[0]
    snapshot.read(0, 2 * K)
    disk.read(0, 2 * K)                     # from RAM
    disk.write(0, b"n" * K)                 # found there
    disk.write(100 * K, b"n" * 3 * K)       # zeroes
    disk.discard(20 * K, 8 * K)             # recorded,
    disk.write(20 * K, b"n" * K)            # and some of it cancelled
    snapshot.discard(40 * K, 5 * K)
    text = remote.metrics()
    for sample, size in {'disk_saved_bytes{disk="a",cause="lazy-discard"}': 7 * K, 'disk_saved_bytes{disk="a",cause="ram-reads"}': 2 * K,
                         'snapshot_saved_bytes{disk="a",snapshot="s",cause="zeroes"}': 3 * K,
                         'snapshot_saved_bytes{disk="a",snapshot="s",cause="copy-on-read"}': K,
                         'snapshot_saved_bytes{disk="a",snapshot="s",cause="snapshot-discard"}': 5 * K}.items():
        assert f"fastcbw_{sample} {size}\n" in text, sample


def test_the_table_of_counters_names_everything_that_is_reported(daemon, snapshot):
    """A number that somebody adds to a report belongs into the table, with its unit and its meaning."""
    from fastcbw.qmp.metrics import DISK_METRICS, SNAPSHOT_METRICS

    status = daemon.disks["a"].status()
    for table, report in ((DISK_METRICS, status["guest"]), (SNAPSHOT_METRICS, status["snapshots"]["s"])):
        numbers = {key for key, value in report.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
        assert numbers <= {metric.key for metric in table}
        assert len({metric.name for metric in table}) == len(table) and all(metric.unit and metric.help.endswith(".") for metric in table)
