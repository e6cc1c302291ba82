"""A copy-before-write node whose store is the backup's target: who may write there, and how it ends."""

import os
import subprocess
import threading
from contextlib import ExitStack

import numpy as np
import pytest

from fastcbw.block.delay import DelayDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.errors import Error
from fastcbw.export.nbd.client import Client
from fastcbw.qmp.daemon import Daemon
from fastcbw.qmp.remote import connect

K = 1 << 10
M = 1 << 20
LENGTH = 1 << 20


@pytest.fixture
def execute(remote):
    execute = remote.client.execute
    execute("blockdev-add", driver="x-fastcbw-memory", node_name="target", size=LENGTH)
    return execute


def insert(execute, disk="a", **options):
    """The filter above a disk in use, and its snapshot, as one."""
    cbw = {"driver": "copy-before-write", "node-name": "cbw", "file": disk, "target": "target", "ram": 0, "layout": "in-place", **options}
    execute("transaction", actions=[{"type": "blockdev-add", "data": cbw},
                                    {"type": "blockdev-add", "data": {"driver": "snapshot-access", "node-name": "snap", "file": "cbw"}},
                                    {"type": "fastcbw-replace", "data": {"parent": disk, "node": "cbw"}}])


def backup(execute, job="j", device="snap", target="target", **options):
    execute("blockdev-backup", job_id=job, device=device, target=target, sync="full", auto_dismiss=False, **options)


def put(daemon, device):
    """Have DEVICE be the target, instead of plain memory."""
    node = daemon.nodes.graph.find("target")
    node.device.close()
    node.device = device
    return device


def ended(daemon, job="j"):
    record = daemon.jobs.find(job)
    record.thread.join(30)
    return record.outcome


def test_the_backup_of_the_snapshot_goes_to_the_store(daemon, execute):
    disk, target = daemon.disks["a"], daemon.nodes.graph.find("target")
    before = disk.read(0, LENGTH)
    insert(execute)
    disk.write(0, b"new!" * K)
    assert target.device.read(0, 4 * K) == before[: 4 * K]
    backup(execute)
    assert ended(daemon) == "completed" and daemon.jobs.find("j").job.result["landed_bytes"] == 64 * K
    assert target.device.read(0, LENGTH) == before
    roles = {(edge["parent"], edge["role"]) for node in execute("fastcbw-graph") if node["node"] == "target" for edge in node["parents"]}
    assert roles == {("node 'cbw'", "store")}


def test_of_all_who_want_to_write_there_only_that_job_may(daemon, execute):
    slow = put(daemon, DelayDevice(MemoryDevice(LENGTH, name="slow")))
    insert(execute)
    refused = "node 'cbw' needs 'write' on node 'target' as 'target': conflicts with use by {} as '{}', which does not allow 'write' on it"
    with pytest.raises(Error, match=refused.format("job 'j'", "target")):
        backup(execute, device="b")
    with pytest.raises(Error, match=refused.format("job 'j'", "target")):
        backup(execute, device="a")         # the live disk, by a snapshot of its own
    with pytest.raises(Error, match="export 'e' needs 'consistent-read, write' on node 'target' as 'root': conflicts with use by node 'cbw'"):
        execute("block-export-add", type="nbd", id="e", node_name="target", writable=True)
    execute("blockdev-add", driver="x-fastcbw-memory", node_name="other-disk", size=LENGTH)
    with pytest.raises(Error, match=refused.format("node 'second'", "target")):
        execute("blockdev-add", driver="copy-before-write", node_name="second", file="other-disk", target="target", layout="in-place")
    with slow.hold("write", 0, LENGTH) as gate:
        backup(execute)
        gate.wait_arrived()
        with pytest.raises(Error, match="job '(j|again)' needs 'write' on node 'target' as 'target': conflicts with use by job '(j|again)'"):
            backup(execute, job="again")
        with pytest.raises(Error, match="node 'cbw': job 'j' copies to its target what is not there yet"):
            execute("blockdev-add", driver="x-fastcbw-memory", node_name="other", size=LENGTH)
            execute("fastcbw-replace", parent="cbw", child="target", node="other")
        gate.open()
    assert ended(daemon) == "completed"


