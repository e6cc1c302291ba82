"""Jobs as QEMU's clients know them: states, verbs, events; and what the schema tells of commands."""

import json

import pytest

from fastcbw.errors import Error

LENGTH = 1 << 20


@pytest.fixture
def execute(remote):
    for name in ("from", "to"):
        remote.client.execute("blockdev-add", driver="x-fastcbw-memory", node_name=name, size=LENGTH)
    return remote.client.execute


def states(remote):
    """The states that job j went through, from the events that came until now."""
    remote.client.execute("query-version")
    return [event["data"]["status"] for event in remote.client.events if event["event"] == "JOB_STATUS_CHANGE"]


def ended(daemon, id="j"):
    daemon.jobs.find(id).thread.join(30)


def wait_until_pending(daemon, execute):
    daemon.jobs.find("j").job.wait(30)
    while execute("query-block-jobs")[0]["status"] != "pending":
        pass


def test_a_job_goes_through_qemus_states(daemon, remote, execute):
    execute("blockdev-backup", job_id="j", device="from", target="to", sync="full", auto_dismiss=False)
    ended(daemon)
    assert states(remote) == ["created", "running", "waiting", "pending", "concluded"]
    (job,) = execute("query-block-jobs")
    assert job == {"type": "backup", "device": "j", "len": LENGTH, "offset": LENGTH, "busy": False, "paused": False, "speed": 0,
                   "io-status": "ok", "ready": False, "status": "concluded", "auto-finalize": True, "auto-dismiss": False}
    execute("block-job-dismiss", id="j")
    assert execute("query-block-jobs") == []


def test_a_job_that_is_not_to_finalize_by_itself_waits_and_holds_its_nodes(daemon, remote, execute):
    execute("blockdev-backup", job_id="j", device="from", target="to", sync="full", auto_finalize=False, auto_dismiss=False)
    wait_until_pending(daemon, execute)
    with pytest.raises(Error, match="Node to is in use: by job 'j'"):
        execute("blockdev-del", node_name="to")
    execute("job-finalize", id="j")
    ended(daemon)
    assert daemon.jobs.find("j").outcome == "completed"
    execute("blockdev-del", node_name="to")
    with pytest.raises(Error, match="Job 'j' in state 'concluded' cannot accept command verb 'finalize'"):
        execute("block-job-finalize", id="j")


def test_a_pending_job_is_cancelled(daemon, remote, execute):
    execute("blockdev-backup", job_id="j", device="from", target="to", sync="full", auto_finalize=False, auto_dismiss=False)
    wait_until_pending(daemon, execute)
    execute("block-job-cancel", device="j", force=True)
    ended(daemon)
    assert daemon.jobs.find("j").outcome == "cancelled"
    assert states(remote)[-3:] == ["pending", "aborting", "concluded"]
    assert daemon.nodes.graph.find("to").parents == []


def test_a_job_is_paused_and_resumed_by_either_name(daemon, remote, execute):
    daemon.disks["a"].write(0, b"x" * LENGTH)
    execute("blockdev-backup", job_id="j", device="a", target="to", sync="full", speed=1 << 16, auto_dismiss=False)
    for pause, resume, name in (("job-pause", "job-resume", "id"), ("block-job-pause", "block-job-resume", "device")):
        execute(pause, **{name: "j"})
        assert execute("query-block-jobs")[0]["paused"]
        execute(resume, **{name: "j"})
        assert not execute("query-block-jobs")[0]["paused"]
    with pytest.raises(Error, match="Job 'j' in state 'running' cannot accept command verb 'complete'"):
        execute("job-complete", id="j")
    execute("job-cancel", id="j")
    ended(daemon)
    assert states(remote)[-2:] == ["aborting", "concluded"]


def test_a_daemon_ends_with_a_job_that_is_pending(daemon, remote, execute):
    execute("blockdev-backup", job_id="j", device="from", target="to", sync="full", auto_finalize=False)
    wait_until_pending(daemon, execute)     # the fixture closes the daemon


def test_the_schema_tells_of_every_command_and_its_arguments(remote):
    entries = {entry["name"]: entry for entry in remote.client.execute("query-qmp-schema")}
    commands = {command["name"] for command in remote.client.execute("query-commands")}
    assert commands == {name for name, entry in entries.items() if entry["meta-type"] == "command"}
    members = {member["name"]: member for member in entries[entries["blockdev-backup"]["arg-type"]]["members"]}
    assert members["sync"] == {"name": "sync", "type": "str"} and members["speed"] == {"name": "speed", "type": "int", "default": None}
    named = {member["type"] for entry in entries.values() for member in entry.get("members", ())}
    assert named <= set(entries)
    assert len(json.dumps(list(entries.values()))) < 64 << 10       # within the read limit of qemu.qmp


def test_no_kind_of_job_here_is_one_that_can_be_changed(daemon, execute):
    execute("blockdev-backup", job_id="j", device="from", target="to", sync="full", auto_dismiss=False)
    ended(daemon)
    with pytest.raises(Error, match="^Job type does not support change$"):
        execute("block-job-change", id="j", type="backup")
    with pytest.raises(Error, match="Job 'j' is of type 'backup', not 'mirror'"):
        execute("block-job-change", id="j", type="mirror", copy_mode="write-blocking")
    with pytest.raises(Error, match="job 'x': not found"):
        execute("block-job-change", id="x", type="backup")
