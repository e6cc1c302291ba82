"""The schemes of this package: the filter, with the tiers and the copy orders that it has."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from fastcbw.compare.process import Process, nbd_answers, python_module, socket_uri
from fastcbw.compare.schemes.pulled import progress_of, pull
from fastcbw.compare.schemes.base import Daemon, Progress, Tiers, allocated_bytes
from fastcbw.compare.schemes.overlay import Commit, create_qcow2
from fastcbw.compare.targets.server import EXPORT
from fastcbw.units import format_size


class Ours(Daemon):
    """`fastcbw serve`, by default with nothing but the disk."""

    def words(self) -> list[str]:
        return python_module("fastcbw", "serve", f"disk={self.setting.image}", "--socket", self.socket, "--format", "raw")


class NoBackup(Ours):
    name = "none"
    title = "no backup"
    backs_up = False

    # Asked as often as the others: so the questions are no part of what a scheme costs.
    def progress(self) -> Progress:
        self.qmp.execute("query-jobs")
        return Progress(ended=True)

    def tiers(self) -> Tiers:
        self.qmp.execute("fastcbw-status")
        return Tiers()


class Filter(Ours):
    """The filter preserves, and a job in the daemon copies what it shows and gives back what it has copied."""

    order: ClassVar[str | None] = None
    spills: ClassVar[bool] = True
    others: ClassVar[dict[str, Any]] = {}

    def begin(self) -> None:
        given: dict[str, Any] = {"ram": self.setting.ram} | self.others
        if self.spills:
            given |= {"spill": self.setting.folder}
        else:
            given |= {"on_full": "wait"}
        self.qmp.execute("fastcbw-snapshot-create", name="s", disks=["disk"], **given)
        self.settings = {"cache": "writeback", "durability": "none", "ram": format_size(self.setting.ram), "cluster": "4K (default)",
                         "disk tier": "yes" if self.spills else "no, a guest waits when RAM is full",
                         "order": self.order or "default", "workers": "adaptive"}
        self.copy()

    def copy(self) -> None:
        self.qmp.execute("fastcbw-backup", disk="disk", snapshot="s", target=self.target.where, job_id=self.JOB, force=True,
                         consume=True, order=self.order)

    def tiers(self) -> Tiers:
        snapshot = self.qmp.execute("fastcbw-status")["disks"]["disk"]["snapshots"]["s"]
        return Tiers(snapshot["ram_bytes"], snapshot["disk_bytes"], sum(snapshot["preserved_by"].values()))


class FilterRam(Filter):
    name = "filter-ram"
    title = "filter, RAM tier"
    spills = False


class FilterTiers(Filter):
    name = "filter-tiers"
    title = "filter, RAM and disk tier"


class Notifier(Daemon):
    """The old backup job: a guest write to a cluster that is not copied yet waits until its old content is in the target.

    Workers, chunk, and what is under way at an NBD target at most, are those of QEMU's job by default, which works by the same rule.
    """

    name = "notifier"
    title = "write notifier, 64 workers, 1M chunks"
    workers: ClassVar[int] = 64
    chunk: ClassVar[int] = 1 << 20

    def words(self) -> list[str]:
        return python_module("fastcbw.compare.schemes.notifier_server", self.setting.image, self.target.where, self.socket, str(self.workers),
                             str(self.chunk))

    def begin(self) -> None:
        self.settings = {"cache": "writeback", "cluster": "64K", "workers": self.workers, "chunk": format_size(self.chunk),
                         "connections to the target": "1, with 16 requests"}
        self.qmp.execute("begin")


class NotifierTuned(Notifier):
    name = "notifier-tuned"
    title = "write notifier, 2 workers, 64K chunks"
    workers, chunk = 2, 65536


class SyncNone(Notifier):
    """The old scheme with a fast place for old data: one job with sync none keeps there what the guest overwrites, another copies from both."""

    name = "sync-none"
    title = "two jobs, one with sync none into a file"

    def words(self) -> list[str]:
        return [*super().words(), self.setting.path("fleece.img")]

    def begin(self) -> None:
        super().begin()
        self.settings["workers"] = self.settings["chunk"] = "adaptive"

    def tiers(self) -> Tiers:
        stored = allocated_bytes(self.setting.path("fleece.img"))
        return Tiers(0, stored, stored)


class Nodes(Ours):
    """A graph of nodes: the disk, to which the guest's export goes, and the target."""

    def words(self) -> list[str]:
        config = self.setting.path("graph.json")
        with open(config, "w", encoding="utf-8") as file:
            json.dump({"nodes": [{"driver": "file", "node-name": "disk", "filename": self.setting.image}],
                       "exports": [{"id": "guest", "node-name": "disk", "name": "disk", "writable": True}]}, file)
        return python_module("fastcbw", "serve", "--config", config, "--socket", self.socket)

    def add_target(self) -> None:
        target = self.target
        if target.socket is None:
            self.qmp.execute("blockdev-add", driver="file", node_name="target", filename=target.where)
        else:
            self.qmp.execute("blockdev-add", driver="nbd", node_name="target", server={"type": "unix", "path": target.socket}, export=target.export)


