"""block-commit of a qcow2 overlay into its raw backing file, while a guest writes; and sync top of one."""

import random
import subprocess
import threading
from contextlib import contextmanager

import pytest

from fastcbw.errors import Error, JobCancelled
from fastcbw.export.nbd.client import Client
from fastcbw.jobs import commit
from fastcbw.jobs.backup import BackupJob
from fastcbw.jobs.commit import CommitJob
from fastcbw.qmp import server

K, M = 1 << 10, 1 << 20
LENGTH = 8 * M


@pytest.fixture
def execute(remote):
    return remote.client.execute


def qemu_img(*words):
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True, timeout=60)


def qemu_io(path, *commands):
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow2", *words, str(path)], check=True, capture_output=True, timeout=60)


@pytest.fixture
def images(tmp_path):
    """A base of ones, an overlay that has twos at 64K, zeroes at 256K, and threes at the end."""
    (tmp_path / "base.img").write_bytes(b"\x01" * LENGTH)
    qemu_img("create", "-f", "qcow2", "-b", tmp_path / "base.img", "-F", "raw", tmp_path / "top.qcow2")
    qemu_io(tmp_path / "top.qcow2", "write -P 2 64k 64k", "write -z 256k 128k", f"write -P 3 {LENGTH - 512} 512")
    return tmp_path


@pytest.fixture
def nodes(images, daemon, execute):
    execute("blockdev-add", driver="raw", node_name="base", file={"driver": "file", "filename": str(images / "base.img")})
    execute("blockdev-add", driver="qcow2", node_name="top", file={"driver": "file", "filename": str(images / "top.qcow2")})
    return images


def content(path):
    wanted = bytearray(b"\x01" * LENGTH)
    wanted[64 * K : 128 * K] = b"\x02" * 64 * K
    wanted[256 * K : 384 * K] = bytes(128 * K)
    wanted[LENGTH - 512 :] = b"\x03" * 512
    return wanted


def states(remote):
    remote.client.execute("query-version")
    return [event["data"]["status"] for event in remote.client.events if event["event"] == "JOB_STATUS_CHANGE"]


def until_ready(execute):
    while execute("query-block-jobs")[0]["status"] not in ("ready", "concluded"):
        pass
    assert execute("query-block-jobs")[0]["ready"], execute("query-jobs")


def outcome(daemon):
    record = daemon.jobs.find("j")
    record.thread.join(30)
    return record.outcome


def test_an_overlay_is_committed_into_its_backing_file(nodes, daemon, remote, execute):
    execute("block-commit", device="top", base_node="base", job_id="j", auto_dismiss=False)
    until_ready(execute)
    assert "BLOCK_JOB_READY" in {event["event"] for event in remote.client.events}
    (job,) = execute("query-jobs")
    assert (job["type"], job["disk"], job["target"], job["total-progress"] - job["current-progress"]) == ("commit", "top", "base", 0)
    execute("job-complete", id="j")
    assert outcome(daemon) == "completed"
    assert states(remote) == ["created", "running", "ready", "waiting", "pending", "concluded"]
    assert daemon.jobs.find("j").job.result["data_bytes"] <= 256 * K       # what is allocated, not the disk
    assert not daemon.nodes.graph.find("top").disk().bitmaps and not daemon.nodes.graph.find("top").disk().snapshots
    for name in ("top", "base"):
        execute("blockdev-del", node_name=name)
    assert (nodes / "base.img").read_bytes() == content(nodes)


