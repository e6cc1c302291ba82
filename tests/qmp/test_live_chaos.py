"""Everything at once to a daemon's graph: guests at depth on connections of their own, some of which die in the middle of a request, while
filters come and go under them, disks fail now and then, and backups are taken; seeded, and each sector's version is accounted for.

    guest ── its pages, one write of each under way ── acknowledged: there for good ── failed, or its client killed: old or new, until
             it is written again ── every read after an acknowledgement is of that version
    backup ─ of the disk itself: each sector of a page has a version that was issued, and no cache being above, one not older than
             what was acknowledged before

FASTCBW_SECONDS=N lets the run take N seconds, FASTCBW_SEEDS=N runs N seeds.
"""

import os
import random
import threading
import time

import numpy as np
import pytest
from test_live import LENGTH, PAGE, act, execute, to, vm  # noqa: F401 - fixtures

from fastcbw.errors import Error
from fastcbw.export.nbd.client import Client
from fastcbw.wire import constants as c

SECONDS = float(os.environ.get("FASTCBW_SECONDS", 3))
SEEDS = int(os.environ.get("FASTCBW_SEEDS", 1))
GUESTS, DEPTH = 3, 6
PAGES = LENGTH // PAGE
ABOVE = [
    {"driver": "throttle", "limits": {"bps-total": 1 << 40}},
    {"driver": "x-fastcbw-cache", "size": 1 << 20},
    {"driver": "x-fastcbw-cache", "size": 1 << 20, "mode": "writethrough"},
    {"driver": "copy-before-write", "target": {"driver": "x-fastcbw-memory", "size": 2 * LENGTH}, "on-cbw-error": "break-snapshot", "ram": 1 << 16},
    {"driver": "x-fastcbw-write-notifier", "target": {"driver": "x-fastcbw-memory", "size": LENGTH}},
    {"driver": "x-fastcbw-fault", "rules": [{"operation": "write", "after": 40, "count": 3}, {"operation": "read", "stall-ms": 1, "errno": "none"}]},
]


