"""The public objects: a disk with the filter on it, its snapshots, and several disks as a group."""

from __future__ import annotations

import atexit
import itertools
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from fastcbw.bitmaps.dirty import DirtyWords
from fastcbw.block.device import BlockDevice
from fastcbw.block.image import as_device
from fastcbw.block.nbd import NbdDevice
from fastcbw.block.nbd_uri import is_nbd_uri, parse_nbd_uri
from fastcbw.block.python import Device
from fastcbw.cbw.access import map_extents
from fastcbw.cbw.dirty import DirtyBitmap
from fastcbw.cbw.engine import Engine, take_snapshots
from fastcbw.cbw.latency import LatencyMeter
from fastcbw.cbw.options import SnapshotOptions, check_name, check_policies
from fastcbw.cbw.order import Order
from fastcbw.cbw.policies import ORDER_DEFAULT
from fastcbw.errors import Error
from fastcbw.export.nbd.contexts import MetaContext
from fastcbw.export.nbd.dirty import contexts_of_disk, contexts_of_snapshot
from fastcbw.export.nbd.server import Server
from fastcbw.jobs.backup import BackupJob
from fastcbw.jobs.job import Job
from fastcbw.jobs.preserve import PreserveJob
from fastcbw.units import parse_size

_numbers = itertools.count(1)
_open_disks: weakref.WeakSet[Disk] = weakref.WeakSet()
_hooks_lock = threading.Lock()
_hooks_installed = False


def open(  # noqa: A001 - the name users write is fastcbw.open
    image: str | os.PathLike | BlockDevice | Device,
    *,
    name: str | None = None,
    format: str | None = None,
    read_only: bool = False,
    lock: bool = True,
    direct: bool = False,
    io: str | None = None,
) -> Disk:
    """Open a disk with the copy-before-write filter on it.

    image: the path of a raw image file or block device; an NBD URI; or a device object, which stays the caller's to close.
    name: letters, digits, `_`, `.`, `-`; default: the file's name without its suffix, or the name of the NBD export.
    format: "raw" takes the bytes of a file as they are, whatever magic they carry.
    lock: take the image locks that QEMU understands.
    direct: past the page cache (O_DIRECT); OSError where the file system has none.
    io: "sync", "threads" or "uring": who does the requests of exports that would wait for the device, so that others go on; with
        "sync" all wait in the connection's thread. OSError where it is not there. Default: "threads"; with direct "uring" where it is.
    Raises FormatRefused, ImageLocked, OSError, ValueError; nothing is left open.
    """
    if name is not None:
        check_name(name, "disk name")
    device = as_device(image, format=format, read_only=read_only, lock=lock, direct=direct, io=io)
    owned = device is not image
    try:
        return Disk(device, name=name or _default_name(image, device), owned=owned)
    except BaseException:
        if owned:
            device.close()
        raise


def _default_name(image: object, device: BlockDevice) -> str:
    text = os.fsdecode(image) if isinstance(image, (str, bytes, os.PathLike)) else device.name
    name = parse_nbd_uri(text).export if is_nbd_uri(text) else os.path.splitext(os.path.basename(text))[0]
    return "".join(c if c.isascii() and (c.isalnum() or c in "_.-") else "_" for c in name) or "disk"


