"""Live editing: nodes replaced under a guest that verifies what it wrote, other options, and refusals that leave all as it was."""

import os
import threading

import pytest

from fastcbw.errors import Error
from fastcbw.export.nbd.client import Client
from fastcbw.graph.live import changed
from fastcbw.wire import constants as c

LENGTH = 1 << 20
PAGE = 4096
#: Insertions, and as many removals; more by hand: FASTCBW_EDITS=10000.
EDITS = int(os.environ.get("FASTCBW_EDITS", 1500))
DEPTH = 16


@pytest.fixture
def execute(remote):
    """Send one command; a name with _ stands for -."""
    return remote.client.execute


@pytest.fixture
def vm(execute, tmp_path):
    """A node `disk` over a file, exported writable as vm."""
    (tmp_path / "disk.img").write_bytes(bytes(LENGTH))
    execute("blockdev-add", driver="raw", node_name="disk", file={"driver": "file", "filename": str(tmp_path / "disk.img")})
    execute("block-export-add", type="nbd", id="vm", node_name="disk", name="vm", writable=True)
    return tmp_path / "disk.img"


def act(kind, **data):
    return {"type": kind, "data": {name.replace("_", "-"): value for name, value in data.items()}}


def to(node, parent="vm", **more):
    return act("fastcbw-replace", parent=parent, node=node, **more)


