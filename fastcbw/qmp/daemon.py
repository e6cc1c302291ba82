"""The daemon: disks, their snapshots, one NBD server, one QMP server and the jobs, tied together.

It owns names and lifetimes and does O(1) work per operation; no guest request passes here. Every disk is the export
NAME, every snapshot the export NAME@SNAP, which holds its snapshot while a client is connected.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Sequence
from urllib.parse import quote

from fastcbw.block.image import same_image
from fastcbw.cbw.options import check_name
from fastcbw.disk import Disk, group
from fastcbw.errors import Error
from fastcbw.export.nbd.listen import Listener, listen_unix
from fastcbw.export.nbd.server import Server
from fastcbw.qmp.bound import Bound
from fastcbw.qmp.jobs import JobRecord, JobTable
from fastcbw.qmp.metrics import LatencyMeters
from fastcbw.qmp.nodes import Nodes
from fastcbw.qmp.server import QmpServer
from fastcbw.version import __version__

ENDING_SECONDS = 0.5        # how long the end of a snapshot waits for connections that are ending


class Daemon:
    """Disks under names, served over NBD and driven over QMP.

    Build it, add disks, listen, close. Methods are safe from any thread; changes of disks and snapshots happen one at
    a time. A refused change raises ValueError or fastcbw.Error and leaves everything as it was.
    """

    def __init__(self):
        self.disks: dict[str, object] = {}
        self.jobs = JobTable(self.emit)
        self.nodes = Nodes(self)
        self.bound = Bound(self)
        self.latencies = LatencyMeters(self)
        self.nbd: Server | None = None
        self.qmp: QmpServer | None = None
        self._change = threading.RLock()
        self._started_ns = time.monotonic_ns()
        self._uri_base = ("", "")  # what stands before and after an export's name
        self._stop: queue.SimpleQueue[str] = queue.SimpleQueue()  # put() is safe in a signal handler
        self._closed = False

    # -- listening

    def listen_nbd(self, where: str | Listener, *, spin: str | int = "off") -> None:
        """Serve all exports on a unix socket path, or on a listener that the caller passes on. spin: see Server."""
        with self._change:
            if self.nbd is not None:
                raise Error("the NBD server is running already")
            listener = where if isinstance(where, Listener) else listen_unix(where)
            self._uri_base = _uri_base(listener)
            self.nbd = Server(spin=spin)
            for disk in self.disks.values():
                self._export_disk(disk)
                for snapshot in disk.snapshots.values():
                    self._export_snapshot(snapshot)
            self.nbd.listen(listener)  # last: a client that waits already finds every export

    def listen_qmp(self, path: str, schema=None) -> None:
        """Serve SCHEMA (default: all commands) on a unix socket path."""
        from fastcbw.qmp.commands import COMMANDS  # commands need the daemon's type; the daemon needs them only here

        with self._change:
            if self.qmp is not None:
                raise Error("the QMP server is running already")
            self.qmp = QmpServer(listen_unix(path), COMMANDS if schema is None else schema, self, on_leave=self.bound.client_gone)

    def uri(self, export: str) -> str:
        """Return the NBD URI of EXPORT."""
        prefix, suffix = self._uri_base
        return f"{prefix}{quote(export, safe='@')}{suffix}"

    def exports(self) -> list[str]:
        """Return the names of all exports: each disk, then its snapshots."""
        with self._change:
            names = []
            for name, disk in self.live_disks().items():
                names += [name] if name in self.disks else []
                names += [f"{name}@{snapshot}" for snapshot in disk.snapshots]
            if self.nbd is not None:        # snapshots of jobs and nodes are not exported by that name
                names = [name for name in names if name in self.nbd.exports]
            return names + [export.name for export in self.nodes.exports.values()]

    # -- disks and snapshots

    def live_disks(self) -> dict[str, object]:
        """Return all disks with an engine, by name: those that are served, then those of nodes that somebody writes or takes
        snapshots of. With the change lock held."""
        bases = [node.base for node in self.nodes.graph.nodes.values() if node.base is not None]
        return self.disks | {disk.name: disk for disk in bases}

    def add_disk(self, disk) -> None:
        """Take DISK over, a Disk whose name is its export's; close() closes it."""
        with self._change:
            check_name(disk.name, "disk name")
            if disk.name in self.disks:
                raise ValueError(f"disk {disk.name!r}: the name is in use (give each image its own, as in a=disk.img)")
            self.nodes.adopt(disk)
            self.disks[disk.name] = disk
            if self.nbd is not None:
                self._export_disk(disk)

    def add_nodes(self, nodes: Sequence[dict] = (), exports: Sequence[dict] = ()) -> None:
        """Add nodes as blockdev-add describes them and exports as block-export-add does: all, or none and an error."""
        from fastcbw.qmp.node_commands import transaction_of  # as with COMMANDS above

        transaction_of(self, [{"type": "blockdev-add", "data": node} for node in nodes]
                       + [{"type": "block-export-add", "data": {"type": "nbd"} | export} for export in exports])

    def changing(self) -> threading.RLock:
        """The lock under which disks, snapshots, nodes and exports change, one at a time; a context manager."""
        return self._change

    def disk(self, name: str):
        """Return the disk NAME: one that is served, or that of a node of the graph."""
        if name in self.disks:
            return self.disks[name]
        nodes = self.nodes.graph.nodes
        if name not in nodes:
            known = dict.fromkeys([*self.disks, *(node.name for node in nodes.values() if node.owned and node.kind.live)])
            raise Error(f"disk {name!r}: not found (disks here: {', '.join(known) or 'none'})")
        if not nodes[name].kind.live:
            below = nodes[name].children["file"].child.name
            raise Error(f"node {name!r}: shows a snapshot, no live disk (as DISK@SNAP it is {below}@{below})")
        return nodes[name].disk()

    def snapshot(self, disk: str, name: str):
        """Return the live snapshot NAME of DISK."""
        snapshots = self.disk(disk).snapshots
        try:
            return snapshots[name]
        except KeyError:
            known = ", ".join(snapshots) or "none"
            raise Error(f"snapshot {disk}@{name}: not found (snapshots of this disk: {known})") from None

    def bitmap(self, disk: str, name: str):
        """Return the dirty bitmap NAME of DISK."""
        bitmaps = self.disk(disk).bitmaps
        try:
            return bitmaps[name]
        except KeyError:
            raise Error(f"bitmap {name!r}: not found (bitmaps of disk {disk}: {', '.join(bitmaps) or 'none'})") from None

    def create_snapshot(self, name: str, disks: Sequence[str], **options) -> list:
        """Take the snapshot NAME of DISKS, all at one instant, and export it. OPTIONS: as of Disk.snapshot."""
        with self._change:
            check_name(name)
            members = [self.disk(disk) for disk in _distinct(disks)]
            for disk in members:
                if disk.name in self.nodes.graph.nodes:
                    self.nodes.graph.nodes[disk.name].check_content()
                    self.nodes.graph.check_undisturbed(self.nodes.graph.nodes[disk.name])
            for disk in members:
                if name in disk.snapshots:
                    raise Error(f"snapshot {disk.name}@{name}: exists already (delete it, or choose another name)")
            snapshots = _take(members, name, options)
            if self.nbd is not None:
                for snapshot in snapshots:
                    self._export_snapshot(snapshot)
        self.emit("FASTCBW_SNAPSHOT_CREATED", {"name": name, "disks": [disk.name for disk in members]})
        return snapshots

    def delete_snapshot(self, name: str, disks: Sequence[str]) -> None:
        """Delete the snapshot NAME of each of DISKS; refused as a whole while one is in use or missing."""
        with self._change:
            snapshots = [self.snapshot(disk, name) for disk in _distinct(disks)]
            for snapshot in snapshots:
                self._check_unused(snapshot)
            for snapshot in snapshots:
                snapshot.close()  # refuses, atomically, what a client has taken up since
                if self.nbd is not None:
                    self.nbd.remove_export(_export_name(snapshot), force=True)
        self.emit("FASTCBW_SNAPSHOT_DELETED", {"name": name, "disks": list(disks)})

    def set_snapshot(self, name: str, disks: Sequence[str], *, on_full: str | None = None, on_cbw_error: str | None = None,
                     **limits) -> list:
        """Change limits (ram, spill_limit) and policies of the snapshot NAME of each of DISKS, one after the other."""
        with self._change:
            if on_full is None and on_cbw_error is None and not any(value is not None for value in limits.values()):
                raise ValueError(f"snapshot {name}: nothing to change (give ram, spill-limit, on-full or on-cbw-error)")
            snapshots = [self.snapshot(disk, name) for disk in _distinct(disks)]
            for snapshot in snapshots:
                snapshot.set_limits(**limits)
                snapshot.set_policy(on_full=on_full, on_cbw_error=on_cbw_error)
        return snapshots

    def drop_kept(self, name: str, disks: Sequence[str]) -> dict[str, int]:
        """Drop what reads left in RAM of the snapshot NAME of each of DISKS; return the bytes that it freed, by disk."""
        with self._change:
            snapshots = [self.snapshot(disk, name) for disk in _distinct(disks)]
            return {snapshot.disk.name: snapshot.drop() for snapshot in snapshots}

    def _check_unused(self, snapshot) -> None:
        name = _export_name(snapshot)
        for node in self.nodes.graph.nodes.values():
            if node.kind.live and node.snapshot is snapshot:
                raise Error(f"snapshot {name}: is that of node '{node.name}', and ends with it (blockdev-del)")
        for record in self.jobs.all():
            if record.outcome is None and f"{record.disk}@{record.snapshot}" == name:
                raise Error(f"snapshot {name}: in use by job {record.id} (cancel it, or wait for its end)")
        # A client that has closed its connection is gone for itself at once, for the server a moment later.
        end = time.monotonic() + ENDING_SECONDS
        while (holds := snapshot.status().get("holds", 0)) and time.monotonic() < end:
            time.sleep(0.005)
        if holds:
            raise Error(f"snapshot {name}: in use by {holds} connection(s) or job(s) (end them first)")

    def _export_disk(self, disk) -> None:
        self.nbd.add_export(disk.name, disk.device, description=f"disk {disk.name}", contexts=disk.contexts)

    def _export_snapshot(self, snapshot) -> None:
        self.nbd.add_export(_export_name(snapshot), snapshot.device, read_only=True, drops=snapshot._drops, background=True,
                            contexts=snapshot.contexts, description=f"snapshot {snapshot.name} of {snapshot.disk.name}",
                            on_connect=snapshot._connect, on_disconnect=snapshot._disconnect)

    # -- jobs

    def start_backup(self, disk: str, target: str, *, snapshot: str | None = None, job_id: str | None = None,
                     bitmap: str | None = None, **options) -> JobRecord:
        """Start a backup of DISK@SNAPSHOT to TARGET, a file or an NBD URI; without SNAPSHOT one is made, and deleted at the end.

        bitmap: copy only what it marks; if the job succeeds, the bitmap is what has changed since its snapshot.
        """
        with self._change:
            if self.nbd is not None and any(same_image(target, own) for export in self.exports() for own in self.nbd.uris(export)):
                raise ValueError(f"target {target}: is served by this daemon (name another)")
            if job_id is not None:
                check_name(job_id, "job id")
            disk = self.disk(disk).name  # a node above it names it too
            own = snapshot is None
            if bitmap is not None and not own:
                raise ValueError(f"bitmap: {bitmap!r}: {disk}@{snapshot} exists already (take it with --bitmap, or name the disk alone)")
            existing = self.disk(disk) if own else self.snapshot(disk, snapshot)
            job_id = self.jobs.reserve(job_id)
            made = None
            try:
                if own:
                    snapshot = f"backup-{job_id}"
                    made = self.create_snapshot(snapshot, [disk], bitmap=bitmap, bitmap_for=None if bitmap is None else f"job {job_id}")[0]
                job = (made or existing).backup(target, **options)
            except BaseException:
                self.jobs.give_back(job_id)
                if made is not None:
                    self.delete_snapshot(snapshot, [disk])
                raise
            record = JobRecord(job_id, job, disk, snapshot, target)
            self.jobs.add(record, lambda record, outcome: self._end_backup(record, own))
            return record

    def _end_backup(self, record: JobRecord, own: bool) -> None:
        if own:
            with self._change:
                name = f"{record.disk}@{record.snapshot}"
                if self.nbd is not None:
                    self.nbd.remove_export(name, force=True)  # the job's own: a client that looked in has to go
                self.snapshot(record.disk, record.snapshot).close()

    # -- the outside

    def emit(self, event: str, data: dict) -> None:
        """Send an event to the QMP clients, when there are any."""
        if self.qmp is not None:
            self.qmp.emit(event, data)

    def status(self) -> dict:
        """Return everything that is known, as one object fit for JSON."""
        with self._change:
            return {
                "version": __version__,
                "pid": os.getpid(),
                "uptime_s": round((time.monotonic_ns() - self._started_ns) / 1e9, 3),
                "nbd": None if self.nbd is None else {
                    **self.nbd.status(),
                    "exports": [{**export, "uri": self.uri(export["name"])} for export in self.nbd.status()["exports"]],
                },
                "qmp": None if self.qmp is None else {"clients": self.qmp.clients},
                "disks": {name: disk.status() for name, disk in self.live_disks().items()},
                "jobs": [record.describe() for record in self.jobs.all()],
                "bound": self.bound.describe(),
            }

    def status_of(self, name: str) -> dict:
        """Return the part of status() that is of the disk NAME."""
        with self._change:
            disk = self.disk(name)
            return {"version": __version__, "pid": os.getpid(), "disks": {disk.name: disk.status()}}

    def request_stop(self, reason: str) -> None:
        """Make wait() return REASON. Safe in a signal handler."""
        self._stop.put(reason)

    def wait(self) -> str:
        """Wait until somebody asks for the end; return why."""
        return self._stop.get()

    def close(self) -> None:
        """Answer the QMP clients, cancel the jobs, end the connections, close disks with their snapshots, remove the sockets.

        Every step runs even when one before it failed; the first error is raised at the end. Jobs whose devices do not answer are left
        behind after a bounded time, and what they use is left open.
        """
        if self._closed:
            return
        self._closed = True
        steps = [lambda: self.qmp.close(self._let_go)] if self.qmp is not None else []  # first: nobody may begin anything any more
        left: list[JobRecord] = []      # jobs whose devices do not answer: what they use stays open
        steps += [self.nodes.let_go, lambda: left.extend(self.jobs.close(self.nodes.give_up)), self.latencies.close]
        if self.nbd is not None:
            steps.append(self.nbd.close)
        steps.append(lambda: self.nodes.close(left))
        steps += [lambda disk=disk: self._close_disk(disk, left) for disk in self.disks.values()]
        first = None
        for step in steps:
            try:
                step()
            except Exception as error:
                first = first or error
        if first is not None:
            raise first

    @staticmethod
    def _close_disk(disk: Disk, left: list[JobRecord]) -> None:
        if any(disk.name == record.disk for record in left):
            disk.leave_open()
        else:
            disk.close()

    @property
    def is_closing(self) -> bool:
        """Whether close() was called."""
        return self._closed

    def _let_go(self) -> None:
        """End what a command may wait for: a job that it completes, and what that waits for in a node."""
        self.nodes.let_go()
        self.jobs.cancel_all()

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def _distinct(disks: Sequence[str]) -> list[str]:
    if not disks:
        raise ValueError("disks: at least one is needed")
    for disk in disks:
        if list(disks).count(disk) > 1:
            raise ValueError(f"disk {disk!r}: named twice")
    return list(disks)


def _take(disks: list, name: str, options: dict) -> list:
    """Take the snapshot of one disk, or of several at one instant."""
    if len(disks) == 1:
        return [disks[0].snapshot(name, **options)]
    return list(group(disks).snapshot(name, **options))


def _export_name(snapshot) -> str:
    return f"{snapshot.disk.name}@{snapshot.name}"


def _uri_base(listener: Listener) -> tuple[str, str]:
    """Return what stands before and after an export's name in its URI."""
    if listener.sock.family == socket.AF_UNIX:
        return "nbd+unix:///", f"?socket={quote(os.path.abspath(listener.address), safe='/')}"
    host, port = listener.sock.getsockname()[:2]
    return f"nbd://{f'[{host}]' if ':' in host else host}:{port}/", ""