class Disk:
    """A live disk: reads and writes go through the filter, snapshots are taken of it. Made by open().

    read, readinto, write, write_zeroes, discard, flush, extents are those of `device`, the filter that also exports serve.
    All methods are safe from any thread.
    """

    def __init__(self, device: BlockDevice, *, name: str, owned: bool) -> None:
        _install_hooks()
        self.name = name
        self.length = device.length
        self._child = device
        self._owned = owned
        self._engine = Engine(device, name)
        self.device = self._engine.device
        self.snapshots: dict[str, Snapshot] = {}
        self._jobs: weakref.WeakSet[Job] = weakref.WeakSet()
        self._server: Server | None = None
        self._lock = threading.RLock()
        self._closed = False
        # The door's own methods, so that a call costs no more than it must.
        self.read, self.readinto, self.extents = self.device.read, self.device.readinto, self.device.extents
        self.write, self.write_zeroes = self.device.write, self.device.write_zeroes
        self.discard, self.flush = self.device.discard, self.device.flush
        _open_disks.add(self)

    @property
    def read_only(self) -> bool:
        """Whether the guest may not write."""
        return self._child.read_only

    @property
    def sources(self) -> list[str | int]:
        """Descriptors and NBD URIs of this disk, of what it is made of and as it is served: what no backup may be written to."""
        server = self._server
        sources = [] if server is None else server.uris(self.name)
        if isinstance(self._child, NbdDevice):
            return [self._child.uri, *sources]
        return [self._child.fileno(), *sources] if hasattr(self._child, "fileno") else sources

    def snapshot(self, name: str, **options: Any) -> Snapshot:
        """Take a snapshot of this instant.

        name: letters, digits, `_`, `.`, `-`. Keywords (INTERFACE's options): cluster_size=4096 (power of two, 4K to 1M),
        ram="256M", spill=None (folder), spill_limit=None, on_full="break-snapshot", on_cbw_error="break-snapshot",
        cbw_timeout=5000 (milliseconds), copy_on_read=False, export="ro" ("discard", "read-once"), durability="none"; bitmap=None (a dirty bitmap: only what it marks is
        preserved and readable), new_bitmap=None (the name of a bitmap that starts, empty, at the same instant),
        new_bitmap_granularity=None (default: that of `bitmap`, or 64K). in_place=False; True: old data goes to the device `spill` at the disk's
        own offsets, and a backup to that device copies the rest.
        Raises ValueError, TypeError, Error, LimitReached, OSError, MemoryError; then nothing has changed.
        """
        return _take([self], name, options)[0]

    def add_bitmap(self, name: str, *, granularity: int | str | None = None, enabled: bool = True) -> DirtyBitmap:
        """Add an empty dirty bitmap, which marks every write that begins from now on; return it.

        granularity: bytes per bit, a power of two from 512 to 2G; default 64K. enabled: False marks nothing until enable().
        Raises ValueError, TypeError, Error (the name exists), LimitReached (16 at once), MemoryError; then nothing has changed.
        """
        return self._engine.bitmaps.add(name, granularity=granularity, enabled=enabled)

    @property
    def bitmaps(self) -> Mapping[str, DirtyBitmap]:
        """The dirty bitmaps by name, oldest first: a read-only live mapping."""
        return self._engine.bitmaps.named

    def contexts(self) -> dict[str, MetaContext]:
        """Return the meta contexts that exports of the disk offer beside base:allocation, as they are now."""
        return contexts_of_disk(self.bitmaps)

    def backup(self, target: str | os.PathLike | BlockDevice, *, bitmap: str | None = None, **options: Any) -> BackupJob:
        """Start copying the disk as it is now to TARGET; return the job. Its snapshot is made here and deleted when the job has ended.

        bitmap: copy only what this dirty bitmap marks, into a full backup that exists (an increment; a file needs force=True). If
            the job succeeds the bitmap is what has changed since now, else it is what it would be had there been no job.
        Keywords as Snapshot.backup. Raises what Disk.snapshot and Snapshot.backup raise; then nothing was made or changed.
        """
        number = next(_numbers)
        snapshot = self.snapshot(f"backup-{number}", bitmap=bitmap, bitmap_for=None if bitmap is None else f"backup {number}")
        try:
            job = snapshot.backup(target, **options)
        except BaseException:
            snapshot.close()
            raise
        job.on_end(lambda job: snapshot.close())
        return job

    def serve(self, path: str | os.PathLike) -> Server:
        """Serve the disk and its snapshots over NBD on the unix socket PATH, in the background, until close()."""
        with self._lock:
            if self._server is not None:
                raise Error(f"{self.name}: is served already, on {', '.join(self._server.addresses)}")
            server = Server()
            try:
                server.listen_unix(path)
                server.add_export(self.name, self.device, description=f"disk {self.name}", contexts=self.contexts)
                for snapshot in self.snapshots.values():
                    snapshot._export(server)
            except BaseException:
                server.close()
                raise
            self._server = server
            return server

    def latency_meter(self) -> LatencyMeter:
        """Return a meter of the latency of guest writes, settled and preserving ones apart; they are measured until its close()."""
        return self._engine.latency_meter()

    def map(self, offset: int = 0, length: int | None = None) -> NDArray[numpy.void]:
        """Return what is known of a range (default: to the end): offset, length (bytes), flags (as extents), access (bits).

        access: 1 readable, 16 changed since the newest snapshot; see fastcbw.cbw.access. A structured array of MAP_DTYPE.
        """
        return _whole_map(self.device, offset, length)

    def status(self) -> dict[str, Any]:
        """Return the facts of the disk and of its snapshots, ready for JSON."""
        return {
            "name": self.name,
            "length": self.length,
            "read_only": self.read_only,
            "guest": self._engine.counters() | self._engine.inherited(),
            "bitmaps": self._engine.bitmaps.report(),
            "snapshots": {name: snapshot.status() for name, snapshot in list(self.snapshots.items())},
        }

    def close(self) -> None:
        """Cancel jobs, end exports and snapshots, release the image. Closing twice is no error."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for job in list(self._jobs):
            job.cancel()
            try:
                job.wait()
            except Error:
                pass
        if self._server is not None:
            self._server.close()
        self._engine.close()
        self.snapshots.clear()
        if self._owned:
            self._child.close()
        _open_disks.discard(self)

    def leave_open(self) -> None:
        """Forget the disk as it is, at the end of a process: a job's device does not answer, and close() would wait for it."""
        _open_disks.discard(self)

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<fastcbw.Disk {self.name}, {self.length} bytes, {len(self.snapshots)} snapshots>"