class Writer:
    """A guest at queue depth 16 on one connection: it writes pages in versions, and reads each back once it is acknowledged."""

    def __init__(self, path):
        self.path = path
        self.acknowledged = [0] * (LENGTH // PAGE)
        self.errors = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive() and self.errors == []

    def _run(self):
        try:
            with Client(self.path, "vm") as guest:
                self._work(guest)
        except BaseException as error:
            self.errors.append(error)

    def _work(self, guest):
        under_way = {}      # cookie -> page, version, kind
        page = version = 0
        while under_way or not self._stop.is_set():
            while len(under_way) < DEPTH and not self._stop.is_set():
                page = (page + 7) % len(self.acknowledged)
                if any(page == busy for busy, _, _ in under_way.values()):
                    continue
                version += 1
                under_way[guest.send(c.CMD_WRITE, page * PAGE, PAGE, payload=self.content(version))] = page, version, c.CMD_WRITE
            reply = guest.receive_reply()
            assert reply.error == 0, reply.message
            page_done, what, kind = under_way.pop(reply.cookie)
            if kind == c.CMD_WRITE:
                self.acknowledged[page_done] = what
                under_way[guest.send(c.CMD_READ, page_done * PAGE, PAGE)] = page_done, what, c.CMD_READ
            else:
                assert b"".join(data for _, data in reply.data) == self.content(what), f"page {page_done} is not of version {what}"

    @staticmethod
    def content(version):
        return version.to_bytes(4, "little") * (PAGE // 4)

    def expected(self):
        return b"".join(self.content(version) for version in self.acknowledged)


THROTTLE = {"driver": "throttle", "node_name": "slow", "file": "disk", "limits": {"bps-total": 1 << 40}}
CACHE = {"driver": "x-fastcbw-cache", "node_name": "cache", "file": "disk", "size": 1 << 20}
CBW = {"driver": "copy-before-write", "node_name": "cbw", "file": "disk", "target": "temp", "on_cbw_error": "break-snapshot", "ram": 1 << 20}
NOTIFIER = {"driver": "x-fastcbw-write-notifier", "node_name": "old", "file": "disk", "target": "temp"}


def edit(execute, daemon, number):
    """One insertion above the guest's disk and one removal."""
    match number % 4:
        case 0:
            execute("transaction", actions=[act("blockdev-add", **THROTTLE), to("slow")])
            execute("transaction", actions=[to("disk"), act("blockdev-del", node_name="slow")])
        case 1:
            execute("transaction", actions=[act("blockdev-add", **CBW), to("cbw")])
            execute("transaction", actions=[to("disk"), act("blockdev-del", node_name="cbw")])
        case 2:
            execute("transaction", actions=[act("blockdev-add", **CACHE), to("cache")])
            execute("transaction", actions=[to("disk"), act("blockdev-del", node_name="cache")])
        case 3:
            execute("transaction", actions=[act("blockdev-add", **NOTIFIER), to("old")])
            execute("transaction", actions=[to("disk"), act("blockdev-del", node_name="old")])


def test_nothing_acknowledged_is_lost_while_filters_come_and_go(daemon, vm, execute, tmp_path):
    """Each edit is an insertion and a removal of a node above the disk in use; the guest keeps its connection and 16 requests under way."""
    execute("blockdev-add", driver="x-fastcbw-memory", node_name="temp", size=2 * LENGTH)
    with Writer(tmp_path / "nbd") as writer:
        for number in range(EDITS):
            edit(execute, daemon, number)
    assert daemon.nodes.exports["vm"].node.name == "disk" and {"slow", "cbw", "cache", "old"}.isdisjoint(daemon.nodes.graph.nodes)
    assert sum(version > 0 for version in writer.acknowledged) > DEPTH
    with Client(tmp_path / "nbd", "vm") as guest:
        assert guest.read(0, LENGTH) == writer.expected()
    execute("block-export-del", id="vm")
    assert vm.read_bytes() == writer.expected()



def test_the_guest_moves_through_a_filter_into_another_and_back(daemon, vm, execute, tmp_path):
    execute("blockdev-add", **THROTTLE)
    execute("blockdev-add", **THROTTLE | {"node_name": "slower", "file": "slow"})
    with Client(tmp_path / "nbd", "vm") as guest:
        for node in ("slower", "slow", "slower", "disk", "slow"):
            execute("fastcbw-replace", parent="vm", node=node)
            guest.write(0, node.encode().ljust(512))
            assert vm.read_bytes()[:512] == node.encode().ljust(512)
        assert daemon.nodes.exports["vm"].switch.child is daemon.nodes.graph.find("slow").guest()
        with pytest.raises(Error, match="Node slow is in use"):
            execute("blockdev-del", node_name="slow")


def test_a_child_is_replaced_under_load(daemon, vm, execute, tmp_path):
    """A throttle gets a fault node and back as its child; the disk below is the same."""
    execute("transaction", actions=[act("blockdev-add", **THROTTLE), to("slow")])
    execute("blockdev-add", driver="x-fastcbw-fault", node_name="bad", file="disk")
    with Writer(tmp_path / "nbd") as writer:
        for _ in range(20):
            execute("fastcbw-replace", parent="slow", child="file", node="bad")
            execute("fastcbw-replace", parent="slow", child="file", node="disk")
    with Client(tmp_path / "nbd", "vm") as guest:
        assert guest.read(0, LENGTH) == writer.expected()


def test_a_child_that_was_described_inside_goes_when_it_is_replaced(daemon, vm, execute):
    execute("blockdev-add", driver="throttle", node_name="slow", limits={}, file={"driver": "x-fastcbw-fault", "file": "disk"})
    (inside,) = set(daemon.nodes.graph.nodes) & {child["node"] for node in execute("fastcbw-graph") if node["node"] == "slow"
                                                 for child in node["children"]}
    before = execute("fastcbw-graph")
    with pytest.raises(Error, match="nowhere"):
        execute("transaction", actions=[to("disk", parent="slow", child="file"), act("blockdev-del", node_name="nowhere")])
    assert execute("fastcbw-graph") == before
    execute("fastcbw-replace", parent="slow", child="file", node="disk")
    assert inside not in daemon.nodes.graph.nodes


def test_a_child_is_not_replaced_for_a_client_that_may_go(daemon, vm, execute):
    execute("blockdev-add", **THROTTLE)
    with pytest.raises(Error, match="'fastcbw-replace' of a child can't be undone"):
        execute("transaction", actions=[to("disk", parent="slow", child="file")], properties={"fastcbw-bind-to-connection": True})


def test_a_store_takes_what_it_holds_along(daemon, vm, execute, tmp_path):
    for name in ("temp", "other"):
        execute("blockdev-add", driver="x-fastcbw-memory", node_name=name, size=4 * LENGTH)
    daemon.nodes.graph.find("other").device.write(0, b"\xff" * 4 * LENGTH)
    execute("transaction", actions=[act("blockdev-add", **CBW | {"ram": 0}), to("cbw")])
    execute("blockdev-add", driver="snapshot-access", node_name="snap", file="cbw")
    with Client(tmp_path / "nbd", "vm") as guest:
        guest.write(0, b"a" * (LENGTH // 2))
        execute("fastcbw-replace", parent="cbw", child="target", node="other")
        guest.write(LENGTH // 2, b"b" * (LENGTH // 2))
        daemon.nodes.graph.find("temp").device.write(0, b"\xff" * 4 * LENGTH)
        assert daemon.nodes.graph.find("snap").device.read(0, LENGTH) == bytes(LENGTH)
    execute("blockdev-del", node_name="temp")       # free again
    with pytest.raises(Error, match="Node other is in use: by node 'cbw'"):
        execute("blockdev-del", node_name="other")


def test_a_request_that_does_not_end_in_time_leaves_all_as_it_was(daemon, vm, execute, tmp_path):
    execute("blockdev-add", driver="x-fastcbw-delay", node_name="late", file="disk")
    execute("fastcbw-replace", parent="vm", node="late")
    execute("blockdev-add", **THROTTLE)
    before = execute("fastcbw-graph")
    with Client(tmp_path / "nbd", "vm") as guest:
        with daemon.nodes.graph.find("late").device.hold("write") as gate:
            write = guest.send(c.CMD_WRITE, 0, 4, payload=b"late")
            gate.wait_arrived()
            for actions in ([to("slow", timeout=20)], [act("blockdev-add", **CACHE), to("cache", timeout=20)]):
                with pytest.raises(Error, match=r"requests under way did not end within 0.0\d+ s \(nothing was changed\)|did not end within"):
                    execute("transaction", actions=actions)
                assert execute("fastcbw-graph") == before
            guest.read(8192, 512)           # the guest goes on beside the request that hangs
        assert guest.receive_reply().cookie == write
        execute("fastcbw-replace", parent="vm", node="slow")
        assert guest.read(0, 4) == b"late"


def test_only_the_place_concerned_is_held(daemon, vm, execute, tmp_path):
    """Another export of the same daemon is served while the change of one waits for its bound."""
    execute("blockdev-add", driver="x-fastcbw-delay", node_name="late", file="disk")
    execute("fastcbw-replace", parent="vm", node="late")
    with Client(tmp_path / "nbd", "vm") as guest, Client(tmp_path / "nbd", "a") as other:
        with daemon.nodes.graph.find("late").device.hold("write") as gate:
            write = guest.send(c.CMD_WRITE, 0, 4, payload=b"late")
            gate.wait_arrived()
            failures = []

            def replace():
                try:
                    execute("fastcbw-replace", parent="vm", node="disk", timeout=30_000)
                except Error as error:
                    failures.append(error)

            thread = threading.Thread(target=replace)
            thread.start()
            other.write(4096, b"beside")
            assert other.read(4096, 6) == b"beside"
        thread.join(30)
        assert not failures and guest.receive_reply().cookie == write and guest.read(0, 4) == b"late"


def test_a_cache_is_written_back_before_the_guest_leaves_it_or_nothing_changes(daemon, vm, execute, tmp_path):
    execute("blockdev-add", driver="x-fastcbw-fault", node_name="bad", file="disk",
            rules=[{"operation": "write", "errno": "ENOSPC", "count": 1}])
    execute("transaction", actions=[act("blockdev-add", **CACHE | {"file": "bad"}), to("cache")])
    leave = [to("disk"), act("blockdev-del", node_name="cache")]
    with Client(tmp_path / "nbd", "vm") as guest:
        guest.write(0, b"data" * 1024)
        with pytest.raises(Error, match="conflicts with use by node 'cache'"):
            execute("fastcbw-replace", parent="vm", node="bad")       # what it holds would be lost to the guest
        with pytest.raises(Error, match="No space left"):
            execute("transaction", actions=leave)
        assert guest.read(0, 4096) == b"data" * 1024 and daemon.nodes.exports["vm"].node.name == "cache"
        execute("transaction", actions=leave)
        assert guest.read(0, 4096) == b"data" * 1024 == vm.read_bytes()[:4096]


def test_a_transaction_that_fails_moves_nobody(daemon, vm, execute):
    execute("blockdev-add", **THROTTLE)
    before, device = execute("fastcbw-graph"), daemon.nodes.exports["vm"].switch.child
    with pytest.raises(Error, match="nowhere"):
        execute("transaction", actions=[to("slow"), act("blockdev-del", node_name="nowhere")])
    with pytest.raises(Error, match="bitmap"):
        execute("transaction", actions=[to("slow"), act("blockdev-backup", device="slow", target="a", sync="incremental", job_id="j")])
    assert execute("fastcbw-graph") == before and daemon.nodes.exports["vm"].switch.child is device
    execute("transaction", actions=[to("slow"), to("disk")])      # the last word counts
    assert daemon.nodes.exports["vm"].switch.child is device


@pytest.mark.parametrize("arguments, words", [
    ({"parent": "vm", "node": "small"}, "cannot replace 'disk': .*4096 bytes are not the 1048576"),
    ({"parent": "vm", "node": "ro"}, "read-only"),
    ({"parent": "nobody", "node": "disk"}, "export 'nobody': not found"),
    ({"parent": "a", "node": "disk"}, "the daemon serves this disk by itself"),
    ({"parent": "slow", "child": "backing", "node": "disk"}, "has no child 'backing' .there is file"),
    ({"parent": "disk", "child": "file", "node": "slow"}, "its child 'file' is what it shows"),
    ({"parent": "slow", "child": "file", "node": "slow"}, "would be below itself"),
    ({"parent": "slow", "child": "file", "node": "upper"}, "would be below itself"),
    ({"parent": "slow", "child": "file", "node": "small"}, "4096 bytes are not"),
    ({"parent": "nowhere", "child": "file", "node": "disk"}, "nowhere"),
    ({"parent": "vm", "node": "slow", "timeout": 0}, "'timeout' expects milliseconds"),
])
def test_what_cannot_be_replaced_is_refused(daemon, vm, execute, arguments, words):
    execute("blockdev-add", **THROTTLE)
    execute("blockdev-add", **THROTTLE | {"node_name": "upper", "file": "slow"})
    execute("blockdev-add", driver="x-fastcbw-memory", node_name="small", size=4096)
    execute("blockdev-add", driver="x-fastcbw-memory", node_name="ro", size=LENGTH, read_only=True)
    before = execute("fastcbw-graph")
    with pytest.raises(Error, match=words):
        execute("fastcbw-replace", **arguments)
    assert execute("fastcbw-graph") == before


def test_a_notifier_keeps_its_children_while_its_backup_runs(daemon, vm, execute):
    for name in ("temp", "other"):
        execute("blockdev-add", driver="x-fastcbw-memory", node_name=name, size=LENGTH)
    execute("transaction", actions=[act("blockdev-add", **NOTIFIER), to("old")])
    execute("fastcbw-replace", parent="old", child="target", node="other")
    execute("blockdev-backup", job_id="j", device="old", target="other", sync="full", speed=1)
    with pytest.raises(Error, match="node 'old': its backup runs"):
        execute("fastcbw-replace", parent="old", child="target", node="temp")
    execute("block-job-cancel", device="j")


def test_a_daemon_ends_though_a_job_waits_for_a_throttle(daemon, vm, execute):
    for name in ("m", "n"):
        execute("blockdev-add", driver="x-fastcbw-memory", node_name=name, size=LENGTH)
        daemon.nodes.graph.find(name).device.write(0, b"x" * LENGTH)
    execute("blockdev-add", driver="throttle", node_name="target", file="m", limits={"bps-write": 1})
    execute("blockdev-add", driver="x-fastcbw-fault", node_name="hangs", file="n", rules=[{"operation": "write", "stall-ms": 3_600_000}])
    for target in ("target", "hangs"):
        execute("blockdev-backup", job_id=target, device="disk" if target == "hangs" else "a", target=target, sync="full")
    daemon.close()      # in time for the test's end, not in an hour


# -- what the guest has discarded

@pytest.mark.parametrize("leave", [
    [to("disk"), act("blockdev-del", node_name="cbw"), act("blockdev-del", node_name="slow")],
    [to("disk"), act("blockdev-del", node_name="cbw")]])
def test_a_discard_that_was_recorded_above_is_not_carried_out_once_the_guest_has_left(daemon, vm, execute, tmp_path, leave):
    """The engine that recorded it would not see what the guest writes there from now on."""
    execute("blockdev-add", driver="x-fastcbw-memory", node_name="temp", size=LENGTH)
    execute("transaction", actions=[act("blockdev-add", **THROTTLE), to("slow")])
    with Client(tmp_path / "nbd", "vm") as guest:
        guest.write(0, b"data" * (LENGTH // 4))
        execute("transaction", actions=[act("blockdev-add", **CBW | {"file": "slow"}), to("cbw")])
        guest.trim(0, LENGTH // 2)
        engine = daemon.nodes.graph.find("slow").base._engine
        assert engine.counters()["lazy_bytes"] == LENGTH // 2
        execute("transaction", actions=leave)
        guest.write(0, b"late")
        if not engine.is_closed:
            engine.finish_discards()
        counters = engine.counters()
        assert (counters["lazy_bytes"], counters["lazy_carried_out"], counters["lazy_cancelled"]) == (0, 0, LENGTH // 2)
        assert guest.read(0, LENGTH) == b"late" + b"data" * (LENGTH // 4 - 1)


def test_nobody_writes_below_a_disk_that_has_a_snapshot_past_it(daemon, vm, execute, tmp_path):
    """It would show what they write; and a discard that it has kept waiting would be carried out over that."""
    execute("blockdev-add", **THROTTLE)
    execute("blockdev-add", driver="x-fastcbw-memory", node_name="temp", size=LENGTH)
    with pytest.raises(Error, match="export 'vm' writes node 'disk' as 'root', below node 'slow' and past it"):
        execute("fastcbw-snapshot-create", name="s", disks=["slow"])
    with pytest.raises(Error, match="conflicts with use by"):
        execute("blockdev-backup", job_id="j", device="slow", target="temp", sync="full")
    execute("fastcbw-replace", parent="vm", node="slow")
    execute("fastcbw-snapshot-create", name="s", disks=["slow"])
    with Client(tmp_path / "nbd", "vm") as guest:
        guest.write(0, b"x" * 65536)
        guest.trim(65536, 65536)                    # recorded: the snapshot needs what is there
        for export in ("past", "vm2"):
            with pytest.raises(Error, match="export .* needs .*write.* on node 'disk'|conflicts with use by"):
                execute("block-export-add", type="nbd", id=export, node_name="disk", writable=True)
        execute("fastcbw-snapshot-delete", name="s", disks=["slow"])
        execute("block-export-add", type="nbd", id="past", node_name="disk", writable=True)
        with Client(tmp_path / "nbd", "disk") as past:
            past.write(65536, b"y" * 65536)
            daemon.nodes.graph.find("slow").disk()._engine.finish_discards()
            assert past.read(65536, 65536) == guest.read(65536, 65536) == b"y" * 65536


def test_a_guest_that_stays_on_its_disk_has_its_discards_carried_out(daemon, vm, execute, tmp_path):
    execute("blockdev-add", driver="x-fastcbw-memory", node_name="temp", size=LENGTH)
    with Client(tmp_path / "nbd", "vm") as guest:
        guest.write(0, b"data" * (LENGTH // 4))
        execute("transaction", actions=[act("blockdev-add", **CBW), to("cbw")])
        guest.trim(0, LENGTH // 2)
        execute("transaction", actions=[act("blockdev-add", **THROTTLE | {"file": "cbw"}), to("slow")])
        execute("transaction", actions=[to("disk"), act("blockdev-del", node_name="slow"), act("blockdev-del", node_name="cbw")])
        daemon.nodes.graph.find("disk").disk()._engine.finish_discards()
        assert guest.read(0, LENGTH) == bytes(LENGTH // 2) + b"data" * (LENGTH // 8)


# -- what would wait for itself

@pytest.mark.parametrize("replaced", [to("bad", parent="slow", child="file"), act("blockdev-reopen", options=[
    {"driver": "throttle", "node-name": "slow", "limits": {}, "file": "bad"}])])
def test_a_backup_above_a_child_that_is_replaced_is_refused(daemon, vm, execute, tmp_path, replaced):
    """Its instant waits for the guest's writes under way, these for the child's place, and the place for the end of the transaction."""
    execute("transaction", actions=[act("blockdev-add", **THROTTLE), to("slow")])
    execute("blockdev-add", driver="x-fastcbw-fault", node_name="bad", file="disk")
    execute("blockdev-add", driver="x-fastcbw-memory", node_name="temp", size=LENGTH)
    before = execute("fastcbw-graph")
    backup = act("blockdev-backup", job_id="j", device="slow", target="temp", sync="full")
    with Writer(tmp_path / "nbd"):
        with pytest.raises(Error, match="job 'j': is above node 'slow', whose child is replaced in the same transaction"):
            execute("transaction", actions=[replaced, backup])
        assert execute("fastcbw-graph") == before and execute("query-jobs") == []
        execute("transaction", actions=[to("bad", parent="slow", child="file"), act("blockdev-backup", **backup["data"] | {"device": "bad"})])
        execute("job-cancel", id="j")


def test_a_backup_to_what_is_above_a_child_that_is_replaced_is_refused(daemon, vm, execute):
    execute("blockdev-add", driver="x-fastcbw-memory", node_name="temp", size=LENGTH)
    execute("blockdev-add", driver="x-fastcbw-memory", node_name="other", size=LENGTH)
    execute("blockdev-add", **THROTTLE | {"file": "temp"})
    with pytest.raises(Error, match="job 'j': is above node 'slow'"):
        execute("transaction", actions=[to("other", parent="slow", child="file"),
                                        act("blockdev-backup", job_id="j", device="disk", target="slow", sync="full")])


def test_the_backup_of_a_write_notifier_above_a_child_that_is_replaced_is_refused(daemon, vm, execute):
    execute("blockdev-add", driver="x-fastcbw-memory", node_name="temp", size=LENGTH)
    execute("blockdev-add", **THROTTLE)
    execute("transaction", actions=[act("blockdev-add", **NOTIFIER | {"file": "slow"}), to("old")])
    execute("blockdev-add", driver="x-fastcbw-fault", node_name="bad", file="disk")
    with pytest.raises(Error, match="job 'j': is above node 'slow'"):
        execute("transaction", actions=[to("bad", parent="slow", child="file"),
                                        act("blockdev-backup", job_id="j", device="old", target="temp", sync="full")])


def test_a_cache_does_not_go_while_a_child_below_it_is_replaced(daemon, vm, execute):
    execute("block-export-del", id="vm")
    execute("blockdev-add", **THROTTLE)
    execute("blockdev-add", driver="x-fastcbw-fault", node_name="bad", file="disk")
    execute("blockdev-add", **CACHE | {"file": "slow"})
    before = execute("fastcbw-graph")
    with pytest.raises(Error, match="node 'cache', which goes: is above node 'slow'"):
        execute("transaction", actions=[to("bad", parent="slow", child="file"), act("blockdev-del", node_name="cache")])
    assert execute("fastcbw-graph") == before
    execute("blockdev-del", node_name="cache")


def test_a_store_is_not_copied_through_a_child_that_is_replaced(daemon, vm, execute):
    execute("block-export-del", id="vm")
    for name in ("temp", "other", "third"):
        execute("blockdev-add", driver="x-fastcbw-memory", node_name=name, size=LENGTH)
    execute("blockdev-add", **THROTTLE | {"file": "temp"})
    execute("blockdev-add", **CBW | {"target": "slow"})
    with pytest.raises(Error, match="a store that is copied from node 'slow' or to it: is above node 'slow'"):
        execute("transaction", actions=[to("other", parent="cbw", child="target"), to("third", parent="slow", child="file")])


def test_places_are_held_from_the_uppermost_down(daemon, vm, execute, tmp_path, monkeypatch):
    """The other way round requests under way in the upper one would wait in the lower one until the bound."""
    execute("transaction", actions=[act("blockdev-add", **THROTTLE), act("blockdev-add", **THROTTLE | {"node_name": "upper", "file": "slow"}),
                                    act("blockdev-add", **THROTTLE | {"node_name": "free"}), to("upper")])
    execute("blockdev-add", driver="x-fastcbw-fault", node_name="bad", file="disk")
    execute("blockdev-add", driver="x-fastcbw-fault", node_name="worse", file="slow")
    nodes, held = daemon.nodes.graph.nodes, []

    def noted(changes, seconds):
        held.extend(change.place for change in changes)
        return changed(changes, seconds)

    monkeypatch.setattr("fastcbw.qmp.live.changed", noted)
    places = [daemon.nodes.exports["vm"].switch, nodes["upper"].joints["file"], nodes["slow"].joints["file"]]
    with Writer(tmp_path / "nbd"):
        execute("transaction", actions=[to("bad", parent="slow", child="file"), to("worse", parent="upper", child="file"), to("free")])
    assert held == places


def test_a_cache_that_was_described_inside_is_written_back_or_nothing_goes(daemon, vm, execute):
    execute("block-export-del", id="vm")
    execute("blockdev-add", driver="x-fastcbw-fault", node_name="bad", file="disk", rules=[{"operation": "write", "errno": "ENOSPC", "count": 2}])
    execute("blockdev-add", driver="throttle", node_name="slow", limits={}, file={
        "driver": "throttle", "limits": {}, "file": {"driver": "x-fastcbw-cache", "node-name": "cache", "file": "bad", "size": 1 << 20}})
    daemon.nodes.graph.find("slow").device.write(0, b"data" * 1024)
    before = execute("fastcbw-graph")
    for send in (lambda: execute("blockdev-del", node_name="slow"), lambda: execute("transaction", actions=[act("blockdev-del", node_name="slow")])):
        with pytest.raises(Error, match="No space left"):
            send()
        assert execute("fastcbw-graph") == before
    execute("blockdev-del", node_name="slow")
    assert vm.read_bytes()[:4096] == b"data" * 1024 and "cache" not in daemon.nodes.graph.nodes


def test_a_write_notifiers_beginning_is_bounded(daemon, vm, execute, tmp_path, monkeypatch):
    """Everybody's changes wait for it."""
    monkeypatch.setattr("fastcbw.qmp.backups.HOLD_SECONDS", 0.02)
    execute("blockdev-add", driver="x-fastcbw-memory", node_name="temp", size=LENGTH)
    execute("blockdev-add", driver="x-fastcbw-delay", node_name="late", file="disk")
    execute("transaction", actions=[act("blockdev-add", **NOTIFIER | {"file": "late"}), to("old")])
    backup = {"job_id": "j", "device": "old", "target": "temp", "sync": "full"}
    with Client(tmp_path / "nbd", "vm") as guest:
        with daemon.nodes.graph.find("late").device.hold("write") as gate:
            write = guest.send(c.CMD_WRITE, 0, 4, payload=b"late")
            gate.wait_arrived()
            with pytest.raises(Error, match="guest writes did not end within 0.02 s"):
                execute("blockdev-backup", **backup)
            assert execute("query-jobs") == []
        assert guest.receive_reply().cookie == write
        execute("blockdev-backup", **backup)


def test_a_store_that_was_taken_along_is_on_its_new_disk(daemon, vm, execute):
    execute("block-export-del", id="vm")
    for name in ("temp", "other"):
        execute("blockdev-add", driver="x-fastcbw-memory", node_name=name, size=LENGTH)
    execute("blockdev-add", driver="x-fastcbw-fault", node_name="bad", file="other", rules=[{"operation": "flush", "count": 1}])
    execute("blockdev-add", **CBW | {"ram": 0})
    with pytest.raises(Error, match="Input/output error"):
        execute("fastcbw-replace", parent="cbw", child="target", node="bad")
    assert daemon.nodes.graph.find("cbw").children["target"].child.name == "temp"
    execute("fastcbw-replace", parent="cbw", child="target", node="bad")
    assert daemon.nodes.graph.find("bad").device.requests["flush"] == 2


# -- blockdev-reopen

def slow(**limits):
    return {"driver": "throttle", "node-name": "slow", "limits": {name.replace("_", "-"): value for name, value in limits.items()}}


def test_options_are_changed_live(daemon, vm, execute):
    execute("transaction", actions=[act("blockdev-add", **THROTTLE), to("slow")])
    execute("blockdev-add", driver="x-fastcbw-delay", node_name="late", file="disk", read_ms=5)
    execute("blockdev-reopen", options=[slow(iops_write=7), {"driver": "x-fastcbw-delay", "node-name": "late"}])
    nodes = daemon.nodes.graph.nodes
    assert nodes["slow"].device.limits == {"iops_write": 7} and "read-ms" not in nodes["late"].options
    assert nodes["slow"].children["file"].child is nodes["disk"]        # left out: it stays


def test_a_node_becomes_read_only_and_writable_again(daemon, vm, execute, tmp_path):
    reopen = {"driver": "raw", "node-name": "disk", "read-only": True}
    with pytest.raises(Error, match="node 'disk' is read-only: export 'vm' needs 'write' on it"):
        execute("blockdev-reopen", options=[reopen])
    assert not daemon.nodes.graph.find("disk").read_only
    execute("block-export-del", id="vm")
    execute("blockdev-reopen", options=[reopen])
    with pytest.raises(Error, match="read-only"):
        execute("block-export-add", type="nbd", id="vm", node_name="disk", writable=True)
    execute("blockdev-reopen", options=[reopen | {"read-only": False}])
    execute("block-export-add", type="nbd", id="vm", node_name="disk", writable=True)
    execute("blockdev-add", driver="x-fastcbw-memory", node_name="fixed", size=4096, **{"read-only": True})
    with pytest.raises(Error, match="node 'fixed' is open for reading only"):
        execute("blockdev-reopen", options=[{"driver": "x-fastcbw-memory", "node-name": "fixed", "size": 4096}])


def test_limits_of_a_store_are_changed_live(daemon, vm, execute):
    execute("blockdev-add", driver="x-fastcbw-memory", node_name="temp", size=LENGTH)
    execute("transaction", actions=[act("blockdev-add", **CBW), to("cbw")])
    reopen = {"driver": "copy-before-write", "node-name": "cbw", "file": "disk", "target": "temp"}
    execute("blockdev-reopen", options=[reopen | {"on-cbw-error": "break-guest-write", "ram": 128 << 10}])
    snapshot = daemon.nodes.graph.find("cbw").snapshot.status
    assert snapshot()["on_cbw_error"] == snapshot()["on_full"] == "break-guest-write" and snapshot()["ram_limit"] == 128 << 10
    with pytest.raises(Error, match="node 'cbw': ram: 1 is less than one cluster"):
        execute("blockdev-reopen", options=[reopen | {"on-cbw-error": "break-snapshot", "ram": 1}])
    assert snapshot()["on_cbw_error"] == "break-guest-write" and snapshot()["ram_limit"] == 128 << 10
    with pytest.raises(Error, match="Cannot change the option 'min-cluster-size'"):
        execute("blockdev-reopen", options=[reopen | {"min-cluster-size": 4096}])


def test_reopen_replaces_a_child(daemon, vm, execute, tmp_path):
    execute("transaction", actions=[act("blockdev-add", **THROTTLE), to("slow")])
    execute("blockdev-add", driver="x-fastcbw-fault", node_name="bad", file="disk", rules=[{"operation": "write"}])
    with Client(tmp_path / "nbd", "vm") as guest:
        guest.write(0, b"x")
        execute("blockdev-reopen", options=[slow(bps_total=1 << 30) | {"file": "bad"}])
        with pytest.raises(OSError):
            guest.write(0, b"y")
        execute("blockdev-reopen", options=[{"driver": "x-fastcbw-fault", "node-name": "bad"}])
        guest.write(0, b"z")
    assert vm.read_bytes()[:1] == b"z"


@pytest.mark.parametrize("second, words", [
    ({"driver": "file", "node-name": "disk"}, "Cannot change the option 'driver'"),
    ({"driver": "throttle"}, "node-name not specified"),
    ({"driver": "x-fastcbw-memory", "node-name": "m", "size": 8192}, "Cannot change the option 'size'"),
    ({"driver": "x-fastcbw-memory", "node-name": "m"}, "Parameter 'size' is missing"),
    ({"driver": "throttle", "node-name": "nowhere"}, "nowhere"),
    ({"driver": "x-fastcbw-fault", "node-name": "bad", "rules": [{"operation": "move"}]}, "does not accept value 'move'"),
    ({"driver": "x-fastcbw-fault", "node-name": "bad", "file": {"driver": "file"}}, "not described in place"),
    ({"driver": "x-fastcbw-fault", "node-name": "bad", "file": "m"}, "4096 bytes are not"),
])
def test_a_reopen_that_fails_changes_nothing(daemon, vm, execute, second, words):
    execute("blockdev-add", **THROTTLE)
    execute("blockdev-add", driver="x-fastcbw-memory", node_name="m", size=4096)
    execute("blockdev-add", driver="x-fastcbw-fault", node_name="bad", file="disk")
    before = execute("fastcbw-graph")
    with pytest.raises(Error, match=words):
        execute("blockdev-reopen", options=[slow(iops_write=7), second])
    assert execute("fastcbw-graph") == before
    assert daemon.nodes.graph.find("slow").device.limits == {"bps_total": 1 << 40}
