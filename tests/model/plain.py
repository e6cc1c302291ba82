"""The oracle: a disk with snapshots as plainly as it can be written. Copies the whole disk at a snapshot.

Method names are those of the engine and its devices, so that one test body drives either. Beside the bytes it counts
what copy-before-write has to do: which clusters are preserved for which snapshot, how many of them were zeroes, how many
take room in a store, and when a store is full, so that the snapshot must be given up.
"""

from __future__ import annotations

from dataclasses import dataclass, field


class GuestWriteRefused(Exception):
    """A snapshot is full, or what it needs can't be read, and its policy protects it from the guest. The reason in words."""


@dataclass
class PlainSnapshot:
    """A copy of the disk. `kept`: cluster -> the snapshot in whose store its old data takes room; None: in none, zeroes.

    dead: clusters of the capacity that can't be used just now, since what lay there has gone in part only; whoever drives the model says so.
    copy: the clusters that are in it; None: all. discarded: of some of them its reader has done with.
    """

    name: str
    data: bytes = field(repr=False)
    capacity: int
    dead: int = 0
    copy: frozenset[int] | None = None
    on_full: str = "break-snapshot"
    on_cbw_error: str = "break-snapshot"
    broken: bool = False
    discarded: bool = False
    kept: dict[int, PlainSnapshot | None] = field(default_factory=dict)
    preserved: int = 0
    preserved_zero: int = 0

    def has(self, cluster: int) -> bool:
        return self.copy is None or cluster in self.copy

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