class Snapshot:
    """A disk as it was at one instant. Made by Disk.snapshot().

    read, readinto, extents are those of `device`, a BlockDevice that nobody writes; reads raise SnapshotBroken once the snapshot
    was given up for the guest's sake. discard(offset, length) drops what its reader has done with, take(offset, length) reads
    and drops; both in multiples of `device.granule` bytes. Safe from any thread.
    """

    def __init__(self, disk: Disk, name: str, device: BlockDevice) -> None:
        self.disk = disk
        self.name = name
        self.device = device
        self.length = device.length
        self._holds = 0
        self._handed: str | None = None     # a bitmap that is this snapshot's until it is given back
        self._settles = True                # a job that succeeds gives it back; else whoever took the snapshot does
        self._closed = False
        self._exported_by: Server | None = None
        self._lock = threading.Lock()
        self.read, self.readinto, self.extents = device.read, device.readinto, device.extents
        self.discard, self.take = device.discard, device.take
        self._drops = None if device.export == "ro" else device.export

    def backup(self, target: str | os.PathLike | BlockDevice, **options: Any) -> BackupJob:
        """Start copying this snapshot to TARGET (a file, a block device, or a device object); return the job.

        Of a snapshot of what a bitmap marks only that is copied, into a full backup that exists: a file needs force=True.
        Keywords: order="ram-first,hot-first" (policies with commas, docs/copy-order.md), workers=None, in_flight=None, verify=False,
        consume=False, force=False. See BackupJob.
        Raises ValueError, TypeError, OSError, ImageLocked; then nothing was made or changed.
        """
        if target is self.device or target is self.disk.device or target is self.disk._child:
            raise ValueError(f"target {target.name}: is the source itself (name another device)")
        if options.get("consume") and self._holds:
            raise Error(f"{self.disk.name}@{self.name}: in use by {self._holds} jobs or clients, which would lose what this job consumes")
        self.hold()
        try:
            job = BackupJob(self.device, target, sources=self.disk.sources, on_release=lambda: self._end_job(job), **options)
        except BaseException:
            self.release()
            raise
        if job.consume:
            self.disk._engine.consumer_begin(self.device)
        self.disk._jobs.add(job)
        return job.start()

    def preserve(self, target: BlockDevice, **options: Any) -> PreserveJob:
        """Start copying to TARGET, each at its offset, the clusters that the guest overwrites, and drop them here; return the job.

        It goes on until cancel(), and copies what is preserved by then. Nobody else may read the snapshot meanwhile.
        Keywords: workers=1, rate=None. Raises ValueError, TypeError, Error (in use); then nothing has begun.
        """
        if target is self.device or target is self.disk.device or target is self.disk._child:
            raise ValueError(f"target {target.name}: is the source itself (name another device)")
        if self._holds:
            raise self._in_use()
        self.hold()
        try:
            job = PreserveJob(self.device, target, broken=self._why_broken, on_release=self._end_preserve, **options)
        except BaseException:
            self.release()
            raise
        self.disk._engine.consumer_begin(self.device)       # who waits for room gets it from the job
        self.disk._jobs.add(job)
        job.start()
        return job

    def _why_broken(self) -> str | None:
        status = self.status()
        return None if status["state"] == "live" else f"{self.disk.name}@{self.name}: {status.get('reason') or 'the snapshot broke'}"

    def _end_preserve(self) -> None:
        self.disk._engine.consumer_end(self.device)
        self.release()

    def contexts(self) -> dict[str, MetaContext]:
        """Return the meta contexts that exports of the snapshot offer beside base:allocation."""
        return contexts_of_snapshot(self.device)

    def _end_job(self, job: BackupJob) -> None:
        if job.consume:
            self.disk._engine.consumer_end(self.device)
        if job.result and self._settles:
            self._give_back(success=True)
        self.release()

    def _give_back(self, *, success: bool, unless: BackupJob | None = None) -> None:
        """A bitmap that was handed to this snapshot is what changed since once its content is in a backup, else all of it again.

        unless: a job that tracks: what that has not copied instead of all of it.
        """
        with self._lock:
            handed, self._handed = self._handed, None
        if handed is None:
            return
        left = None
        if unless is not None and not success:
            wanted = self.device.bitmap
            if wanted is None:
                wanted = DirtyWords(self.length, self.disk.bitmaps[handed].granularity)
                wanted.mark(0, self.length)
            left = unless.left(wanted)
        self.disk._engine.bitmaps.give_back(handed, success, left)

    def order(self, policy: str = ORDER_DEFAULT, *, chunk: int | str = "256K") -> Iterator[NDArray[numpy.void]]:
        """Return an iterator over the snapshot in the copy order POLICY, as structured arrays: offset, length (bytes), class.

        Each byte that can be read comes once. Rows are chosen when an array is asked for, so that what the guest does meanwhile counts. chunk:
        a short run takes its neighbours along, up to an eighth of that. Raises ValueError for what is no order.
        """
        return Order(self.device, policy, chunk=parse_size(chunk, "chunk"))

    def map(self, offset: int = 0, length: int | None = None) -> NDArray[numpy.void]:
        """Return what is known of a range (default: to the end): offset, length (bytes), flags (as extents), access (bits).

        access: 1 readable, 2 in RAM, 4 in the disk tier, 8 zero, 16 changed. A structured array of MAP_DTYPE.
        """
        return _whole_map(self.device, offset, length)

    def cache(self, offset: int = 0, length: int | None = None) -> None:
        """Read a range (default: all) into the RAM tier, as far as slots are free that guest writes can spare; see docs/copy-on-read.md.

        Raises ValueError for a range outside the disk, OSError when the disk fails, SnapshotBroken, NotInSnapshot.
        """
        self.device.cache(offset, length)

    def drop(self, offset: int = 0, length: int | None = None) -> int:
        """Drop from RAM what reads left there and the guest has not changed; return the bytes that it freed.

        A range of bytes (default: all); clusters that it touches go whole. Nothing is lost: it is read from the disk when it is wanted.
        Raises ValueError for a range outside the disk, Error when the snapshot has been deleted.
        """
        try:
            return self.disk._engine.drop(self.name, offset, length)
        except KeyError:
            raise Error(f"{self.disk.name}@{self.name}: the snapshot has been deleted") from None

    def hold(self) -> None:
        """Keep the snapshot from being closed; for exports and jobs. Error when it is closed already."""
        with self._lock:
            if self._closed:
                raise Error(f"{self.disk.name}@{self.name}: the snapshot has been deleted")
            self.disk._engine.check_open()
            self._holds += 1

    def _connect(self) -> None:
        """A client has come to an export; one that reads once makes room."""
        self.hold()
        if self._drops == "read-once":
            self.disk._engine.consumer_begin(self.device)

    def _disconnect(self) -> None:
        if self._drops == "read-once":
            self.disk._engine.consumer_end(self.device)
        self.release()

    def release(self) -> None:
        """Undo one hold()."""
        with self._lock:
            self._holds -= 1

    def set_limits(self, *, ram: int | str | None = None, spill_limit: int | str | None = None) -> None:
        """Change the limits of the tiers of a snapshot that lives; None leaves one as it is.

        A limit below what is used takes effect as far as there is room: from now on nothing is taken above it, the flusher
        moves down what the disk tier has room for, and memory that comes free above it goes back to the system.
        status() shows limit and use. Raises ValueError, TypeError, LimitReached, SnapshotBroken; then nothing has changed.
        """
        try:
            self.disk._engine.set_limits(self.name, ram=ram, spill_limit=spill_limit)
        except KeyError:
            raise Error(f"{self.disk.name}@{self.name}: the snapshot has been deleted") from None

    def set_policy(self, *, on_full: str | None = None, on_cbw_error: str | None = None) -> None:
        """Change the policies of a snapshot that lives; guest writes that wait for room are judged anew. ValueError, Error."""
        check_policies(on_full, on_cbw_error)
        try:
            self.disk._engine.set_policy(self.name, on_full=on_full, on_cbw_error=on_cbw_error)
        except KeyError:
            raise Error(f"{self.disk.name}@{self.name}: the snapshot has been deleted") from None

    def status(self) -> dict[str, Any]:
        """Return the facts of the snapshot, ready for JSON."""
        facts = {"name": self.name, "holds": self._holds}
        try:
            return facts | self.disk._engine.report(self.name)
        except KeyError:
            return facts | {"state": "deleted"}

    def close(self) -> None:
        """Delete the snapshot. Error while exports with clients, or jobs, hold it. Closing twice is no error."""
        if self.disk._closed:
            return              # it went with the disk; in the child of a fork it is the parent's
        server = self._exported_by
        if server is not None and not self._closed:
            # First the clients: this waits for those that have hung up already, and refuses while others are there.
            try:
                server.remove_export(f"{self.disk.name}@{self.name}")
            except Error:
                raise self._in_use() from None
            self._exported_by = None
        with self._lock:
            if self._closed or self.disk._closed:
                return
            held, self._closed = self._holds, not self._holds
        if held:
            if server is not None:
                self._export(server)
            raise self._in_use()
        self.disk.snapshots.pop(self.name, None)
        if not self.disk._closed:
            self._give_back(success=False)
            self.disk._engine.delete(self.name)

    def _in_use(self) -> Error:
        return Error(f"{self.disk.name}@{self.name}: in use by {self._holds} jobs or clients (end them first)")

    def _export(self, server: Server) -> None:
        server.add_export(f"{self.disk.name}@{self.name}", self.device, read_only=True, drops=self._drops, background=True, contexts=self.contexts,
                          description=f"snapshot {self.name} of {self.disk.name}", on_connect=self._connect, on_disconnect=self._disconnect)
        self._exported_by = server

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<fastcbw.Snapshot {self.disk.name}@{self.name}>"


