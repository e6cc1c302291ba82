"""The process of the write-notifier scheme: a disk under the old backup's filter as the NBD export `disk`, and a job begun over QMP.

Run as ``python -m fastcbw.compare.schemes.notifier_server IMAGE TARGET SOCKET WORKERS CHUNK``; TARGET: a file or an NBD URI. Its QMP
socket is SOCKET.qmp and has the commands begin, and query-jobs as everywhere.
"""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from typing import Any

from fastcbw.block.image import open_image
from fastcbw.cbw.notifier import WriteNotifier
from fastcbw.errors import Error
from fastcbw.export.nbd.listen import listen_unix
from fastcbw.export.nbd.server import Server
from fastcbw.jobs.write_notifier import WriteNotifierJob
from fastcbw.qmp.schema import Command, Schema
from fastcbw.qmp.server import QmpServer


def _begin(job: WriteNotifierJob) -> None:
    job.start()


def _query_jobs(job: WriteNotifierJob) -> list[dict[str, Any]]:
    progress = job.progress
    return [{"id": "backup", "status": job.status, "current-progress": progress["done"], "total-progress": progress["total"],
             **({} if job.error is None else {"error": job.error})}]


COMMANDS = Schema([Command("qmp_capabilities", "end the negotiation", lambda job: None), Command("begin", "the point in time is now; copy", _begin),
                   Command("query-jobs", "how far it is", _query_jobs)])


def main(arguments: list[str]) -> None:
    image, where, socket, workers, chunk = arguments
    disk = open_image(image, format="raw", io="threads")
    target = open_image(where, format="raw")
    notifier = WriteNotifier(disk, target, cluster_size=65536)
    job = WriteNotifierJob(notifier, workers=int(workers), chunk=int(chunk))
    qmp = QmpServer(listen_unix(f"{socket}.qmp"), COMMANDS, job)
    try:
        with Server() as server:
            server.add_export("disk", notifier)
            server.listen(listen_unix(socket))
            signal.sigwait({signal.SIGTERM, signal.SIGINT})
    finally:
        qmp.close()
        if job.status == "running":
            job.cancel()
            with suppress(Error, TimeoutError):
                job.wait(10)
        notifier.close()
        target.close()


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    main(sys.argv[1:])
