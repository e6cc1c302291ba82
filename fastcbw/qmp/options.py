"""The options of a snapshot and of a backup, once: the command line and QMP both are made from these tables.

A value that is not built yet is refused by name, here and for both; it is never accepted and ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from fastcbw.cbw.policies import ORDER_DEFAULT, ORDERS, parse_order


@dataclass(frozen=True)
class Option:
    """One option.

    name: as on the command line, without the dashes. type: a type of the schema, for both.
    choices: every value the interface knows; built: those that exist now (None: any; empty: the option itself is not
    built, so only ``off`` may be given). off: the value that asks for nothing. check: raises ValueError, with the option's name
    in front, for a value that can't be had; choices are then what to name in the help. metavar: what the help calls the value.
    """

    name: str
    type: str
    doc: str
    choices: tuple[str, ...] = ()
    built: tuple | None = None
    off: object = None
    check: Callable[[str], object] | None = None
    metavar: str = ""

    @property
    def keyword(self) -> str:
        return self.name.replace("-", "_")

    def refusal(self, value, dashes: str = "") -> str | None:
        """Return why VALUE can't be had, one line, or None when it can. DASHES: how the option is written."""
        name = dashes + self.name
        if self.check is not None:
            try:
                self.check(value)
            except ValueError as error:
                return f"{dashes}{error}"
        elif self.choices and value not in self.choices:
            return f"{name}: {value!r} is unknown (one of {', '.join(self.built or self.choices)})"
        if self.built is None or value in self.built or value == self.off:
            return None
        if not self.built:
            return f"{name}: not built yet (leave the option out)"
        return f"{name}: {value!r} is not built yet (what exists: {', '.join(map(str, self.built))})"


SNAPSHOT_OPTIONS = (
    Option("cluster-size", "size", "unit of copy-before-write, a power of two; the first live snapshot fixes it"),
    Option("ram", "size", "hard limit of the RAM tier; 0 = none (default 256M)"),
    Option("spill", "str", "directory of the disk tier (default: no disk tier)", metavar="DIR"),
    Option("spill-limit", "size", "hard limit of the disk tier; whole segments with their headers, so that a little less is data (default: half of what is free)"),
    Option("bitmap", "str", "preserve only what this dirty bitmap marks; nothing else can be read", metavar="NAME"),
    Option("new-bitmap", "str", "name of a dirty bitmap that starts, empty, at the same instant", metavar="NAME"),
    Option("new-bitmap-granularity", "size", "its bytes per bit (default that of --bitmap, or 64K)"),
    Option("on-full", "str", "when the limits are reached (default break-snapshot)",
           choices=("wait", "break-snapshot", "break-guest-write")),
    Option("on-cbw-error", "str", "when source or store fails (default break-snapshot)",
           choices=("break-snapshot", "break-guest-write")),
    Option("cbw-timeout", "int", "longest wait of a guest write in milliseconds (default 5000)", metavar="MS"),
    Option("copy-on-read", "bool", "keep in RAM what readers read, while room is free"),
    Option("export", "str", "how the snapshot is exported (default ro)",
           choices=("ro", "discard", "read-once")),
    Option("durability", "str", "what the store survives (default none; process and power are not built yet)",
           choices=("none", "process", "power"), built=("none",)),
)

#: What can be changed of a snapshot that lives.
LIVE_OPTIONS = tuple(replace(option, doc=re.sub(r"[;,]? ?\(default[^)]*\)", "", option.doc)) for option in SNAPSHOT_OPTIONS if option.name in ("ram", "spill-limit", "on-full", "on-cbw-error"))

BACKUP_OPTIONS = (
    Option("order", "str", "copy order, one policy or several with commas (default " + ORDER_DEFAULT + ")", choices=ORDERS, check=parse_order),
    Option("workers", "int", "threads that copy"),
    Option("in-flight", "size", "most bytes of the job in flight"),
    Option("verify", "bool", "read the target again and compare it with the snapshot"),
    Option("force", "bool", "replace an existing target"),
    Option("rate", "size", "limit in bytes per second"),
    Option("guest-p99", "int", "slow down when the guest's p99 write latency is above these milliseconds", metavar="MS"),
    Option("bitmap", "str", "copy only what this dirty bitmap marks, into a full backup that exists", metavar="NAME"),
    Option("consume", "bool", "drop from the snapshot what is copied (not with --verify)"),
    Option("resume", "bool", "go on with a target that was left incomplete", built=(), off=False),
)


def refusals(options: tuple[Option, ...], given: Mapping[str, object], dashes: str = "") -> str | None:
    """Return the first reason why GIVEN (keyword -> value; None = not given) can't be had, or None."""
    for option in options:
        value = given.get(option.keyword)
        if value is None:
            continue
        reason = option.refusal(value, dashes)
        if reason is not None:
            return reason
    return None