class StoreIsTarget(Nodes):
    """What the guest overwrites goes straight to its place in the backup, and a job copies what is not there yet."""

    name = "store-target"
    title = "filter whose store is the target"

    def begin(self) -> None:
        self.add_target()
        filter_ = {"driver": "copy-before-write", "node-name": "cbw", "file": "disk", "target": "target", "layout": "in-place", "ram": 0,
                   "on-cbw-error": "break-snapshot"}
        job = {"job-id": self.JOB, "device": "snap", "target": "target", "sync": "full", "discard-source": True, "auto-dismiss": False}
        actions = [("blockdev-add", filter_), ("blockdev-add", {"driver": "snapshot-access", "node-name": "snap", "file": "cbw"}),
                   ("fastcbw-replace", {"parent": "guest", "node": "cbw"}), ("blockdev-backup", job)]
        self.qmp.execute("transaction", actions=[{"type": kind, "data": data} for kind, data in actions])
        self.settings = {"cache": "writeback", "durability": "none", "ram": 0, "cluster": "4K (default)", "workers": "adaptive"}


class Overlay(Nodes):
    """The guest writes to an overlay, which qemu-nbd serves to us, while the disk below is copied; then the overlay is committed into the disk."""

    name = "overlay"
    title = "overlay by qemu-nbd, then a live commit"
    needs = (("qemu-img", "qemu-utils"), ("qemu-nbd", "qemu-utils"))

    def begin(self) -> None:
        overlay = self.setting.path("overlay.qcow2")
        create_qcow2(overlay, self.setting.length, self.setting.image)
        execute = self.qmp.execute
        execute("blockdev-add", driver="qcow2", node_name="overlay", file={"driver": "file", "filename": overlay})
        execute("fastcbw-replace", parent="guest", node="overlay")
        self.add_target()
        execute("blockdev-backup", job_id=self.JOB, device="disk", target="target", sync="full", auto_dismiss=False)
        self.settings = {"cache": "writeback", "durability": "none", "cluster": "64K", "workers": "adaptive"}
        self.commit = Commit(self)

    def progress(self) -> Progress:
        return self.commit.progress(super().progress)

    def tiers(self) -> Tiers:
        stored = allocated_bytes(self.setting.path("overlay.qcow2"))
        return Tiers(0, stored, stored)


class Pull(Filter):
    """An outside client reads the snapshot's export; the daemon only serves."""

    name = "pull"
    title = "filter, both tiers, pulled by nbdcopy"
    needs = (("nbdcopy", "libnbd-bin"),)

    def copy(self) -> None:
        self.settings |= {"client": "nbdcopy, 4 connections"}
        self.client = pull(self, socket_uri(self.socket, "disk@s"))

    def progress(self) -> Progress:
        return progress_of(self.client, self.setting.length)


class SlowSource(Filter):
    """The disk itself is slow to read, so that a first write waits for the old content."""

    name = "slow-source"
    title = "filter on a disk of 2 ms a read"
    others: ClassVar[dict[str, Any]] = {}

    def words(self) -> list[str]:
        path = self.setting.path("source.sock")
        source = Process("source", python_module("fastcbw.compare.targets.server", self.setting.image, path, "read_ms=2"), self.setting.folder,
                         self.setting.cpu)
        self.processes.append(source)
        source.start(lambda: nbd_answers(path))
        return python_module("fastcbw", "serve", f"disk={socket_uri(path, EXPORT)}", "--socket", self.socket, "--format", "raw")


class SlowSourceKept(SlowSource):
    name = "slow-source-kept"
    title = "the same with copy-on-read"
    others = {"copy_on_read": True}


def with_order(policy: str) -> type[Filter]:
    """Return the filter with both tiers and the copy order POLICY as a scheme."""
    return type(f"Filter_{policy}", (Filter,), {"name": f"order-{policy}", "title": f"filter, both tiers, order {policy}", "order": policy,
                                                "__doc__": f"The filter with both tiers, copied in the order {policy}."})
