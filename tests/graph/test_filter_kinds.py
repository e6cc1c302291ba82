"""Nodes that are filters with a device of their own: throttle, fault, delay, the write notifier."""

import errno

import pytest

from fastcbw.block.throttle import ThrottleDevice
from fastcbw.errors import Error
from fastcbw.graph.graph import Graph
from fastcbw.graph.permissions import GUEST

LENGTH = 1 << 20


@pytest.fixture
def graph():
    graph = Graph()
    yield graph
    for node in graph.nodes.values():
        node.parents = [edge for edge in node.parents if hasattr(edge.parent, "kind")]
    graph.close()
    assert graph.nodes == {}


def memory(name, size=LENGTH):
    return {"driver": "x-fastcbw-memory", "node-name": name, "size": size}


FILTERS = {
    "throttle": {"limits": {"bps-total": 1 << 30, "iops-write": 1_000_000, "iops-size": 4096}},
    "x-fastcbw-fault": {"rules": []},
    "x-fastcbw-delay": {"read-ms": 1},
    "x-fastcbw-cache": {"size": 1 << 20},
    "copy-on-read": {},
}


def filter_node(driver, **more):
    return {"driver": driver, "node-name": "filter", "file": "disk", **FILTERS[driver], **more}


@pytest.mark.parametrize("driver", FILTERS)
def test_what_is_written_through_a_filter_is_on_its_child_and_stays_when_it_goes(graph, driver):
    graph.add([memory("disk"), filter_node(driver)])
    graph.find("filter").guest().write(4096, b"data" * 1024)
    graph.find("filter").guest().flush()
    assert graph.find("disk").guest().read(4096, 8) == b"datadata"
    graph.remove("filter")
    assert graph.find("disk").guest().read(4096, 8) == b"datadata"


@pytest.mark.parametrize("driver", FILTERS)
def test_a_filter_above_a_disk_keeps_its_bitmaps_and_its_snapshots(graph, driver):
    """A write that enters above is a write of the disk below: its bitmaps mark it, its snapshots keep what was there."""
    graph.add([memory("disk"), memory("store", 4 * LENGTH), filter_node(driver)])
    bitmap = graph.find("disk").disk().add_bitmap("b")
    snapshot = graph.find("disk").disk().snapshot("s")
    graph.find("filter").guest().write(65536, b"new!")
    graph.find("filter").guest().flush()
    assert bitmap.extents().tolist() == [(65536, 65536)]
    assert snapshot.read(65536, 4) == bytes(4)
    snapshot.close()


def test_a_filter_above_a_copy_before_write_node_passes_it(graph):
    graph.add([memory("disk"), memory("store", 4 * LENGTH),
               {"driver": "copy-before-write", "node-name": "cbw", "file": "disk", "target": "store"},
               {"driver": "snapshot-access", "node-name": "snap", "file": "cbw"},
               {"driver": "throttle", "node-name": "slow", "file": "cbw", "limits": {"bps-total": 1 << 30}}])
    graph.find("slow").guest().write(0, b"new!")
    assert graph.find("snap").device.read(0, 4) == bytes(4) and graph.find("disk").guest().read(0, 4) == b"new!"


def test_a_snapshot_can_be_read_through_a_filter(graph):
    graph.add([memory("disk"), memory("store", 4 * LENGTH),
               {"driver": "copy-before-write", "node-name": "cbw", "file": "disk", "target": "store"},
               {"driver": "snapshot-access", "node-name": "snap", "file": "cbw"},
               {"driver": "throttle", "node-name": "slow", "file": "snap", "limits": {"bps-read": 1 << 30}}])
    graph.find("cbw").guest().write(0, b"new!")
    assert graph.find("slow").read_only and graph.find("slow").device.read(0, 4) == bytes(4)
    with pytest.raises(Error, match="Node cbw is in use: by node 'snap'"):
        graph.remove("cbw")


