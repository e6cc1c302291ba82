"""Replies and a client's default read limit: long lists come in pages, to an unmodified qemu.qmp client too."""

import json
import socket

import pytest
from qemu.qmp import ExecuteError
from test_qemu_qmp_client import drive

from fastcbw.errors import Error
from fastcbw.qmp.replies import REPLY_BYTES_LIMIT

NODES = 600


@pytest.fixture
def many(daemon):
    """Nodes, more than a reply of 64 KiB describes."""
    daemon.nodes.add([{"driver": "x-fastcbw-memory", "node-name": f"node-with-a-rather-long-name-{i:03}", "size": 512} for i in range(NODES)])
    return {"a", "b"} | {f"node-with-a-rather-long-name-{i:03}" for i in range(NODES)}


@pytest.mark.parametrize("command, start, limit, key", [("query-named-block-nodes", "fastcbw-start", "fastcbw-limit", "node-name"),
                                                        ("fastcbw-graph", "start", "limit", "node")])
def test_an_unmodified_client_pages_through_a_long_list_on_one_connection(daemon, many, tmp_path, command, start, limit, key):
    async def script(client):
        with pytest.raises(ExecuteError, match=f"more than a client reads by default, 65536 .ask for parts of it, by '{start}' and '{limit}'."):
            await client.execute(command)
        seen = []
        while True:
            page = await client.execute(command, {start: len(seen)})        # as many as fit
            if not page:
                break
            assert len(json.dumps(page)) < REPLY_BYTES_LIMIT * 1.1
            seen += page
        few = await client.execute(command, {start: 7, limit: 3})
        assert few == seen[7:10] and await client.execute(command, {limit: 1}) == seen[:1]
        return [item[key] for item in seen]

    seen = drive(tmp_path / "qmp", script)
    assert len(seen) == len(many) and set(seen) == many


def test_a_client_that_reads_longer_lines_says_so_and_gets_them(many, remote):
    """Ours does: the command line shows everything."""
    assert {node["node"] for node in remote.client.execute("fastcbw-graph")} == many
    assert len(remote.client.execute("query-named-block-nodes", fastcbw_start=1)) == len(many) - 1


def test_the_status_is_had_by_disk(daemon, many, tmp_path):
    for i in range(NODES):
        daemon.disk(f"node-with-a-rather-long-name-{i:03}")

    async def script(client):
        with pytest.raises(ExecuteError, match="The reply of fastcbw-status is .* bytes.*by 'disk'"):
            await client.execute("fastcbw-status")
        with pytest.raises(ExecuteError, match="disk 'c': not found"):
            await client.execute("fastcbw-status", {"disk": "c"})
        return await client.execute("fastcbw-status", {"disk": "a"})

    assert list(drive(tmp_path / "qmp", script)["disks"]) == ["a"]


@pytest.mark.parametrize("given, words", [({"fastcbw-start": -1}, "'fastcbw-start' expects a value of at least 0, not -1"),
                                          ({"fastcbw-limit": 0}, "'fastcbw-limit' expects a value of at least 1, not 0"),
                                          ({"fastcbw-limit": "1"}, "'fastcbw-limit', expected: integer"),
                                          ({"start": 1}, "Parameter 'start' is unexpected")])
def test_a_page_that_makes_no_sense_is_refused(remote, given, words):
    with pytest.raises(Error, match=words):
        remote.client.execute("query-jobs", **given)


def test_a_page_after_the_last_is_empty(remote):
    assert remote.client.execute("query-block-exports", fastcbw_start=1000) == []


def test_errors_that_quote_a_long_request_stay_short(daemon, tmp_path):
    name = "x" * 500_000
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "qmp"))
        client.settimeout(30)
        stream = client.makefile("rb")
        stream.readline()
        for request in ({"execute": "qmp_capabilities"}, {"execute": name}, {"execute": "blockdev-del", "arguments": {"node-name": name}},
                        {"execute": "blockdev-add", "arguments": {"driver": name}}, {"execute": "query-version", "arguments": {name: 1}},
                        {"execute": "transaction", "arguments": {"actions": [{"type": name}]}}, {"execute": "query-version"}):
            client.sendall(json.dumps(request).encode())        # without a newline
            line = stream.readline()
            assert len(line) < 10_000
        assert "return" in json.loads(line)
