"""``fastcbw demo``: a live disk, a guest load, a snapshot under load, a backup, and the proof that it is right."""

from __future__ import annotations

import argparse

from fastcbw.cli.common import UsageError, add_json, positive, print_json, size, terminate_as_interrupt
from fastcbw.units import format_size

SIZE_MIN = 64 << 20


def add_parser(verbs) -> None:
    parser = verbs.add_parser(
        "demo", help="show a verified backup of a disk that is being written to",
        description="A disk with a real file system is served and written to; a snapshot is taken under that load, "
                    "a backup is made from it while the writes go on, and every byte of it is checked.")
    parser.add_argument("--size", type=size, default=1 << 30, metavar="SIZE", help="size of the disk (default 1G)")
    parser.add_argument("--seconds", type=positive, default=10, metavar="N", help="how long the load runs (default 10)")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.size < SIZE_MIN or arguments.size % 4096:
        raise UsageError(f"--size: {arguments.size} is no multiple of 4096 from {format_size(SIZE_MIN)} on")
    from fastcbw.cli.demo_run import run_demo

    terminate_as_interrupt()
    report = run_demo(arguments.size, arguments.seconds, say=_silent if arguments.json else _say)
    if arguments.json:
        print_json(report)
    return 0 if report["verified"] else 1


def _say(text: str) -> None:
    print(text, flush=True)


def _silent(text: str) -> None:
    pass
