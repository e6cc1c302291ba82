"""The commands of the daemon's QMP socket, as one table. Names, arguments and replies of QEMU's are QEMU's."""

from __future__ import annotations

from fastcbw.errors import Error
from fastcbw.qmp.cache_commands import CACHE_COMMANDS
from fastcbw.qmp.daemon import Daemon
from fastcbw.qmp.errors import QmpError
from fastcbw.qmp.introspection import describe_schema
from fastcbw.qmp.job_commands import JOB_COMMANDS
from fastcbw.qmp.node_commands import COMMANDS as NODE_COMMANDS
from fastcbw.qmp.options import BACKUP_OPTIONS, LIVE_OPTIONS, SNAPSHOT_OPTIONS, Option, refusals
from fastcbw.qmp.schema import Argument, Command, Schema
from fastcbw.qmp.server import VERSION


def _capabilities(daemon: Daemon, enable=()) -> None:
    if enable:
        raise QmpError(f"Capability '{enable[0]}' is not available")


def _query_commands(daemon: Daemon) -> list:
    return [{"name": name} for name in sorted(COMMANDS.commands)]


def _query_schema(daemon: Daemon) -> list:
    return describe_schema(COMMANDS)


def _query_version(daemon: Daemon) -> dict:
    return VERSION


def _quit(daemon: Daemon) -> None:
    daemon.request_stop("quit")


def _query_block_exports(daemon: Daemon) -> list:
    names = daemon.exports() if daemon.nbd is not None else []
    made = {export.name: export for export in daemon.nodes.all_exports()}
    return [{"id": made[name].id if name in made else name, "type": "nbd",
             "node-name": made[name].node.name if name in made else name, "shutting-down": False} for name in names]


def _snapshot_create(daemon: Daemon, name: str, disks: list, **options) -> list:
    _refuse(SNAPSHOT_OPTIONS, options)
    snapshots = daemon.create_snapshot(name, disks, **_given(SNAPSHOT_OPTIONS, options))
    return [_describe(snapshot, daemon) for snapshot in snapshots]


def _snapshot_delete(daemon: Daemon, name: str, disks: list) -> None:
    daemon.delete_snapshot(name, disks)


def _snapshot_set(daemon: Daemon, name: str, disks: list, **options) -> list:
    _refuse(LIVE_OPTIONS, options)
    snapshots = daemon.set_snapshot(name, disks, **options)
    return [_describe(snapshot, daemon) for snapshot in snapshots]


def _snapshot_drop(daemon: Daemon, name: str, disks: list) -> list:
    return [{"disk": disk, "dropped": dropped} for disk, dropped in daemon.drop_kept(name, disks).items()]


def _snapshot_discard(daemon: Daemon, name: str, disk: str, offset: int, length: int) -> None:
    daemon.snapshot(disk, name).discard(offset, length)


def _snapshot_list(daemon: Daemon) -> list:
    with daemon.changing():
        return [_describe(snapshot, daemon) for disk in daemon.live_disks().values() for snapshot in disk.snapshots.values()]


def _backup(daemon: Daemon, disk: str, target: str, snapshot: str | None = None, job_id: str | None = None,
            **options) -> dict:
    _refuse(BACKUP_OPTIONS, options)
    record = daemon.start_backup(disk, target, snapshot=snapshot, job_id=job_id, **_given(BACKUP_OPTIONS, options))
    return {"id": record.id, "snapshot": record.snapshot}


def _status(daemon: Daemon, disk: str | None = None) -> dict:
    return daemon.status() if disk is None else daemon.status_of(disk)


def _refuse(table: tuple[Option, ...], options: dict) -> None:
    reason = refusals(table, options)
    if reason is not None:
        raise QmpError(reason)


def _given(table: tuple[Option, ...], options: dict) -> dict:
    """Drop options that are not built: what is left of them says ``off``, and the objects below don't know them."""
    unbuilt = {option.keyword for option in table if option.built == ()}
    return {keyword: value for keyword, value in options.items() if keyword not in unbuilt}


def _describe(snapshot, daemon: Daemon) -> dict:
    described = {"disk": snapshot.disk.name, "name": snapshot.name, "length": snapshot.length}
    export = f"{snapshot.disk.name}@{snapshot.name}"
    if daemon.nbd is not None and export in daemon.nbd.exports:     # those of jobs and nodes are not
        described["uri"] = daemon.uri(export)
    try:
        described["status"] = snapshot.status()
    except Error as error:  # deleted between the listing and the look at it
        described["status"] = {"error": str(error)}
    return described


def _arguments(table: tuple[Option, ...]) -> tuple[Argument, ...]:
    return tuple(Argument(option.name, option.type, option.doc) for option in table)


_SNAPSHOT_NAME = Argument("name", "str", "the snapshot", required=True)
_DISKS = Argument("disks", "strings", "the disks; several: one instant, all or none", required=True)

COMMANDS = Schema([
    Command("qmp_capabilities", "end the negotiation; no other command is answered before", _capabilities,
            (Argument("enable", "strings", "capabilities to enable; there are none"),)),
    Command("query-commands", "the names of all commands", _query_commands),
    Command("query-qmp-schema", "all commands with their arguments and types", _query_schema),
    Command("query-version", "the QEMU whose interface this follows, and our version", _query_version),
    Command("quit", "end the daemon cleanly", _quit),
    Command("query-block-exports", "all NBD exports", _query_block_exports, paged=True),
    Command("fastcbw-snapshot-create", "take a snapshot of one disk, or of several at one instant", _snapshot_create,
            (_SNAPSHOT_NAME, _DISKS, *_arguments(SNAPSHOT_OPTIONS))),
    Command("fastcbw-snapshot-delete", "delete a snapshot that nobody uses", _snapshot_delete,
            (_SNAPSHOT_NAME, _DISKS)),
    Command("fastcbw-snapshot-set", "change limits and policies of a snapshot that lives", _snapshot_set,
            (_SNAPSHOT_NAME, _DISKS, *_arguments(LIVE_OPTIONS))),
    Command("fastcbw-snapshot-drop", "drop from RAM what reads left there and the guest has not changed; bytes for each disk",
            _snapshot_drop, (_SNAPSHOT_NAME, _DISKS)),
    Command("fastcbw-snapshot-discard", "a reader has done with a range: it can't be read any more, and guest writes there cost nothing",
            _snapshot_discard, (_SNAPSHOT_NAME, Argument("disk", "str", "the disk", required=True),
                                Argument("offset", "int", "bytes, a multiple of the snapshot's granule", required=True),
                                Argument("length", "int", "bytes, likewise, or to the end of the disk", required=True))),
    Command("fastcbw-snapshot-list", "all snapshots of all disks", _snapshot_list, paged=True),
    Command("fastcbw-backup", "start a backup job", _backup, (
        Argument("disk", "str", "the disk", required=True),
        Argument("target", "str", "the file or NBD URI to write; a relative path starts at the daemon's folder", required=True),
        Argument("snapshot", "str", "the snapshot to copy (default: one is made, and deleted at the end)"),
        Argument("job-id", "str", "the job's id (default: job1, job2, ...)"),
        *_arguments(BACKUP_OPTIONS))),
    Command("fastcbw-status", "everything that is known", _status, (
        Argument("disk", "str", "of this disk only, and of nothing else"),), narrowed="disk"),
    *JOB_COMMANDS,
    *NODE_COMMANDS,
    *CACHE_COMMANDS,
])