def test_a_guest_that_writes_all_the_time_is_moved_to_the_base_and_nothing_is_lost(nodes, daemon, execute):
    """On one connection, from before the commit to after it; in the end the base is what the guest knows that it wrote."""
    execute("block-export-add", type="nbd", id="guest", node_name="top", writable=True)
    wanted = content(nodes)
    rng, stopping, errors, count = random.Random(5), threading.Event(), [], [0]

    def write():
        try:
            with Client(nodes / "nbd", "top") as guest:
                while not stopping.is_set():
                    offset, length = rng.randrange(LENGTH - 64 * K), rng.choice([1, 512, 4096, 50_000])
                    data = rng.randbytes(length)
                    guest.write(offset, data)
                    wanted[offset : offset + length] = data
                    assert guest.read(offset, length) == data
                    count[0] += 1
                guest.flush()
        except BaseException as error:
            errors.append(error)

    def until_more(n=30):
        seen = count[0]
        while count[0] < seen + n and not errors:
            pass

    writer = threading.Thread(target=write)
    writer.start()
    try:
        execute("block-commit", device="top", job_id="j", auto_dismiss=False)
        until_ready(execute)
        until_more()
        execute("job-complete", id="j")
        assert [export["node-name"] for export in execute("query-block-exports") if export["id"] == "guest"] == ["base"]
        assert outcome(daemon) == "completed"
        before = daemon.nodes.graph.find("top").device.read(0, LENGTH)
        until_more()
    finally:
        stopping.set()
        writer.join(30)
    assert errors == []
    assert daemon.nodes.graph.find("base").device.read(0, LENGTH) == wanted
    assert daemon.nodes.graph.find("top").parents == [] and before != wanted
    execute("block-export-del", id="guest")
    execute("blockdev-del", node_name="top")
    execute("blockdev-del", node_name="base")
    assert (nodes / "base.img").read_bytes() == wanted


def test_job_complete_is_refused_while_the_overlay_is_written_otherwise_and_the_job_goes_on(nodes, daemon, execute):
    execute("blockdev-add", driver="x-fastcbw-delay", node_name="slow", file="top")
    execute("block-export-add", type="nbd", id="other", node_name="slow", writable=True)
    execute("block-export-add", type="nbd", id="guest", node_name="top", writable=True)
    execute("block-commit", device="top", job_id="j", auto_dismiss=False)
    until_ready(execute)
    before = execute("fastcbw-graph"), execute("query-block-exports")
    with pytest.raises(Error, match="node 'slow' needs 'write' on node 'top'.*conflicts with use by job 'j'"):
        execute("job-complete", id="j")
    assert (execute("fastcbw-graph"), execute("query-block-exports")) == before
    assert execute("query-block-jobs")[0]["status"] == "ready"
    with Client(nodes / "nbd", "top") as guest, Client(nodes / "nbd", "slow") as other:
        guest.write(0, b"guest")
        other.write(5, b"other")
    execute("block-export-del", id="other")
    execute("job-complete", id="j")
    assert outcome(daemon) == "completed"
    assert daemon.nodes.graph.find("base").device.read(0, 10) == b"guestother"
    with Client(nodes / "nbd", "top") as guest:
        guest.write(0, b"after")
    assert daemon.nodes.graph.find("base").device.read(0, 10) == b"afterother"
    assert daemon.nodes.graph.find("top").device.read(0, 10) == b"guestother"


def test_a_last_pass_that_takes_too_long_is_an_error_and_the_guest_goes_on_above(nodes, daemon, execute, monkeypatch):
    execute("block-export-add", type="nbd", id="guest", node_name="top", writable=True)
    execute("block-commit", device="top", job_id="j", auto_dismiss=False)
    until_ready(execute)
    execute("job-pause", id="j")        # so that something is left
    monkeypatch.setattr(commit, "LAST_SECONDS", -1.0)
    with Client(nodes / "nbd", "top") as guest:
        guest.write(0, b"guest")
        execute("job-resume", id="j")
        monkeypatch.setattr(CommitJob, "_left", lambda self: 1)
        with pytest.raises(Error, match="the last pass did not end within"):
            execute("job-complete", id="j")
        guest.write(5, b"more")
        monkeypatch.undo()
        assert [export["node-name"] for export in execute("query-block-exports") if export["id"] == "guest"] == ["top"]
        execute("job-complete", id="j")
        assert outcome(daemon) == "completed"
        guest.write(9, b"!")
        assert guest.read(0, 10) == b"guestmore!"
    assert daemon.nodes.graph.find("base").device.read(0, 10) == b"guestmore!"


@pytest.mark.parametrize("force", [False, True])
def test_a_job_that_is_ready_is_cancelled_softly_or_by_force(nodes, daemon, execute, force):
    execute("block-commit", device="top", job_id="j", auto_dismiss=False)
    until_ready(execute)
    execute("job-pause", id="j")
    assert execute("query-block-jobs")[0]["status"] == "standby"
    execute("job-resume", id="j")
    execute("block-job-cancel", device="j", force=force)
    assert outcome(daemon) == ("cancelled" if force else "completed")
    assert daemon.nodes.graph.find("base").device.read(0, LENGTH) == content(nodes)


