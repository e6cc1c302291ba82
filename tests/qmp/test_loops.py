"""Targets that are, by way of the daemon's own export, what they are to be a copy of."""

import pytest
from test_live import LENGTH, act, execute, to, vm  # noqa: F401 - fixtures

from fastcbw.errors import Error

WORDS = "Source and target cannot be the same"


@pytest.fixture(params=["unix", "inet", "default"])
def own(request, daemon, vm, execute):  # noqa: F811
    """Where a client finds the export vm of `disk`: the members of an nbd node."""
    if request.param == "default":
        for name in "ab":
            daemon.nbd.remove_export(name)
        return {"server": {"type": "unix", "path": daemon.nbd.addresses[0]}}
    if request.param == "unix":
        return {"server": {"type": "unix", "path": daemon.nbd.addresses[0]}, "export": "vm"}
    port = daemon.nbd.listen_tcp(0).rpartition(":")[2]
    return {"server": {"type": "inet", "host": "localhost", "port": port}, "export": "vm"}


def test_a_backup_does_not_go_to_its_source_by_way_of_the_daemons_own_export(vm, execute, own):  # noqa: F811
    """It would put the guest's disk back to what it was when the backup began."""
    execute("blockdev-add", driver="nbd", node_name="loop", **own)
    execute("blockdev-add", driver="throttle", node_name="slow", limits={}, file="loop")
    for source, target in (("disk", "loop"), ("disk", "slow")):
        with pytest.raises(Error, match=f"job '{source}': its target node '{target}' is, by way of .*{WORDS}"):
            execute("blockdev-backup", device=source, target=target, sync="full")
    assert execute("query-jobs") == [] and vm.read_bytes() == bytes(LENGTH)


def test_a_store_does_not_lie_on_the_disk_whose_old_data_it_keeps(vm, execute, own):  # noqa: F811
    execute("blockdev-add", driver="nbd", node_name="loop", **own)
    with pytest.raises(Error, match=f"node 'cbw': its target node 'loop' is, .*{WORDS}"):
        execute("transaction", actions=[act("blockdev-add", driver="copy-before-write", node_name="cbw", file="disk", target="loop"), to("cbw")])


def test_an_export_is_not_moved_to_what_is_copied_to_it(vm, execute, tmp_path, own):  # noqa: F811
    """The loop is closed while a job runs."""
    (tmp_path / "other.img").write_bytes(b"o" * LENGTH)
    execute("blockdev-add", driver="raw", node_name="other", file={"driver": "file", "filename": str(tmp_path / "other.img")})
    execute("blockdev-add", driver="nbd", node_name="loop", **own)
    execute("blockdev-backup", device="other", target="loop", sync="none", job_id="job")
    with pytest.raises(Error, match=f"job 'job': its target node 'loop' is, .*{WORDS}"):
        execute("fastcbw-replace", parent="vm", node="other")
    execute("block-job-cancel", device="job")


def test_a_backup_to_an_export_of_another_disk_is_one(vm, execute, own):  # noqa: F811
    execute("blockdev-add", driver="nbd", node_name="loop", **own)
    execute("blockdev-backup", device="a", target="loop", sync="full", job_id="job", auto_dismiss=False)
    while execute("query-jobs")[0]["status"] not in ("concluded", "aborting"):
        pass
    assert execute("query-jobs")[0]["outcome"] == "completed" and vm.read_bytes()[:4096] == b"a" * 4096


def test_a_backup_by_uri_does_not_go_to_any_address_of_the_daemon(daemon, remote, tmp_path):
    port = daemon.nbd.listen_tcp(0).rpartition(":")[2]
    second = daemon.nbd.listen_unix(tmp_path / "nbd2")
    for uri in (f"nbd+unix:///a?socket={second}", f"nbd://127.0.0.1:{port}/a", f"nbd://localhost:{port}/a"):
        with pytest.raises(Error, match="is served by this daemon"):
            remote.backup("a", uri)
