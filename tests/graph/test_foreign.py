"""Images in other formats, through qemu-nbd."""

import os
import subprocess

import pytest

from fastcbw.errors import Error
from fastcbw.graph.graph import Graph

LENGTH = 4 << 20


@pytest.fixture
def graph():
    graph = Graph()
    yield graph
    graph.close()


def make(tmp_path, format):
    path = str(tmp_path / f"disk.{format}")
    subprocess.run(["qemu-img", "create", "-q", "-f", format, path, str(LENGTH)], check=True, timeout=60)
    return path


def node(path, format, **more):
    return {"driver": format, "node-name": "disk", "file": {"driver": "file", "filename": path}, **more}


def children():
    """Processes that are ours."""
    return {int(pid) for pid in os.listdir("/proc") if pid.isdigit() and parent(pid) == os.getpid()}


def parent(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


@pytest.mark.parametrize("format", ["qcow2", "vmdk", "vdi"])
def test_a_guest_writes_an_image_in_another_format_and_its_snapshot_stays(graph, tmp_path, format):
    path = make(tmp_path, format)
    before = children()
    graph.add([node(path, format), {"driver": "x-fastcbw-memory", "node-name": "store", "size": LENGTH}])
    assert children() - before
    guest = graph.find("disk").guest()
    guest.write(65536, b"old!" * 1024)
    graph.add([{"driver": "copy-before-write", "node-name": "cbw", "file": "disk", "target": "store", "on-cbw-error": "break-snapshot"},
               {"driver": "snapshot-access", "node-name": "snap", "file": "cbw"}])
    guest.write(65536, b"new!" * 1024)
    assert graph.find("snap").device.read(65536, 8) == b"old!old!"
    guest.flush()
    graph.close()
    assert children() == before
    done = subprocess.run(["qemu-io", "-r", "-f", format, "-c", "read -v 65536 16", path], capture_output=True, text=True, timeout=60)
    assert "6e 65 77 21 6e 65 77 21" in done.stdout          # new!new!
    assert subprocess.run(["qemu-img", "check", "-q", "-f", format, path], timeout=60).returncode in (0, 63)     # 63: no check for it


@pytest.mark.parametrize("description, error, words", [
    ({"file": {"driver": "file", "filename": "nowhere.qcow2"}}, FileNotFoundError, "nowhere.qcow2"),
    ({"file": {"driver": "nbd"}}, Error, "Parameter 'file' of driver 'qcow2' expects"),
    ({"file": {"driver": "file", "filename": 7}}, Error, "expects"),
    ({"file": "image"}, Error, "Invalid parameter type for 'file'"),
    ({}, Error, "Parameter 'file' is missing"),
])
def test_a_wrong_description_starts_nothing(graph, description, error, words):
    before = children()
    with pytest.raises(error, match=words):
        graph.add([{"driver": "qcow2", "node-name": "disk", **description}])
    assert children() == before and graph.nodes == {}


def test_what_qemu_nbd_does_not_like_is_told_in_its_words(graph, tmp_path):
    path = tmp_path / "disk.qcow2"
    path.write_bytes(bytes(65536))
    with pytest.raises(Error, match="disk.qcow2: qemu-nbd: .*not in qcow2 format"):
        graph.add([node(str(path), "qcow2")])
    assert graph.nodes == {}


def test_a_machine_without_qemu_nbd_is_told_the_package(graph, tmp_path, monkeypatch):
    path = make(tmp_path, "qcow2")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Error, match="needs qemu-nbd, which is not installed .Debian's package is qemu-utils"):
        graph.add([node(path, "qcow2")])
