"""fastcbw-bind-to-connection: what a client made ends with its connection, however that ends; what others use stays, and is named."""

import os
import signal
import subprocess
import sys

import pytest

from fastcbw.cli.main import main
from fastcbw.errors import Error
from fastcbw.export.nbd.client import Client
from fastcbw.qmp.client import QmpClient

LENGTH = 1 << 20
BIND = {"fastcbw-bind-to-connection": True}


def memory(name, size=4 * LENGTH):
    return {"type": "blockdev-add", "data": {"driver": "x-fastcbw-memory", "node-name": name, "size": size}}


def fleecing(disk="a"):
    """The filter above a disk in use, its snapshot and an export of that, as one."""
    return [memory("temp"),
            {"type": "blockdev-add", "data": {"driver": "copy-before-write", "node-name": "cbw", "file": disk, "target": "temp"}},
            {"type": "blockdev-add", "data": {"driver": "snapshot-access", "node-name": "snap", "file": "cbw"}},
            {"type": "fastcbw-replace", "data": {"parent": disk, "node": "cbw"}},
            {"type": "block-export-add", "data": {"type": "nbd", "id": "fleece", "node-name": "snap"}}]


@pytest.fixture
def execute(remote):
    return remote.client.execute


@pytest.fixture
def tool(daemon, tmp_path):
    """Another client, which dies in the course of the test."""
    with QmpClient(tmp_path / "qmp") as client:
        yield client


def look(execute):
    return execute("fastcbw-graph"), execute("query-block-exports"), execute("query-jobs")


def undone(remote):
    """Wait until what the client that has gone had bound is undone; return the event's data."""
    while True:
        for event in remote.client.events:
            if event["event"] == "FASTCBW_CLIENT_UNDONE":
                return event["data"]
        remote.client.execute("query-version")


def test_all_that_a_client_bound_goes_with_its_connection_and_the_guest_stays(daemon, remote, execute, tool, tmp_path):
    before = look(execute)
    with Client(tmp_path / "nbd", "a") as guest:
        tool.execute("transaction", actions=fleecing(), properties=BIND)
        guest.write(0, b"new!")
        with Client(tmp_path / "nbd", "snap") as reader:
            assert reader.read(0, 4) == b"aaaa"
            (bound,) = execute("fastcbw-status")["bound"]
            assert bound["connected"] and bound["pid"] == os.getpid() and bound["command"]
            assert {row["what"] for row in bound["holds"]} == {
                "node 'temp'", "node 'cbw'", "node 'snap'", "export 'fleece'", "export 'a' at node 'cbw'"}
            tool.close()
            assert undone(remote)["left-over"] == []
            with pytest.raises((OSError, EOFError)):
                reader.read(0, 4)
        assert look(execute) == before and execute("fastcbw-status")["bound"] == []
        assert guest.read(0, 8) == b"new!aaaa"
        guest.write(4, b"more")
    assert not daemon.disks["a"].snapshots


def test_a_job_that_was_bound_is_cancelled_and_forgotten_and_its_bitmap_goes_on(daemon, remote, execute, tool):
    daemon.disks["a"].write(0, b"x" * LENGTH)
    execute("block-dirty-bitmap-add", node="a", name="kept", granularity=4096)
    daemon.disks["a"].write(4096, b"y" * 4096)
    tool.execute("transaction", properties=BIND, actions=[
        memory("target", LENGTH), {"type": "block-dirty-bitmap-add", "data": {"node": "b", "name": "gone"}},
        {"type": "blockdev-backup", "data": {"job-id": "j", "device": "a", "target": "target", "sync": "bitmap", "bitmap": "kept",
                                             "bitmap-mode": "on-success", "speed": 1, "auto-dismiss": False, "auto-finalize": False}}])
    record = daemon.jobs.find("j")
    tool.close()
    assert undone(remote)["left-over"] == []
    assert record.outcome == "cancelled" and execute("query-jobs") == [] and "target" not in daemon.nodes.graph.nodes
    assert not daemon.disks["b"].bitmaps and not daemon.disks["a"].snapshots
    assert [tuple(row) for row in daemon.disks["a"].bitmaps["kept"].extents()] == [(4096, 4096)]


def test_what_somebody_else_has_come_to_use_is_left_over_and_named_with_whose_it_was(daemon, remote, execute, tool, tmp_path, capsys):
    tool.execute("transaction", actions=[memory("m"), memory("alone")], properties=BIND)
    execute("block-export-add", type="nbd", id="mine", node_name="m")
    tool.close()
    row = {"what": "node 'm'", "why": "Node m is in use: by export 'mine' (remove that first)"}
    assert undone(remote)["left-over"] == [row]
    (bound,) = execute("fastcbw-status")["bound"]
    assert not bound["connected"] and bound["pid"] == os.getpid() and bound["left-over"] == [row]
    assert "alone" not in daemon.nodes.graph.nodes
    assert main(["status", "--qmp", str(tmp_path / "qmp")]) == 0
    assert f"has gone and left node 'm': {row['why']}\n" in capsys.readouterr().out
    execute("block-export-del", id="mine")
    execute("blockdev-del", node_name="m")
    assert execute("fastcbw-status")["bound"] == []


