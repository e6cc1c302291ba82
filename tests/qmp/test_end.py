"""A daemon ends, in bounded time, though a job waits for a device that does not answer."""

import threading

import pytest

from fastcbw.block.delay import DelayDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.export.nbd.server import Server
from fastcbw.qmp import jobs
from fastcbw.qmp.remote import connect

LENGTH = 1 << 20


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(jobs, "END_SECONDS", 0.05)


@pytest.fixture
def late():
    device = DelayDevice(MemoryDevice(LENGTH, name="late"))
    device.write(0, b"x" * LENGTH)
    yield device
    device.open_all()


@pytest.mark.parametrize("frozen", ["target", "source"])
def test_a_server_that_does_not_answer_is_given_up(daemon, remote, late, soon, tmp_path, frozen):
    """With the gate closed until after the end: nothing of the job is left then."""
    execute = remote.client.execute
    with Server() as server:
        server.listen_unix(str(tmp_path / "late"))
        server.add_export("x", late)
        execute("blockdev-add", driver="nbd", node_name="far", server={"type": "unix", "path": str(tmp_path / "late")}, export="x")
        execute("blockdev-add", driver="x-fastcbw-memory", node_name="near", size=LENGTH)
        with late.hold("write" if frozen == "target" else "read") as gate:
            source, target = ("a", "far") if frozen == "target" else ("far", "near")
            execute("blockdev-backup", job_id="j", device=source, target=target, sync="full")
            gate.wait_arrived()
            thread = daemon.jobs.find("j").thread
            daemon.close()
            assert not thread.is_alive() and daemon.disks["a"]._closed


def test_a_job_whose_device_hangs_is_left_behind_with_what_it_uses(daemon, remote, late, soon):
    execute = remote.client.execute
    execute("blockdev-add", driver="x-fastcbw-memory", node_name="target", size=LENGTH)
    daemon.nodes.graph.find("target").device.close()
    daemon.nodes.graph.find("target").device = late
    with late.hold("write") as gate:
        execute("blockdev-backup", job_id="j", device="a", target="target", sync="full")
        gate.wait_arrived()
        thread = daemon.jobs.find("j").thread
        daemon.close()
        assert thread.is_alive() and thread.daemon
        assert daemon.disks["b"]._closed and not daemon.disks["a"]._closed
        assert late.read(LENGTH - 1, 1) == b"x"       # open still
    thread.join(30)
    assert not thread.is_alive()
    daemon.disks["a"].close()


def test_the_undoing_of_what_a_client_left_does_not_keep_the_daemon(daemon, remote, late, soon, tmp_path):
    remote.client.execute("blockdev-add", driver="x-fastcbw-memory", node_name="target", size=LENGTH)
    daemon.nodes.graph.find("target").device.close()
    daemon.nodes.graph.find("target").device = late
    with late.hold("write") as gate:
        with connect(tmp_path / "qmp") as tool:
            tool.client.execute("transaction", properties={"fastcbw-bind-to-connection": True}, actions=[
                {"type": "blockdev-backup", "data": {"job-id": "j", "device": "a", "target": "target", "sync": "full"}}])
            gate.wait_arrived()
            record = daemon.jobs.find("j")
        while not record.job.cancelled:
            pass
        daemon.close()
    record.thread.join(30)
    assert not record.thread.is_alive()
    daemon.disks["a"].close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastcbw-qmp-command")]