class Group:
    """Several disks, whose snapshots are taken at one instant. Made by group()."""

    def __init__(self, disks: Sequence[Disk]) -> None:
        self.disks = tuple(disks)

    def snapshot(self, name: str, *, each: Sequence[Mapping[str, Any]] | None = None, **options: Any) -> SnapshotGroup:
        """Take the snapshot NAME of every disk at one instant: all, or none and an error. Options as Disk.snapshot.

        New guest writes are held, on all the disks, for the few memory stores of the instant, so that writes that
        depend on each other across disks keep their order in the snapshots. The limits (ram, spill_limit) are per disk.
        each: options of the disks one by one, in their order, above those of all: `each=[{"bitmap": "a0"}, {"bitmap": "b0"}]`.
        """
        if each is not None and len(each) != len(self.disks):
            raise ValueError(f"each: options of {len(each)} disks for a group of {len(self.disks)}")
        return SnapshotGroup(_take(self.disks, name, options, each))


class SnapshotGroup(tuple):
    """The snapshots of a group, in the order of its disks; a context manager that closes them."""

    def close(self) -> None:
        """Delete every snapshot; the first error is raised after all were tried."""
        first: Exception | None = None
        for snapshot in self:
            try:
                snapshot.close()
            except Exception as error:
                first = first or error
        if first is not None:
            raise first

    def __enter__(self) -> SnapshotGroup:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def group(disks: Sequence[Any]) -> Any:
    """Return a group of DISKS, whose snapshots share one instant: disks of this process, or all of one daemon (connect())."""
    remote = [disk for disk in disks if not isinstance(disk, Disk)]
    if not remote:
        return Group(disks)
    if len(remote) < len(disks) or not all(hasattr(disk, "daemon") for disk in remote):
        raise TypeError("group: disks of this process and of a daemon have no instant in common (give disks of one kind)")
    return remote[0].daemon.group(disks)


