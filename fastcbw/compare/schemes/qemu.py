"""QEMU's schemes, in its storage daemon: the backup job that writes to the target, and fleecing through a temporary image."""

from __future__ import annotations

from typing import Any, ClassVar

from fastcbw.compare.process import find, socket_uri
from fastcbw.compare.schemes.base import Daemon, Progress, Tiers, allocated_bytes
from fastcbw.compare.schemes.overlay import Commit, create_qcow2
from fastcbw.compare.schemes.pulled import progress_of, pull

PACKAGE = "qemu-system-common"


class Qemu(Daemon):
    needs = (("qemu-storage-daemon", PACKAGE),)
    ours = False
    perf: ClassVar[dict[str, Any] | None] = None

    def words(self) -> list[str]:
        return [find("qemu-storage-daemon", PACKAGE), "--chardev", f"socket,id=qmp,path={self.socket}.qmp,server=on,wait=off",
                "--monitor", "chardev=qmp",
                "--blockdev", f"driver=file,node-name=file,filename={self.setting.image},discard=unmap",
                "--blockdev", "driver=raw,node-name=disk,file=file,discard=unmap",
                "--nbd-server", f"addr.type=unix,addr.path={self.socket},max-connections=64",
                "--export", "type=nbd,id=disk,node-name=disk,name=disk,writable=on"]

    def add_target(self) -> None:
        target = self.target
        if target.socket is None:
            file = {"driver": "file", "filename": target.where}
        else:
            file = {"driver": "nbd", "server": {"type": "unix", "path": target.socket}, "export": target.export}
        self.qmp.execute("blockdev-add", driver="raw", node_name="target", file=file)

    def copy(self, source: str) -> None:
        self.settings = {"cache": "writeback", "durability": "none", "cluster": "64K", "aio": "threads"}
        self.settings |= {"x-perf": self.perf or "default"}
        self.qmp.execute("blockdev-backup", job_id=self.JOB, device=source, target="target", sync="full", auto_dismiss=False,
                         x_perf=self.perf)


class Direct(Qemu):
    name = "qemu-direct"
    title = "QEMU, backup job to the target"

    def begin(self) -> None:
        self.add_target()
        self.copy("disk")


class DirectTuned(Direct):
    """Small chunks and few workers: a guest write waits for one small write to the target, not for a full queue."""

    name = "qemu-direct-tuned"
    title = "QEMU, backup job to the target, tuned"
    perf = {"max-workers": 2, "max-chunk": 65536}


class Fleecing(Qemu):
    """copy-before-write into a temporary image, snapshot-access above it, and a backup of that."""

    name = "qemu-fleecing"
    title = "QEMU, fleecing"

    def begin(self) -> None:
        self.insert_filter()
        self.add_target()
        self.copy("access")

    def insert_filter(self) -> None:
        """Put copy-before-write under the guest's node, without a word to its export."""
        setting = self.setting
        with open(setting.path("fleece.img"), "wb") as file:
            file.truncate(setting.length)
        execute = self.qmp.execute
        execute("blockdev-add", driver="file", node_name="fleece", filename=setting.path("fleece.img"), discard="unmap")
        execute("blockdev-add", driver="copy-before-write", node_name="cbw", file="file", target="fleece", discard="unmap")
        execute("blockdev-reopen", options=[{"driver": "raw", "node-name": "disk", "file": "cbw", "discard": "unmap"}])
        execute("blockdev-add", driver="snapshot-access", node_name="access", file="cbw")

    def tiers(self) -> Tiers:
        stored = allocated_bytes(self.setting.path("fleece.img"))
        return Tiers(0, stored, stored)


class FleecingTuned(Fleecing):
    """Chunks of one cluster: QEMU 7.2 reads a range of snapshot-access from the disk where only its first clusters are preserved."""

    name = "qemu-fleecing-tuned"
    title = "QEMU, fleecing, tuned"
    perf = {"max-workers": 64, "max-chunk": 65536}


class FleecingPull(Fleecing):
    """The same filter; an outside client reads what snapshot-access shows."""

    name = "qemu-pull"
    title = "QEMU, fleecing, pulled by nbdcopy"
    needs = (*Qemu.needs, ("nbdcopy", "libnbd-bin"))

    def begin(self) -> None:
        self.insert_filter()
        self.qmp.execute("block-export-add", type="nbd", id="access", node_name="access", name="access")
        self.settings = {"cache": "writeback", "durability": "none", "cluster": "64K", "aio": "threads", "client": "nbdcopy, 4 connections"}
        self.client = pull(self, socket_uri(self.socket, "access"))

    def progress(self) -> Progress:
        return progress_of(self.client, self.setting.length)


class SyncNone(Qemu):
    """What came before copy-before-write: a job with sync none keeps old data in an image above the disk, which is served to a client."""

    name = "qemu-sync-none"
    title = "QEMU, a job with sync none, pulled by nbdcopy"
    needs = (*Qemu.needs, ("qemu-img", "qemu-utils"), ("nbdcopy", "libnbd-bin"))

    def begin(self) -> None:
        fleece = self.setting.path("fleece.qcow2")
        create_qcow2(fleece, self.setting.length)
        self.qmp.execute("blockdev-add", driver="qcow2", node_name="fleece", backing="disk", file={"driver": "file", "filename": fleece})
        self.qmp.execute("blockdev-backup", job_id="keep", device="disk", target="fleece", sync="none", auto_dismiss=False)
        self.qmp.execute("block-export-add", type="nbd", id="fleece", node_name="fleece", name="fleece")
        self.settings = {"cache": "writeback", "durability": "none", "cluster": "64K", "aio": "threads", "client": "nbdcopy, 4 connections"}
        self.client = pull(self, socket_uri(self.socket, "fleece"))

    def progress(self) -> Progress:
        return progress_of(self.client, self.setting.length)

    def tiers(self) -> Tiers:
        stored = allocated_bytes(self.setting.path("fleece.qcow2"))
        return Tiers(0, stored, stored)


class Overlay(Qemu):
    """The guest writes to an overlay while the disk below is copied; then the overlay is committed into the disk."""

    name = "qemu-overlay"
    title = "QEMU, overlay, then a live commit"
    needs = (*Qemu.needs, ("qemu-img", "qemu-utils"))

    def begin(self) -> None:
        overlay = self.setting.path("overlay.qcow2")
        create_qcow2(overlay, self.setting.length)
        self.add_target()
        self.qmp.execute("blockdev-add", driver="qcow2", node_name="overlay", backing=None, file={"driver": "file", "filename": overlay})
        self.qmp.execute("blockdev-snapshot", node="disk", overlay="overlay")
        self.copy("disk")
        self.commit = Commit(self, auto_finalize=True)

    def progress(self) -> Progress:
        return self.commit.progress(super().progress)

    def tiers(self) -> Tiers:
        stored = allocated_bytes(self.setting.path("overlay.qcow2"))
        return Tiers(0, stored, stored)
