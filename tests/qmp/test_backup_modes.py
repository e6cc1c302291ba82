"""blockdev-backup: what becomes of a bitmap in each mode, at success, failure and cancel; jobs that complete together."""

import pytest

from fastcbw.block.delay import DelayDevice
from fastcbw.block.fault import FaultDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.errors import Error

LENGTH = 1 << 20
K = 1 << 10


@pytest.fixture
def execute(remote):
    execute = remote.client.execute
    for name in "ab":
        execute("block-dirty-bitmap-add", node=name, name="b0", granularity=4 * K)
        execute("blockdev-add", driver="x-fastcbw-memory", node_name=f"to-{name}", size=LENGTH)
    return execute


def marked(daemon, disk="a"):
    """What bitmap b0 of the disk marks: (offset, length) in KiB."""
    return [(int(row["offset"]) // K, int(row["length"]) // K) for row in daemon.disks[disk].bitmaps["b0"].extents()]


def target(daemon, disk="a"):
    return daemon.nodes.graph.find(f"to-{disk}").device


def put(daemon, device, disk="a"):
    """Have DEVICE be what backups of the disk go to, instead of plain memory."""
    node = daemon.nodes.graph.find(f"to-{disk}")
    node.device.close()
    node.device = device
    return device


def backup(disk="a", **options):
    return {"device": disk, "target": f"to-{disk}", "job-id": f"j{disk}", "auto-dismiss": False, **options}


def start(execute, **options):
    execute("blockdev-backup", **{name.replace("-", "_"): value for name, value in backup(**options).items()})


def outcome(daemon, disk="a"):
    record = daemon.jobs.find(f"j{disk}")
    record.thread.join(30)
    return record.outcome


@pytest.mark.parametrize("mode, left", [("on-success", [(512, 4), (16, 4), (64, 8)]), ("always", [(512, 4), (64, 8)]), ("never", [(512, 4), (16, 4), (64, 8)])])
def test_a_bitmap_after_a_backup_that_failed(daemon, execute, mode, left):
    """16K is copied, then 64K fails; 512K is written meanwhile."""
    disk = daemon.disks["a"]
    disk.write(16 * K, b"x" * 4 * K)
    disk.write(64 * K, b"y" * 8 * K)
    slow = DelayDevice(MemoryDevice(LENGTH))
    failing = put(daemon, FaultDevice(slow))
    with failing.fail_on("write", 64 * K, 4 * K), slow.hold("write", 16 * K, 4 * K) as gate:
        start(execute, sync="bitmap", bitmap="b0", **{"bitmap-mode": mode, "x-perf": {"max-workers": 1}})
        gate.wait_arrived()
        disk.write(512 * K, b"z" * 4 * K)
        gate.open()
        assert outcome(daemon) == "failed"
    assert marked(daemon) == sorted(left)
    execute("job-dismiss", id="ja")
    if mode != "never":
        start(execute, sync="bitmap", bitmap="b0", **{"bitmap-mode": mode})
        assert outcome(daemon) == "completed" and marked(daemon) == []
        assert target(daemon).read(16 * K, 512 * K) == disk.read(16 * K, 512 * K)


@pytest.mark.parametrize("sync", ["full", "top"])
@pytest.mark.parametrize("mode", ["on-success", "always"])
def test_a_full_backup_with_a_bitmap_starts_a_chain_of_increments(daemon, execute, sync, mode):
    """The bitmap marked something before; after it, only what was written since the backup's instant. An increment makes it whole."""
    disk = daemon.disks["a"]
    disk.write(16 * K, b"x" * 4 * K)
    slow = put(daemon, DelayDevice(MemoryDevice(LENGTH)))
    with slow.hold("write", 16 * K, 4 * K) as gate:
        start(execute, sync=sync, bitmap="b0", **{"bitmap-mode": mode})
        gate.wait_arrived()
        before = disk.read(0, LENGTH)
        disk.write(128 * K, b"z" * 4 * K)
        assert execute("fastcbw-status")["disks"]["a"]["bitmaps"][0]["busy"]
        with pytest.raises(Error, match="Bitmap 'b0' is currently in use by another operation and cannot be used .by job 'ja'."):
            start(execute, sync="full", bitmap="b0", **{"bitmap-mode": "always", "job-id": "again"})
        gate.open()
        assert outcome(daemon) == "completed"
    assert target(daemon).read(0, LENGTH) == before and marked(daemon) == [(128, 4)]
    execute("job-dismiss", id="ja")
    start(execute, sync="incremental", bitmap="b0")
    assert outcome(daemon) == "completed" and marked(daemon) == []
    assert target(daemon).read(0, LENGTH) == disk.read(0, LENGTH)


def test_a_full_backup_that_is_cancelled_leaves_in_an_always_bitmap_what_was_not_copied(daemon, execute):
    disk = daemon.disks["a"]
    disk.write(0, bytes(range(1, 256)) * 4112)       # no zeroes
    slow = put(daemon, DelayDevice(MemoryDevice(LENGTH)))
    with slow.hold("write", 256 * K, LENGTH - 256 * K) as gate:
        start(execute, sync="full", bitmap="b0", **{"bitmap-mode": "always", "x-perf": {"max-workers": 1}})
        gate.wait_arrived()
        execute("job-cancel", id="ja")
        gate.open()
        assert outcome(daemon) == "cancelled"
    ((offset, length),) = marked(daemon)
    assert 256 <= offset <= 512 and offset + length == 1024       # what was under way at the cancel may have ended well
    assert target(daemon).read(0, offset * K) == disk.read(0, offset * K)
    execute("job-dismiss", id="ja")
    start(execute, sync="incremental", bitmap="b0")
    assert outcome(daemon) == "completed"
    assert target(daemon).read(0, LENGTH) == disk.read(0, LENGTH)


def test_what_a_target_that_cannot_flush_was_given_counts_as_not_copied(daemon, execute):
    daemon.disks["a"].write(16 * K, b"x" * 4 * K)
    failing = put(daemon, FaultDevice(MemoryDevice(LENGTH)))
    with failing.fail_on("flush"):
        start(execute, sync="bitmap", bitmap="b0", **{"bitmap-mode": "always"})
        assert outcome(daemon) == "failed"
    assert marked(daemon) == [(16, 4)]


def increments(execute, mode="grouped", **others):
    execute("transaction", actions=[{"type": "blockdev-backup", "data": backup(disk, sync="incremental", bitmap="b0", **others)} for disk in "ab"],
            properties={"completion-mode": mode})


def test_increments_of_two_disks_are_of_one_instant_and_complete_together(daemon, execute):
    for disk in "ab":
        daemon.disks[disk].write(16 * K, disk.upper().encode() * 4 * K)
    increments(execute)
    for disk in "ab":
        assert outcome(daemon, disk) == "completed" and marked(daemon, disk) == []
        assert target(daemon, disk).read(16 * K, 4 * K) == disk.upper().encode() * 4 * K
        assert daemon.jobs.find(f"j{disk}").job.result["data_bytes"] == 4 * K


@pytest.mark.parametrize("mode, of_a", [("grouped", "cancelled"), ("individual", "completed")])
def test_when_one_of_two_increments_fails(daemon, execute, mode, of_a):
    """Grouped, the other one is cancelled though its copy is complete, and its bitmap marks all again."""
    for disk in "ab":
        daemon.disks[disk].write(16 * K, disk.upper().encode() * 4 * K)
    failing = put(daemon, FaultDevice(MemoryDevice(LENGTH)), "b")
    with failing.fail_on("write"):
        increments(execute, mode)
        assert (outcome(daemon, "a"), outcome(daemon, "b")) == (of_a, "failed")
    assert marked(daemon, "b") == [(16, 4)]
    assert marked(daemon, "a") == ([(16, 4)] if mode == "grouped" else [])
    if mode == "grouped":
        assert daemon.jobs.find("ja").error == "job 'jb' of the same transaction did not complete"
    for disk in "ab":
        execute("job-dismiss", id=f"j{disk}")
    increments(execute)
    for disk in "ab":
        assert outcome(daemon, disk) == "completed" and marked(daemon, disk) == []


def test_jobs_that_are_grouped_wait_for_each_other_and_one_finalize_is_for_all(daemon, remote, execute):
    slow = put(daemon, DelayDevice(MemoryDevice(LENGTH)), "b")
    daemon.disks["b"].write(16 * K, b"b" * 4 * K)
    with slow.hold("write") as gate:
        increments(execute, **{"auto-finalize": False})
        gate.wait_arrived()
        daemon.jobs.find("ja").job.wait(30)
        while execute("query-jobs")[0]["status"] != "waiting":
            pass
        with pytest.raises(Error, match="Job 'ja' in state 'waiting' cannot accept command verb 'finalize'"):
            execute("job-finalize", id="ja")
        gate.open()
    while {job["status"] for job in execute("query-jobs")} != {"pending"}:
        pass
    assert marked(daemon, "b") == [(16, 4)]         # until it has concluded
    execute("job-finalize", id="jb")
    assert outcome(daemon, "a") == outcome(daemon, "b") == "completed" and marked(daemon, "b") == []


def test_a_cancel_of_one_job_that_waits_cancels_the_group(daemon, execute):
    slow = put(daemon, DelayDevice(MemoryDevice(LENGTH)), "b")
    for disk in "ab":
        daemon.disks[disk].write(16 * K, b"b" * 4 * K)
    with slow.hold("write") as gate:
        increments(execute)
        gate.wait_arrived()
        while execute("query-jobs")[0]["status"] != "waiting":
            pass
        execute("job-cancel", id="ja")
        gate.open()
        assert outcome(daemon, "a") == outcome(daemon, "b") == "cancelled"
    assert marked(daemon, "a") == marked(daemon, "b") == [(16, 4)]


@pytest.mark.parametrize("given, words", [
    ({"sync": "incremental", "bitmap": "b1"}, "Bitmap 'b1' could not be found"),
    ({"sync": "bitmap", "bitmap": "b0"}, "Bitmap sync mode must be given when providing a bitmap"),
    ({"sync": "incremental", "bitmap": "b0", "bitmap-mode": "never"}, "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'"),
    ({"sync": "incremental", "bitmap": "b0", "bitmap-mode": "always"}, "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'"),
    ({"sync": "none", "bitmap": "b0", "bitmap-mode": "never"}, "sync mode 'none' does not produce meaningful bitmap outputs"),
    ({"sync": "none", "bitmap": "b0", "bitmap-mode": "on-success"}, "sync mode 'none' does not produce meaningful bitmap outputs"),
    ({"sync": "none", "bitmap": "b0"}, "Bitmap sync mode must be given when providing a bitmap"),
    ({"sync": "top", "bitmap": "b0"}, "Bitmap sync mode must be given when providing a bitmap"),
    ({"sync": "full", "bitmap": "b0", "bitmap-mode": "sometimes"}, "'bitmap-mode' does not accept value 'sometimes'"),
    ({"sync": "bitmap"}, "must provide a valid bitmap name for 'bitmap' sync mode"),
])
def test_what_makes_no_sense_of_a_bitmap_is_refused_and_leaves_it_alone(daemon, execute, given, words):
    daemon.disks["a"].write(0, b"x")
    before = execute("fastcbw-status")["disks"]["a"]["bitmaps"], execute("fastcbw-graph")
    with pytest.raises(Error, match=words):
        start(execute, **given)
    assert (execute("fastcbw-status")["disks"]["a"]["bitmaps"], execute("fastcbw-graph")) == before and execute("query-jobs") == []


def test_a_snapshot_has_no_bitmaps_to_copy_by(daemon, execute):
    execute("blockdev-add", driver="x-fastcbw-memory", node_name="m", size=LENGTH)
    execute("blockdev-add", driver="x-fastcbw-memory", node_name="temp", size=2 * LENGTH)
    execute("block-dirty-bitmap-add", node="m", name="b1")
    execute("blockdev-add", driver="copy-before-write", node_name="cbw", file="m", target="temp")
    execute("blockdev-add", driver="snapshot-access", node_name="snap", file="cbw")
    with pytest.raises(Error, match="Bitmap 'b1' could not be found .node 'snap' shows a snapshot"):
        execute("blockdev-backup", device="snap", target="to-a", sync="incremental", bitmap="b1")


def test_nobody_may_write_below_the_source_of_a_backup_past_it(daemon, execute, tmp_path):
    """Refused whichever comes first; writes through the source are its guest's, and no conflict."""
    (tmp_path / "disk.img").write_bytes(b"old!" * (LENGTH // 4))
    execute("blockdev-add", driver="file", node_name="file", filename=str(tmp_path / "disk.img"))
    execute("blockdev-add", driver="raw", node_name="disk", file="file")
    execute("block-export-add", type="nbd", id="vm", node_name="disk", writable=True)
    execute("block-export-add", type="nbd", id="below", node_name="file", writable=True)
    conflict = "export 'below' needs 'write' on node 'file' as 'root': conflicts with use by node 'disk' as 'file', which does not allow 'write'"
    with pytest.raises(Error, match=conflict):
        execute("blockdev-backup", device="disk", target="to-a", sync="full", job_id="j")
    assert execute("query-jobs") == []
    execute("block-export-del", id="below")
    slow = put(daemon, DelayDevice(MemoryDevice(LENGTH)))
    with slow.hold("write") as gate:
        execute("blockdev-backup", device="disk", target="to-a", sync="full", job_id="ja", auto_dismiss=False)
        gate.wait_arrived()
        with pytest.raises(Error, match=conflict):
            execute("block-export-add", type="nbd", id="below", node_name="file", writable=True)
        gate.open()
        assert outcome(daemon) == "completed"
    execute("block-export-add", type="nbd", id="below", node_name="file", writable=True)
    assert target(daemon).read(0, LENGTH) == b"old!" * (LENGTH // 4)


@pytest.mark.parametrize("properties, words", [({"completion-mode": "together"}, "'completion-mode' does not accept value 'together'"),
                                               ({"completion-mode": 1}, "'completion-mode' does not accept value '1'"),
                                               ({"colour": 1}, "'properties.colour' is unexpected")])
def test_properties_of_a_transaction_that_make_no_sense_are_refused(execute, properties, words):
    with pytest.raises(Error, match=words):
        execute("transaction", actions=[], properties=properties)


@pytest.mark.parametrize("given, words", [({"sync": "incremental", "bitmap": "b"}, "could not be found|old scheme knows sync full"),
                                          ({"sync": "none"}, "old scheme knows sync full")])
def test_the_old_scheme_makes_full_backups_only_and_one_at_a_time(daemon, execute, given, words):
    execute("blockdev-add", driver="x-fastcbw-memory", node_name="m", size=LENGTH)
    execute("blockdev-add", driver="x-fastcbw-write-notifier", node_name="old", file="m", target="to-a")
    with pytest.raises(Error, match=words):
        execute("blockdev-backup", device="old", target="to-a", job_id="j", **given)
    with pytest.raises(Error, match="several disks of one instant need snapshots"):
        execute("transaction", actions=[{"type": "blockdev-backup", "data": {"device": "old", "target": "to-a", "sync": "full"}},
                                        {"type": "blockdev-backup", "data": {"device": "b", "target": "to-b", "sync": "full"}}])
    assert execute("query-jobs") == []


def test_sync_none_copies_what_the_guest_overwrites_until_it_is_cancelled(daemon, remote, execute):
    disk = daemon.disks["a"]
    disk.write(0, b"x" * 64 * K)
    start(execute, sync="none")
    disk.write(8 * K, b"y" * 4 * K)
    (job,) = execute("query-block-jobs")
    assert (job["status"], job["len"]) == ("running", LENGTH)
    execute("block-job-cancel", device="ja")
    assert outcome(daemon) == "cancelled"
    assert target(daemon).read(0, 16 * K) == bytes(8 * K) + b"x" * 4 * K + bytes(4 * K)
    execute("query-version")
    seen = [event["data"]["status"] for event in remote.client.events if event["event"] == "JOB_STATUS_CHANGE"]
    assert seen == ["created", "running", "aborting", "concluded"] and not disk.snapshots
    assert daemon.nodes.graph.find("to-a").parents == []


def test_sync_none_of_a_snapshot_is_refused(daemon, execute):
    execute("blockdev-add", driver="x-fastcbw-memory", node_name="m", size=LENGTH)
    execute("blockdev-add", driver="copy-before-write", node_name="cbw", file="m", target="to-b")
    execute("blockdev-add", driver="snapshot-access", node_name="snap", file="cbw")
    with pytest.raises(Error, match="nobody writes a snapshot"):
        execute("blockdev-backup", device="snap", target="to-a", sync="none")
