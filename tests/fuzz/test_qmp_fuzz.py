"""Seeded, bounded: requests and descriptions of graphs that are nearly right find nothing but errors.

What is sent begins as something that works and is then bent: values of other types, members missing, added or swapped, names of what
is there and what is not, whole parts from elsewhere. Every reply must be a value or an error in our own words, and
afterwards the daemon works as before. FASTCBW_FUZZ multiplies the number of requests.
"""

import copy
import json
import logging
import os
import random
import re
import socket
import time

import pytest

from fastcbw.block.memory import MemoryDevice
from fastcbw.disk import open as open_disk
from fastcbw.export.nbd.client import Client
from fastcbw.qmp.daemon import Daemon

REQUESTS = 300 * int(os.environ.get("FASTCBW_FUZZ", "1"))
#: What Python says when nobody has checked an argument.
OURS_NOT = re.compile(r"internal error|NoneType|unexpected keyword|positional|object is not|has no attribute|not supported between|"
                      r"unhashable|must be str|expected str, bytes|Traceback|can only concatenate")
CBW = {"driver": "copy-before-write", "node-name": "cbw", "file": "m", "target": "t", "on-cbw-error": "break-snapshot", "ram": 1 << 20}
SEEDS = [
    ("blockdev-add", {"driver": "x-fastcbw-memory", "node-name": "m", "size": 1 << 20}),
    ("blockdev-add", {"driver": "x-fastcbw-memory", "node-name": "t", "size": 4 << 20}),
    ("blockdev-add", {"driver": "raw", "node-name": "r", "file": {"driver": "file", "filename": "disk.img", "cache": {"direct": False}}}),
    ("blockdev-add", {"driver": "nbd", "node-name": "n", "server": {"type": "unix", "path": "nowhere"}, "export": "x"}),
    ("blockdev-add", {"driver": "x-fastcbw-delay", "node-name": "d", "file": "m", "read-ms": 0}),
    ("blockdev-add", {"driver": "throttle", "node-name": "th", "file": "m", "limits": {"bps-total": 1 << 30, "bps-total-max": 1 << 31,
                                                                                     "bps-total-max-length": 2, "iops-write": 7, "iops-size": 4096}}),
    ("blockdev-add", {"driver": "x-fastcbw-fault", "node-name": "fa", "file": "m", "rules": [
        {"operation": "write", "errno": "ENOSPC", "offset": 0, "length": 4096, "after": 1, "after-bytes": 4096, "count": 1, "stall-ms": 1}]}),
    ("blockdev-add", {"driver": "x-fastcbw-cache", "node-name": "ca", "file": "m", "size": 1 << 20, "mode": "writeback"}),
    ("blockdev-add", {"driver": "copy-on-read", "node-name": "cr", "file": "th", "size": 1 << 20}),
    ("blockdev-add", {"driver": "x-fastcbw-write-notifier", "node-name": "wn", "file": "m", "target": "t", "cluster-size": 4096,
                      "on-cbw-error": "break-snapshot"}),
    ("blockdev-reopen", {"options": [{"driver": "throttle", "node-name": "th", "file": "m", "limits": {"bps-read": 1 << 30}},
                                     {"driver": "x-fastcbw-fault", "node-name": "fa", "rules": []}]}),
    ("fastcbw-replace", {"parent": "e", "node": "th", "timeout": 100}),
    ("fastcbw-replace", {"parent": "th", "child": "file", "node": "m"}),
    ("fastcbw-replace", {"parent": "cbw", "child": "target", "node": "t"}),
    ("transaction", {"actions": [{"type": "fastcbw-replace", "data": {"parent": "e", "node": "ca"}}, {"type": "blockdev-add", "data": {
        "driver": "x-fastcbw-cache", "node-name": "ca", "file": "m", "size": 1 << 20}}]}),
    ("blockdev-backup", {"job-id": "w", "device": "wn", "target": "t", "sync": "full"}), ("blockdev-del", {"node-name": "th"}),
    ("blockdev-add", CBW),
    ("blockdev-add", {"driver": "snapshot-access", "node-name": "s", "file": "cbw"}),
    ("blockdev-del", {"node-name": "m"}),
    ("blockdev-del", {"node-name": "cbw"}),
    ("query-named-block-nodes", {"flat": True}), ("fastcbw-graph", {}), ("query-block-exports", {}), ("query-jobs", {}), ("fastcbw-status", {}),
    ("block-export-add", {"type": "nbd", "id": "e", "node-name": "m", "writable": True, "name": "x"}),
    ("block-export-add", {"type": "nbd", "id": "f", "node-name": "s"}),
    ("block-export-del", {"id": "e", "mode": "hard"}),
    ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "second"}}}), ("nbd-server-stop", {}),
    ("fastcbw-replace", {"parent": "e", "node": "cbw"}),
    ("blockdev-backup", {"job-id": "j", "device": "m", "target": "t", "sync": "full", "x-perf": {"max-workers": 1}}),
    ("transaction", {"actions": [{"type": "blockdev-add", "data": CBW}, {"type": "blockdev-backup", "data": {
        "device": "a", "target": "t", "sync": "full"}}], "properties": {"completion-mode": "individual"}}),
    ("fastcbw-snapshot-create", {"name": "s1", "disks": ["a"], "ram": "1M", "cluster-size": 65536}),
    ("fastcbw-snapshot-delete", {"name": "s1", "disks": ["a"]}), ("fastcbw-snapshot-list", {}),
    ("fastcbw-backup", {"disk": "a", "target": "out.img", "workers": 1, "force": True}),
    ("blockdev-backup", {"job-id": "k", "device": "m", "target": "t", "sync": "none", "speed": 1 << 20, "auto-dismiss": True}),
    ("block-dirty-bitmap-add", {"node": "m", "name": "b", "granularity": 4096, "disabled": False}),
    ("block-dirty-bitmap-merge", {"node": "m", "target": "b", "bitmaps": ["b"]}), ("block-dirty-bitmap-remove", {"node": "m", "name": "b"}),
    ("blockdev-backup", {"job-id": "l", "device": "m", "target": "t", "sync": "full", "bitmap": "b", "bitmap-mode": "always"}),
    ("transaction", {"actions": [
        {"type": "block-dirty-bitmap-clear", "data": {"node": "m", "name": "b"}},
        {"type": "blockdev-backup", "data": {"device": "m", "target": "t", "sync": "incremental", "bitmap": "b", "auto-finalize": False}}],
        "properties": {"completion-mode": "grouped"}}),
    ("transaction", {"actions": [{"type": "blockdev-add", "data": {"driver": "x-fastcbw-memory", "node-name": "g", "size": 4096}}],
                     "properties": {"fastcbw-bind-to-connection": True}}),
    ("block-commit", {"job-id": "c", "device": "m", "base-node": "r", "top": "disk.img", "speed": 0, "on-error": "report"}),
    ("query-block-jobs", {"fastcbw-start": 0, "fastcbw-limit": 2}), ("fastcbw-status", {"disk": "a"}),
    ("job-complete", {"id": "j"}), ("job-finalize", {"id": "m"}), ("block-job-cancel", {"device": "k", "force": False}), ("job-pause", {"id": "k"}),
    ("block-job-set-speed", {"device": "k", "speed": 0}),
    ("job-cancel", {"id": "j"}), ("job-dismiss", {"id": "j"}), ("query-commands", {}), ("query-version", {}),
]
WORDS = ["", "a", "a@s1", "m", "t", "cbw", "s", "j", "nowhere", "a/b", "x" * 300, "\x00", "é", "1M", "-1", "full", "raw", "disk.img"]
VALUES = [None, True, 0, -1, 7, 1 << 70, 1.5, [], {}, [[]], ["a", "a"], [{}], {"driver": "raw"}, {"type": "unix"}, *WORDS]


