"""A cache over a temporary qcow2 image backed by the active disk, as the store of a copy-before-write node: what QEMU's users have as target."""

import subprocess

import pytest

from fastcbw.export.nbd.client import Client

LENGTH = 1 << 20


@pytest.mark.parametrize("layout", ["log", "in-place"])
def test_a_cache_over_a_temporary_image_backed_by_the_active_disk_is_a_store(daemon, remote, tmp_path, layout):
    execute = remote.client.execute
    (tmp_path / "vm.img").write_bytes(b"old!" * (LENGTH // 4))
    execute("blockdev-add", driver="file", node_name="disk", filename=str(tmp_path / "vm.img"))
    execute("block-export-add", type="nbd", id="vm", node_name="disk", name="vm", writable=True)
    length = LENGTH if layout == "in-place" else 2 * LENGTH
    subprocess.run(["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", tmp_path / "vm.img", "-F", "raw", tmp_path / "temp.qcow2", str(length)], check=True)
    store = {"driver": "x-fastcbw-cache", "node-name": "store", "size": LENGTH,
             "file": {"driver": "qcow2", "file": {"driver": "file", "filename": str(tmp_path / "temp.qcow2")}}}
    cbw = {"driver": "copy-before-write", "node-name": "cbw", "file": "disk", "target": "store", "ram": 0, "layout": layout}
    execute("transaction", actions=[
        {"type": "blockdev-add", "data": store}, {"type": "blockdev-add", "data": cbw},
        {"type": "blockdev-add", "data": {"driver": "snapshot-access", "node-name": "snap", "file": "cbw"}},
        {"type": "fastcbw-replace", "data": {"parent": "vm", "node": "cbw"}},
        {"type": "block-export-add", "data": {"type": "nbd", "id": "snap", "node-name": "snap"}}])
    with Client(tmp_path / "nbd", "vm") as guest:
        guest.write(65536, b"new!" * 65536)
        guest.flush()
    with Client(tmp_path / "nbd", "snap") as snap:
        assert snap.read(0, LENGTH) == b"old!" * (LENGTH // 4)
    execute("block-export-del", id="snap")
    execute("transaction", actions=[{"type": "fastcbw-replace", "data": {"parent": "vm", "node": "disk"}},
                                    *({"type": "blockdev-del", "data": {"node-name": name}} for name in ("snap", "cbw", "store"))])
