"""The scenario of the founding discussion's own test in its five forms, by QMP: an unmodified qemu.qmp client, qemu-io as guest and as reader."""

import asyncio
import subprocess

import pytest
from qemu.qmp import QMPClient
from test_founding_scenario import AFTER, BEFORE, UNTOUCHED, ZEROES, K, M, qemu_io

from fastcbw.qmp.daemon import Daemon

FILTER = {"driver": "copy-before-write", "node-name": "cbw", "file": "disk", "target": "temp", "min-cluster-size": 64 * K}
SNAPSHOT = {"driver": "snapshot-access", "node-name": "snap", "file": "cbw"}


def raw(name, path):
    return {"driver": "raw", "node-name": name, "file": {"driver": "file", "node-name": f"{name}-file", "filename": str(path)}}


def fails_to_read(socket, export, patterns):
    """Each read by itself: all of them are errors."""
    for _, offset, length in patterns:
        done = subprocess.run(["qemu-io", "-r", "-f", "raw", "-c", f"read {offset} {length}", f"nbd+unix:///{export}?socket={socket}"],
                              capture_output=True, text=True, timeout=60)
        assert "read failed: Invalid argument" in done.stdout + done.stderr


class Session:
    """A daemon with a 64 MiB disk that a guest has written to, and the client that controls it."""

    def __init__(self, client, path):
        self.client, self.path, self.socket = client, path, path / "s"

    async def __call__(self, command, **arguments):
        return await self.client.execute(command, {name.replace("_", "-"): value for name, value in arguments.items()})

    async def add(self, **description):
        await self.client.execute("blockdev-add", description)

    async def io(self, export, command, patterns):
        await asyncio.to_thread(qemu_io, self.socket, export, command, patterns)

    async def insert(self, store=None, **options):
        """The filter above the disk in use, and its snapshot's export, as one. store: the node `temp`, a disk in memory by default."""
        await self.client.execute("blockdev-add", {"node-name": "temp"} | (store or {"driver": "x-fastcbw-memory", "size": 2 * M}))
        await self("transaction", actions=[{"type": "blockdev-add", "data": FILTER | options}, {"type": "blockdev-add", "data": SNAPSHOT},
                                           {"type": "fastcbw-replace", "data": {"parent": "guest", "node": "cbw"}},
                                           {"type": "block-export-add", "data": {"type": "nbd", "id": "fleece", "node-name": "snap"}}])

    async def take_out(self):
        await self("block-export-del", id="fleece")
        await self("transaction", actions=[{"type": "fastcbw-replace", "data": {"parent": "guest", "node": "disk"}}]
                   + [{"type": "blockdev-del", "data": {"node-name": name}} for name in ("snap", "cbw", "temp")])


def play(path, script, bitmap=None):
    """Make the disk, write to it, run SCRIPT; in the end the disk has what the guest wrote, and nothing is left of the script."""
    (path / "disk.img").touch()
    with open(path / "disk.img", "r+b") as file:
        file.truncate(64 * M)

    async def main():
        client = QMPClient("scenario")
        await client.connect(str(path / "qmp"))
        session = Session(client, path)
        try:
            await client.execute("blockdev-add", raw("disk", path / "disk.img"))
            await session("block-export-add", type="nbd", id="guest", node_name="disk", name="vm", writable=True)
            if bitmap:
                await session("block-dirty-bitmap-add", node="disk", name=bitmap)
            await session.io("vm", "write", BEFORE)
            before = await session("fastcbw-graph"), await session("query-block-exports")
            await script(session)
            assert (await session("fastcbw-graph"), await session("query-block-exports")) == before and await session("query-jobs") == []
            await session.io("vm", "read", AFTER + UNTOUCHED)
            await session("block-export-del", id="guest")
            await session("blockdev-del", node_name="disk")
        finally:
            await client.disconnect()

    with Daemon() as daemon:
        daemon.listen_nbd(str(path / "s"))
        daemon.listen_qmp(str(path / "qmp"))
        asyncio.run(main())


def test_filter_and_cache(tmp_path):
    """The store is a cache node above a file; old data that no flush has brought there is read from the cache."""
    async def script(session):
        with open(tmp_path / "temp.img", "wb") as file:
            file.truncate(2 * M)
        below = {"driver": "file", "node-name": "temp-file", "filename": str(tmp_path / "temp.img")}
        await session.insert(store={"driver": "x-fastcbw-cache", "size": 1 * M, "file": below}, ram=0)
        await session.io("snap", "read", BEFORE + ZEROES)
        await session.io("vm", "write", AFTER)
        await session.io("snap", "read", BEFORE + ZEROES)
        await session.io("vm", "read", AFTER + UNTOUCHED)
        await session.take_out()

    play(tmp_path, script)


