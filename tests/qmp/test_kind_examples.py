"""The examples on the pages of the kinds work as they stand there, but for addresses and paths of other machines."""

import json
import pathlib
import re
import subprocess

import pytest

from fastcbw.block.memory import MemoryDevice
from fastcbw.export.nbd.server import Server
from fastcbw.graph.kinds import KINDS

PAGES = pathlib.Path(__file__).resolve().parents[2] / "docs" / "kinds"
LENGTH = 1 << 20
EXAMPLES = [pytest.param(json.loads(text), id=f"{page.stem}-{number}")
            for page in sorted(PAGES.glob("*.md")) for number, text in enumerate(re.findall(r"```json\n(.*?)```", page.read_text(), re.DOTALL))]


@pytest.fixture
def execute(remote, tmp_path, monkeypatch):
    """Commands of a daemon in a folder with the files that examples name, and an NBD server with an export `backup`."""
    monkeypatch.chdir(tmp_path)
    for name in ("vm.img", "temp.img", "backup.img"):
        (tmp_path / name).write_bytes(bytes(LENGTH))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "vm.qcow2", "1M"], check=True, timeout=60)
    with Server() as server:
        server.listen_unix(str(tmp_path / "far"))
        server.add_export("backup", MemoryDevice(LENGTH))
        yield lambda command, arguments: remote.client.execute(command, **arguments)
        for row in remote.client.execute("fastcbw-graph"):      # before the server ends
            if row["driver"] == "nbd":
                remote.client.execute("blockdev-del", node_name=row["node"])


def memory(execute, name):
    execute("blockdev-add", {"driver": "x-fastcbw-memory", "node-name": name, "size": LENGTH})


def add_children(execute, description):
    for child in KINDS[description["driver"]].children:
        match description[child]:
            case "cbw":
                memory(execute, "disk")
                memory(execute, "temp")
                execute("blockdev-add", {"driver": "copy-before-write", "node-name": "cbw", "file": "disk", "target": "temp"})
            case str(name):
                memory(execute, name)


@pytest.mark.parametrize("example", [example for example in EXAMPLES if "driver" in example.values[0]])
def test_the_example_of_a_node(execute, tmp_path, example):
    add_children(execute, example)
    if example["driver"] == "nbd":
        example = example | {"server": {"type": "unix", "path": str(tmp_path / "far")}}
    if "filename" in example:
        example = example | {"filename": pathlib.Path(example["filename"]).name}
    execute("blockdev-add", example)
    (node,) = [row for row in execute("fastcbw-graph", {}) if row["node"] == example["node-name"]]
    assert node["driver"] == example["driver"] and node["length"] > 0


@pytest.mark.parametrize("example", [example for example in EXAMPLES if "execute" in example.values[0]])
def test_the_example_of_a_backup_into_the_store(daemon, execute, tmp_path, example):
    memory(execute, "disk")
    daemon.nodes.graph.find("disk").device.write(0, b"content!" * (LENGTH // 8))
    execute("block-export-add", {"type": "nbd", "id": "guest", "node-name": "disk", "name": "guest", "writable": True})
    execute(example["execute"], example["arguments"])
    while execute("query-jobs", {}):
        pass
    assert (tmp_path / "backup.img").read_bytes() == b"content!" * (LENGTH // 8)


def test_every_page_has_an_example():
    assert {page.stem for page in PAGES.glob("*.md")} - {"README"} == {example.id.rsplit("-", 1)[0] for example in EXAMPLES}