@pytest.mark.parametrize("limits, words", [
    ({"bps": 1}, "Parameter 'limits.bps' is unexpected"),
    ({"bps-total": "1M"}, "Parameter 'limits': bps_total: expected an int"),
    ({"bps-total": 1, "bps-read": 1}, "a total and one of its parts"),
    (7, "Invalid parameter type for 'limits', expected: object"),
])
def test_wrong_limits_are_refused(graph, limits, words):
    with pytest.raises(Error, match=words):
        graph.add([memory("disk"), filter_node("throttle", limits=limits)])
    assert graph.nodes == {}


def test_qemus_groups_do_not_exist(graph):
    with pytest.raises(Error, match="Parameter 'throttle-group' is unexpected"):
        graph.add([memory("disk"), filter_node("throttle") | {"throttle-group": "g"}])


def test_rules_fail_what_they_name(graph):
    graph.add([memory("disk"), filter_node("x-fastcbw-fault", rules=[
        {"operation": "write", "errno": "ENOSPC", "after-bytes": 8192},
        {"operation": "read", "offset": 65536, "length": 4096, "count": 1},
        {"operation": "flush", "errno": "none", "stall-ms": 1},
    ])])
    guest = graph.find("filter").guest()
    guest.write(0, bytes(4096))
    guest.write(0, bytes(4096))
    with pytest.raises(OSError, match="No space left") as caught:
        guest.write(0, b"x")
    assert caught.value.errno == errno.ENOSPC
    guest.read(0, 65536)
    with pytest.raises(OSError, match="Input/output error"):
        guest.read(65536 + 4095, 1)
    guest.read(65536, 1)
    guest.flush()


@pytest.mark.parametrize("rules, words", [
    ([7], "expected: array of objects"),
    ([{}], r"Parameter 'rules\[0\].operation' is missing"),
    ([{"operation": "write"}, {"operation": "move"}], "does not accept value 'move'"),
    ([{"operation": "write", "errno": "EWHAT"}], r"'rules\[0\].errno' does not accept value 'EWHAT'"),
    ([{"operation": "write", "errno": "none"}], "is no error number"),
    ([{"operation": "write", "offset": LENGTH, "length": 1}], "is not within the device"),
    ([{"operation": "write", "colour": 1}], r"'rules\[0\].colour' is unexpected"),
    ([{"operation": "write", "stall-ms": 10**9}], "stall_ms"),
    ([{"operation": "write"}] * 17, "has 17 rules .at most 16"),
])
def test_wrong_rules_are_refused(graph, rules, words):
    with pytest.raises(Error, match=words):
        graph.add([memory("disk"), filter_node("x-fastcbw-fault", rules=rules)])
    assert graph.nodes == {}


def notifier(**more):
    return {"driver": "x-fastcbw-write-notifier", "node-name": "old", "file": "disk", "target": "backup", **more}


def test_a_write_notifier_copies_to_its_target(graph):
    graph.add([memory("disk"), memory("backup"), notifier(**{"cluster-size": 4096})])
    graph.find("old").guest().write(0, b"old!")
    graph.find("old").device.begin()
    graph.find("old").guest().write(0, b"new!")
    assert graph.find("backup").device.read(0, 4) == b"old!"


def test_nobody_writes_below_a_write_notifier_or_into_its_target(graph):
    graph.add([memory("disk"), memory("backup"), notifier()])
    for name in ("disk", "backup"):
        with pytest.raises(Error, match=f"needs '.*write' on node '{name}' as 'root': conflicts with use by node 'old'"):
            graph.attach("export 'e'", [(graph.find(name), "root", "source", GUEST)])
    graph.attach("export 'e'", [(graph.find("old"), "root", "source", GUEST)])


@pytest.mark.parametrize("more, words", [
    ({"cluster-size": 5000}, "no power of two"),
    ({"on-cbw-error": "panic"}, "does not accept value 'panic'"),
    ({"target": memory("small", 4096)}, "4096 bytes are less than"),
    ({"target": "disk"}, "conflicts with use by node 'old'"),
])
def test_a_wrong_write_notifier_is_refused(graph, more, words):
    with pytest.raises(Error, match=words):
        graph.add([memory("disk"), memory("backup"), notifier(**more)])
    assert graph.nodes == {}


