"""The objects of a daemon in another process: disks, snapshots and jobs, each method one QMP command."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence

from fastcbw.block.nbd_uri import is_nbd_uri, parse_nbd_uri
from fastcbw.errors import Error, JobCancelled, JobFailed
from fastcbw.units import parse_size
from fastcbw.qmp.client import QmpClient
from fastcbw.qmp.remote_bitmaps import RemoteBitmap
from fastcbw.qmp.remote_data import PAGE_ROWS, RemoteDiskBytes, RemoteGroup, RemoteSnapshotBytes

#: How often a waiter looks at a job.
POLL_SECONDS = 0.1


def connect(path: str | os.PathLike, timeout: float | None = 60.0) -> RemoteDaemon:
    """Connect to the QMP socket of a running daemon (``fastcbw serve --qmp PATH``)."""
    return RemoteDaemon(QmpClient(path, timeout))


class RemoteDaemon:
    """A daemon in another process. Use it in a with block, or close() it; the daemon itself goes on."""

    def __init__(self, client: QmpClient):
        self.client = client

    def status(self) -> dict:
        """Return everything that the daemon knows of itself."""
        return self.client.execute("fastcbw-status")

    @property
    def disks(self) -> Mapping[str, RemoteDisk]:
        """The daemon's disks by name, as of now."""
        return {name: RemoteDisk(self, name) for name in self.status()["disks"]}

    def snapshot(self, name: str, disks: Sequence[str], **options) -> tuple[RemoteSnapshot, ...]:
        """Take the snapshot NAME of DISKS (names), all at one instant. OPTIONS: as of Disk.snapshot."""
        self.client.execute("fastcbw-snapshot-create", name=name, disks=list(disks), **options)
        return tuple(RemoteSnapshot(self, disk, name) for disk in disks)

    def group(self, disks: Sequence[RemoteDisk]) -> RemoteGroup:
        """Return a group of DISKS of this daemon, whose snapshots share one instant; fastcbw.group() is the same."""
        return RemoteGroup(disks)

    def snapshots(self) -> list[dict]:
        """Return what the daemon knows of each snapshot."""
        return self.client.execute("fastcbw-snapshot-list")

    def latencies(self) -> dict:
        """Return the histograms of guest write latency, measured from the first time this is asked for."""
        return self.client.execute("fastcbw-latency")

    def metrics(self) -> str:
        """Return all counters in Prometheus' text format."""
        return self.client.execute("fastcbw-metrics")["text"]

    def map(self, disk: str, snapshot: str | None = None) -> list[dict]:
        """Return the map of a disk, or of a snapshot of it: extents with the keys of `qemu-img map`, and state."""
        return self._pages("fastcbw-map", disk=disk, snapshot=snapshot)

    def order(self, disk: str, snapshot: str, policy: str | None = None) -> list[dict]:
        """Return the extents of a snapshot in copy order, with their class. What moves meanwhile may be missing or twice."""
        return self._pages("fastcbw-order", disk=disk, snapshot=snapshot, order=policy)

    def _pages(self, command: str, **arguments) -> list[dict]:
        extents, start = [], 0
        while start is not None:
            page = self.client.execute(command, start=start, limit=PAGE_ROWS, **arguments)
            extents += page["extents"]
            start = page.get("next")
        return extents

    @property
    def jobs(self) -> Mapping[str, RemoteJob]:
        """The daemon's jobs by id, ended ones too until they are dismissed."""
        return {job["id"]: RemoteJob(self, job["id"]) for job in self.client.execute("query-jobs")}

    def backup(self, disk: str, target: str | os.PathLike, *, snapshot: str | None = None, **options) -> RemoteJob:
        """Start a backup of DISK@SNAPSHOT there; without SNAPSHOT one is made for the job and deleted after it."""
        text = os.fsdecode(target)      # made absolute: the daemon's folder is another
        target = parse_nbd_uri(text).absolute() if is_nbd_uri(text) else os.path.abspath(text)
        answer = self.client.execute("fastcbw-backup", disk=disk, snapshot=snapshot, target=target, **options)
        return RemoteJob(self, answer["id"])

    def quit(self) -> None:
        """End the daemon."""
        self.client.execute("quit")

    def close(self) -> None:
        """Close the connection; the daemon goes on."""
        self.client.close()

    def __enter__(self) -> RemoteDaemon:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


class RemoteDisk(RemoteDiskBytes):
    """A disk of a daemon in another process."""

    def __init__(self, daemon: RemoteDaemon, name: str):
        self.daemon = daemon
        self.name = name

    def _export(self) -> str:
        return self.name

    def _names(self) -> dict[str, str]:
        return {"disk": self.name}

    def snapshot(self, name: str, **options) -> RemoteSnapshot:
        """Take the snapshot NAME of this disk. OPTIONS: as of Disk.snapshot."""
        return self.daemon.snapshot(name, [self.name], **options)[0]

    @property
    def snapshots(self) -> Mapping[str, RemoteSnapshot]:
        """The live snapshots of this disk by name, as of now."""
        return {found["name"]: RemoteSnapshot(self.daemon, self.name, found["name"])
                for found in self.daemon.snapshots() if found["disk"] == self.name}

    def add_bitmap(self, name: str, *, granularity: int | str | None = None, enabled: bool = True) -> RemoteBitmap:
        """Add an empty dirty bitmap, which marks every write that begins from now on. See Disk.add_bitmap."""
        self.daemon.client.execute("block-dirty-bitmap-add", node=self.name, name=name, granularity=granularity,
                                   disabled=None if enabled else True)
        return RemoteBitmap(self.daemon, self.name, name)

    @property
    def bitmaps(self) -> Mapping[str, RemoteBitmap]:
        """The dirty bitmaps of this disk by name, as of now."""
        return {found["name"]: RemoteBitmap(self.daemon, self.name, found["name"]) for found in self.status()["bitmaps"]}

    def backup(self, target: str | os.PathLike, **options) -> RemoteJob:
        """Start a backup of this disk as it is now: its snapshot is made for the job and deleted after it."""
        return self.daemon.backup(self.name, target, **options)

    def status(self) -> dict:
        """Return what the daemon knows of this disk."""
        disks = self.daemon.status()["disks"]
        if self.name not in disks:
            raise Error(f"disk {self.name!r}: not found")
        return disks[self.name]