def test_a_commit_that_is_cancelled_early_leaves_the_overlay_whole(nodes, daemon, execute):
    execute("block-commit", device="top", job_id="j", speed=1, auto_dismiss=False)
    with pytest.raises(Error, match="Job 'j' in state 'running' cannot accept command verb 'complete'"):
        execute("job-complete", id="j")
    with pytest.raises(Error, match="is kept for job 'j'|not found"):
        execute("block-dirty-bitmap-clear", node="top", name="j.commit")
    execute("job-cancel", id="j")
    assert outcome(daemon) == "cancelled" and "node 'base' is incomplete" in daemon.jobs.find("j").error
    assert daemon.nodes.graph.find("top").device.read(0, LENGTH) == content(nodes)
    assert daemon.nodes.graph.find("base").parents == daemon.nodes.graph.find("top").parents == []


def test_a_base_that_somebody_uses_and_what_is_no_backing_file_are_refused(nodes, daemon, execute):
    (nodes / "other.img").write_bytes(bytes(LENGTH))
    execute("blockdev-add", driver="file", node_name="other", filename=str(nodes / "other.img"))
    execute("block-export-add", type="nbd", id="e", node_name="base")
    for given, words in (({"device": "nowhere"}, "Cannot find device='' nor node-name='nowhere'"),
                         ({"device": "other"}, "driver 'file' has no backing file"),
                         ({"device": "top", "base_node": "other"}, "'base-node': 'other' does not show the backing file .*base.img"),
                         ({"device": "top", "base": str(nodes / "other.img")}, "is not the backing file, which is .*base.img"),
                         ({"device": "top", "top_node": "other"}, "'other' is not the active layer of 'top'"),
                         ({"device": "top", "top": str(nodes / "other.img")}, "is not the active layer"),
                         ({"device": "top", "speed": -1}, "non-negative"),
                         ({"device": "top", "on_error": "stop"}, "'on-error' does not accept value 'stop'"),
                         ({"device": "top"}, "export 'e' needs 'consistent-read' on node 'base'.*conflicts with use by job 'top'")):
        with pytest.raises(Error, match=words):
            execute("block-commit", **given)
    assert execute("query-jobs") == [] and daemon.nodes.graph.find("top").parents == []
    qemu_img("create", "-f", "qcow2", nodes / "alone.qcow2", "1M")
    execute("blockdev-add", driver="qcow2", node_name="alone", file={"driver": "file", "filename": str(nodes / "alone.qcow2")})
    with pytest.raises(Error, match="alone.qcow2 has no backing file"):
        execute("block-commit", device="alone")
    execute("block-export-del", id="e")
    execute("blockdev-del", node_name="base")
    with pytest.raises(Error, match="no node shows the backing file .*base.img as a raw image"):
        execute("block-commit", device="top")


@pytest.mark.parametrize("length", [LENGTH - M, LENGTH + M])
def test_a_base_of_another_length_is_refused(nodes, daemon, execute, length):
    execute("blockdev-del", node_name="base")
    with open(nodes / "base.img", "r+b") as file:
        file.truncate(length)
    execute("blockdev-add", driver="raw", node_name="base", file={"driver": "file", "filename": str(nodes / "base.img")})
    with pytest.raises(Error, match=f"node 'base': its {length} bytes are not the {LENGTH} of 'top' .resize the base first."):
        execute("block-commit", device="top")
    assert execute("query-jobs") == [] and daemon.nodes.graph.find("top").parents == []


def test_sync_top_copies_what_the_overlay_has_of_its_own(nodes, daemon, execute):
    execute("blockdev-add", driver="x-fastcbw-memory", node_name="copy", size=LENGTH)
    execute("blockdev-backup", device="top", target="copy", sync="top", job_id="j", auto_dismiss=False)
    assert outcome(daemon) == "completed"
    wanted = bytearray(content(nodes))
    for at in range(0, LENGTH, 64 * K):
        if wanted[at : at + 64 * K] == b"\x01" * 64 * K:
            wanted[at : at + 64 * K] = bytes(64 * K)
    assert daemon.nodes.graph.find("copy").device.read(0, LENGTH) == wanted
    assert not daemon.nodes.graph.find("top").disk().bitmaps
    execute("job-dismiss", id="j")
    execute("blockdev-backup", device="top", target="copy", sync="full", job_id="j", auto_dismiss=False)
    assert outcome(daemon) == "completed"
    assert daemon.nodes.graph.find("copy").device.read(0, LENGTH) == content(nodes)


