"""The data of a daemon's disks and snapshots, for another process: bytes over NBD, maps and copy orders over QMP.

Each read or write is a connection of its own, so that no object of ours keeps a snapshot in use. For more than a few, open `uri`:
`fastcbw.open(snapshot.uri, read_only=True)`, or any client of NBD.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy

from fastcbw.block.device import HOLE, ZERO
from fastcbw.block.image import as_device
from fastcbw.cbw.access import CHANGED, IN_RAM, IS_ZERO, MAP_DTYPE, ON_DISK, READABLE
from fastcbw.cbw.order import ORDER_DTYPE
from fastcbw.cbw.policies import ORDER_DEFAULT
from fastcbw.disk import SnapshotGroup
from fastcbw.errors import Error

#: Extents asked for at once: a reply of some MiB.
PAGE_ROWS = 10000
_PLACES = {"ram": IN_RAM, "disk": ON_DISK, "zero": IS_ZERO, "changed": CHANGED}


class RemoteBytes:
    """What a remote disk and a remote snapshot have alike; a subclass knows its daemon and its names."""

    _writable = False

    def _export(self) -> str:
        raise NotImplementedError

    def _names(self) -> dict[str, str]:
        """How QMP commands call it: disk, and snapshot for one."""
        raise NotImplementedError

    @property
    def uri(self) -> str:
        """The NBD URI under which the data is served."""
        nbd = self.daemon.status()["nbd"] or {"exports": []}
        for export in nbd["exports"]:
            if export["name"] == self._export():
                return export["uri"]
        raise Error(f"{self._export()}: not exported over NBD")

    def _over_nbd(self, method: str, *arguments):
        # raw: what looks for the magic of other formats would read, and of a read-once export drop, what it looks at.
        device = as_device(self.uri, format="raw", read_only=not self._writable)
        try:
            return getattr(device, method)(*arguments)
        finally:
            device.close()

    @property
    def length(self) -> int:
        """Bytes."""
        return self.daemon.status()["disks"][self._names()["disk"]]["length"]

    def read(self, offset: int, length: int) -> bytes:
        """Return LENGTH bytes at OFFSET. OSError with what the daemon says when that can't be."""
        return self._over_nbd("read", offset, length)

    def readinto(self, offset: int, buffer) -> int:
        """Fill BUFFER from OFFSET on; return how many bytes that is."""
        return self._over_nbd("readinto", offset, buffer)

    def extents(self, offset: int = 0, length: int | None = None) -> numpy.ndarray:
        """Return the extents of a range as a structured array: offset, length (bytes), flags."""
        return self._over_nbd("extents", offset, self.length - offset if length is None else length)

    def map(self, offset: int = 0, length: int | None = None) -> numpy.ndarray:
        """Return what is known of a range (default: to the end), see Disk.map and Snapshot.map: a structured array of MAP_DTYPE."""
        end = self.length if length is None else offset + length
        rows: list[tuple] = []
        start: int | None = offset
        while start is not None and start < end:
            page = self.daemon.client.execute("fastcbw-map", start=start, length=end - start, limit=PAGE_ROWS, **self._names())
            rows += map(_row, page["extents"])
            start = page.get("next")
        return numpy.array(rows, dtype=MAP_DTYPE)


def _row(extent: dict) -> tuple[int, int, int, int]:
    """A row of a map, from what `fastcbw-map` says of it."""
    present = extent["present"]
    flags = ZERO * extent["zero"] | HOLE * (present and not extent["data"])
    access = READABLE * present | _PLACES.get(extent["state"], 0) | CHANGED * extent.get("changed", False)
    return extent["start"], extent["length"], flags, access


class RemoteDiskBytes(RemoteBytes):
    """The bytes of a disk, through the filter."""

    _writable = True

    def write(self, offset: int, data) -> None:
        """Write bytes at OFFSET, as a guest would."""
        self._over_nbd("write", offset, data)

    def write_zeroes(self, offset: int, length: int) -> None:
        """Write LENGTH zeroes at OFFSET."""
        self._over_nbd("write_zeroes", offset, length)

    def discard(self, offset: int, length: int) -> None:
        """Say that nobody needs LENGTH bytes at OFFSET any more."""
        self._over_nbd("discard", offset, length)

    def flush(self) -> None:
        """Make what was written durable."""
        self._over_nbd("flush")


class RemoteSnapshotBytes(RemoteBytes):
    """The bytes of a snapshot, and what its reader has done with."""

    def discard(self, offset: int, length: int) -> None:
        """Drop LENGTH bytes at OFFSET from the snapshot, see Snapshot.discard; whatever its export allows its clients."""
        self.daemon.client.execute("fastcbw-snapshot-discard", name=self._names()["snapshot"], disk=self._names()["disk"], offset=offset, length=length)

    def take(self, offset: int, length: int) -> bytes:
        """Return LENGTH bytes at OFFSET and drop them; on an error nothing was dropped (of a read-once export: what was read)."""
        data = self.read(offset, length)
        self.discard(offset, length)
        return data

    def order(self, policy: str = ORDER_DEFAULT) -> Iterator[numpy.ndarray]:
        """Return an iterator over the snapshot in the copy order POLICY, as structured arrays: offset, length (bytes), class.

        Each array is a page of `fastcbw-order`, asked for when it is wanted. What moves meanwhile may be missing or come twice.
        """
        start: int | None = 0
        while start is not None:
            page = self.daemon.client.execute("fastcbw-order", order=policy, start=start, limit=PAGE_ROWS, **self._names())
            yield numpy.array([(extent["offset"], extent["length"], extent["class"]) for extent in page["extents"]], dtype=ORDER_DTYPE)
            start = page.get("next")


class RemoteGroup:
    """Several disks of one daemon, whose snapshots are taken at one instant. Made by fastcbw.group()."""

    def __init__(self, disks) -> None:
        self.disks = tuple(disks)
        if len({disk.daemon for disk in self.disks}) != 1:
            raise ValueError("group: the disks are of several connections (one daemon can take a snapshot at one instant, of its own disks)")

    def snapshot(self, name: str, **options) -> SnapshotGroup:
        """Take the snapshot NAME of every disk at one instant: all, or none and an error. Options as Disk.snapshot."""
        return SnapshotGroup(self.disks[0].daemon.snapshot(name, [disk.name for disk in self.disks], **options))
