"""block-dirty-bitmap-*: QEMU's arguments, transactions, and backups of what a bitmap marks."""

import pytest

import fastcbw
from fastcbw.errors import Error
from fastcbw.export.nbd.client import Client


@pytest.fixture
def execute(remote):
    def execute(command, **arguments):
        return remote.client.execute(command, **arguments)

    return execute


def counts(daemon, disk="a"):
    return {found["name"]: found["count"] for found in daemon.disks[disk].status()["bitmaps"]}


def test_bitmaps_by_the_names_of_qemu(daemon, execute):
    execute("block-dirty-bitmap-add", node="a", name="b0", granularity=512)
    execute("block-dirty-bitmap-add", node="a", name="b1", disabled=True)
    daemon.disks["a"].write(0, b"x" * 513)
    assert counts(daemon) == {"b0": 1024, "b1": 0}
    execute("block-dirty-bitmap-merge", node="a", target="b1", bitmaps=["b0"])
    execute("block-dirty-bitmap-clear", node="a", name="b0")
    execute("block-dirty-bitmap-disable", node="a", name="b0")
    execute("block-dirty-bitmap-enable", node="a", name="b1")
    daemon.disks["a"].write(1 << 19, b"x")
    assert counts(daemon) == {"b0": 0, "b1": 131072}
    assert execute("fastcbw-status")["disks"]["a"]["bitmaps"][0] == {
        "name": "b0", "granularity": 512, "count": 0, "recording": False, "busy": False, "persistent": False}
    execute("block-dirty-bitmap-remove", node="a", name="b0")
    assert counts(daemon) == {"b1": 131072} and counts(daemon, "b") == {}


@pytest.mark.parametrize("verb, arguments, words", [
    ("add", {"name": "x", "granularity": 100}, "granularity: 100 is no power of two"),
    ("add", {"name": "x", "granularity": 256}, "granularity: 256"),
    ("add", {"name": "x", "persistent": True}, "persistent: .* not built yet"),
    ("add", {"name": "b0"}, "'b0': exists already"),
    ("add", {"name": "a/b"}, "is no name"),
    ("remove", {"name": "x"}, "'x': not found .bitmaps of disk a: b0."),
    ("clear", {"name": "x"}, "'x': not found"),
    ("enable", {"name": "x"}, "'x': not found"),
    ("disable", {"name": "x"}, "'x': not found"),
    ("merge", {"target": "x", "bitmaps": ["b0"]}, "'x': not found"),
    ("merge", {"target": "b0", "bitmaps": ["b0", "x"]}, "'x': not found"),
    ("merge", {"target": "b0", "bitmaps": "b0"}, "Invalid parameter type for 'bitmaps'"),
    ("merge", {"target": "b0"}, "Parameter 'bitmaps' is missing"),
])
def test_what_is_wrong_is_named(daemon, execute, verb, arguments, words):
    daemon.disks["a"].add_bitmap("b0")
    with pytest.raises(Error, match=words):
        execute(f"block-dirty-bitmap-{verb}", node="a", **arguments)
    assert counts(daemon) == {"b0": 0}


def test_an_export_names_bitmaps_that_exist(daemon, execute, tmp_path):
    daemon.disks["a"].add_bitmap("b0", granularity=512)
    daemon.disks["a"].write(512, b"x")
    with pytest.raises(Error, match="Bitmap 'b1' is not found"):
        execute("block-export-add", type="nbd", id="e", node_name="a", name="again", bitmaps=["b0", "b1"])
    execute("block-export-add", type="nbd", id="e", node_name="a", name="again", bitmaps=["b0"])
    with Client(tmp_path / "nbd", "again", contexts=["qemu:dirty-bitmap:b0"]) as client:
        assert client.block_status(0, 2048) == {"qemu:dirty-bitmap:b0": [(512, 0), (512, 1), (1024, 0)]}
    execute("block-export-del", id="e")