class RemoteSnapshot(RemoteSnapshotBytes):
    """A snapshot of a daemon in another process. Leaving a with block deletes it, as close() does."""

    def __init__(self, daemon: RemoteDaemon, disk: str, name: str):
        self.daemon = daemon
        self.disk = disk
        self.name = name

    def _export(self) -> str:
        return f"{self.disk}@{self.name}"

    def _names(self) -> dict[str, str]:
        return {"disk": self.disk, "snapshot": self.name}

    def backup(self, target: str | os.PathLike, **options) -> RemoteJob:
        """Start a backup of this snapshot to the file TARGET, on the daemon's machine."""
        return self.daemon.backup(self.disk, target, snapshot=self.name, **options)

    def set_limits(self, *, ram: int | str | None = None, spill_limit: int | str | None = None) -> None:
        """Change the limits of its tiers; see Snapshot.set_limits."""
        self._set(ram=ram, spill_limit=spill_limit)

    def set_policy(self, *, on_full: str | None = None, on_cbw_error: str | None = None) -> None:
        """Change its policies; see Snapshot.set_policy."""
        self._set(on_full=on_full, on_cbw_error=on_cbw_error)

    def drop(self) -> int:
        """Drop from RAM what reads left there and the guest has not changed; return the bytes that it freed."""
        (row,) = self.daemon.client.execute("fastcbw-snapshot-drop", name=self.name, disks=[self.disk])
        return row["dropped"]

    def _set(self, **options) -> None:
        given = {keyword: value for keyword, value in options.items() if value is not None}
        self.daemon.client.execute("fastcbw-snapshot-set", name=self.name, disks=[self.disk], **given)

    def status(self) -> dict:
        """Return what the daemon knows of this snapshot."""
        for found in self.daemon.snapshots():
            if (found["disk"], found["name"]) == (self.disk, self.name):
                return found
        raise Error(f"snapshot {self._export()}: not found")

    def close(self) -> None:
        """Delete the snapshot; refused while it is in use."""
        self.daemon.client.execute("fastcbw-snapshot-delete", name=self.name, disks=[self.disk])

    def __enter__(self) -> RemoteSnapshot:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


class RemoteJob:
    """A job of a daemon in another process."""

    def __init__(self, daemon: RemoteDaemon, id: str):
        self.daemon = daemon
        self.id = id

    def describe(self) -> dict:
        """Return what query-jobs shows of this job."""
        for job in self.daemon.client.execute("query-jobs"):
            if job["id"] == self.id:
                return job
        raise Error(f"job {self.id!r}: not found")

    @property
    def status(self) -> str:
        """``created``, ``running`` or ``concluded``."""
        return self.describe()["status"]

    @property
    def progress(self) -> dict:
        """Bytes done and in all, and the rate: done, total, bytes_per_s."""
        return _progress(self.describe())

    @property
    def error(self) -> str | None:
        """Why the job failed or that it was cancelled; None while it runs and when it completed."""
        return self.describe().get("error")

    @property
    def result(self) -> dict | None:
        """What the job reports at its end."""
        return self.describe().get("result")

    def wait(self, timeout: float | None = None) -> dict:
        """Wait for the job's end and return its result.

        Raises JobFailed or JobCancelled as it ended, TimeoutError when it has not within TIMEOUT seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (job := self.describe())["status"] != "concluded":
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"job {self.id}: not ended within {timeout:g} seconds")
            time.sleep(POLL_SECONDS)
        if job["outcome"] == "cancelled":
            raise JobCancelled(job["error"])
        if job["outcome"] == "failed":
            raise JobFailed(job["error"])
        return job["result"]

    def cancel(self) -> None:
        """Ask the job to end; it ends as cancelled, unless it had ended already."""
        try:
            self.daemon.client.execute("job-cancel", id=self.id)
        except Error:
            if self.status != "concluded":
                raise

    def pause(self) -> None:
        """Let it begin nothing more until resume()."""
        self.daemon.client.execute("job-pause", id=self.id)

    def resume(self) -> None:
        """Let it go on."""
        self.daemon.client.execute("job-resume", id=self.id)

    @property
    def rate(self) -> int | None:
        """Bytes a second that the job may move, None for no limit; may be set at any time."""
        return self.describe()["rate"]

    @rate.setter
    def rate(self, rate: int | str | None) -> None:
        limit = None if rate is None else parse_size(rate, "rate")
        if limit == 0:
            raise ValueError("rate: 0 bytes a second would never end (None is no limit)")
        self.daemon.client.execute("block-job-set-speed", device=self.id, speed=limit or 0)

    @property
    def pacing(self) -> dict:
        """How the job is paced now, see BackupJob.pacing."""
        job = self.describe()
        return {name: job[name.replace("_", "-")] for name in ("rate", "guest_p99", "guest_p99_now", "workers", "in_flight")}

    def dismiss(self) -> None:
        """Make the daemon forget the job, which has ended."""
        self.daemon.client.execute("job-dismiss", id=self.id)


def _progress(job: dict) -> dict:
    return {"done": job["current-progress"], "total": job["total-progress"], "bytes_per_s": job["bytes-per-s"]}