def test_job_complete_is_refused_while_the_overlay_has_a_snapshot_which_would_read_what_the_guest_writes_to_the_base(nodes, daemon, execute):
    execute("block-export-add", type="nbd", id="guest", node_name="top", writable=True)
    execute("block-commit", device="top", job_id="j", auto_dismiss=False)
    until_ready(execute)
    execute("fastcbw-snapshot-create", name="s", disks=["top"])
    before = execute("fastcbw-graph"), execute("query-block-exports")
    with pytest.raises(Error, match="node 'top': its disk has the snapshot s, which would read what the guest writes to the base"):
        execute("job-complete", id="j")
    assert (execute("fastcbw-graph"), execute("query-block-exports")) == before
    assert execute("query-block-jobs")[0]["status"] == "ready"
    with Client(nodes / "nbd", "top") as guest:
        guest.write(M, b"guest")        # where the overlay had nothing of its own
    assert daemon.snapshot("top", "s").read(0, LENGTH) == content(nodes)
    execute("fastcbw-snapshot-delete", name="s", disks=["top"])
    execute("job-complete", id="j")
    assert outcome(daemon) == "completed"
    assert daemon.nodes.graph.find("base").device.read(M, 5) == b"guest"


def test_job_complete_is_refused_while_somebody_else_reads_the_overlay(nodes, daemon, execute):
    execute("blockdev-add", driver="x-fastcbw-delay", node_name="slow", file="top")
    execute("block-export-add", type="nbd", id="reader", node_name="slow")
    execute("block-export-add", type="nbd", id="guest", node_name="top", writable=True)
    execute("block-commit", device="top", job_id="j", auto_dismiss=False)
    until_ready(execute)
    before = execute("fastcbw-graph"), execute("query-block-exports")
    with pytest.raises(Error, match="node 'slow' reads node 'top' as 'file', which would show it what the guest writes to the base"):
        execute("job-complete", id="j")
    assert (execute("fastcbw-graph"), execute("query-block-exports")) == before
    execute("block-export-del", id="reader")
    execute("job-complete", id="j")
    assert outcome(daemon) == "completed"


def test_a_bitmap_and_a_snapshot_of_the_base_see_what_is_committed(nodes, daemon, execute):
    execute("block-dirty-bitmap-add", node="base", name="b", granularity=64 * K)
    execute("fastcbw-snapshot-create", name="s", disks=["base"])
    execute("block-commit", device="top", job_id="j", auto_dismiss=False)
    until_ready(execute)
    execute("job-complete", id="j")
    assert outcome(daemon) == "completed"
    base = daemon.nodes.graph.find("base").disk()
    assert base.read(0, LENGTH) == content(nodes)
    assert base.snapshots["s"].read(0, LENGTH) == b"\x01" * LENGTH
    assert base.bitmaps["b"].report()["count"] == (64 + 128 + 64) * K        # what lies in the overlay
    execute("fastcbw-snapshot-delete", name="s", disks=["base"])


def ready_job(daemon, execute, **more):
    execute("block-export-add", type="nbd", id="guest", node_name="top", writable=True)
    execute("block-commit", device="top", job_id="j", auto_dismiss=False, **more)
    until_ready(execute)
    return daemon.jobs.find("j")


def where(execute):
    return [export["node-name"] for export in execute("query-block-exports") if export["id"] == "guest"]


def until(record, state):
    while record.status != state:
        assert record.outcome is None


def test_a_commit_whose_guest_is_on_the_base_can_not_be_cancelled(nodes, daemon, execute):
    record = ready_job(daemon, execute, auto_finalize=False)
    execute("job-complete", id="j")
    until(record, "pending")
    for verb in ({"command": "job-cancel", "id": "j"}, {"command": "block-job-cancel", "device": "j", "force": True}):
        with pytest.raises(Error, match="the guest is on 'base' already, the job can't be cancelled"):
            execute(**verb)
    assert record.status == "pending" and where(execute) == ["base"]
    execute("job-finalize", id="j")
    assert outcome(daemon) == "completed"