def test_a_transaction_that_fails_leaves_the_bitmaps_as_they_were(daemon, execute):
    bitmap = daemon.disks["a"].add_bitmap("b0", granularity=512)
    daemon.disks["a"].write(0, b"x")
    with pytest.raises(Error, match="'nowhere'"):
        execute("transaction", actions=[
            {"type": "block-dirty-bitmap-add", "data": {"node": "a", "name": "new"}},
            {"type": "block-dirty-bitmap-clear", "data": {"node": "a", "name": "b0"}},
            {"type": "block-dirty-bitmap-clear", "data": {"node": "a", "name": "nowhere"}}])
    assert counts(daemon) == {"b0": 512} and bitmap.enabled


def test_full_backup_and_new_bitmap_in_one_transaction_then_increments(daemon, execute, tmp_path):
    disk = daemon.disks["a"]
    target = tmp_path / "target.img"
    target.write_bytes(bytes(disk.length))
    execute("blockdev-add", driver="file", node_name="target", filename=str(target))
    execute("transaction", actions=[
        {"type": "block-dirty-bitmap-add", "data": {"node": "a", "name": "b0", "granularity": 512}},
        {"type": "blockdev-backup", "data": {"device": "a", "target": "target", "sync": "full", "job-id": "full", "auto-dismiss": False}}])
    daemon.jobs.find("full").job.wait(20)
    daemon.jobs.find("full").thread.join(20)
    assert target.read_bytes() == disk.read(0, disk.length)
    for mode, left in (("on-success", 0), ("never", 4096)):
        disk.write(65536 if left else 4096, mode.encode() + b"." * (4096 - len(mode)))
        sync = "bitmap" if left else "incremental"
        execute("blockdev-backup", device="a", target="target", sync=sync, bitmap="b0", bitmap_mode=mode, job_id=mode, auto_dismiss=False)
        record = daemon.jobs.find(mode)
        record.job.wait(20)
        record.thread.join(20)
        assert target.read_bytes() == disk.read(0, disk.length)
        assert record.job.result["data_bytes"] == 4096 and counts(daemon) == {"b0": left}
    with pytest.raises(Error, match="Bitmap 'nothing' could not be found"):
        execute("blockdev-backup", device="a", target="target", sync="incremental", bitmap="nothing")
    assert counts(daemon) == {"b0": 4096}


def test_a_backup_job_has_the_bitmap_and_gives_it_back(daemon, remote, tmp_path):
    disk = remote.disks["a"]
    with disk.snapshot("s", new_bitmap="b0", new_bitmap_granularity=512) as snapshot:
        snapshot.backup(tmp_path / "backup").wait(20)
    daemon.disks["a"].write(8192, b"increment")
    assert disk.bitmaps["b0"].report()["count"] == 512 and disk.bitmaps["b0"].granularity == 512 and disk.bitmaps["b0"].enabled
    job = disk.backup(tmp_path / "backup", bitmap="b0", force=True)
    assert job.wait(20)["data_bytes"] == 4096
    assert (tmp_path / "backup").read_bytes() == daemon.disks["a"].read(0, 1 << 20)
    assert disk.bitmaps["b0"].report()["count"] == 0 and not disk.bitmaps["b0"].report()["busy"]
    with disk.snapshot("part", bitmap="b0") as part:
        with pytest.raises(Error, match="exists already"):
            part.backup(tmp_path / "backup", bitmap="b0", force=True)
    bitmap = disk.add_bitmap("b1", enabled=False)
    bitmap.enable()
    bitmap.merge("b0")
    bitmap.disable()
    bitmap.clear()
    bitmap.remove()
    assert list(disk.bitmaps) == ["b0"]
    with pytest.raises(fastcbw.Error, match="'b1' of a: not found"):
        bitmap.report()


def test_a_removal_in_a_transaction_that_fails_brings_the_bitmap_back_and_it_marks_too_much_rather_than_too_little(daemon, execute):
    daemon.disks["a"].add_bitmap("b0", granularity=512)
    remove = {"type": "block-dirty-bitmap-remove", "data": {"node": "a", "name": "b0"}}
    with pytest.raises(Error, match="'nowhere'"):
        execute("transaction", actions=[remove, {"type": "block-dirty-bitmap-clear", "data": {"node": "a", "name": "nowhere"}}])
    bitmap = daemon.disks["a"].bitmaps["b0"]
    assert bitmap.enabled and bitmap.granularity == 512 and counts(daemon) == {"b0": daemon.disks["a"].length}
    execute("transaction", actions=[remove])
    assert counts(daemon) == {}
