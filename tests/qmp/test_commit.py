"""block-commit of a qcow2 overlay into its raw backing file, while a guest writes; and sync top of one."""

import random
import subprocess
import threading

import pytest

from fastcbw.errors import Error
from fastcbw.export.nbd.client import Client

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


def test_a_guest_writes_all_the_time_and_nothing_of_it_is_missing_in_the_base(nodes, daemon, execute):
    """Verified at the end against what the guest knows it wrote; job-complete is refused while it may still write."""
    execute("block-export-add", type="nbd", id="guest", node_name="top", writable=True)
    wanted = content(nodes)
    rng, stopping = random.Random(5), threading.Event()

    def write():
        with Client(nodes / "nbd", "top") as guest:
            while not stopping.is_set():
                offset, length = rng.randrange(LENGTH - 64 * K), rng.choice([1, 512, 4096, 50_000])
                data = rng.randbytes(length)
                guest.write(offset, data)
                wanted[offset : offset + length] = data
            guest.flush()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        execute("block-commit", device="top", job_id="j", auto_dismiss=False)
        until_ready(execute)
        with pytest.raises(Error, match="export 'guest' needs 'write' on node 'top'.*conflicts with use by job 'j'"):
            execute("job-complete", id="j")
        assert execute("query-block-jobs")[0]["status"] == "ready"
    finally:
        stopping.set()
        writer.join(30)
    execute("block-export-del", id="guest")
    execute("job-complete", id="j")
    assert outcome(daemon) == "completed"
    assert daemon.nodes.graph.find("base").device.read(0, LENGTH) == daemon.nodes.graph.find("top").device.read(0, LENGTH) == wanted


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
    assert outcome(daemon) == "cancelled"
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