def _take(disks: Sequence[Disk], name: str, options: Mapping[str, Any], each: Sequence[Mapping[str, Any]] | None = None) -> list[Snapshot]:
    parsed = [SnapshotOptions.parse(**{**options, **own}) for own in each or [{}] * len(disks)]
    devices = take_snapshots([disk._engine for disk in disks], name, parsed)
    taken = []
    for disk, device, own in zip(disks, devices, parsed):
        snapshot = Snapshot(disk, name, device)
        snapshot._handed = own.bitmap if own.bitmap_for is not None else None
        disk.snapshots[name] = snapshot
        taken.append(snapshot)
    for snapshot in taken:
        if snapshot.disk._server is not None:
            snapshot._export(snapshot.disk._server)
    return taken


def _whole_map(device: BlockDevice, offset: int, length: int | None) -> NDArray[numpy.void]:
    end = device.length if length is None else offset + length
    rows, offset = map_extents(device, offset, end - offset)
    parts = [rows]
    while offset is not None:
        rows, offset = map_extents(device, offset, end - offset)
        parts.append(rows)
    return numpy.concatenate(parts)


def _install_hooks() -> None:
    """With the first disk: close what is open when the interpreter ends, and refuse in the child of a fork."""
    global _hooks_installed
    with _hooks_lock:
        if not _hooks_installed:
            _hooks_installed = True
            atexit.register(_close_all)
            os.register_at_fork(after_in_child=_refuse_all)


def _disks() -> Iterator[Disk]:
    yield from list(_open_disks)


def _close_all() -> None:
    for disk in _disks():
        disk.close()


def _refuse_all() -> None:
    # Threads, jobs, clients and sockets are the parent's: the child must neither wait for them nor end them.
    for disk in _disks():
        disk._engine.mark_forked()
        disk._lock = threading.RLock()      # whoever holds the old one is in the parent
        disk._closed = True
        if disk._server is not None:
            atexit.unregister(disk._server.close)       # it would remove the parent's socket and cut its clients
