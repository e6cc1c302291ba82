"""The graph: descriptions of nodes, all or nothing; permissions and their conflicts; transactions."""

import pytest

from fastcbw.errors import Error, ImageLocked
from fastcbw.graph.graph import Graph
from fastcbw.graph.permissions import GUEST, READER, TARGET

LENGTH = 1 << 20


@pytest.fixture
def graph():
    graph = Graph()
    yield graph
    for node in graph.nodes.values():
        node.parents = [edge for edge in node.parents if hasattr(edge.parent, "kind")]
    graph.close()
    assert graph.nodes == {}


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(b"old!" * (LENGTH // 4))
    return str(path)


def memory(name, size=LENGTH):
    return {"driver": "x-fastcbw-memory", "node-name": name, "size": size}


def cbw(name="cbw", **others):
    return {"driver": "copy-before-write", "node-name": name, "file": "disk", "target": "store", "on-cbw-error": "break-snapshot", **others}


def raw(name, image):
    return {"driver": "raw", "node-name": name, "file": {"driver": "file", "filename": image}}


def test_a_snapshot_below_a_filter_needs_no_helper_node(graph, image):
    graph.add([raw("disk", image), memory("store", 4 * LENGTH), cbw(), {"driver": "snapshot-access", "node-name": "snap", "file": "cbw"}])
    graph.find("cbw").guest().write(0, b"new!")
    assert graph.find("snap").guest().read(0, 8) == b"old!old!"
    assert graph.find("disk").guest().read(0, 8) == b"new!old!"


def test_nodes_may_name_each_other_in_any_order(graph, image):
    asked = graph.add([{"driver": "snapshot-access", "node-name": "snap", "file": "cbw"}, cbw(), memory("store", 4 * LENGTH),
                       raw("disk", image)])
    assert [node.name for node in asked] == ["snap", "cbw", "store", "disk"]


def test_when_one_node_fails_none_is_left(graph, image, tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.img"):
        graph.add([raw("disk", image), memory("store"), cbw(), raw("other", str(tmp_path / "missing.img"))])
    assert graph.nodes == {}
    graph.add([raw("disk", image)])     # and the image is not locked


def test_an_image_in_use_is_refused_by_name(graph, image):
    graph.add([raw("disk", image)])
    with pytest.raises(ImageLocked, match="disk.img"):
        graph.add([raw("again", image)])
    assert "again" not in graph.nodes


@pytest.mark.parametrize("descriptions, words", [
    ([{"node-name": "x"}], "Parameter 'driver' is missing"),
    ([{"driver": "qcow9", "node-name": "x"}], "'driver' does not accept value 'qcow9'"),
    ([{"driver": ["raw"], "node-name": "x"}], "'driver' does not accept value"),
    ([memory("a") | {"colour": 1}], "Parameter 'colour' is unexpected"),
    ([{"driver": "x-fastcbw-memory", "node-name": "a"}], "Parameter 'size' is missing"),
    ([memory("a", "1M")], "Invalid parameter type for 'size', expected: integer"),
    ([memory("a", 0)], "'size' expects a value of at least 1"),
    ([{"driver": "x-fastcbw-memory", "size": 1}], "'node-name' must be specified"),
    ([memory("a b")], "Invalid node-name: 'a b'"),
    ([memory("a"), memory("a")], "Duplicate nodes with node-name='a'"),
    ([{"driver": "raw", "node-name": "a", "file": "b"}], "Cannot find device='' nor node-name='b'"),
    ([{"driver": "raw", "node-name": "a", "file": "b"}, {"driver": "raw", "node-name": "b", "file": "a"}], "is below itself"),
    ([{"driver": "raw", "node-name": "a", "file": 7}], "Invalid parameter type for 'file'"),
    ([{"driver": "raw", "node-name": "a"}], "Parameter 'file' is missing"),
    (["a"], "expected: object, got str"),
    ([{"driver": "snapshot-access", "node-name": "s", "file": memory("a")}], "has no snapshot to show"),
])
def test_a_wrong_description_is_one_error_and_changes_nothing(graph, descriptions, words):
    with pytest.raises(Error, match=words):
        graph.add(descriptions)
    assert graph.nodes == {}


def test_a_description_nested_too_deep_is_refused(graph):
    description = memory("bottom")
    for i in range(100):
        description = {"driver": "raw", "node-name": f"n{i}", "file": description}
    with pytest.raises(Error, match="too large"):
        graph.add([description])
    assert graph.nodes == {}


def test_a_conflict_names_both_parents_the_node_and_the_permission(graph, image):
    graph.add([raw("disk", image), memory("store")])
    export = graph.attach("export 'vm'", [(graph.find("disk"), "root", "source", GUEST)])
    with pytest.raises(Error, match=r"export 'vm' needs 'write' on node 'disk' as 'root': conflicts with use by node 'cbw' as 'file'"):
        graph.add([cbw()])
    assert set(graph.nodes) == {"disk", "disk.file", "store"}
    assert graph.find("store").parents == []
    graph.detach(export)
    graph.add([cbw()])


def test_a_target_being_written_is_nobody_elses(graph):
    graph.add([memory("a"), memory("b")])
    job = graph.attach("job 'j'", [(graph.find("a"), "source", "source", READER), (graph.find("b"), "target", "target", TARGET)])
    with pytest.raises(Error, match="export 'e' needs 'consistent-read' on node 'b'"):
        graph.attach("export 'e'", [(graph.find("b"), "root", "source", READER)])
    assert len(graph.find("b").parents) == 1
    graph.detach(job)
    graph.attach("export 'e'", [(graph.find("b"), "root", "source", READER)])


def test_needs_reach_the_bottom_through_filters(graph, image):
    graph.add([raw("disk", image)])
    graph.attach("export 'vm'", [(graph.find("disk"), "root", "source", GUEST)])
    (node,) = [node for node in graph.describe() if node["driver"] == "raw"]
    assert node["children"] == [{"name": "file", "node": "disk.file", "role": "filtered", "taken": ["consistent-read", "write"],
                                 "shared": ["consistent-read", "write", "write-unchanged", "resize"]}]


def test_a_node_in_use_is_not_removed_and_one_inside_another_goes_with_it(graph, image):
    graph.add([raw("disk", image), memory("store", 4 * LENGTH), cbw()])
    with pytest.raises(Error, match="Node disk is in use: by node 'cbw'"):
        graph.remove("disk")
    with pytest.raises(Error, match="Node disk.file is not owned by the monitor"):
        graph.remove("disk.file")
    with pytest.raises(Error, match="Failed to find node with node-name='no'"):
        graph.remove("no")
    for name in ("cbw", "disk", "store"):
        graph.remove(name)
    assert graph.nodes == {}


def test_a_node_whose_disk_has_a_snapshot_is_not_removed(graph):
    graph.add([memory("a")])
    snapshot = graph.find("a").disk().snapshot("s")
    with pytest.raises(Error, match="Node a is in use: its disk has the snapshot s"):
        graph.remove("a")
    snapshot.close()
    graph.remove("a")


def test_a_transaction_puts_the_filter_above_a_disk_in_use(graph, image):
    """Apart, the node conflicts with the guest below it; together with the guest's move it does not."""
    graph.add([raw("disk", image), memory("store", 4 * LENGTH)])
    export = graph.attach("export 'vm'", [(graph.find("disk"), "root", "source", GUEST)])
    device = graph.find("disk").guest()
    with graph.transaction():
        graph.add([cbw()])
        graph.move(export, graph.find("cbw"))
    assert graph.find("cbw").guest() is device      # the guest did not notice
    with graph.transaction():
        graph.remove("cbw")
        graph.move(export, graph.find("disk"))
    assert "cbw" not in graph.nodes and graph.find("disk").guest() is device


def test_a_transaction_that_fails_at_its_end_leaves_everything_as_it_was(graph, image):
    graph.add([raw("disk", image), memory("store", 4 * LENGTH)])
    graph.attach("export 'vm'", [(graph.find("disk"), "root", "source", GUEST)])
    before = graph.describe()
    with pytest.raises(Error, match="which does not allow 'write'"), graph.transaction():
        graph.add([memory("more"), cbw()])
    with pytest.raises(Error, match="Node disk is in use"), graph.transaction():
        graph.remove("store")
        graph.remove("disk")
    with pytest.raises(RuntimeError), graph.transaction():
        graph.add([memory("more")])
        graph.remove("store")
        raise RuntimeError
    assert graph.describe() == before
    assert not graph.find("disk").disk().snapshots


def test_replace_stays_within_one_disk(graph, image):
    graph.add([raw("disk", image), memory("other")])
    export = graph.attach("export 'vm'", [(graph.find("disk"), "root", "source", GUEST)])
    with pytest.raises(Error, match="uses nothing that node 'other' shows"):
        graph.move(export, graph.find("other"))
    assert [edge.parent for edge in graph.find("disk").parents] == [export]


def test_a_read_only_node_is_not_written_through_another(graph, image):
    graph.add([{"driver": "raw", "node-name": "disk", "file": {"driver": "file", "filename": image, "read-only": True}}])
    assert graph.find("disk").read_only
    with pytest.raises(Error, match="node 'disk.file' is read-only: node 'disk' needs 'write' on it"):
        graph.attach("export 'vm'", [(graph.find("disk"), "root", "source", GUEST)])


def test_another_format_is_never_raw(graph, tmp_path):
    from fastcbw.errors import FormatRefused

    path = tmp_path / "disk.qcow2"
    path.write_bytes(b"QFI\xfb\0\0\0\3" + bytes(65536))
    with pytest.raises(FormatRefused, match="qcow2"):
        graph.add([raw("disk", str(path))])
    assert graph.nodes == {}