def test_a_log_is_nobodys_target(daemon, execute):
    insert(execute, layout="log")
    with pytest.raises(Error, match="node 'cbw' needs 'write' on node 'target' as 'target': conflicts with use by job 'j'"):
        backup(execute)


@pytest.mark.parametrize("options, words", [
    ({"layout": "heap"}, "Parameter 'layout' does not accept value 'heap' .there is log, in-place."),
    ({"target": "small"}, "node 'small': its 4096 bytes are less than the 1048576 of node 'a', whose clusters are to lie at their own offsets"),
])
def test_what_makes_no_sense_is_refused(execute, options, words):
    execute("blockdev-add", driver="x-fastcbw-memory", node_name="small", size=4 * K)
    before = execute("fastcbw-graph")
    with pytest.raises(Error, match=words):
        insert(execute, **options)
    assert execute("fastcbw-graph") == before


def test_what_is_copied_is_dropped_with_discard_source(daemon, execute):
    disk = daemon.disks["a"]
    before = disk.read(0, LENGTH)
    insert(execute, ram=1 * M)
    disk.write(0, b"new!" * K)
    backup(execute, **{"discard-source": True})
    assert ended(daemon) == "completed" and daemon.nodes.graph.find("target").device.read(0, LENGTH) == before
    disk.write(64 * K, b"new!" * 64 * K)
    status = daemon.nodes.graph.find("cbw").snapshot.status()
    assert status["preserved_clusters"] == 1 and status["ram_bytes"] == 0         # the guest's first writes cost nothing any more
    with pytest.raises(Error, match="Parameter 'discard-source': node 'b' is a live disk"):
        backup(execute, job="k", device="b", **{"discard-source": True})


def test_the_node_stays_while_a_write_of_old_data_hangs(daemon, execute, monkeypatch):
    monkeypatch.setattr("fastcbw.graph.kinds.copy_before_write.HOLD_SECONDS", 0.05)
    slow = put(daemon, DelayDevice(MemoryDevice(LENGTH, name="slow")))
    insert(execute, **{"cbw-timeout": 1, "on-cbw-error": "break-snapshot"})
    with slow.hold("write", 0, 64 * K) as gate:
        daemon.disks["a"].write(0, b"new")          # goes on after a second
        take_out = [{"type": "fastcbw-replace", "data": {"parent": "a", "node": "a"}},
                    *({"type": "blockdev-del", "data": {"node-name": name}} for name in ("snap", "cbw", "target"))]
        before = execute("fastcbw-graph")
        with pytest.raises(Error, match="node 'cbw': a write of old data to node 'target' is under way"):
            execute("transaction", actions=take_out)
        assert execute("fastcbw-graph") == before
        gate.open()
    monkeypatch.undo()
    execute("transaction", actions=take_out)