def test_a_filter_whose_snapshot_is_in_use_stays_with_the_guest_on_it(daemon, remote, execute, tool):
    """The guest can't go back below a filter that stays; nothing is undone by halves."""
    tool.execute("transaction", actions=fleecing(), properties=BIND)
    execute("block-export-add", type="nbd", id="mine", node_name="snap", name="mine")
    tool.close()
    left = {row["what"] for row in undone(remote)["left-over"]}
    assert left == {"node 'temp'", "node 'cbw'", "node 'snap'", "export 'a' at node 'cbw'"}
    assert [export["node-name"] for export in execute("query-block-exports") if export["id"] == "a"] == ["cbw"]


def test_a_name_that_somebody_else_has_made_again_is_theirs(daemon, remote, execute, tool):
    tool.execute("transaction", actions=[memory("m")], properties=BIND)
    tool.execute("blockdev-del", node_name="m")
    execute("blockdev-add", driver="x-fastcbw-memory", node_name="m", size=LENGTH)
    tool.close()
    assert undone(remote)["left-over"] == []
    assert "m" in daemon.nodes.graph.nodes


def test_what_was_not_bound_stays(daemon, remote, execute, tool):
    tool.execute("transaction", actions=[memory("kept")])
    tool.execute("transaction", actions=[memory("gone")], properties=BIND)
    tool.close()
    undone(remote)
    assert "kept" in daemon.nodes.graph.nodes and "gone" not in daemon.nodes.graph.nodes


def test_a_transaction_that_failed_leaves_nothing_bound(daemon, execute, tool):
    with pytest.raises(Error, match="'nowhere'"):
        tool.execute("transaction", properties=BIND, actions=[memory("m"), {"type": "fastcbw-replace", "data": {"parent": "a", "node": "nowhere"}}])
    assert execute("fastcbw-status")["bound"] == [] and "m" not in daemon.nodes.graph.nodes


@pytest.mark.parametrize("action", [{"type": "blockdev-del", "data": {"node-name": "a"}},
                                    {"type": "block-dirty-bitmap-clear", "data": {"node": "a", "name": "b"}}])
def test_what_cannot_be_undone_is_not_bound(execute, action):
    with pytest.raises(Error, match=f"'{action['type']}' can't be undone when the client has gone"):
        execute("transaction", actions=[action], properties=BIND)
    with pytest.raises(Error, match="'fastcbw-bind-to-connection', expected: boolean"):
        execute("transaction", actions=[], properties={"fastcbw-bind-to-connection": 1})


def test_a_client_that_is_killed_in_the_middle_of_a_backup(daemon, remote, execute, tmp_path):
    """A process of its own, by an unmodified qemu.qmp client; nobody says goodbye."""
    before = look(execute)
    daemon.disks["a"].write(0, b"x" * LENGTH)
    script = f"""
import asyncio
from qemu.qmp import QMPClient
async def main():
    client = QMPClient("victim")
    await client.connect({str(tmp_path / 'qmp')!r})
    await client.execute("transaction", {{"properties": {BIND}, "actions": {fleecing() + [memory('target', LENGTH)]} + [
        {{"type": "blockdev-backup", "data": {{"job-id": "j", "device": "b", "target": "target", "sync": "full", "speed": 1}}}}]}})
    print("ready", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""
    victim = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert victim.stdout.readline() == "ready\n"
        assert execute("fastcbw-status")["bound"][0]["pid"] == victim.pid
    finally:
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
    assert undone(remote)["pid"] == victim.pid
    assert look(execute) == before


def test_a_daemon_that_ends_has_nothing_to_undo(daemon, tool):
    """The fixture closes it while the client is there, with a job that would take for ever."""
    daemon.disks["a"].write(0, b"x" * LENGTH)
    tool.execute("transaction", properties=BIND, actions=[
        memory("target", LENGTH), {"type": "blockdev-backup", "data": {"device": "a", "target": "target", "sync": "full", "speed": 1}}])


def test_a_disk_error_in_undoing_all_as_one_leaves_what_can_go_alone(daemon, remote, execute, tool):
    """A cache that can't be written back stays; the rest goes one by one, and the client is done with."""
    tool.execute("transaction", properties=BIND, actions=[
        memory("m", LENGTH), memory("alone"),
        {"type": "blockdev-add", "data": {"driver": "x-fastcbw-fault", "node-name": "bad", "file": "m", "rules": [{"operation": "write"}]}},
        {"type": "blockdev-add", "data": {"driver": "x-fastcbw-cache", "node-name": "cache", "file": "bad", "size": 1 << 20}}])
    daemon.nodes.graph.find("cache").device.write(0, b"data" * 1024)
    tool.close()
    left = undone(remote)["left-over"]
    assert {row["what"] for row in left} == {"node 'm'", "node 'bad'", "node 'cache'"} and "alone" not in daemon.nodes.graph.nodes
    assert [row["why"] for row in left if row["what"] == "node 'cache'"][0].endswith("Input/output error")
    execute("blockdev-reopen", options=[{"driver": "x-fastcbw-fault", "node-name": "bad"}])
    for name in ("cache", "bad", "m"):
        execute("blockdev-del", node_name=name)
