"""``fastcbw map DISK[@SNAP]``: what is where, as text, as the JSON of ``qemu-img map``, or as a picture."""

from __future__ import annotations

import argparse

from fastcbw.cli.common import UsageError, add_json, add_qmp, connect, print_json, print_table
from fastcbw.cli.map_picture import LEGEND, draw
from fastcbw.units import format_size


def add_parser(verbs) -> None:
    parser = verbs.add_parser("map", help="show what of a disk or snapshot is where",
                              description="Extents of a disk, or of a snapshot of it: where its data is (ram, disk, zero, active: the "
                                          "active disk, dropped: not in the snapshot), and whether the guest has changed it since.")
    parser.add_argument("what", metavar="DISK[@SNAP]")
    parser.add_argument("--png", metavar="FILE", help="draw it into FILE instead; colours: "
                                                      + ", ".join(f"{state} {colour}" for state, (colour, _) in LEGEND.items()))
    add_qmp(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    disk, at, snapshot = arguments.what.partition("@")
    if at and not snapshot:
        raise UsageError(f"{arguments.what}: no snapshot is named (give DISK@SNAP, or DISK)")
    with connect(arguments) as daemon:
        extents = daemon.map(disk, snapshot or None)
    if arguments.png is not None:
        size = draw(extents, arguments.png)
        print_json({"file": arguments.png, "width": size[0], "height": size[1]}) if arguments.json else print(arguments.png)
    elif arguments.json:
        print_json(extents)
    else:
        print_table(("OFFSET", "LENGTH", "STATE", "DATA", "CHANGED"), [
            (hex(extent["start"]), format_size(extent["length"]), extent["state"],
             "zero" if extent["zero"] else "data" if extent["data"] else "hole" if extent["present"] else "-",
             "changed" if extent.get("changed", extent["state"] == "changed") else "")
            for extent in extents])
        print()
        totals: dict[str, int] = {}
        for extent in extents:
            totals[extent["state"]] = totals.get(extent["state"], 0) + extent["length"]
        print(", ".join(f"{state} {format_size(length)}" for state, length in totals.items()))
    return 0
