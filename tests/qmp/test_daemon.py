"""The daemon: names, exports, snapshots in use, jobs; driven over its own QMP socket."""

import pytest

from fastcbw.errors import Error, JobFailed
from fastcbw.export.nbd.client import Client
from fastcbw.qmp.commands import COMMANDS

LENGTH = 1 << 20


def exports(remote):
    return sorted(export["id"] for export in remote.client.execute("query-block-exports"))


def test_disks_and_snapshots_are_exports(daemon, remote, tmp_path):
    remote.disks["a"].snapshot("s")
    assert exports(remote) == ["a", "a@s", "b"]
    with Client(tmp_path / "nbd", "a") as guest, Client(tmp_path / "nbd", "a@s") as reader:
        guest.write(0, b"new" * 1000)
        assert reader.read(0, 4096) == b"a" * 4096
        assert guest.read(0, 3) == b"new"


def test_the_uri_of_a_snapshot_is_what_clients_connect_to(daemon, remote, tmp_path):
    snapshot = remote.disks["b"].snapshot("s")
    assert snapshot.uri == f"nbd+unix:///b@s?socket={tmp_path}/nbd"


def test_a_group_is_taken_of_all_disks_or_of_none(daemon, remote):
    remote.snapshot("s", ["a", "b"])
    assert [(found["disk"], found["name"]) for found in remote.snapshots()] == [("a", "s"), ("b", "s")]
    remote.disks["b"].snapshots["s"].close()
    with pytest.raises(Error, match="snapshot a@s: exists already"):
        remote.snapshot("s", ["b", "a"])
    assert exports(remote) == ["a", "a@s", "b"]


@pytest.mark.parametrize("disks, text", [(["c"], "disk 'c': not found"), ([], "at least one"), (["a", "a"], "named twice")])
def test_a_snapshot_of_the_wrong_disks_changes_nothing(daemon, remote, disks, text):
    with pytest.raises(Error, match=text):
        remote.snapshot("s", disks)
    assert remote.snapshots() == []


@pytest.mark.parametrize("option, value, text", [
    ("cluster_size", 5000, "cluster_size: 5000 is not a power of two"), ("durability", "power", "durability: 'power' is not built"),
    ("ram", "1Q", "ram: '1Q' is no size"), ("colour", 1, "'colour' is unexpected")])
def test_a_wrong_option_is_named_and_changes_nothing(daemon, remote, option, value, text):
    with pytest.raises(Error, match=text):
        remote.snapshot("s", ["a"], **{option: value})
    assert remote.snapshots() == []


def test_a_snapshot_with_a_client_is_not_deleted_and_the_client_reads_on(daemon, remote, tmp_path):
    snapshot = remote.disks["a"].snapshot("s")
    with Client(tmp_path / "nbd", "a@s") as reader:
        with pytest.raises(Error, match="snapshot a@s: in use"):
            snapshot.close()
        assert reader.read(0, 4096) == b"a" * 4096
    while daemon.snapshot("a", "s").status()["holds"]:  # the server learns of the client's end by itself
        pass
    snapshot.close()
    assert exports(remote) == ["a", "b"]
    with pytest.raises(OSError, match="not known"):
        Client(tmp_path / "nbd", "a@s")


def test_limits_of_a_remote_snapshot_change(daemon, remote):
    snapshot = remote.disks["a"].snapshot("s", ram="8K", on_full="wait", on_cbw_error="break-guest-write")
    snapshot.set_limits(ram="64K")
    snapshot.set_policy(on_full="break-guest-write")
    facts = snapshot.status()["status"]
    assert (facts["ram_limit"], facts["on_full"], facts["on_cbw_error"]) == (65536, "break-guest-write", "break-guest-write")
    for call, text in [(lambda: snapshot.set_limits(), "nothing to change"), (lambda: snapshot.set_limits(ram=5), "less than one cluster"),
                       (lambda: snapshot.set_policy(on_full="burn"), "'burn' is unknown"),
                       (lambda: remote.client.execute("fastcbw-snapshot-set", name="t", disks=["a"], ram=1), "t: not found")]:
        with pytest.raises(Error, match=text):
            call()
    assert snapshot.status()["status"]["ram_limit"] == 65536


def test_deleting_what_is_not_there_names_what_is(daemon, remote):
    remote.disks["a"].snapshot("s")
    with pytest.raises(Error, match=r"snapshot a@t: not found \(snapshots of this disk: s\)"):
        remote.client.execute("fastcbw-snapshot-delete", name="t", disks=["a"])


def test_a_backup_of_a_snapshot_is_the_snapshot(daemon, remote, tmp_path):
    snapshot = remote.disks["a"].snapshot("s")
    daemon.disks["a"].write(0, b"z" * 8192)
    job = snapshot.backup(tmp_path / "target", order="ram-first")
    job.wait(60)
    assert (tmp_path / "target").read_bytes() == b"a" * 4096 + bytes(LENGTH - 4096)
    assert job.progress["done"] == job.progress["total"] == LENGTH
    job.dismiss()
    assert remote.jobs == {}
    assert exports(remote) == ["a", "a@s", "b"]


