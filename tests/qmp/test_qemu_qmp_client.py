"""An unmodified qemu.qmp client, the one of QEMU's own tools, drives the daemon."""

import asyncio

import pytest
from qemu.qmp import ExecuteError, QMPClient


def drive(path, script):
    async def session():
        client = QMPClient("test")
        await client.connect(str(path))
        try:
            return await script(client)
        finally:
            await client.disconnect()

    return asyncio.run(session())


def test_it_negotiates_takes_a_snapshot_backs_up_and_hears_the_events(daemon, tmp_path):
    async def script(client):
        await client.execute("fastcbw-snapshot-create", {"name": "s", "disks": ["a"], "ram": "1M"})
        with client.listener(names=("BLOCK_JOB_COMPLETED",)) as events:
            job = await client.execute("fastcbw-backup", {"disk": "a", "snapshot": "s", "target": str(tmp_path / "t")})
            event = await asyncio.wait_for(events.get(), 60)
        assert event["data"]["device"] == job["id"]
        return await client.execute("query-jobs")

    (job,) = drive(tmp_path / "qmp", script)
    assert job["type"] == "backup" and job["current-progress"] == 1 << 20
    assert (tmp_path / "t").read_bytes()[:4096] == b"a" * 4096


def test_it_raises_the_class_and_the_words_of_an_error(daemon, tmp_path):
    async def script(client):
        with pytest.raises(ExecuteError) as unknown:
            await client.execute("no-such-command")
        with pytest.raises(ExecuteError) as missing:
            await client.execute("fastcbw-snapshot-delete", {"name": "s"})
        return unknown.value.error.error, missing.value.error.error

    unknown, missing = drive(tmp_path / "qmp", script)
    assert unknown.class_ == "CommandNotFound"
    assert (missing.class_, missing.desc) == ("GenericError", "Parameter 'disks' is missing")