def content(version):
    return version.to_bytes(4, "little") * (PAGE // 4)


def versions(data):
    """The version of each sector, one row for each page; a sector of two versions is an error."""
    words = np.frombuffer(data, "<u4").reshape(len(data) // PAGE, 8, 128)
    assert (words == words[:, :, :1]).all(), "a sector of two versions"
    return words[:, :, 0]


class Guest:
    """A guest of the pages NUMBER, NUMBER + GUESTS, … by an export of its own; run() until stop is set."""

    def __init__(self, daemon, path, number, seed, stop):
        self.daemon, self.path, self.name, self.stop = daemon, path, f"vm{number}", stop
        self.random = random.Random(f"{seed} {number}")
        self.pages = range(number, PAGES, GUESTS)
        self.issued = np.zeros(PAGES, np.int64)
        self.acknowledged = np.zeros(PAGES, np.int64)       # or -1: old or new
        self.settled = np.zeros(PAGES, np.int64)            # the last one that was acknowledged
        self.kills = self.failures = 0

    def run(self):
        version = 0
        while not self.stop.is_set():
            under_way = {}
            with Client(self.path, self.name) as guest:
                doomed = self.random.randrange(20, 400)
                while under_way or not self.stop.is_set():
                    while len(under_way) < DEPTH and not self.stop.is_set() and doomed:
                        page = self.random.choice(self.pages)
                        if any(page == busy for busy, _ in under_way.values()):
                            continue
                        doomed -= 1
                        if self.acknowledged[page] >= 0 and self.random.random() < 0.4:
                            under_way[guest.send(c.CMD_READ, page * PAGE, PAGE)] = page, None
                            continue
                        version += 1
                        self.issued[page] = version
                        self.acknowledged[page] = -1
                        under_way[guest.send(c.CMD_WRITE, page * PAGE, PAGE, payload=content(version))] = page, version
                    if not doomed and not self.stop.is_set():
                        self.die(guest)
                        break
                    self.take(guest.receive_reply(), under_way)
            while self.daemon.nbd.exports[self.name].connections:       # what it had under way has ended then
                time.sleep(0.001)

    def die(self, guest):
        """In the middle of a request's header, of its payload, or between two."""
        page = self.random.choice([page for page in self.pages if self.acknowledged[page] < 0] or [self.pages[0]])
        self.acknowledged[page] = -1
        request = c.REQUEST_MAGIC.to_bytes(4, "big") + bytes(3) + b"\x01" + bytes(8) + (page * PAGE).to_bytes(8, "big") + PAGE.to_bytes(4, "big")
        guest.sock.sendall((request + content(int(self.issued[page])))[: self.random.choice([0, 11, 28, 1000])])
        guest.sock.close()
        self.kills += 1

    def take(self, reply, under_way):
        page, version = under_way.pop(reply.cookie)
        if reply.error:
            self.failures += 1
        elif version is not None:
            self.acknowledged[page] = self.settled[page] = version
        else:
            assert b"".join(data for _, data in reply.data) == content(int(self.settled[page])), f"page {page}: not {self.settled[page]}"


@pytest.mark.parametrize("seed", range(SEEDS))
def test_nothing_is_lost_whatever_happens_at_once(daemon, vm, execute, tmp_path, seed):  # noqa: F811
    chance, stop, errors = random.Random(seed), threading.Event(), []
    for number in range(GUESTS):
        execute("block-export-add", type="nbd", id=f"vm{number}", node_name="disk", name=f"vm{number}", writable=True)
    execute("block-export-del", id="vm")
    execute("blockdev-add", driver="x-fastcbw-memory", node_name="copy", size=LENGTH)
    guests = [Guest(daemon, tmp_path / "nbd", number, seed, stop) for number in range(GUESTS)]

    def run(guest):
        try:
            guest.run()
        except BaseException as error:
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=run, args=(guest,)) for guest in guests]
    for thread in threads:
        thread.start()
    move = lambda node: [to(node, parent=f"vm{number}") for number in range(GUESTS)]     # noqa: E731
    edits = backups = refused = 0
    end = time.monotonic() + SECONDS
    try:
        while time.monotonic() < end and not stop.is_set():
            above = chance.choice(ABOVE)
            try:
                execute("transaction", actions=[act("blockdev-add", **above | {"node-name": "above", "file": "disk"}), *move("above")])
            except Error:
                refused += 1
                continue
            edits += 1
            cached = above["driver"] == "x-fastcbw-cache"
            for _ in range(chance.randrange(3)):
                backups += backup(execute, daemon, guests, cached)
            while True:
                try:        # a write-back that fails, or a disk that does not come to rest in time, leaves all as it is
                    execute("transaction", actions=[*move("disk"), act("blockdev-del", **{"node-name": "above"})])
                    break
                except Error:
                    refused += 1
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads) and not errors, errors
    for number in range(GUESTS):
        execute("block-export-del", id=f"vm{number}")
    found = versions(vm.read_bytes())
    for guest in guests:
        sure = [page for page in guest.pages if guest.acknowledged[page] >= 0]
        assert (found[sure] == guest.acknowledged[sure, None]).all()
    assert edits > 3
    print(f"{edits} edits, {refused} refused, {backups} backups, {sum(guest.kills for guest in guests)} kills, "
          f"{sum(guest.failures for guest in guests)} failures, {sum(int(guest.settled.max()) for guest in guests)} writes")


def backup(execute, daemon, guests, cached):
    """Back the disk up, or find that it can't be had just now; check it by the versions of before and after. Whether it was one."""
    before = np.maximum.reduce([guest.settled for guest in guests])
    try:
        execute("blockdev-backup", device="disk", target="copy", sync="full", job_id="job", auto_dismiss=False)
    except Error:
        return False
    while (job := execute("query-jobs")[0])["status"] != "concluded":
        time.sleep(0.001)
    execute("job-dismiss", id="job")
    after = np.maximum.reduce([guest.issued for guest in guests])
    if job["outcome"] != "completed":
        return False
    found = versions(daemon.nodes.graph.find("copy").device.read(0, LENGTH))
    assert (found <= after[:, None]).all(), "a version that was never issued"
    assert cached or (found >= before[:, None]).all(), "an acknowledged write is not in the backup"
    return True