def test_a_backup_of_a_disk_makes_its_snapshot_and_removes_it(daemon, remote, tmp_path):
    job = remote.disks["a"].backup(tmp_path / "target")
    job.wait(60)
    assert job.status == "concluded" and job.error is None
    assert remote.snapshots() == [] and exports(remote) == ["a", "b"]
    assert (tmp_path / "target").read_bytes()[:4096] == b"a" * 4096


def test_a_backup_that_cannot_start_leaves_no_snapshot_and_no_job(daemon, remote, tmp_path):
    (tmp_path / "target").write_text("precious")
    with pytest.raises(Error, match="target"):
        remote.disks["a"].backup(tmp_path / "target")
    assert remote.snapshots() == [] and remote.jobs == {}
    assert (tmp_path / "target").read_text() == "precious"


def test_a_job_ends_with_events_that_qemus_clients_know(daemon, remote, tmp_path):
    job = remote.disks["a"].backup(tmp_path / "target", job_id="j")
    job.wait(60)
    remote.status()
    seen = [(event["event"], event["data"].get("status")) for event in remote.client.events]
    assert seen == [("FASTCBW_SNAPSHOT_CREATED", None),
                    *(("JOB_STATUS_CHANGE", state) for state in ("created", "running", "waiting", "pending")), ("BLOCK_JOB_COMPLETED", None),
                    ("JOB_STATUS_CHANGE", "concluded")]


def test_a_job_is_slowed_down_paused_and_let_go(daemon, remote, tmp_path):
    daemon.disks["a"].write(0, b"x" * LENGTH)       # a quarter of an hour at that rate
    job = remote.disks["a"].backup(tmp_path / "a.bak", rate="1K", guest_p99=1000)
    assert job.rate == 1024 and job.pacing["guest_p99"] == 1000 and job.status == "running"
    job.pause()
    assert job.status == "paused"
    job.resume()
    assert job.status == "running"
    for speed in (-1, 1.5, "1M"):
        with pytest.raises(Error, match="speed"):
            remote.client.execute("block-job-set-speed", device=job.id, speed=speed)
    job.rate = "2K"
    assert job.rate == 2048
    job.rate = None
    assert job.rate is None
    job.wait(30)
    assert (tmp_path / "a.bak").read_bytes() == b"x" * LENGTH
    for command in ("job-pause", "job-resume"):
        with pytest.raises(Error, match="has ended"):
            remote.client.execute(command, id=job.id)


@pytest.mark.parametrize("option, value, text", [
    ("rate", 0, "rate: 0"), ("rate", "1X", "rate"), ("rate", -1, "rate"), ("guest_p99", 0, "guest_p99: 0"), ("guest_p99", -1, "guest_p99: -1"),
    ("guest_p99", "5", "guest-p99"),
])
def test_a_pace_that_makes_no_sense_is_refused_and_makes_nothing(daemon, remote, tmp_path, option, value, text):
    with pytest.raises(Error, match=text):
        remote.disks["a"].backup(tmp_path / "a.bak", **{option: value})
    assert not remote.jobs and not list(tmp_path.glob("a.bak*")) and not daemon.disks["a"].snapshots


def test_a_job_id_in_use_and_an_unknown_one_are_refused(daemon, remote, tmp_path):
    remote.disks["a"].backup(tmp_path / "one", job_id="j").wait(60)
    with pytest.raises(Error, match="job 'j': the id is in use"):
        remote.disks["a"].backup(tmp_path / "two", job_id="j")
    for command in ("job-cancel", "job-dismiss"):
        with pytest.raises(Error, match="job 'k': not found"):
            remote.client.execute(command, id="k")
    with pytest.raises(Error, match="job 'j': has ended"):
        remote.client.execute("job-cancel", id="j")


def test_quit_ends_the_wait_of_who_runs_the_daemon(daemon, remote):
    remote.quit()
    assert daemon.wait() == "quit"


def test_the_status_has_everything(daemon, remote):
    remote.snapshot("s", ["a"])
    status = remote.status()
    assert set(status["disks"]) == {"a", "b"} and status["jobs"] == []
    assert [export["name"] for export in status["nbd"]["exports"]] == ["a", "b", "a@s"]
    assert status["qmp"]["clients"] == 1


def test_every_command_and_argument_is_documented_and_listed(remote):
    listed = {command["name"] for command in remote.client.execute("query-commands")}
    assert listed == set(COMMANDS.commands)
    for command in COMMANDS.commands.values():
        assert command.doc and all(argument.doc for argument in command.arguments), command.name


@pytest.mark.parametrize("name", ["", "a@b", "a/b", "a=b", " a", "a\n"])
def test_a_bad_name_of_a_snapshot_is_refused(daemon, remote, name):
    with pytest.raises(Error, match="snapshot name: .* is no name"):
        remote.disks["a"].snapshot(name)
    assert remote.snapshots() == []


def test_data_of_a_remote_disk_comes_by_way_of_its_export(daemon, remote, tmp_path):
    assert remote.disks["a"].uri == f"nbd+unix:///a?socket={tmp_path}/nbd"
    assert remote.disks["a"].read(0, 4096) == b"a" * 4096
