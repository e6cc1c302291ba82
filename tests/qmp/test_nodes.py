"""Nodes, exports, backups and transactions over QMP, as QEMU's own tools send them."""

import subprocess
import threading

import pytest
from test_qemu_qmp_client import drive

from fastcbw.errors import Error
from fastcbw.export.nbd import server
from fastcbw.export.nbd.client import Client
from fastcbw.wire import constants as c

LENGTH = 1 << 20
K = 1 << 10


@pytest.fixture
def execute(remote):
    """Send one command; a name with _ stands for -."""
    return remote.client.execute


@pytest.fixture
def disk(execute, tmp_path):
    """A node `disk` over an image of 1 MiB, exported writable as `vm`."""
    (tmp_path / "disk.img").write_bytes(b"old!" * (LENGTH // 4))
    (tmp_path / "temp.img").write_bytes(b"")
    with open(tmp_path / "temp.img", "wb") as file:
        file.truncate(8 * LENGTH)
    execute("blockdev-add", driver="raw", node_name="disk", file={"driver": "file", "filename": str(tmp_path / "disk.img")})
    execute("blockdev-add", driver="file", node_name="temp", filename=str(tmp_path / "temp.img"))
    return "disk"


CBW = {"driver": "copy-before-write", "node-name": "cbw", "file": "disk", "target": "temp", "on-cbw-error": "break-snapshot"}


def add(execute, **description):
    execute("blockdev-add", **description)


def test_the_fleecing_sequence_of_qemu_works_as_it_is(daemon, disk, execute, tmp_path):
    add(execute, **CBW)
    add(execute, driver="snapshot-access", node_name="snap", file="cbw")
    execute("block-export-add", type="nbd", id="vm", node_name="cbw", name="vm", writable=True)
    execute("block-export-add", type="nbd", id="fleece", node_name="snap", name="fleece")
    with Client(tmp_path / "nbd", "vm") as guest, Client(tmp_path / "nbd", "fleece") as reader:
        guest.write(0, b"new!" * 16384)
        assert reader.read(0, 128 * K) == b"old!" * (32 * K)
        assert guest.read(0, 64 * K) == b"new!" * (16 * K)
        with pytest.raises(Error, match="Node snap is in use: by export 'fleece'"):
            execute("blockdev-del", node_name="snap")
        with pytest.raises(Error, match="export 'fleece' still in use"):
            execute("block-export-del", id="fleece")
    assert {export["id"] for export in execute("query-block-exports")} >= {"vm", "fleece"}
    for id in ("fleece", "vm"):
        execute("block-export-del", id=id)
    for node in ("snap", "cbw", "disk", "temp"):
        execute("blockdev-del", node_name=node)
    assert (tmp_path / "disk.img").read_bytes()[:8] == b"new!new!"
    assert {node["node-name"] for node in execute("query-named-block-nodes")} == {"a", "b"}


def test_the_snapshot_of_a_node_ends_with_the_node_alone(daemon, remote, disk, execute, tmp_path):
    add(execute, **CBW)
    add(execute, driver="snapshot-access", node_name="snap", file="cbw")
    execute("block-export-add", type="nbd", id="fleece", node_name="snap", name="fleece")
    with pytest.raises(Error, match=r"snapshot disk.file@cbw: is that of node 'cbw', and ends with it \(blockdev-del\)"):
        execute("fastcbw-snapshot-delete", name="cbw", disks=["disk"])
    (listed,) = execute("fastcbw-snapshot-list")
    assert listed["name"] == "cbw" and "uri" not in listed      # nothing is exported as disk.file@cbw
    with Client(tmp_path / "nbd", "fleece") as reader:
        assert reader.read(0, 4) == b"old!"


def test_metrics_and_latencies_are_of_disks_under_nodes_too(daemon, remote, disk, execute, tmp_path):
    """A disk that only blockdev-add names is counted and measured as one that the daemon serves by itself, and goes with its node."""
    add(execute, **CBW)
    execute("block-export-add", type="nbd", id="vm", node_name="cbw", name="vm", writable=True)
    (name,) = set(remote.status()["disks"]) - {"a", "b"}        # that of the node at the bottom
    with Client(tmp_path / "nbd", "vm") as guest:
        assert remote.latencies()[name]["preserving"] == []
        guest.write(0, b"new!")                 # preserves
        guest.write(0, b"new!" * 2)             # settled
        kinds = remote.latencies()[name]
        assert [sum(count for _, count in kinds[kind]) for kind in ("settled", "preserving")] == [1, 1]
        text = remote.metrics()
    for sample in (f'disk_guest_writes_total{{disk="{name}"}} 2', f'disk_guest_preserving_total{{disk="{name}"}} 1',
                   f'disk_guest_write_seconds_count{{disk="{name}",kind="settled"}} 1',
                   f'disk_guest_write_seconds_count{{disk="{name}",kind="preserving"}} 1',
                   f'snapshot_ram_bytes{{disk="{name}",snapshot="cbw"}} 65536', f'disk_saved_bytes{{disk="{name}",cause="lazy-discard"}} 0'):
        assert f"fastcbw_{sample}\n" in text, sample
    execute("block-export-del", id="vm")
    for node in ("cbw", "disk"):
        execute("blockdev-del", node_name=node)
    assert set(remote.latencies()) == {"a", "b"} and f'disk="{name}"' not in remote.metrics()


def test_a_disk_that_comes_back_under_its_node_name_is_measured_anew(daemon, remote, disk, execute, tmp_path):
    (tmp_path / "disk2.img").write_bytes(b"old!" * (LENGTH // 4))
    for _ in range(2):
        add(execute, driver="file", node_name="again", filename=str(tmp_path / "disk2.img"))
        add(execute, **CBW | {"file": "again"})
        assert remote.latencies()["again"]["settled"] == remote.latencies()["again"]["preserving"] == []
        execute("block-export-add", type="nbd", id="vm", node_name="cbw", name="vm", writable=True)
        with Client(tmp_path / "nbd", "vm") as guest:
            guest.write(0, b"new!")
        assert sum(count for _, count in remote.latencies()["again"]["preserving"]) == 1
        execute("block-export-del", id="vm")
        for node in ("cbw", "again"):
            execute("blockdev-del", node_name=node)


def test_an_unmodified_client_pushes_a_backup_from_a_snapshot_node(daemon, disk, execute, tmp_path):
    with open(tmp_path / "copy.img", "wb") as file:
        file.truncate(LENGTH)

    async def script(client):
        await client.execute("blockdev-add", CBW)
        await client.execute("blockdev-add", {"driver": "snapshot-access", "node-name": "snap", "file": "cbw"})
        await client.execute("block-export-add", {"type": "nbd", "id": "vm", "node-name": "cbw", "writable": True})
        await client.execute("blockdev-add", {"driver": "raw", "node-name": "copy",
                                              "file": {"driver": "file", "filename": str(tmp_path / "copy.img")}})
        with Client(tmp_path / "nbd", "cbw") as guest:
            guest.write(0, b"new!" * 1000)
        with client.listener(names=("JOB_STATUS_CHANGE",)) as events:
            await client.execute("blockdev-backup", {"job-id": "j", "device": "snap", "target": "copy", "sync": "full"})
            seen = []
            while "null" not in seen:
                seen.append((await events.get())["data"]["status"])
        return seen, await client.execute("query-jobs")

    seen, jobs = drive(tmp_path / "qmp", script)
    assert seen[-2:] == ["concluded", "null"] and jobs == []
    assert (tmp_path / "copy.img").read_bytes() == b"old!" * (LENGTH // 4)


def test_two_live_disks_are_backed_up_at_one_instant_by_a_transaction(daemon, execute, tmp_path):
    """Each write of the guest is n to a, then n to b: no backup of b is ahead of that of a."""
    for name in "ab":
        add(execute, driver="x-fastcbw-memory", node_name=f"copy-{name}", size=LENGTH)
    stopping = threading.Event()

    def write():
        n = 0
        while not stopping.is_set():
            n += 1
            for name in "ab":
                daemon.disks[name].write(0, n.to_bytes(8, "little"))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(20):
            execute("transaction", actions=[
                {"type": "blockdev-backup", "data": {"job-id": f"j{name}", "device": name, "target": f"copy-{name}", "sync": "full",
                                                     "auto-dismiss": False}} for name in "ab"])
            for name in "ab":
                daemon.jobs.find(f"j{name}").thread.join(30)
                assert daemon.jobs.find(f"j{name}").outcome == "completed"
                execute("job-dismiss", id=f"j{name}")
            a, b = (int.from_bytes(daemon.nodes.graph.find(f"copy-{name}").device.read(0, 8), "little") for name in "ab")
            assert b <= a <= b + 1
    finally:
        stopping.set()
        writer.join()
    assert not daemon.disks["a"].snapshots


def test_the_filter_is_inserted_and_removed_above_a_disk_in_use(daemon, disk, execute, tmp_path):
    """A verifying writer keeps its connection while filters come and go; nothing acknowledged is lost."""
    execute("block-export-add", type="nbd", id="vm", node_name="disk", writable=True)
    written = [b"old!" * K] * 64
    errors, stopping = [], threading.Event()

    def write():
        n = 0
        try:
            with Client(tmp_path / "nbd", "disk") as guest:
                while not stopping.is_set():
                    n += 1
                    written[n % 64] = n.to_bytes(4, "little") * K
                    guest.write(n % 64 * 4096, written[n % 64])
                    assert guest.read((n - 9) % 64 * 4096, 4096) == written[(n - 9) % 64]
        except BaseException as error:
            errors.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(100):
            execute("transaction", actions=[{"type": "fastcbw-replace", "data": {"parent": "vm", "node": "cbw"}},
                                            {"type": "blockdev-add", "data": CBW}])
            add(execute, driver="snapshot-access", node_name="snap", file="cbw")
            snapshot = daemon.nodes.graph.find("snap").device
            first = snapshot.read(0, 256 * K)
            assert snapshot.read(0, 256 * K) == first
            execute("transaction", actions=[{"type": "blockdev-del", "data": {"node-name": name}} for name in ("cbw", "snap")]
                    + [{"type": "fastcbw-replace", "data": {"parent": "vm", "node": "disk"}}])
    finally:
        stopping.set()
        writer.join(30)
    assert errors == []
    execute("block-export-del", id="vm")
    assert (tmp_path / "disk.img").read_bytes()[:256 * K] == b"".join(written)


def test_a_transaction_that_fails_undoes_nodes_exports_and_jobs(daemon, disk, execute, tmp_path):
    before = execute("fastcbw-graph"), execute("query-block-exports"), execute("query-jobs")
    with pytest.raises(Error, match="Cannot find device='' nor node-name='nowhere'"):
        execute("transaction", actions=[
            {"type": "blockdev-add", "data": CBW},
            {"type": "block-export-add", "data": {"type": "nbd", "id": "vm", "node-name": "cbw", "writable": True}},
            {"type": "blockdev-backup", "data": {"device": "a", "target": "temp", "sync": "full"}},
            {"type": "blockdev-backup", "data": {"device": "nowhere", "target": "temp", "sync": "full"}}])
    assert (execute("fastcbw-graph"), execute("query-block-exports"), execute("query-jobs")) == before
    assert not daemon.nodes.graph.find("disk").disk().snapshots


@pytest.mark.parametrize("given, words", [
    ({"sync": "half"}, "Parameter 'sync' does not accept value 'half'"),
    ({"sync": "full", "bitmap": "b", "bitmap-mode": "never"}, "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode 'full'"),
    ({"sync": "top", "bitmap": "b", "bitmap-mode": "never"}, "has no meaningful effect when combined with sync mode 'top'"),
    ({"sync": "none", "bitmap": "b", "bitmap-mode": "always"}, "sync mode 'none' does not produce meaningful bitmap outputs"),
    ({"sync": "full", "bitmap": "b"}, "Bitmap sync mode must be given when providing a bitmap"),
    ({"sync": "full", "bitmap-mode": "always"}, "Cannot specify bitmap sync mode without a bitmap"),
    ({"sync": "incremental"}, "must provide a valid bitmap name for 'incremental' sync mode"),
    ({"sync": "incremental", "bitmap": "b", "bitmap-mode": "always"}, "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'"),
    ({"sync": "full", "speed": -1}, "Parameter 'speed' expects a non-negative value"),
    ({"sync": "full", "compress": True}, "Parameter 'compress' does not accept value 'True'"),
    ({"sync": "full", "on-target-error": "stop"}, "Parameter 'on-target-error' does not accept value 'stop'"),
    ({"sync": "full", "x-perf": {"max-weight": 1}}, "Parameter 'x-perf.max-weight' is unexpected"),
])
def test_a_wrong_backup_is_refused_in_the_words_of_qemu(daemon, disk, execute, given, words):
    with pytest.raises(Error, match=words):
        execute("blockdev-backup", device="disk", target="temp", job_id="j", **given)
    assert execute("query-jobs") == [] and "temp" in daemon.nodes.graph.nodes
    assert daemon.nodes.graph.find("temp").parents == []


def test_a_backup_is_refused_when_another_parent_writes_its_target_or_below_its_source(daemon, disk, execute):
    execute("block-export-add", type="nbd", id="vm", node_name="temp", writable=True)
    with pytest.raises(Error, match="export 'vm' needs .* on node 'temp'.*conflicts with use by job 'j'"):
        execute("blockdev-backup", device="disk", target="temp", job_id="j", sync="full")
    execute("block-export-del", id="vm")
    execute("block-export-add", type="nbd", id="vm", node_name="disk", writable=True)
    with pytest.raises(Error, match="export 'vm' needs 'write' on node 'disk'.*conflicts with use by node 'cbw'"):
        add(execute, **CBW)


def test_exports_are_refused_by_id_name_and_permission(daemon, disk, execute):
    execute("block-export-add", type="nbd", id="e", node_name="disk")
    for given, words in (({"id": "e", "node_name": "temp"}, "Block export id 'e' is already in use"),
                         ({"id": "f", "node_name": "disk"}, "already has export named 'disk'"),
                         ({"id": "f", "node_name": "nowhere"}, "Cannot find device='' nor node-name='nowhere'"),
                         ({"id": "f", "node_name": "temp", "type": "fuse"}, "'type' does not accept value 'fuse'")):
        with pytest.raises(Error, match=words):
            execute("block-export-add", **({"type": "nbd"} | given))
    with pytest.raises(Error, match="Export 'f' is not found"):
        execute("block-export-del", id="f")


def test_a_second_listener_begins_and_ends(daemon, disk, execute, tmp_path):
    address = {"type": "unix", "data": {"path": str(tmp_path / "nbd2")}}
    execute("nbd-server-start", addr=address)
    with pytest.raises(Error, match="NBD server already running"):
        execute("nbd-server-start", addr=address)
    execute("block-export-add", type="nbd", id="e", node_name="disk", name="late")
    shown = subprocess.run(["nbdinfo", "--size", f"nbd+unix:///late?socket={tmp_path}/nbd2"], capture_output=True, text=True, timeout=30)
    assert shown.stdout.strip() == str(LENGTH), shown.stderr
    execute("nbd-server-stop")
    assert not (tmp_path / "nbd2").exists()
    with pytest.raises(Error, match="NBD server not running"):
        execute("nbd-server-stop")


@pytest.mark.parametrize("addr", [{}, {"type": "vsock", "data": {}}, {"type": "unix"}, {"type": "unix", "data": {"path": 7}},
                                  {"type": "inet", "data": {"host": "127.0.0.1", "port": "http"}},
                                  {"type": "unix", "data": {"path": "x", "mode": 1}}])
def test_a_wrong_address_is_refused(daemon, execute, addr):
    with pytest.raises(Error, match="addr|port"):
        execute("nbd-server-start", addr=addr)


def test_an_export_whose_requests_did_not_end_in_time_is_removed_by_a_second_try(daemon, disk, execute, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "GRACE_SECONDS", 0.05)
    monkeypatch.setattr(server, "DEVICE_SECONDS", 0.05)
    execute("blockdev-add", driver="x-fastcbw-delay", node_name="late", file="disk", read_ms=1000)
    execute("block-export-add", type="nbd", id="e", node_name="late", name="late")
    with Client(tmp_path / "nbd", "late") as client:
        client.send(c.CMD_READ, 0, 4096)
        while not daemon.nbd.exports["late"].status()["counters"]["requests"]:
            pass
        with pytest.raises(Error, match="have not ended"):
            execute("block-export-del", id="e", mode="hard")
        with pytest.raises(Error, match="Node late is in use: by export 'e'"):
            execute("blockdev-del", node_name="late")       # not under their hands
        monkeypatch.setattr(server, "DEVICE_SECONDS", 30)
        execute("block-export-del", id="e")
    execute("blockdev-del", node_name="late")
