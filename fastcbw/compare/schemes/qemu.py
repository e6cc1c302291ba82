"""QEMU's schemes, in its storage daemon: the backup job that writes to the target, and fleecing through a temporary image."""

from __future__ import annotations

from typing import Any, ClassVar

from fastcbw.compare.process import find
from fastcbw.compare.schemes.base import Daemon, Tiers, allocated_bytes
from fastcbw.compare.targets.base import Target

PACKAGE = "qemu-system-common"


class Qemu(Daemon):
    needs = (("qemu-storage-daemon", PACKAGE),)
    perf: ClassVar[dict[str, Any] | None] = None

    def words(self) -> list[str]:
        return [find("qemu-storage-daemon", PACKAGE), "--chardev", f"socket,id=qmp,path={self.socket}.qmp,server=on,wait=off",
                "--monitor", "chardev=qmp",
                "--blockdev", f"driver=file,node-name=file,filename={self.setting.image},discard=unmap",
                "--blockdev", "driver=raw,node-name=disk,file=file,discard=unmap",
                "--nbd-server", f"addr.type=unix,addr.path={self.socket},max-connections=64",
                "--export", "type=nbd,id=disk,node-name=disk,name=disk,writable=on"]

    def add_target(self, target: Target) -> None:
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

    def begin(self, target: Target) -> None:
        self.add_target(target)
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

    def begin(self, target: Target) -> None:
        self.insert_filter()
        self.add_target(target)
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
