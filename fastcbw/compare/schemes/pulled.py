"""nbdcopy as the client that takes a backup away."""

from __future__ import annotations

from fastcbw.compare.process import Process, find
from fastcbw.compare.schemes.base import Progress, Scheme


def pull(scheme: Scheme, uri: str) -> Process:
    """Begin to copy URI to the scheme's target, on the target's core."""
    client = Process("nbdcopy", [find("nbdcopy", "libnbd-bin"), "--connections=4", uri, scheme.target.where], scheme.setting.folder,
                     scheme.target.cpu, elsewhere=True)
    client.start()
    scheme.clients.append(client)
    return client


def progress_of(client: Process, length: int) -> Progress:
    """Return how far CLIENT is, by what it has written or sent; all of LENGTH when it has ended well."""
    if client.running():
        return Progress(0, length)
    status = client.wait()
    return Progress(length if status == 0 else 0, length, True, None if status == 0 else f"nbdcopy failed: {client.words_said()}")