def test_a_throttled_device_is_what_the_node_has(graph):
    graph.add([memory("disk"), filter_node("throttle")])
    assert isinstance(graph.find("filter").device, ThrottleDevice)
    assert graph.find("filter").device.limits == {"bps_total": 1 << 30, "iops_write": 1_000_000, "iops_size": 4096}


def test_a_cache_keeps_writes_back_until_it_goes(graph):
    graph.add([memory("disk"), filter_node("x-fastcbw-cache")])
    graph.find("filter").guest().write(0, b"data" * 1024)
    assert graph.find("disk").guest().read(0, 4) == bytes(4) and graph.find("filter").guest().read(0, 4) == b"data"
    graph.remove("filter")
    assert graph.find("disk").guest().read(0, 4096) == b"data" * 1024


@pytest.mark.parametrize("together", [False, True])
def test_a_cache_that_cannot_be_written_back_stays(graph, together):
    rule = {"operation": "write", "errno": "ENOSPC", "count": 1}
    graph.add([memory("disk"), {"driver": "x-fastcbw-fault", "node-name": "bad", "file": "disk", "rules": [rule]},
               filter_node("x-fastcbw-cache", file="bad")])
    graph.find("filter").guest().write(0, b"data" * 1024)
    with pytest.raises(OSError, match="No space left"):
        if together:
            with graph.transaction():
                graph.remove("filter")
        else:
            graph.remove("filter")
    assert graph.find("filter").guest().read(0, 4) == b"data"
    graph.remove("filter")
    assert graph.find("disk").guest().read(0, 4096) == b"data" * 1024


def test_copy_on_read_reads_the_source_once_and_leaves_it_as_it_is(graph):
    graph.add([memory("disk"), {"driver": "x-fastcbw-fault", "node-name": "once", "file": "disk",
                                "rules": [{"operation": "read", "after": 1}]}, filter_node("copy-on-read", file="once")])
    for _ in range(3):
        assert graph.find("filter").guest().read(4096, 8192) == bytes(8192)
    assert graph.find("filter").device.counters() == {"hit": 16384, "read": 8192, "written_back": 0, "dirty": 0, "used": 8192}


def test_a_cache_is_the_store_of_a_copy_before_write_node(graph):
    """Old data beyond the RAM tier goes to a slow device, through a cache that takes it at once."""
    graph.add([memory("disk"), memory("temp", 4 * LENGTH), {"driver": "x-fastcbw-cache", "node-name": "store", "file": "temp", "size": 1 << 20},
               {"driver": "copy-before-write", "node-name": "cbw", "file": "disk", "target": "store", "ram": 0},
               {"driver": "snapshot-access", "node-name": "snap", "file": "cbw"}])
    guest = graph.find("cbw").guest()
    guest.write(0, b"new!" * (LENGTH // 4))
    assert graph.find("snap").device.read(0, LENGTH) == bytes(LENGTH) and guest.read(0, 4) == b"new!"
    with pytest.raises(Error, match="Node store is in use: by node 'cbw'"):
        graph.remove("store")


@pytest.mark.parametrize("more, words", [
    ({"size": 4096}, "'size' expects a value of at least 1048576"),
    ({"size": 1 << 41}, "'size' expects a value of at most"),
    ({"size": "1M"}, "expected: integer"),
    ({"mode": "none"}, "'mode' does not accept value 'none'"),
])
def test_a_wrong_cache_is_refused(graph, more, words):
    with pytest.raises(Error, match=words):
        graph.add([memory("disk"), filter_node("x-fastcbw-cache", **more)])
    assert graph.nodes == {}


def test_a_delay_of_hours_is_refused(graph):
    with pytest.raises(Error, match="'read-ms' expects a value of at most 60000"):
        graph.add([memory("disk"), filter_node("x-fastcbw-delay", **{"read-ms": 60001})])
    assert graph.nodes == {}
