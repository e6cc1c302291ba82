"""The schemes of this package: the filter, with the tiers and the copy orders that it has."""

from __future__ import annotations

from typing import Any, ClassVar

from fastcbw.compare.process import python_module
from fastcbw.compare.schemes.base import Daemon, Progress, Tiers
from fastcbw.compare.targets.base import Target
from fastcbw.units import format_size


class Ours(Daemon):
    """`fastcbw serve`, by default with nothing but the disk."""

    def words(self) -> list[str]:
        return python_module("fastcbw", "serve", f"disk={self.setting.image}", "--socket", self.socket, "--format", "raw")


class NoBackup(Ours):
    name = "none"
    title = "no backup"
    backs_up = False

    def progress(self) -> Progress:
        return Progress(ended=True)


class Filter(Ours):
    """The filter preserves, and a job in the daemon copies what it shows and gives back what it has copied."""

    order: ClassVar[str | None] = None
    spills: ClassVar[bool] = True
    others: ClassVar[dict[str, Any]] = {}

    def begin(self, target: Target) -> None:
        given: dict[str, Any] = {"ram": self.setting.ram} | self.others
        if self.spills:
            given |= {"spill": self.setting.folder}
        else:
            given |= {"on_full": "wait"}
        self.qmp.execute("fastcbw-snapshot-create", name="s", disks=["disk"], **given)
        self.settings = {"cache": "writeback", "durability": "none", "ram": format_size(self.setting.ram), "cluster": "4K (default)",
                         "disk tier": "yes" if self.spills else "no, a guest waits when RAM is full",
                         "order": self.order or "default", "workers": "adaptive"}
        self.copy(target)

    def copy(self, target: Target) -> None:
        self.qmp.execute("fastcbw-backup", disk="disk", snapshot="s", target=target.where, job_id=self.JOB, force=True,
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


def with_order(policy: str) -> type[Filter]:
    """Return the filter with both tiers and the copy order POLICY as a scheme."""
    return type(f"Filter_{policy}", (Filter,), {"name": f"order-{policy}", "title": f"filter, both tiers, order {policy}", "order": policy,
                                                "__doc__": f"The filter with both tiers, copied in the order {policy}."})
