"""``fastcbw serve``: stand between a hypervisor and its disks, in the foreground."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys

from fastcbw.block.device import engine_number
from fastcbw.cli.common import UsageError, add_options, check_nbd_uri, check_options
from fastcbw.export.nbd.listen import inherited
from fastcbw.export.nbd.server import parse_spin
from fastcbw.qmp.options import SNAPSHOT_OPTIONS

_NAME = re.compile(r"[A-Za-z0-9_.-]+")

def add_parser(verbs) -> None:
    parser = verbs.add_parser(
        "serve", help="serve disks over NBD, driven over QMP",
        description="Serve each IMAGE as the NBD export NAME (default: the file name without suffix, or the name of the NBD export) and each of its "
                    "snapshots as NAME@SNAP. Prints one URI a line, then 'ready'. SIGTERM, SIGHUP and Ctrl-C end it cleanly.")
    parser.add_argument("images", nargs="*", metavar="[NAME=]IMAGE", help="a file, a block device or an NBD URI")
    parser.add_argument("--socket", metavar="PATH", help="unix socket of the NBD server")
    parser.add_argument("--qmp", metavar="PATH", help="unix socket of the QMP server (default: the NBD socket + .qmp)")
    parser.add_argument("--format", metavar="FMT", help="format of the images: raw (default: raw, where no magic of "
                                                        "another format is found)")
    parser.add_argument("--no-lock", action="store_true", help="open the images without QEMU's byte locks")
    parser.add_argument("--read-only", action="store_true", help="open the images read-only")
    parser.add_argument("--direct", action="store_true", help="open the images O_DIRECT, past the page cache")
    parser.add_argument("--io", metavar="ENGINE",
                        help="who does requests that would wait for the disk: threads, uring, or sync: nobody else, they wait in the "
                             "connection's thread (default: threads; with --direct uring, where the kernel has it)")
    parser.add_argument("--spin", metavar="MODE", default="off",
                        help="busy-polling of guest sockets: off (default), adaptive, or microseconds; costs processor time")
    parser.add_argument("--config", metavar="FILE", help="nodes and exports from a JSON file, see docs/graph.md")
    parser.add_argument("--snapshot", metavar="SNAP", help="take this snapshot of all disks before 'ready'")
    add_options(parser, SNAPSHOT_OPTIONS, "options of --snapshot")
    parser.set_defaults(run=run)


def split_image(text: str) -> tuple[str | None, str]:
    """Return (name, image) of ``[NAME=]IMAGE``; the name is None when there is none: the file's then."""
    name, equals, image = text.partition("=")
    if not equals or not _NAME.fullmatch(name):
        name, image = None, text
    if not image:
        raise UsageError(f"{text!r}: names no image (give [NAME=]IMAGE)")
    check_nbd_uri(image)
    return name, image


def read_config(path: str) -> dict[str, list]:
    """Return the members of the JSON file PATH: nodes and exports, lists of objects; UsageError when it is anything else."""
    with open(path, encoding="utf-8") as file:
        try:
            config = json.load(file)
        except ValueError as error:
            raise UsageError(f"--config: {path}: is no JSON: {error}") from None
    members = {"nodes", "exports"}
    if not isinstance(config, dict) or set(config) - members:
        raise UsageError(f"--config: {path}: expected an object with {' and '.join(sorted(members))}")
    for name, value in config.items():
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise UsageError(f"--config: {path}: {name}: expected a list of objects")
    return config


def run(arguments: argparse.Namespace) -> int:
    options = check_options(SNAPSHOT_OPTIONS, arguments)
    if arguments.format not in (None, "raw"):
        raise UsageError(f"--format: {arguments.format!r} is not built yet (what exists: raw)")
    if options and arguments.snapshot is None:
        raise UsageError(f"--{next(iter(options)).replace('_', '-')}: an option of --snapshot, which is not given")
    if options.get("bitmap"):
        raise UsageError("--bitmap: no bitmap exists before the daemon runs (use it with snapshot create)")
    try:
        parse_spin(arguments.spin)
    except ValueError as error:
        raise UsageError(f"--{error}") from None
    if arguments.io is not None:
        try:
            engine_number(arguments.io)
        except ValueError as error:
            raise UsageError(f"--{error}") from None
    images = [split_image(text) for text in arguments.images]
    passed = _passed_socket()
    if arguments.socket is None and passed is None:
        raise UsageError("--socket: where to serve? (give --socket PATH)")
    qmp = arguments.qmp or (f"{arguments.socket}.qmp" if arguments.socket else None)
    config = None if arguments.config is None else read_config(arguments.config)
    if not images and config is None and arguments.qmp is None:
        raise UsageError("no image to serve (give one, or --qmp PATH to add disks later)")
    if arguments.snapshot is not None and not images:
        raise UsageError("--snapshot: of which disk? (give an image)")

    from fastcbw.disk import open as open_disk
    from fastcbw.qmp.daemon import Daemon

    with Daemon() as daemon:
        reasons = {signal.SIGTERM: "terminated", signal.SIGHUP: "hung up", signal.SIGINT: "interrupted"}
        for number, reason in reasons.items():
            signal.signal(number, lambda *_, reason=reason: daemon.request_stop(reason))
        for name, image in images:
            daemon.add_disk(open_disk(image, name=name, format=arguments.format, read_only=arguments.read_only,
                                      lock=not arguments.no_lock, direct=arguments.direct, io=arguments.io))
        if arguments.snapshot is not None:
            daemon.create_snapshot(arguments.snapshot, list(daemon.disks), **options)
        daemon.listen_nbd(arguments.socket if passed is None else passed, spin=arguments.spin)
        if config is not None:
            daemon.add_nodes(**config)
        if qmp is not None:
            daemon.listen_qmp(qmp)
        # With a passed socket stdout is the output of who started us (nbdinfo, nbdcopy): not ours to write to.
        out = sys.stdout if passed is None else sys.stderr
        try:
            for export in daemon.exports():
                print(daemon.uri(export), file=out)
            print("ready", file=out, flush=True)
        except BrokenPipeError:     # who started us has read enough; the guest has not
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        reason = daemon.wait()
    return 130 if reason == "interrupted" else 0


def _passed_socket():
    """Return the listener that systemd's protocol passes to this very process, or None."""
    try:
        passed = inherited()
    except (ValueError, OSError) as error:
        raise UsageError(f"LISTEN_FDS: {error}") from None
    if len(passed) > 1:
        raise UsageError(f"LISTEN_FDS: {len(passed)} sockets were passed (one is expected)")
    return passed[0] if passed else None