def bend(rng, value, depth=0):
    """Return VALUE with something about it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        value = dict(value)
        name = rng.choice(list(value))
        what = rng.random()
        if what < 0.15:
            del value[name]
        elif what < 0.3:
            value[rng.choice([*value, "colour", "bitmap", "file", "node-name", ""])] = copy.deepcopy(rng.choice(VALUES))
        else:
            value[name] = bend(rng, value[name], depth + 1)
        return value
    if isinstance(value, list) and value and rng.random() < 0.8:
        value = list(value)
        i = rng.randrange(len(value))
        value[i:i + 1] = rng.choice([[], [bend(rng, value[i], depth + 1)], [value[i], value[i]]])
        return value
    if rng.random() < 0.05:
        for _ in range(rng.choice([3, 70])):
            value = {"driver": "raw", "file": value}
        return value
    return copy.deepcopy(rng.choice(VALUES))


def say(stream, sock, request):
    """Send REQUEST and return the reply, passing over events."""
    sock.sendall(json.dumps(request).encode() + b"\n")
    while True:
        reply = json.loads(stream.readline())
        if "event" not in reply:
            return reply


@pytest.mark.parametrize("seed", range(4))
def test_requests_that_are_nearly_right_find_nothing_but_errors(seed, tmp_path, monkeypatch, caplog):
    rng = random.Random(seed)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    with Daemon() as daemon:
        daemon.add_disk(open_disk(MemoryDevice(1 << 20, name="a"), name="a"))
        daemon.disks["a"].write(0, b"kept")
        daemon.listen_nbd("nbd")
        daemon.listen_qmp("qmp")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect("qmp")
            sock.settimeout(60)
            stream = sock.makefile("rb")
            stream.readline()
            assert say(stream, sock, {"execute": "qmp_capabilities"}) == {"return": {}}
            answered = {"return": 0, "error": 0}
            for _ in range(REQUESTS):
                name, given = rng.choice(SEEDS)
                for _ in range(rng.choice([0, 0, 1, 1, 2])):
                    given = bend(rng, given)
                request = {"execute": name, "arguments": given, "id": rng.choice(VALUES)}
                reply = say(stream, sock, request)
                assert reply["id"] == request["id"]
                answered["return" if "return" in reply else "error"] += 1
                if "error" in reply:
                    words = reply["error"]["desc"]
                    assert not OURS_NOT.search(words), f"{json.dumps(request)[:500]} -> {words}"
                    assert "\n" not in words and words, request
            assert min(answered.values()) > REQUESTS // 10
        with Client("nbd", "a") as guest:
            assert guest.read(0, 4) == b"kept"
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert not (tmp_path / "nbd").exists() and not (tmp_path / "second").exists()


@pytest.mark.parametrize("seed", range(2))
def test_bytes_that_are_no_requests_end_that_client_at_most(seed, tmp_path):
    rng = random.Random(seed)
    with Daemon() as daemon:
        daemon.listen_nbd(str(tmp_path / "nbd"))
        daemon.listen_qmp(str(tmp_path / "qmp"))
        for _ in range(30):
            while daemon.qmp.clients:       # those that have hung up are about to be noticed
                time.sleep(0.001)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(tmp_path / "qmp"))
                assert b"QMP" in sock.recv(1 << 16)
                text = json.dumps({"execute": "query-version", "id": "x" * rng.randrange(50)}).encode()
                garbage = bytearray(text * rng.randrange(1, 5))
                for _ in range(rng.randrange(1, 20)):
                    garbage[rng.randrange(len(garbage))] = rng.randrange(256)
                try:
                    for at in range(0, len(garbage), 97):
                        sock.sendall(garbage[at:at + 97])
                except BrokenPipeError:
                    pass
        while daemon.qmp.clients:
            time.sleep(0.001)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(tmp_path / "qmp"))
            stream = sock.makefile("rb")
            assert "QMP" in json.loads(stream.readline())
            assert say(stream, sock, {"execute": "qmp_capabilities"}) == {"return": {}}
