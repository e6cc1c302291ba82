"""blockdev-backup: checked in QEMU's words, begun at one instant, its bitmap settled at the end.

A backup of a live disk is one of a snapshot that is taken for it; of several in a transaction these are of one instant. A bitmap that
says what to copy, or that is to say what the backup lacks, is handed to the job at that instant (cbw/dirty) and given back when the
job has concluded, not before: until then a job that is grouped with it may still take it along into failure.

    bitmap-mode    the job completed               it did not
    on-success     what changed since its instant  all that it was, and what changed
    always         what changed since its instant  what it has not copied, and what changed
    never          as if there had been no job
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastcbw.cbw.notifier import WriteNotifier
from fastcbw.cbw.options import check_name
from fastcbw.disk import Disk, Snapshot, group
from fastcbw.errors import Error
from fastcbw.graph.allocation import GRANULARITY, allocated, backing_of, server_of
from fastcbw.graph.graph import Graph
from fastcbw.graph.kinds.copy_before_write import is_in_place
from fastcbw.graph.kinds.foreign import QemuNbd
from fastcbw.graph.kinds.snapshot_access import SnapshotAccess
from fastcbw.graph.live import HOLD_SECONDS
from fastcbw.graph.node import Node, User
from fastcbw.graph.permissions import READER, TARGET
from fastcbw.jobs.write_notifier import WriteNotifierJob
from fastcbw.qmp.jobs import JobGroup, JobRecord

if TYPE_CHECKING:
    from fastcbw.qmp.daemon import Daemon


class Backup:
    """A blockdev-backup that is checked and not begun."""

    def __init__(self, id: str, source: Node, target: Node, user: User, sync: str, mode: str | None, options: dict[str, Any],
                 ends: dict[str, bool]):
        self.id, self.source, self.target, self.user = id, source, target, user
        self.sync, self.mode = sync, mode               # mode: of its bitmap, None without
        self.options, self.ends = options, ends         # ends: auto_dismiss, auto_finalize
        self.snapshot: dict[str, Any] = {}              # options of the snapshot that is taken for it
        self.layer: QemuNbd | None = None               # sync top: only what this image has of its own is copied
        self.notifies = False                           # by the old scheme: guests write old data to the target, no snapshot is taken


class Backups:
    """The blockdev-backups of DAEMON, on its GRAPH. Methods are called with the daemon's change lock held."""

    def __init__(self, daemon: Daemon, graph: Graph):
        self.daemon, self.graph = daemon, graph

    def prepare(self, device: str, target: str, sync: str, *, job_id: str | None = None, speed: int = 0, bitmap: str | None = None,
                bitmap_mode: str | None = None, auto_dismiss: bool = True, auto_finalize: bool = True, **options: Any) -> Backup:
        """Check a blockdev-backup and reserve its id; start() begins it."""
        source, destination = self.graph.find(device), self.graph.find(target)
        mode = check_sync(sync, bitmap, bitmap_mode)
        if bitmap is not None:
            self._check_bitmap(source, bitmap)
        if source.bottom is destination.bottom:
            raise Error("Source and target cannot be the same")
        if destination.read_only or not destination.kind.live:
            raise Error(f"Block node is read-only: node '{target}'")
        if destination.device.length < source.device.length:
            raise Error(f"Source and target image have different sizes (source {source.device.length}, target {destination.device.length})")
        if speed < 0:
            raise Error("Parameter 'speed' expects a non-negative value")
        if speed:
            options["rate"] = speed
        id = device if job_id is None else check_name(job_id, "job id")
        if sync == "none" and not source.kind.live:
            raise Error(f"node '{device}': nobody writes a snapshot, so there is nothing for sync 'none' to copy (name the disk)")
        layer = server_of(source) if sync == "top" and source.kind.live else None
        if layer is not None and backing_of(layer) is None:
            layer = None
        if layer is not None and bitmap is not None:
            raise Error("bitmap: with sync 'top' of an image with a backing file is not built yet (take sync 'full')")
        if options.get("consume") and source.kind.live:
            raise Error(f"Parameter 'discard-source': node '{device}' is a live disk (name a node that shows a snapshot)")
        notifies = self._is_own_target(source, destination)
        if notifies and (sync not in ("full", "top") or bitmap is not None):
            raise Error(f"node '{device}': the old scheme knows sync full without a bitmap (name the disk below it for '{sync}')")
        # The target of a write notifier is its own already.
        uses = [(source, "source", "source", READER), *([] if notifies else [(destination, "target", "target", TARGET)])]
        user = self.graph.attach(f"job '{id}'", uses, guarded=source if source.kind.live else None,
                                 beside=self._store_below(source, destination))
        try:
            id = self.daemon.jobs.reserve(id)
        except BaseException:
            self.graph.detach(user)
            raise
        backup = Backup(id, source, destination, user, sync, mode, options, {"auto_dismiss": auto_dismiss, "auto_finalize": auto_finalize})
        backup.notifies = notifies
        if sync == "none":
            backup.snapshot = {"on_full": "wait"}       # the job makes room
        backup.layer = layer
        if bitmap is not None:
            backup.snapshot = {"bitmap": bitmap, "bitmap_for": None if mode == "never" else f"job '{id}'", "whole": sync not in ("bitmap", "incremental")}
            options["tracks"] = mode == "always"
        return backup

    @staticmethod
    def _check_bitmap(source: Node, name: str) -> None:
        found = source.disk().bitmaps.get(name) if source.kind.live else None
        if found is None:
            hint = "" if source.kind.live else f" (node '{source.name}' shows a snapshot, which has none: name the disk)"
            raise Error(f"Bitmap '{name}' could not be found{hint}")
        if found.user is not None:
            raise Error(f"Bitmap '{name}' is currently in use by another operation and cannot be used (by {found.user})")

    @staticmethod
    def _is_own_target(source: Node, target: Node) -> bool:
        """Whether SOURCE is a write notifier with that TARGET: any other target is served from a snapshot of what it shows."""
        return isinstance(source.device, WriteNotifier) and source.children["target"].child is target

    @staticmethod
    def _store_below(source: Node, target: Node) -> Node | None:
        """Return the copy-before-write node whose snapshot SOURCE shows, and which keeps old data in place in TARGET; None when there is none."""
        below = source.children["file"].child if isinstance(source.kind, SnapshotAccess) else None
        return below if below is not None and is_in_place(below) and below.children["target"].child is target else None

    def start(self, backups: list[Backup], *, grouped: bool = False) -> list[JobRecord]:
        """Begin all of BACKUPS, those of live disks at one instant; or none, and an error. grouped: they complete together."""
        if len(backups) > 1 and any(backup.notifies for backup in backups):
            raise Error("blockdev-backup: several disks of one instant need snapshots (name the disks below the write notifiers)")
        live = [backup for backup in backups if backup.source.kind.live and not backup.notifies]
        made = self._take_snapshots(live)
        jobs: list[tuple[Backup, Any]] = []
        try:
            for backup in backups:
                if backup.notifies:
                    job = WriteNotifierJob(backup.source.device, **backup.options)
                    if not backup.source.device.has_begun:
                        backup.source.device.begin(timeout=HOLD_SECONDS)       # everybody's changes wait meanwhile
                    jobs.append((backup, job.start()))
                    continue
                snapshot = made.get(backup) or backup.source.snapshot
                if backup.sync == "none":
                    jobs.append((backup, snapshot.preserve(backup.target.device, **backup.options)))
                    continue
                jobs.append((backup, snapshot.backup(backup.target.device, **backup.options)))
        except BaseException:
            for _, job in jobs:
                job.cancel()
                try:
                    job.wait()
                except Error:
                    pass
            for snapshot in made.values():
                snapshot.close()
            raise
        together = JobGroup() if grouped else None
        records = [JobRecord(backup.id, job, backup.source.name, made[backup].name if backup in made else backup.source.name,
                             backup.target.name, group=together, **backup.ends) for backup, job in jobs]
        for (backup, _), record in zip(jobs, records):
            self.daemon.jobs.add(record, lambda record, outcome, backup=backup: self._end(backup, made.get(backup), record, outcome))
        return records

    @staticmethod
    def _take_snapshots(live: list[Backup]) -> dict[Backup, Snapshot]:
        """Take the snapshots of backups of LIVE disks, at one instant."""
        disks: list[Disk] = [backup.source.disk() for backup in live]
        for disk in disks:
            if disks.count(disk) > 1:
                raise Error(f"disk '{disk.name}': two backups of one transaction need two snapshots (start them one after the other)")
        if not live:
            return {}
        own = [(backup, backup.source.disk().add_bitmap(f"{backup.id}.top", granularity=GRANULARITY)) for backup in live if backup.layer]
        try:
            for backup, bitmap in own:      # what the guest allocates from here on is marked, as it is written
                bitmap.mark_again(allocated(backup.layer, backup.source.device.length))
                backup.snapshot = {"bitmap": bitmap.name}
            made = dict(zip(live, group(disks).snapshot(f"backup-{live[0].id}", each=[backup.snapshot for backup in live])))
        finally:
            for _, bitmap in own:
                bitmap.remove()
        for snapshot in made.values():
            snapshot._settles = False       # a bitmap is given back at the end of the job as QMP knows it
        return made

    def _end(self, backup: Backup, snapshot: Snapshot | None, record: JobRecord, outcome: str) -> None:
        with self.daemon.changing():
            self.graph.detach(backup.user)
            if snapshot is not None:
                snapshot._give_back(success=outcome == "completed", unless=record.job if backup.mode == "always" else None)
                snapshot.close()


