"""The options of a snapshot: checked and turned into numbers before anything changes."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from fastcbw.block.device import BlockDevice
from fastcbw.units import parse_size

#: Unit of copy-before-write when nobody says: the smallest preserves least, and costs nothing overall (benchmarks).
CLUSTER_SIZE_DEFAULT = 4096
CLUSTER_SIZE_MIN = 4096
CLUSTER_SIZE_MAX = 1 << 20
RAM_DEFAULT = "256M"
CBW_TIMEOUT_MS_DEFAULT = 5000

_NAME = re.compile(r"[A-Za-z0-9_.-]+")
# What INTERFACE names and what of it is built.
_CHOICES = {
    "on_full": (("break-snapshot", "break-guest-write", "wait"), ()),
    "on_cbw_error": (("break-snapshot", "break-guest-write"), ()),
    "export": (("ro", "discard", "read-once"), ()),
    "durability": (("none",), ("process", "power")),
}


def check_name(name: str, what: str = "snapshot name") -> str:
    """Return NAME; ValueError unless it is one or more of letters, digits, `_`, `.`, `-`."""
    if not isinstance(name, str):
        raise TypeError(f"{what}: expected a string, got {type(name).__name__}")
    if not _NAME.fullmatch(name):
        raise ValueError(f"{what}: {name!r} is no name (one or more of A-Z a-z 0-9 _ . -)")
    return name


def check_policies(on_full: str | None, on_cbw_error: str | None) -> None:
    """Raise ValueError unless each is a policy, or None: left as it is."""
    for option, value in (("on_full", on_full), ("on_cbw_error", on_cbw_error)):
        if value is not None:
            _check_choice(option, value)


@dataclass(frozen=True)
class SnapshotOptions:
    """What a snapshot is taken with. Bytes and milliseconds.

    cluster_size None: that of the disk's live snapshots, or the default. spill: a folder, or a BlockDevice to keep the
    disk tier's log on (it is the caller's, and must outlive the snapshot). in_place: no log: each cluster's old data goes to that device at
    the disk's own offset, so that a backup to it copies the rest only.
    """

    cluster_size: int | None = None
    ram: int = 0
    spill: str | BlockDevice | None = None
    spill_limit: int = 0
    cbw_timeout: int = CBW_TIMEOUT_MS_DEFAULT
    export: str = "ro"
    bitmap: str | None = None
    bitmap_for: str | None = None           # what BITMAP is handed to until it is given back; None: it goes on as it was
    whole: bool = False                     # all is preserved: BITMAP is handed over only, and says nothing of what is needed
    new_bitmap: str | None = None
    new_bitmap_granularity: int | None = None
    on_full: str = "break-snapshot"
    on_cbw_error: str = "break-snapshot"
    copy_on_read: bool = False
    in_place: bool = False

    @classmethod
    def parse(
        cls,
        *,
        cluster_size: int | str | None = None,
        ram: int | str = RAM_DEFAULT,
        spill: str | os.PathLike | BlockDevice | None = None,
        spill_limit: int | str | None = None,
        on_full: str = "break-snapshot",
        on_cbw_error: str = "break-snapshot",
        cbw_timeout: int = CBW_TIMEOUT_MS_DEFAULT,
        copy_on_read: bool = False,
        in_place: bool = False,
        export: str = "ro",
        durability: str = "none",
        bitmap: str | None = None,
        bitmap_for: str | None = None,
        whole: bool = False,
        new_bitmap: str | None = None,
        new_bitmap_granularity: int | str | None = None,
        **others: object,
    ) -> SnapshotOptions:
        """Check the keywords of INTERFACE; ValueError or TypeError names the option, its value and what is expected."""
        for option, value in (("on_full", on_full), ("on_cbw_error", on_cbw_error), ("export", export), ("durability", durability)):
            _check_choice(option, value)
        for option in others:
            raise TypeError(f"snapshot: unknown option {option!r}")
        size = None if cluster_size is None else _check_cluster_size(cluster_size)
        room = _parse_ram(ram, size or CLUSTER_SIZE_DEFAULT)
        folder, limit = _parse_in_place(spill, spill_limit) if in_place else _parse_spill(spill, spill_limit, size or CLUSTER_SIZE_DEFAULT)
        if room == 0 and limit == 0:
            raise ValueError(f"ram: {ram!r} and no spill: the snapshot would have no store at all (give one of the two room)")
        if isinstance(cbw_timeout, bool) or not isinstance(cbw_timeout, int):
            raise TypeError(f"cbw_timeout: expected milliseconds as an int, got {type(cbw_timeout).__name__}")
        if not 1 <= cbw_timeout <= 86_400_000:
            raise ValueError(f"cbw_timeout: {cbw_timeout} is not within 1 to 86400000 milliseconds")
        if not isinstance(copy_on_read, bool):
            raise TypeError(f"copy_on_read: expected a bool, got {type(copy_on_read).__name__}")
        if copy_on_read and room == 0:
            raise ValueError(f"copy_on_read: True without a RAM tier: it never leaves anything elsewhere (give ram, not {ram!r})")
        return cls(size, room, folder, limit, cbw_timeout, copy_on_read=copy_on_read, in_place=bool(in_place), on_full=on_full,
                   on_cbw_error=on_cbw_error, export=export, whole=whole, **_parse_bitmaps(bitmap, bitmap_for, new_bitmap, new_bitmap_granularity))


def _parse_bitmaps(bitmap: object, bitmap_for: str | None, new_bitmap: object, granularity: int | str | None) -> dict:
    for option, value in (("bitmap", bitmap), ("new_bitmap", new_bitmap)):
        if value is not None:
            check_name(value, option)
    if granularity is not None:
        if new_bitmap is None:
            raise ValueError(f"new_bitmap_granularity: {granularity!r} without new_bitmap (name the bitmap that is to begin)")
        granularity = parse_granularity(granularity, "new_bitmap_granularity")
    return {"bitmap": bitmap, "bitmap_for": bitmap_for, "new_bitmap": new_bitmap, "new_bitmap_granularity": granularity}


def parse_granularity(value: int | str, what: str = "granularity") -> int:
    """Return bytes per bit of a dirty bitmap; ValueError unless it is a power of two from 512 to 2G."""
    size = parse_size(value, what)
    if size & (size - 1) or not 512 <= size <= 2 << 30:
        raise ValueError(f"{what}: {value!r} is no power of two from 512 to 2G")
    return size


def _check_choice(option: str, value: object) -> None:
    built, later = _CHOICES[option]
    if value in later:
        raise ValueError(f"{option}: {value!r} is not built yet (there is {', '.join(built)})")
    if value not in built:
        raise ValueError(f"{option}: {value!r} is unknown (there is {', '.join(built)})")


def _check_cluster_size(value: int | str) -> int:
    size = parse_size(value, "cluster_size")
    if size & (size - 1) or not CLUSTER_SIZE_MIN <= size <= CLUSTER_SIZE_MAX:
        raise ValueError(f"cluster_size: {value!r} is not a power of two from 4K to 1M")
    return size


def _parse_ram(value: int | str, cluster_size: int) -> int:
    size = parse_size(value, "ram")
    if 0 < size < cluster_size:
        raise ValueError(f"ram: {value!r} is less than one cluster of {cluster_size} bytes (0 means no RAM tier)")
    if size // cluster_size > 1 << 26:
        raise ValueError(f"ram: {value!r} is more than 2^26 clusters of {cluster_size} bytes (take a larger cluster_size)")
    return size


def _parse_spill(spill: object, limit: int | str | None, cluster_size: int) -> tuple[str | BlockDevice | None, int]:
    if spill is None:
        if limit is not None:
            raise ValueError(f"spill_limit: {limit!r} without spill (name the folder of the disk tier)")
        return None, 0
    if isinstance(spill, BlockDevice):
        size = spill.length if limit is None else parse_size(limit, "spill_limit")
        if size > spill.length:
            raise ValueError(f"spill_limit: {limit!r} is more than the {spill.length} bytes of {spill.name}")
        if spill.read_only:
            raise ValueError(f"spill: {spill.name}: is read-only")
        where = spill
    else:
        where = os.fsdecode(spill)
        size = _free_bytes(where) if limit is None else parse_size(limit, "spill_limit")
    least = 4096 + cluster_size
    if size < least:
        raise ValueError(f"spill_limit: {limit!r} is less than a header and one cluster, {least} bytes")
    return where, size


def _parse_in_place(target: object, limit: object) -> tuple[BlockDevice, int]:
    if not isinstance(target, BlockDevice):
        raise ValueError(f"in_place: True, and spill is {target!r} (name the device that is to be the backup)")
    if limit is not None:
        raise ValueError(f"spill_limit: {limit!r}: old data in place takes room of the disk's length")
    if target.read_only:
        raise ValueError(f"spill: {target.name}: is read-only")
    return target, target.length


def _free_bytes(folder: str) -> int:
    """Half of what the file system has free now: the limit when nobody gives one. FileNotFoundError names FOLDER."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize // 2
