"""``fastcbw bitmap add|remove|clear|merge|enable|disable|list``: dirty bitmaps of a running daemon's disks."""

from __future__ import annotations

import argparse

from fastcbw.cli.common import UsageError, add_json, add_qmp, connect, print_json, print_table, size
from fastcbw.units import format_size


def add_parser(verbs) -> None:
    parser = verbs.add_parser("bitmap", help="dirty bitmaps: which parts of a disk the guest has written since")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    add = actions.add_parser("add", help="add an empty bitmap, which marks what is written from now on")
    add.add_argument("--granularity", type=size, metavar="SIZE", help="bytes per bit, a power of two from 512 to 2G (default 64K)")
    add.add_argument("--disabled", action="store_const", const=True, help="mark nothing until it is enabled")
    merge = actions.add_parser("merge", help="mark in NAME also what other bitmaps of the disk mark")
    verbs_of_one = {"add": add, "merge": merge}
    for action, doc in (("remove", "remove a bitmap that no job uses"), ("clear", "forget what it marks; it goes on from now"),
                        ("enable", "have it mark guest writes"), ("disable", "have it stay as it is")):
        verbs_of_one[action] = actions.add_parser(action, help=doc)
    for action, its_parser in verbs_of_one.items():
        its_parser.add_argument("disk", metavar="DISK")
        its_parser.add_argument("name", metavar="NAME")
        its_parser.set_defaults(run=run_change, command=f"block-dirty-bitmap-{action}")
    merge.add_argument("sources", nargs="+", metavar="SOURCE")

    listing = actions.add_parser("list", help="list the bitmaps of a disk, or of all")
    listing.add_argument("disk", nargs="?", metavar="DISK")
    listing.set_defaults(run=run_list)
    for its_parser in (*verbs_of_one.values(), listing):
        add_qmp(its_parser)
        add_json(its_parser)


def run_change(arguments: argparse.Namespace) -> int:
    given = {"node": arguments.disk, "name": arguments.name}
    if arguments.action == "add":
        granularity = arguments.granularity
        if granularity is not None:
            _check_granularity(granularity)
        given |= {"granularity": granularity, "disabled": arguments.disabled}
    elif arguments.action == "merge":
        given = {"node": arguments.disk, "target": arguments.name, "bitmaps": arguments.sources}
    with connect(arguments) as daemon:
        daemon.client.execute(arguments.command, **given)
        if arguments.json:
            print_json([found for found in daemon.status()["disks"][arguments.disk]["bitmaps"] if found["name"] == arguments.name])
    return 0


def _check_granularity(granularity: int) -> None:
    """Refuse before any daemon is asked what none accepts."""
    from fastcbw.cbw.options import parse_granularity

    try:
        parse_granularity(granularity)
    except ValueError as error:
        raise UsageError(f"--{error}") from None


def run_list(arguments: argparse.Namespace) -> int:
    with connect(arguments) as daemon:
        disks = daemon.status()["disks"]
    if arguments.disk is not None:
        if arguments.disk not in disks:
            from fastcbw.errors import Error

            raise Error(f"disk {arguments.disk!r}: not found (disks here: {', '.join(disks) or 'none'})")
        disks = {arguments.disk: disks[arguments.disk]}
    if arguments.json:
        print_json([{"disk": name, **found} for name, disk in disks.items() for found in disk["bitmaps"]])
    else:
        print_table(("DISK", "BITMAP", "GRANULARITY", "MARKED", "STATE"), [
            (name, found["name"], format_size(found["granularity"]), format_size(found["count"]),
             ("recording" if found["recording"] else "disabled") + (", in use" if found["busy"] else ""))
            for name, disk in disks.items() for found in disk["bitmaps"]])
    return 0