def check_sync(sync: str, bitmap: str | None, mode: str | None) -> str | None:
    """Refuse what QEMU refuses of sync, bitmap and bitmap-mode, in its words; then what is not built. Return the mode."""
    if sync not in ("full", "top", "none", "incremental", "bitmap"):
        raise Error(f"Parameter 'sync' does not accept value '{sync}' (there is full, top, incremental, bitmap, none)")
    if mode not in (None, "on-success", "never", "always"):
        raise Error(f"Parameter 'bitmap-mode' does not accept value '{mode}' (there is on-success, always, never)")
    if sync in ("incremental", "bitmap") and bitmap is None:
        raise Error(f"must provide a valid bitmap name for '{sync}' sync mode")
    if sync == "incremental":
        if mode not in (None, "on-success"):
            raise Error("Bitmap sync mode must be 'on-success' when using sync mode 'incremental'")
        mode = "on-success"
    if bitmap is not None:
        if mode is None:
            raise Error("Bitmap sync mode must be given when providing a bitmap")
        if sync == "none":
            raise Error("sync mode 'none' does not produce meaningful bitmap outputs")
        if mode == "never" and sync != "bitmap":
            raise Error(f"Bitmap sync mode 'never' has no meaningful effect when combined with sync mode '{sync}'")
    elif mode is not None:
        raise Error("Cannot specify bitmap sync mode without a bitmap")
    return mode