def test_a_commit_whose_guest_is_on_the_base_has_completed_when_the_daemon_ends(nodes, daemon, execute):
    record = ready_job(daemon, execute, auto_finalize=False)
    execute("job-complete", id="j")
    until(record, "pending")
    daemon.close()
    assert record.outcome == "completed" and record.error is None


def test_nothing_that_can_fail_is_done_to_the_base_once_the_guest_is_there(nodes, daemon, execute):
    record = ready_job(daemon, execute)
    alone = record.job._alone

    class Full:
        def flush(self):
            raise OSError(28, "No space left on device")

    @contextmanager
    def then_full():
        with alone():
            yield
        record.job.base = Full()

    record.job._alone = then_full
    execute("job-complete", id="j")
    assert outcome(daemon) == "completed" and record.error is None and where(execute) == ["base"]


@pytest.mark.parametrize("kind", [MemoryError, ValueError, RuntimeError])
def test_job_complete_tells_whatever_kept_the_guest_from_the_base_and_the_job_goes_on(nodes, daemon, execute, kind):
    record = ready_job(daemon, execute)
    alone = record.job._alone

    @contextmanager
    def fails():
        with alone():
            raise kind("no room for a snapshot")
            yield

    record.job._alone = fails
    with pytest.raises(Error, match="no room for a snapshot"):
        execute("job-complete", id="j")
    assert record.status == "ready" and not record.job.pivoted and where(execute) == ["top"]
    record.job._alone = alone
    execute("job-complete", id="j")
    assert outcome(daemon) == "completed" and where(execute) == ["base"]


def held_in_a_pass(monkeypatch, end):
    """Have the next pass of a job that is ready call END(job) in place of its work; return what is set when it is there."""
    inside = threading.Event()

    def copy(self, until=None):
        inside.set()
        end(self)

    monkeypatch.setattr(CommitJob, "_left", lambda self: 1)
    monkeypatch.setattr(CommitJob, "_copy", copy)
    return inside


def test_job_complete_answers_when_the_pass_that_is_under_way_fails(nodes, daemon, execute, monkeypatch):
    record = ready_job(daemon, execute)

    def fail_once_completing(job):
        with job._changed:
            job._changed.wait_for(lambda: job._completing)
        raise OSError(28, "No space left on device")

    assert held_in_a_pass(monkeypatch, fail_once_completing).wait(30)
    with pytest.raises(Error, match="No space left on device"):
        execute("job-complete", id="j")
    monkeypatch.undo()
    assert outcome(daemon) == "failed" and "No space left on device" in record.error and where(execute) == ["top"]
    with pytest.raises(Error, match="has ended"):
        record.job.complete()


def test_a_commit_that_is_paused_is_not_completed_and_one_that_is_being_completed_is_neither_paused_nor_completed_again(nodes, daemon, execute):
    record = ready_job(daemon, execute)
    execute("job-pause", id="j")
    with pytest.raises(Error, match="Job 'j' in state 'standby' cannot accept command verb 'complete'"):
        execute("job-complete", id="j")
    with pytest.raises(Error, match="j: is paused"):
        record.job.complete()
    execute("job-resume", id="j")
    alone, refused = record.job._alone, []

    @contextmanager
    def meanwhile():
        with alone():
            for verb in (record.job.pause, record.job.complete, lambda: record.job.complete(pivot=False)):
                with pytest.raises(Error, match="is being completed") as error:
                    verb()
                refused.append(error)
            yield

    record.job._alone = meanwhile
    execute("job-complete", id="j")
    assert outcome(daemon) == "completed" and len(refused) == 3


def test_a_commit_that_is_paused_and_cancelled_softly_ends(nodes, daemon, execute):
    ready_job(daemon, execute)
    execute("job-pause", id="j")
    execute("block-job-cancel", device="j")
    assert outcome(daemon) == "completed" and where(execute) == ["top"]


