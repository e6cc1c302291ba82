"""The oracle: a disk with snapshots as plainly as it can be written. Copies the whole disk at a snapshot.

Method names are those of the engine and its devices, so that one test body drives either. Beside the bytes it counts
what copy-before-write has to do: which clusters are preserved for which snapshot, how many of them were zeroes, how many
take room in a store, and when a store is full, so that the snapshot must be given up.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class PlainSnapshot:
    """A copy of the disk. `kept`: cluster -> whether its old data takes room in the store (zeroes do not)."""

    name: str
    data: bytes
    capacity: int
    broken: bool = False
    kept: dict[int, bool] = field(default_factory=dict)
    preserved: int = 0
    preserved_zero: int = 0

    @property
    def held(self) -> int:
        """Clusters that take room in the snapshot's own store, while it lives."""
        return sum(self.kept.values())

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


class PlainDisk:
    """LENGTH zero bytes with snapshots, oldest first in `snapshots`. All at once, one thread."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.data = bytearray(length)
        self.snapshots: dict[str, PlainSnapshot] = {}
        self.cluster_size: int | None = None

    # -- the guest

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        self._preserve(offset, len(data))
        self.data[offset : offset + len(data)] = data

    def write_zeroes(self, offset: int, length: int) -> None:
        self.write(offset, bytes(length))

    def discard(self, offset: int, length: int) -> None:
        """As on a device whose discarded bytes read as zeroes."""
        self.write(offset, bytes(length))

    # -- snapshots

    def snapshot(self, name: str, *, cluster_size: int, capacity: int) -> PlainSnapshot:
        """capacity: clusters that both tiers together can hold."""
        self.cluster_size = cluster_size
        self.snapshots[name] = PlainSnapshot(name, bytes(self.data), capacity)
        return self.snapshots[name]

    def delete(self, name: str) -> None:
        self._hand_over(name)
        del self.snapshots[name]
        self._forget_size()

    def break_snapshot(self, name: str) -> None:
        """Given up: it stays listed until it is deleted, and keeps nothing."""
        self._hand_over(name)
        snapshot = self.snapshots[name]
        snapshot.broken = True
        snapshot.kept.clear()
        self._forget_size()

    # -- copy-before-write

    @property
    def live(self) -> list[PlainSnapshot]:
        return [snapshot for snapshot in self.snapshots.values() if not snapshot.broken]

    def _forget_size(self) -> None:
        if not self.live:
            self.cluster_size = None

    def _preserve(self, offset: int, length: int) -> None:
        """Old data goes into the newest live snapshot; what does not fit breaks it, and the one before is asked."""
        size = self.cluster_size
        while length and self.live:
            newest = self.live[-1]
            missing = [c for c in range(offset // size, -(-(offset + length) // size)) if c not in newest.kept]
            old = {c: any(self.data[c * size : (c + 1) * size]) for c in missing}
            if newest.held + sum(old.values()) > newest.capacity:
                # Some of it may have been preserved before there was no room; an older snapshot then has it already.
                self.break_snapshot(newest.name)
                continue
            newest.kept.update(old)
            newest.preserved += len(old)
            newest.preserved_zero += len(old) - sum(old.values())
            return

    def _hand_over(self, name: str) -> None:
        """What a snapshot keeps goes to the next older live one that has nothing for the cluster."""
        order = list(self.snapshots.values())
        snapshot = self.snapshots[name]
        if snapshot.broken:
            return
        older = [s for s in order[: order.index(snapshot)] if not s.broken]
        if older:
            for cluster in snapshot.kept:
                # The data itself stays in the giver's store: it takes no room of the heir's.
                older[-1].kept.setdefault(cluster, False)