@pytest.mark.parametrize("together", [False, True])
def test_a_store_that_an_older_snapshot_has_come_to_need_stays(daemon, execute, tmp_path, together):
    """Old data is in the newest snapshot's store, and the word for it is the older one's when that ends."""
    for name in ("disk", "t1", "t2"):
        (tmp_path / name).write_bytes(bytes(2 * LENGTH))
        execute("blockdev-add", driver="file", node_name=name, filename=str(tmp_path / name))
    execute("block-export-add", type="nbd", id="vm", node_name="disk", name="vm", writable=True)
    move = {number: {"type": "fastcbw-replace", "data": {"parent": "vm", "node": node}} for number, node in enumerate(("disk", "cbw1", "cbw2"))}
    go = {number: [{"type": "blockdev-del", "data": {"node-name": f"{name}{number}"}} for name in ("cbw", "t")] for number in (1, 2)}
    with Client(tmp_path / "nbd", "vm") as guest:
        guest.write(0, b"old!" * 64 * K)
        for number, below in ((1, "disk"), (2, "cbw1")):
            cbw = {"driver": "copy-before-write", "node-name": f"cbw{number}", "file": below, "target": f"t{number}", "ram": 0}
            execute("transaction", actions=[{"type": "blockdev-add", "data": cbw}, move[number]])
        execute("blockdev-add", driver="snapshot-access", node_name="snap", file="cbw1")
        guest.write(0, b"new!" * 64 * K)
        before = execute("fastcbw-graph")
        with pytest.raises(Error, match="node 'cbw2': its node 't2' holds what the older snapshot cbw1 needs"):
            execute("transaction", actions=[move[1], *go[2]])
        assert execute("fastcbw-graph") == before and daemon.nodes.graph.find("snap").device.read(0, 256 * K) == b"old!" * 64 * K
        execute("blockdev-del", node_name="snap")
        if together:
            execute("transaction", actions=[move[0], *go[2], *go[1]])
        else:
            execute("fastcbw-replace", parent="vm", node="cbw2")
            with pytest.raises(Error, match="Node cbw1 is in use: by node 'cbw2'"):
                execute("blockdev-del", node_name="cbw1")
            execute("transaction", actions=[move[0], *go[1], *go[2]])
        assert guest.read(0, 4) == b"new!"


@pytest.mark.parametrize("options", [{}, {"ram": 0}, {"ram": 0, "discard-source": True}])
def test_the_target_is_the_disk_at_the_instant_under_a_verifying_writer(tmp_path, options):
    """Files; a guest on NBD at queue depth 16 that reads back what it has written; compared by qemu-img with a copy made at the instant."""
    length = 32 * M
    random = np.random.default_rng(len(options))
    (tmp_path / "disk").write_bytes(random.integers(0, 256, length, dtype=np.uint8).tobytes())
    (tmp_path / "target").write_bytes(bytes(length))
    job = {"discard-source": True} if options.pop("discard-source", False) else {}
    rest, stop = threading.Barrier(17), threading.Event()
    wrong = []

    def write(number):
        own = np.random.default_rng(100 + number)
        share = length // 16
        with Client(str(tmp_path / "nbd"), "disk") as client:
            for turn in range(10_000):
                if turn == 20:
                    rest.wait(60)
                    rest.wait(60)
                offset = number * share + int(own.integers(0, share - 70 * K)) // 512 * 512
                data = own.bytes(int(own.integers(1, 130)) * 512)
                client.write(offset, data)
                if client.read(offset, len(data)) != data:
                    wrong.append((number, turn))
                if stop.is_set() and turn > 40:
                    return

    with ExitStack() as stack, Daemon() as daemon:
        daemon.listen_nbd(str(tmp_path / "nbd"))
        daemon.listen_qmp(str(tmp_path / "qmp"))
        remote = stack.enter_context(connect(tmp_path / "qmp"))
        execute = remote.client.execute
        for name in ("disk", "target"):
            execute("blockdev-add", driver="file", node_name=name, filename=str(tmp_path / name))
        execute("block-export-add", type="nbd", id="disk", node_name="disk", writable=True)
        writers = [threading.Thread(target=write, args=(number,)) for number in range(16)]
        for writer in writers:
            writer.start()
        rest.wait(60)
        subprocess.run(["cp", str(tmp_path / "disk"), str(tmp_path / "instant")], check=True)
        insert(execute, "disk", **options)
        rest.wait(60)
        backup(execute, **job)
        assert ended(daemon) == "completed"
        stop.set()
        for writer in writers:
            writer.join(60)
        result = daemon.jobs.find("j").job.result
        execute("block-export-del", id="disk", mode="hard")
        for name in ("snap", "cbw", "target"):
            execute("blockdev-del", node_name=name)
    subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", str(tmp_path / "instant"), str(tmp_path / "target")], check=True)
    assert not wrong and result["landed_bytes"] + result["data_bytes"] == length
    assert os.stat(tmp_path / "target").st_size == length
