"""The process of a target: its file behind devices that make it slow or faulty, as an NBD export.

Run as ``python -m fastcbw.compare.targets.server FILE SOCKET [NAME=NUMBER...]``. bytes_per_s: bandwidth; read_ms, write_ms: delay of each read, each write;
stall_after_bytes, stall_ms: once so much was written, one write takes so long. fail_after_bytes, fail_count: then so many writes
fail. full_after_bytes: from there on none finds room.
"""

from __future__ import annotations

import errno
import signal
import sys

from fastcbw.block.delay import DelayDevice
from fastcbw.block.fault import FaultDevice
from fastcbw.block.file import FileDevice
from fastcbw.export.nbd.listen import listen_unix
from fastcbw.export.nbd.server import Server

EXPORT = "target"


def main(arguments: list[str]) -> None:
    path, socket, *options = arguments
    given = {name: int(value) for name, value in (option.split("=") for option in options)}
    device = FileDevice(path)
    faults = {name: given.pop(name) for name in list(given) if name.startswith(("stall_", "fail_", "full_"))}
    if faults:
        device = FaultDevice(device, io="threads")
    if "stall_ms" in faults:
        device.fail_on("write", errno=0, count=1, after_bytes=faults["stall_after_bytes"], stall_ms=faults["stall_ms"])
    if "fail_after_bytes" in faults:
        device.fail_on("write", errno=errno.EIO, count=faults["fail_count"], after_bytes=faults["fail_after_bytes"])
    if "full_after_bytes" in faults:
        device.fail_on("write", errno=errno.ENOSPC, after_bytes=faults["full_after_bytes"])
    slow = {name: given.pop(name) for name in ("bytes_per_s", "write_ms", "read_ms") if name in given}
    if slow:
        # "threads": requests are late beside each other, not one after the other.
        device = DelayDevice(device, io="threads", **slow)
    if given:
        raise SystemExit(f"unknown options: {given}")
    with Server() as server:
        server.add_export(EXPORT, device)
        server.listen(listen_unix(socket))
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
    device.close()


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    main(sys.argv[1:])