@dataclass
class PlainBitmap:
    """The set of granules written since it began."""

    granularity: int
    enabled: bool = True
    marked: set[int] = field(default_factory=set)

    def mark(self, offset: int, length: int) -> None:
        if length:
            self.marked.update(range(offset // self.granularity, (offset + length - 1) // self.granularity + 1))

    def in_units(self, size: int, length: int) -> set[int]:
        """What of a disk of LENGTH bytes it marks, in units of SIZE, rounded outwards."""
        units = set()
        for bit in self.marked:
            begin, end = bit * self.granularity, min((bit + 1) * self.granularity, length)
            units.update(range(begin // size, (end - 1) // size + 1))
        return units


class PlainDisk:
    """LENGTH zero bytes with snapshots, oldest first in `snapshots`. All at once, one thread."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.data = bytearray(length)
        self.snapshots: dict[str, PlainSnapshot] = {}
        self.bitmaps: dict[str, PlainBitmap] = {}
        self.cluster_size: int | None = None
        # Clusters, of recorded_size, that the guest discarded while a snapshot needed them.
        self.recorded: set[int] = set()
        self.recorded_size = 0

    # -- the guest

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: bytes, unreadable: bool = False) -> None:
        """GuestWriteRefused when a snapshot's policy says so; then nothing is written. unreadable: what is there can't be read."""
        self._preserve(offset, len(data), unreadable)
        if self.recorded:       # cancelled there
            self.recorded -= set(range(offset // self.recorded_size, -(-(offset + len(data)) // self.recorded_size)))
        self.data[offset : offset + len(data)] = data

    def write_zeroes(self, offset: int, length: int) -> None:
        self.write(offset, bytes(length))

    def discard(self, offset: int, length: int) -> list[tuple[int, int]]:
        """On a device whose discarded bytes read as zeroes. Nothing is preserved: what a snapshot needs stays, recorded.

        Return the ranges of which nothing is known but that they read as before or as zeroes (learn() then): parts of clusters.
        """
        end = offset + length
        self._mark(offset, length)
        if not self.live:
            self.data[offset:end] = bytes(length)
            return []
        size = self.cluster_size
        whole = range(-(-offset // size), -(-end // size) if end == self.length else end // size)
        for cluster in whole:
            if self._needing(cluster) is not None:
                self.recorded.add(cluster)
            else:
                self._zero(cluster * size, (cluster + 1) * size)
                self.recorded.discard(cluster)
        # Of no whole cluster between them the two parts meet where their clusters do; each goes, or stays, for itself.
        cuts = (whole.start * size, min(whole.stop * size, end)) if whole else (end // size * size,) * 2
        parts = [(offset, max(offset, cuts[0])), (max(offset, cuts[1]), end)]
        return [part for part in parts if part[0] < part[1]]

    def finish_discards(self) -> None:
        """Carry out what is recorded and in no live snapshot; every bitmap is marked again."""
        size = self.recorded_size
        for cluster in list(self.recorded):
            if not any(snapshot.has(cluster) for snapshot in self.live):
                self.recorded.discard(cluster)
                self._mark(cluster * size, min(size, self.length - cluster * size))
                self._zero(cluster * size, (cluster + 1) * size)

    def learn(self, offset: int, content: bytes) -> None:
        """CONTENT was read at OFFSET, where it is known that it is as before or zeroes."""
        end = offset + len(content)
        assert content == self.data[offset:end] or not any(content), f"neither old data nor zeroes at {offset}"
        self.data[offset:end] = content

    def _mark(self, offset: int, length: int) -> None:
        for bitmap in self.bitmaps.values():
            if bitmap.enabled:
                bitmap.mark(offset, length)

    def _zero(self, begin: int, end: int) -> None:
        end = min(end, self.length)
        self.data[begin:end] = bytes(end - begin)

    # -- snapshots

    def snapshot(self, name: str, *, cluster_size: int, capacity: int, bitmap: str | None = None, new_bitmap: str | None = None,
                 new_bitmap_granularity: int | None = None, on_full: str = "break-snapshot",
                 on_cbw_error: str = "break-snapshot") -> PlainSnapshot:
        """capacity: clusters that both tiers together can hold."""
        self.cluster_size = self.recorded_size = cluster_size
        copy = None if bitmap is None else frozenset(self.bitmaps[bitmap].in_units(cluster_size, self.length))
        self.snapshots[name] = PlainSnapshot(name, bytes(self.data), capacity, copy=copy, on_full=on_full, on_cbw_error=on_cbw_error)
        if new_bitmap is not None:
            inherited = 65536 if bitmap is None else self.bitmaps[bitmap].granularity
            self.bitmaps[new_bitmap] = PlainBitmap(new_bitmap_granularity or inherited)
        return self.snapshots[name]

    # -- bitmaps

    def merge(self, target: str, source: str) -> None:
        bitmap = self.bitmaps[target]
        bitmap.marked |= self.bitmaps[source].in_units(bitmap.granularity, self.length)

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

    def _preserve(self, offset: int, length: int, unreadable: bool = False) -> None:
        """Old data goes into the newest live snapshot that needs it; what does not fit breaks it, and the next is asked.

        Clusters go in groups, one for each snapshot that needs some, in the order of the first cluster of each. Nobody frees
        room here, so that to wait for it is an error at once. Of more than one cluster some would be preserved before it.
        """
        size = self.cluster_size or 1
        self._mark(offset, length)
        asked = range(offset // size, -(-(offset + length) // size)) if length and self.live else ()
        while missing := [(self._needing(c), c) for c in asked if self._needing(c) is not None]:
            newest = missing[0][0]
            old = {c: any(self.data[c * size : (c + 1) * size]) for needing, c in missing if needing is newest}
            if unreadable or self.held(newest) + sum(old.values()) > newest.capacity - newest.dead and any(old.values()):
                policy = newest.on_cbw_error if unreadable or newest.on_full == "wait" else newest.on_full
                if policy == "break-guest-write":
                    raise GuestWriteRefused("could not be read" if unreadable else "nothing that runs can free room"
                                            if newest.on_full == "wait" else "both tiers at their limits")
                # Some of it may have been preserved before there was no room; an older snapshot then has it already.
                self.break_snapshot(newest.name)
                if not self.live:
                    return
                continue
            newest.kept.update({c: newest if takes else None for c, takes in old.items()})
            self.recorded -= set(old)
            newest.preserved += len(old)
            newest.preserved_zero += len(old) - sum(old.values())

    def _needing(self, cluster: int) -> PlainSnapshot | None:
        """The newest live snapshot that needs the cluster, unless it or a newer one has it."""
        for snapshot in reversed(self.live):
            if cluster in snapshot.kept:
                return None
            if snapshot.has(cluster):
                return snapshot
        return None

    def held(self, snapshot: PlainSnapshot) -> int:
        """Clusters that take room in the store of SNAPSHOT, also those that an older one has inherited."""
        return sum(owner is snapshot for other in self.live for owner in other.kept.values())

    def discard_of(self, name: str, clusters: range) -> None:
        """A reader has done with CLUSTERS of a snapshot."""
        snapshot = self.snapshots[name]
        for cluster in clusters:
            if snapshot.has(cluster) and cluster in snapshot.kept:
                self._inherit(snapshot, cluster)
        there = range(-(-self.length // self.cluster_size)) if snapshot.copy is None else snapshot.copy
        snapshot.discarded |= not frozenset(clusters).isdisjoint(there)
        snapshot.copy = frozenset(there) - frozenset(clusters)

    def _hand_over(self, name: str) -> None:
        """What a snapshot keeps goes to those that read it there."""
        snapshot = self.snapshots[name]
        if not snapshot.broken:
            for cluster in list(snapshot.kept):
                self._inherit(snapshot, cluster)

    def _inherit(self, snapshot: PlainSnapshot, cluster: int) -> None:
        """It goes to the next older live one that needs it and has nothing for the cluster; the data stays where it lies."""
        word = snapshot.kept.pop(cluster)
        for heir in reversed(self.live[: self.live.index(snapshot)]):
            if cluster in heir.kept:
                return
            if heir.has(cluster):
                heir.kept[cluster] = word
                return
