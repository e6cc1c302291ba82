"""``fastcbw snapshot create|set|list|delete``: snapshots of a running daemon."""

from __future__ import annotations

import argparse

from fastcbw.cli.common import UsageError, add_json, add_options, add_qmp, check_options, connect, print_json, print_table
from fastcbw.cbw.options import SnapshotOptions, check_name
from fastcbw.qmp.options import LIVE_OPTIONS, SNAPSHOT_OPTIONS
from fastcbw.units import format_size


def add_parser(verbs) -> None:
    parser = verbs.add_parser("snapshot", help="create, change, list or delete snapshots of a running daemon")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    create = actions.add_parser("create", help="take a snapshot of one disk, or of several at one instant")
    create.add_argument("disks", nargs="+", metavar="DISK")
    create.add_argument("--name", required=True, metavar="SNAP")
    add_options(create, SNAPSHOT_OPTIONS, "snapshot options")
    create.set_defaults(run=run_create)

    change = actions.add_parser("set", help="change limits and policies of a snapshot that lives")
    change.add_argument("disks", nargs="+", metavar="DISK")
    change.add_argument("--name", required=True, metavar="SNAP")
    add_options(change, LIVE_OPTIONS, "what to change")
    change.set_defaults(run=run_set)

    listing = actions.add_parser("list", help="list all snapshots")
    listing.set_defaults(run=run_list)

    drop = actions.add_parser("drop", help="drop from RAM what reads left there (copy-on-read); nothing is lost")
    drop.add_argument("disks", nargs="+", metavar="DISK")
    drop.add_argument("--name", required=True, metavar="SNAP")
    drop.set_defaults(run=run_drop)

    delete = actions.add_parser("delete", help="delete a snapshot that nobody uses")
    delete.add_argument("disks", nargs="+", metavar="DISK")
    delete.add_argument("--name", required=True, metavar="SNAP")
    delete.set_defaults(run=run_delete)

    for action in (create, change, listing, delete, drop):
        add_qmp(action)
        add_json(action)


def run_create(arguments: argparse.Namespace) -> int:
    options = check_options(SNAPSHOT_OPTIONS, arguments)
    check_name(arguments.name)
    _check_values(options)
    with connect(arguments) as daemon:
        created = daemon.client.execute("fastcbw-snapshot-create", name=arguments.name, disks=arguments.disks, **options)
    if arguments.json:
        print_json(created)
    else:
        for snapshot in created:
            print(snapshot.get("uri", f"{snapshot['disk']}@{snapshot['name']}"))
    return 0


def _check_values(options: dict) -> None:
    """UsageError for what would be wrong in any daemon; what only the daemon knows (its folders, its disks) is its to refuse."""
    try:
        SnapshotOptions.parse(**{"spill_limit": 1 << 40, **options} if "spill" in options else options)
    except ValueError as error:
        keyword, colon, why = str(error).partition(":")
        raise UsageError(f"--{keyword.replace('_', '-')}{colon}{why}" if keyword in options else str(error)) from None


def run_set(arguments: argparse.Namespace) -> int:
    options = check_options(LIVE_OPTIONS, arguments)
    if not options:
        raise UsageError(f"nothing to change (give {', '.join(f'--{option.name}' for option in LIVE_OPTIONS)})")
    with connect(arguments) as daemon:
        changed = daemon.client.execute("fastcbw-snapshot-set", name=arguments.name, disks=arguments.disks, **options)
    if arguments.json:
        print_json(changed)
    else:
        _print_tiers(changed)
    return 0


def _print_tiers(snapshots: list[dict]) -> None:
    print_table(("SNAPSHOT", "RAM", "OF", "DISK", "OF", "ON FULL", "ON ERROR"), [
        (f"{found['disk']}@{found['name']}", *(format_size(found["status"].get(key, 0)) for key in
         ("ram_bytes", "ram_limit", "disk_bytes", "disk_limit")), found["status"]["on_full"], found["status"]["on_cbw_error"])
        for found in snapshots])


def run_list(arguments: argparse.Namespace) -> int:
    with connect(arguments) as daemon:
        snapshots = daemon.snapshots()
    if arguments.json:
        print_json(snapshots)
    else:
        print_table(("DISK", "SNAPSHOT", "LENGTH", "STATE"),
                    [(found["disk"], found["name"], format_size(found["length"]), found["status"].get("state", ""))
                     for found in snapshots])
    return 0


def run_drop(arguments: argparse.Namespace) -> int:
    with connect(arguments) as daemon:
        dropped = daemon.client.execute("fastcbw-snapshot-drop", name=arguments.name, disks=arguments.disks)
    if arguments.json:
        print_json(dropped)
    else:
        for row in dropped:
            print(f"{row['disk']}@{arguments.name}: {format_size(row['dropped'])} dropped")
    return 0


def run_delete(arguments: argparse.Namespace) -> int:
    with connect(arguments) as daemon:
        daemon.client.execute("fastcbw-snapshot-delete", name=arguments.name, disks=arguments.disks)
    if arguments.json:
        print_json([])
    return 0
