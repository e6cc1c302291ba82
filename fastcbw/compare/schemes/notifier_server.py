"""The process of the write-notifier schemes: a disk under the old backup's filter as the NBD export `disk`, and a backup begun over QMP.

Run as ``python -m fastcbw.compare.schemes.notifier_server IMAGE TARGET SOCKET WORKERS CHUNK``: the filter and one job, both to TARGET, a
file or an NBD URI; or with ``FLEECE`` as a sixth word: the filter preserves into that file, which it makes, as a backup with sync none does, and a second job
reads both and writes to TARGET. Its QMP socket is SOCKET.qmp and has the commands begin, and query-jobs as everywhere.

An NBD target gets one connection with 16 requests under way, which is what QEMU's client has.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fastcbw.block.device import BlockDevice
from fastcbw.block.file import FileDevice
from fastcbw.block.image import open_image
from fastcbw.block.nbd import NbdDevice
from fastcbw.block.nbd_uri import is_nbd_uri
from fastcbw.cbw.notified import NotifiedView
from fastcbw.cbw.notifier import WriteNotifier
from fastcbw.errors import Error
from fastcbw.export.nbd.listen import listen_unix
from fastcbw.export.nbd.server import Server
from fastcbw.jobs.backup import BackupJob
from fastcbw.jobs.job import Job
from fastcbw.jobs.write_notifier import WriteNotifierJob
from fastcbw.qmp.schema import Command, Schema
from fastcbw.qmp.server import QmpServer

CLUSTER = 65536


class Backup:
    """A backup of DISK, which is there to be exported; begun by begin()."""

    def __init__(self, image: str, where: str, workers: str, chunk: str):
        self.target = NbdDevice(where, connections=1, requests=16) if is_nbd_uri(where) else open_image(where, format="raw")
        self.disk = self.make_disk(open_image(image, format="raw", io="threads"))
        self.workers, self.chunk = int(workers), int(chunk)
        self.job: Job | None = None
        self.tell_end: Callable[[], None] = lambda: None

    def make_disk(self, image: BlockDevice) -> WriteNotifier:
        return WriteNotifier(image, self.target, cluster_size=CLUSTER)

    def begin(self) -> None:
        self._start(WriteNotifierJob(self.disk, workers=self.workers, chunk=self.chunk))

    def _start(self, job: Job) -> None:
        self.job = job.start()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        with suppress(Error, OSError):
            self.job.wait()
        self.tell_end()

    def query_jobs(self) -> list[dict[str, Any]]:
        progress = self.job.progress
        return [{"id": "backup", "status": self.job.status, "current-progress": progress["done"], "total-progress": progress["total"],
                 **({} if self.job.error is None else {"error": self.job.error})}]

    def close(self) -> None:
        if self.job is not None and self.job.status == "running":
            self.job.cancel()
            with suppress(Error, TimeoutError):
                self.job.wait(10)
        self.disk.close()
        self.target.close()


class Pair(Backup):
    """Two jobs: what the guest overwrites goes to the file FLEECE, the rest is read beside it, and all of it goes to the target."""

    def __init__(self, image: str, where: str, workers: str, chunk: str, fleece: str):
        self.fleece = fleece
        super().__init__(image, where, workers, chunk)

    def make_disk(self, image: BlockDevice) -> WriteNotifier:
        self.store = FileDevice(self.fleece, create_length=image.length)
        return WriteNotifier(image, self.store, cluster_size=CLUSTER)

    def begin(self) -> None:
        self.disk.begin()
        self._start(BackupJob(NotifiedView(self.disk), self.target))

    def close(self) -> None:
        super().close()
        self.store.close()


COMMANDS = Schema([Command("qmp_capabilities", "end the negotiation", lambda backup: None),
                   Command("begin", "the point in time is now; copy", lambda backup: backup.begin()),
                   Command("query-jobs", "how far it is", lambda backup: backup.query_jobs())])


def main(arguments: list[str]) -> None:
    image, where, socket, *rest = arguments
    backup = (Pair if len(rest) == 3 else Backup)(image, where, *rest)
    qmp = QmpServer(listen_unix(f"{socket}.qmp"), COMMANDS, backup)
    backup.tell_end = lambda: qmp.emit("JOB_STATUS_CHANGE", {"id": "backup", "status": "concluded"})
    try:
        with Server() as server:
            server.add_export("disk", backup.disk)
            server.listen(listen_unix(socket))
            signal.sigwait({signal.SIGTERM, signal.SIGINT})
    finally:
        qmp.close()
        backup.close()


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    main(sys.argv[1:])