def test_filter_and_cache_without_a_node(tmp_path):
    """A snapshot by our own command, whose old data is in memory."""
    async def script(session):
        await session("fastcbw-snapshot-create", name="snap", disks=["disk"], ram=1 * M, cluster_size=64 * K)
        await session.io("disk-file@snap", "read", BEFORE + ZEROES)
        await session.io("vm", "write", AFTER)
        await session.io("disk-file@snap", "read", BEFORE + ZEROES)
        (facts,) = await session("fastcbw-snapshot-list")
        status = facts["status"]
        assert (status["preserved_clusters"], status["zero_clusters"], status["ram_bytes"]) == (6, 3, 196608)
        await session("fastcbw-snapshot-delete", name="snap", disks=["disk"])

    play(tmp_path, script)


@pytest.mark.parametrize("tier", [{}, {"ram": 0}])
def test_filter_and_snapshot_node(tier, tmp_path):
    async def script(session):
        await session.insert(**tier)
        await session.io("snap", "read", BEFORE + ZEROES)
        await session.io("vm", "write", AFTER)
        await session.io("snap", "read", BEFORE + ZEROES)
        await session.io("vm", "read", AFTER + UNTOUCHED)
        await session.take_out()

    play(tmp_path, script)


def test_with_a_bitmap_made_before_the_first_write(tmp_path):
    """What the bitmap marks reads as it was, everything else is an error, before the guest's writes and after."""
    async def script(session):
        await session.insert(bitmap={"node": "disk", "name": "bitmap0"})
        for step in ("before", "after"):
            await session.io("snap", "read", BEFORE)
            await asyncio.to_thread(fails_to_read, session.socket, "snap", [*ZEROES, (0, 16 * M, 64 * K), (0, 0, 2 * M)])
            if step == "before":
                await session.io("vm", "write", AFTER)
        await session.take_out()
        await session("block-dirty-bitmap-remove", node="disk", name="bitmap0")

    play(tmp_path, script, bitmap="bitmap0")


def test_a_push_job_slowed_to_one_byte_a_second_and_set_free_after_the_guests_writes(tmp_path):
    async def script(session):
        with open(tmp_path / "target.img", "wb") as file:
            file.truncate(64 * M)
        await session.insert()
        await session.client.execute("blockdev-add", raw("target", tmp_path / "target.img"))
        with session.client.listener(names=("JOB_STATUS_CHANGE",)) as events:
            await session("blockdev-backup", job_id="push", device="snap", target="target", sync="full", speed=1)
            await session.io("vm", "write", AFTER)
            (job,) = await session("query-block-jobs")
            assert job["status"] == "running" and job["offset"] < job["len"] and job["speed"] == 1
            await session.io("snap", "read", BEFORE + ZEROES)
            await session("block-job-set-speed", device="push", speed=0)
            seen = []
            while seen[-1:] != ["null"]:
                seen.append((await asyncio.wait_for(events.get(), 60))["data"]["status"])
        assert seen == ["created", "running", "waiting", "pending", "concluded", "null"]
        await session("block-export-add", type="nbd", id="look", node_name="target")
        await session.io("target", "read", BEFORE + ZEROES)
        await session("block-export-del", id="look")
        await session("blockdev-del", node_name="target")
        await session.take_out()

    play(tmp_path, script)


def test_the_old_scheme_of_a_write_notifier(tmp_path):
    """The guest writes what it overwrites to the target, past a job that is all but stopped; then the job copies the rest."""
    async def script(session):
        with open(tmp_path / "target.img", "wb") as file:
            file.truncate(64 * M)
        await session.client.execute("blockdev-add", raw("target", tmp_path / "target.img"))
        await session("block-export-del", id="guest")
        await session("blockdev-add", driver="x-fastcbw-write-notifier", node_name="old", file="disk", target="target")
        await session("block-export-add", type="nbd", id="guest", node_name="old", name="vm", writable=True)
        with session.client.listener(names=("JOB_STATUS_CHANGE",)) as events:
            await session("blockdev-backup", job_id="push", device="old", target="target", sync="full", speed=1)
            await session.io("vm", "write", AFTER)
            await session.io("vm", "read", AFTER + UNTOUCHED)
            assert (await session("query-block-jobs"))[0]["status"] == "running"
            data = (tmp_path / "target.img").read_bytes()
            for pattern, offset, length in [BEFORE[0], (0xD5, 1 * M, 32 * K), (0xDC, 0x2008000, 32 * K), *ZEROES]:
                assert data[offset : offset + length] == bytes([pattern]) * length
            await session("block-job-set-speed", device="push", speed=0)
            seen = []
            while seen[-1:] != ["null"]:
                seen.append((await asyncio.wait_for(events.get(), 60))["data"]["status"])
        assert seen == ["created", "running", "waiting", "pending", "concluded", "null"]
        await session("block-export-del", id="guest")
        await session("blockdev-del", node_name="old")
        await session("block-export-add", type="nbd", id="look", node_name="target")
        await session.io("target", "read", BEFORE + ZEROES)
        await session("block-export-del", id="look")
        await session("blockdev-del", node_name="target")
        await session("block-export-add", type="nbd", id="guest", node_name="disk", name="vm", writable=True)

    play(tmp_path, script)