def test_the_daemon_ends_while_a_client_waits_for_a_commit_to_complete(nodes, daemon, execute, monkeypatch):
    record = ready_job(daemon, execute)
    monkeypatch.setattr(server, "CLOSE_SECONDS_LIMIT", 0)

    def until_cancelled(job):
        with job._changed:
            job._changed.wait_for(lambda: job.cancelled)
        raise JobCancelled("cancelled")

    assert held_in_a_pass(monkeypatch, until_cancelled).wait(30)
    answers = []

    def complete():
        try:
            answers.append(execute("job-complete", id="j"))
        except (Error, OSError) as error:
            answers.append(error)

    waiting = threading.Thread(target=complete)
    waiting.start()
    while record.job._completing is None:
        pass
    daemon.close()
    waiting.join(30)
    assert record.outcome == "cancelled" and isinstance(answers[0], (Error, OSError))


def test_the_guest_goes_on_before_a_last_pass_that_took_too_long_has_ended(nodes, daemon, execute, monkeypatch):
    record = ready_job(daemon, execute)
    run, cancel, wait, went_on = BackupJob.run, BackupJob.cancel, BackupJob.wait, []
    was_cancelled, waited_for = threading.Event(), threading.Event()

    def held(job):
        if record.job._completing:      # the last pass is not through before it is cancelled
            assert was_cancelled.wait(30)
        run(job)

    def cancelled(job):
        cancel(job)
        was_cancelled.set()

    def slow(job, timeout=None):
        if timeout is not None:
            raise TimeoutError("slow")
        if job.cancelled:
            guest.write(5, b"more")
            assert "j.commit" in record.job.disk.snapshots
            went_on.append(guest.read(5, 4))
            waited_for.set()
        return wait(job, timeout)

    with Client(nodes / "nbd", "top") as guest:
        monkeypatch.setattr(BackupJob, "run", held)
        monkeypatch.setattr(BackupJob, "cancel", cancelled)
        monkeypatch.setattr(BackupJob, "wait", slow)
        monkeypatch.setattr(CommitJob, "_left", lambda self: 1)
        with pytest.raises(Error, match="the last pass did not end within 2 s"):
            execute("job-complete", id="j")
        assert waited_for.wait(30)
        monkeypatch.undo()
        execute("job-complete", id="j")
        assert outcome(daemon) == "completed" and went_on == [b"more"]
        assert guest.read(5, 4) == daemon.nodes.graph.find("base").device.read(5, 4) == b"more"


def test_the_overlay_can_not_be_used_once_its_guest_is_on_the_base(nodes, daemon, execute):
    execute("blockdev-add", driver="x-fastcbw-memory", node_name="copy", size=LENGTH)
    execute("blockdev-add", driver="x-fastcbw-delay", node_name="slow", file="top")
    record = ready_job(daemon, execute, auto_finalize=False)
    execute("job-complete", id="j")
    words = "node 'top' was committed to node 'base', which its guest writes"

    def all_are_refused():
        before = execute("fastcbw-graph"), execute("query-block-exports")
        for command, given in (("block-export-add", {"type": "nbd", "id": "e", "node_name": "top", "name": "e"}),
                               ("block-export-add", {"type": "nbd", "id": "e", "node_name": "slow", "writable": True}),
                               ("blockdev-backup", {"device": "top", "target": "copy", "sync": "full", "job_id": "b"}),
                               ("fastcbw-replace", {"parent": "guest", "node": "top"}),
                               ("fastcbw-snapshot-create", {"name": "s", "disks": ["top"]}),
                               ("blockdev-add", {"driver": "copy-before-write", "node_name": "cbw", "file": "top", "target": "copy"})):
            with pytest.raises(Error, match=words):
                execute(command, **given)
        assert (execute("fastcbw-graph"), execute("query-block-exports")) == before
        assert not daemon.nodes.graph.find("top").disk().snapshots

    until(record, "pending")
    all_are_refused()
    execute("job-finalize", id="j")
    assert outcome(daemon) == "completed"
    all_are_refused()
    execute("fastcbw-snapshot-create", name="s", disks=["base"])
    assert daemon.snapshot("base", "s").read(0, LENGTH) == content(nodes)
    execute("fastcbw-snapshot-delete", name="s", disks=["base"])
    for name in ("slow", "top"):
        execute("blockdev-del", node_name=name)
