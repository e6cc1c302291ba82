"""``fastcbw backup SOURCE TARGET``: copy a point in time into a file or an NBD export, here or in a daemon."""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack

from fastcbw.cli.common import (UsageError, add_json, add_options, add_qmp, check_nbd_uri, check_options, connect,
                                qmp_path, refuse_unbuilt)
from fastcbw.cli.follow import Interrupts, follow
from fastcbw.qmp.options import BACKUP_OPTIONS


def add_parser(verbs) -> None:
    parser = verbs.add_parser(
        "backup", help="copy a point in time of a disk into a file or an NBD export",
        description="SOURCE: an image file or an NBD URI; or, of a running daemon, DISK@SNAP, or DISK (a snapshot is made for the "
                    "job and removed after it). With --qmp SOURCE is always the daemon's; with only FASTCBW_QMP set "
                    "a file of that name comes first. TARGET: a file, or an NBD URI, whose export is written in place.")
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("target", metavar="TARGET")
    add_options(parser, BACKUP_OPTIONS, "backup options")
    parser.add_argument("--format", metavar="FMT", help="format of the target: raw")
    parser.add_argument("--backing", metavar="FILE", help="backing file of an increment (not built yet)")
    add_qmp(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    options = check_options(BACKUP_OPTIONS, arguments)
    if options.get("consume") and options.get("verify"):
        raise UsageError("--consume: not with --verify (what has been consumed cannot be compared)")
    refuse_unbuilt(backing=arguments.backing)
    _check_pace(arguments)
    check_nbd_uri(arguments.source)
    target_is_uri = check_nbd_uri(arguments.target)
    if arguments.format not in (None, "raw"):
        raise UsageError(f"--format: {arguments.format!r} is not built yet (what exists: raw)")
    if arguments.format is None and arguments.target.endswith(".qcow2") and not target_is_uri:
        raise UsageError(f"{arguments.target}: qcow2 targets are not built yet (choose another name, or --format raw)")
    start = _start_there if _is_daemons(arguments) else _start_here
    with Interrupts() as interrupts, ExitStack() as stack:
        return follow(start(arguments, options, stack), interrupts, json=arguments.json)


def _check_pace(arguments: argparse.Namespace) -> None:
    from fastcbw.jobs.pacing import check_rate

    try:
        check_rate(arguments.rate)
    except ValueError as error:
        raise UsageError(f"--{error}") from None
    if arguments.guest_p99 is not None and not _is_daemons(arguments):
        raise UsageError(f"--guest-p99: {arguments.source}: nobody writes it through this command (it is for a disk of a daemon)")


def _is_daemons(arguments: argparse.Namespace) -> bool:
    """Tell whether SOURCE names a disk of a daemon rather than a file."""
    if arguments.qmp is not None:
        return True
    if "/" in arguments.source or os.path.exists(arguments.source):
        return False
    if qmp_path(arguments) is not None:
        return True
    if "@" in arguments.source:
        raise UsageError(f"{arguments.source}: no such file (for a snapshot of a daemon give --qmp PATH)")
    return False


def _start_there(arguments: argparse.Namespace, options: dict, stack: ExitStack):
    daemon = stack.enter_context(connect(arguments))
    disk, at, snapshot = arguments.source.partition("@")
    if at and not snapshot:
        raise UsageError(f"{arguments.source}: no snapshot is named (give DISK@SNAP, or DISK)")
    job = daemon.backup(disk, arguments.target, snapshot=snapshot or None, **options)
    stack.callback(_forget, job)
    return job


def _forget(job) -> None:
    """Dismiss the job that was followed to its end; a daemon that has gone needs no telling."""
    from fastcbw.errors import Error

    try:
        job.dismiss()
    except (Error, OSError):
        pass


def _start_here(arguments: argparse.Namespace, options: dict, stack: ExitStack):
    from fastcbw.disk import open as open_disk

    if "bitmap" in options:
        raise UsageError("--bitmap: is of a disk that a daemon serves (give --qmp PATH and the disk's name)")
    disk = stack.enter_context(open_disk(arguments.source, read_only=True))
    snapshot = disk.snapshot("backup")
    stack.callback(snapshot.close)
    return snapshot.backup(arguments.target, **options)
