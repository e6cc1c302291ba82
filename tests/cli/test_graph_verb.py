"""graph and serve --config."""

import json

import pytest

from fastcbw.export.nbd.client import Client

CONFIG = {
    "nodes": [
        {"driver": "snapshot-access", "node-name": "snap", "file": "cbw"},
        {"driver": "copy-before-write", "node-name": "cbw", "target": "store", "on-cbw-error": "break-snapshot",
         "file": {"driver": "raw", "node-name": "disk", "file": {"driver": "file", "node-name": "image", "filename": "vm.img"}}},
        {"driver": "x-fastcbw-memory", "node-name": "store", "size": 8 << 20},
    ],
    "exports": [{"id": "guest", "node-name": "cbw", "name": "vm", "writable": True}, {"id": "reader", "node-name": "snap"}],
}


@pytest.fixture
def config(tmp_path, image):
    (tmp_path / "graph.json").write_text(json.dumps(CONFIG))
    return tmp_path / "graph.json"


def test_a_graph_from_a_file_is_served_and_shown(serve, run, config, image, tmp_path):
    before = image.read_bytes()
    served = serve("--config", config, "--socket", "nbd")
    with Client(tmp_path / "nbd", "vm") as guest, Client(tmp_path / "nbd", "snap") as reader:
        guest.write(0, b"n" * 4096)
        assert reader.read(0, 4096) == before[:4096]
    shown = run("graph", "--qmp", "nbd.qmp")
    assert shown.stdout.splitlines() == [
        "export 'reader'", "└─ source: snap (snapshot-access, 4M, read-only)", "   └─ source: cbw (copy-before-write, 4M)",
        "      ├─ filtered: disk (raw, 4M)", "      │  └─ filtered: image (file, 4M)", "      └─ store: store (x-fastcbw-memory, 8M)",
        "export 'guest'", "└─ source: cbw (copy-before-write, 4M)", "   ├─ filtered: disk (raw, 4M)", "   │  └─ filtered: image (file, 4M)",
        "   └─ store: store (x-fastcbw-memory, 8M)"]
    nodes = {node["node"]: node for node in json.loads(run("graph", "--json", "--qmp", "nbd.qmp").stdout)}
    assert {edge["role"] for edge in nodes["cbw"]["children"]} == {"filtered", "store"}
    assert '"cbw" -> "disk" [label="filtered"];' in run("graph", "--dot", "--qmp", "nbd.qmp").stdout
    del served


def test_the_uris_of_the_exports_of_a_file_are_printed(serve, config, tmp_path):
    assert serve("--config", config, "--socket", "nbd").lines == [f"nbd+unix:///{name}?socket={tmp_path}/nbd" for name in ("vm", "snap")]


@pytest.mark.parametrize("content, status, words", [
    ("{", 2, "--config: graph.json: is no JSON"),
    ("[]", 2, "expected an object with exports and nodes"),
    ('{"disks": []}', 2, "expected an object with exports and nodes"),
    ('{"nodes": [7]}', 2, "nodes: expected a list of objects"),
    ('{"nodes": [{"driver": "raw", "node-name": "a", "file": "b"}]}', 1, "Cannot find device='' nor node-name='b'"),
    ('{"exports": [{"id": "e"}]}', 1, "Parameter 'node-name' is missing"),
])
def test_a_wrong_file_is_one_line(run, tmp_path, content, status, words):
    (tmp_path / "graph.json").write_text(content)
    done = run("serve", "--config", "graph.json", "--socket", "nbd")
    assert (done.returncode, done.stderr.count("\n")) == (status, 1) and words in done.stderr
    assert not (tmp_path / "nbd").exists()


def test_the_verbs_name_what_there_is_in_place_of_a_wrong_name(serve, run, tmp_path, image):
    nodes = [CONFIG["nodes"][0], CONFIG["nodes"][1] | {"file": {"driver": "raw", "file": {"driver": "file", "filename": "vm.img"}}}, CONFIG["nodes"][2]]
    (tmp_path / "graph.json").write_text(json.dumps(CONFIG | {"nodes": nodes}))
    served = serve("--config", "graph.json", "--socket", "nbd")
    assert "disk 'vm': not found (disks here: store, cbw)" in run("map", "vm", "--qmp", "nbd.qmp").stderr
    assert "node 'snap': shows a snapshot, no live disk (as DISK@SNAP it is cbw@cbw)" in run("backup", "snap", "out.img", "--qmp", "nbd.qmp").stderr
    assert run("backup", "cbw@cbw", "out.img", "--qmp", "nbd.qmp").returncode == 0
    assert (tmp_path / "out.img").read_bytes() == image.read_bytes()
    assert "cbw.file.file@cbw" in run("status", "--qmp", "nbd.qmp").stdout      # named by its place, as nobody named it
    del served


def test_dot_and_json_together_are_refused(served, run):
    done = run("graph", "--dot", "--json", "--qmp", "nbd.qmp")
    assert done.returncode == 2 and "--dot: not together with --json" in done.stderr
