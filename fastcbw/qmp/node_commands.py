"""The QMP commands of the graph: nodes, exports, backups of nodes, transactions. Names and arguments are QEMU's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastcbw.qmp.backups import Backup
from fastcbw.qmp.bitmaps import BITMAP_ACTIONS
from fastcbw.qmp.clients import Client, current_client
from fastcbw.qmp.errors import QmpError
from fastcbw.qmp.schema import Argument, Command, Schema

if TYPE_CHECKING:
    from fastcbw.qmp.daemon import Daemon

#: Arguments of block-export-add and blockdev-backup that QEMU has and that may only have the value that is true here.
_EXPORT_FIXED = {"writethrough": False, "allocation-depth": False}
_BACKUP_FIXED = {"compress": False, "on-source-error": "report", "on-target-error": "report"}


def _fixed(given: dict[str, Any], fixed: dict[str, Any]) -> None:
    for name, only in fixed.items():
        value = given.pop(name.replace("-", "_"), only)
        if value != only:
            raise QmpError(f"Parameter '{name}' does not accept value '{value}' (not built yet; there is '{only}')")


def _query_nodes(daemon: Daemon, flat: bool = False) -> list:
    with daemon.changing():
        return daemon.nodes.describe_all()


def _graph(daemon: Daemon) -> list:
    with daemon.changing():
        return daemon.nodes.graph.describe()


def _server_start(daemon: Daemon, addr: dict, max_connections: int | None = None) -> None:
    with daemon.changing():
        daemon.nodes.start_server(addr, max_connections)


def _server_stop(daemon: Daemon) -> None:
    with daemon.changing():
        daemon.nodes.stop_server()


# -- what a transaction may hold: each does its part, or puts a backup on the list, and returns how it is undone

def _do_add(daemon: Daemon, backups: list[Backup], **description: Any) -> None:
    daemon.nodes.add([description])


def _do_delete(daemon: Daemon, backups: list[Backup], node_name: str) -> None:
    daemon.nodes.remove(node_name)


def _do_export(daemon: Daemon, backups: list[Backup], type: str, id: str, node_name: str, **others: Any) -> Callable[[], None]:
    if type != "nbd":
        raise QmpError(f"Parameter 'type' does not accept value '{type}' (there is nbd)")
    _fixed(others, _EXPORT_FIXED)
    daemon.nodes.add_export(id, node_name, **others)
    return lambda: daemon.nodes.remove_export(id, "hard")


def _do_replace(daemon: Daemon, backups: list[Backup], parent: str, node: str, child: str | None = None,
                timeout: int | None = None) -> Callable[[], None] | None:
    daemon.nodes.live.within(timeout)
    return daemon.nodes.replace(parent, node, child)


def _do_reopen(daemon: Daemon, backups: list[Backup], options: list[dict[str, Any]]) -> Callable[[], None]:
    undo: list[Callable[[], None]] = []

    def undo_all() -> None:
        for step in reversed(undo):
            step()

    try:
        for description in options:
            undo.append(daemon.nodes.live.reopen(description))
    except BaseException:
        undo_all()
        raise
    return undo_all


def _do_backup(daemon: Daemon, backups: list[Backup], device: str, target: str, sync: str, **options: Any) -> None:
    _fixed(options, _BACKUP_FIXED)
    perf = options.pop("x_perf", {})
    for name, value in perf.items():
        if name not in ("use-copy-range", "max-workers", "max-chunk"):
            raise QmpError(f"Parameter 'x-perf.{name}' is unexpected")
        if name == "max-workers":
            options["workers"] = value
    if options.pop("discard_source", False):
        options["consume"] = True
    backups.append(daemon.nodes.backups.prepare(device, target, sync, **options))


_ADD = Command("blockdev-add", "open a node, and those described inside it", _do_add, (
    Argument("driver", "str", "the kind of the node", required=True),), open_ended=True)
_ACTIONS = Schema([
    _ADD,
    Command("blockdev-del", "close a node that nobody uses", _do_delete, (
        Argument("node-name", "str", "the node", required=True),)),
    Command("block-export-add", "serve a node over NBD, on every socket of the server", _do_export, (
        Argument("type", "str", "nbd", required=True),
        Argument("id", "str", "the export, for block-export-del", required=True),
        Argument("node-name", "str", "the node", required=True),
        Argument("name", "str", "the name for clients (default: the node's)"),
        Argument("writable", "bool", "clients may write (default false)"),
        Argument("description", "str", "what NBD_OPT_INFO tells"),
        Argument("bitmaps", "strings", "dirty bitmaps to export as qemu:dirty-bitmap:NAME; all are, these have to exist"),
        Argument("writethrough", "bool", "false"),
        Argument("allocation-depth", "bool", "false"))),
    Command("fastcbw-replace", "have an export, or a child of a node, be another node; clients stay", _do_replace, (
        Argument("parent", "str", "the export's id; with child, the node's name", required=True),
        Argument("node", "str", "the node", required=True),
        Argument("child", "str", "which child of the node: file, target"),
        Argument("timeout", "int", "milliseconds that clients' requests are held at most (default 2000)"))),
    Command("blockdev-reopen", "change options of nodes", _do_reopen, (
        Argument("options", "objects", "whole descriptions, as of blockdev-add; children that are left out stay", required=True),)),
    Command("blockdev-backup", "copy a node to another: a snapshot, or a live disk as it is now", _do_backup, (
        Argument("job-id", "str", "the job (default: the node's name)"),
        Argument("device", "str", "the node to copy", required=True),
        Argument("target", "str", "the node to write", required=True),
        Argument("sync", "str", "full, top; incremental, bitmap: only what a bitmap marks", required=True),
        Argument("speed", "int", "bytes per second at most; 0: no limit"),
        Argument("bitmap", "str", "the dirty bitmap that says what to copy"),
        Argument("bitmap-mode", "str", "what becomes of the bitmap: on-success, never, always"),
        Argument("compress", "bool", "false"),
        Argument("on-source-error", "str", "report"),
        Argument("on-target-error", "str", "report"),
        Argument("auto-finalize", "bool", "the job ends when its work is done (default true), else it is pending until job-finalize"),
        Argument("auto-dismiss", "bool", "the job is forgotten when it has ended (default true)"),
        Argument("discard-source", "bool", "drop from the snapshot what is copied (default false)"),
        Argument("x-perf", "object", "max-workers; use-copy-range and max-chunk are chosen here"))),
    *BITMAP_ACTIONS,
])


#: The property of a transaction that binds what it makes to the client's connection, and the actions that can be undone then.
_BIND = "fastcbw-bind-to-connection"
_UNDONE = ("blockdev-add", "block-export-add", "blockdev-backup", "fastcbw-replace", "block-dirty-bitmap-add")


def _transaction(daemon: Daemon, actions: list, properties: dict | None = None) -> None:
    given = {"completion-mode": "individual"} | (properties or {})
    mode = given.pop("completion-mode")
    if mode not in ("individual", "grouped"):
        raise QmpError(f"Parameter 'completion-mode' does not accept value '{mode}' (there is individual, grouped)")
    bound = given.pop(_BIND, False)
    if not isinstance(bound, bool):
        raise QmpError(f"Invalid parameter type for '{_BIND}', expected: boolean")
    for name in given:
        raise QmpError(f"Parameter 'properties.{name}' is unexpected (there is completion-mode, {_BIND})")
    client = current_client() if bound else None
    for action in actions if bound else ():
        if action.get("type") in _ACTIONS.commands and action["type"] not in _UNDONE:
            raise QmpError(f"Parameter '{_BIND}': '{action['type']}' can't be undone when the client has gone (there is {', '.join(_UNDONE)})")
        if action.get("type") == "fastcbw-replace" and isinstance(action.get("data"), dict) and "child" in action["data"]:
            raise QmpError(f"Parameter '{_BIND}': 'fastcbw-replace' of a child can't be undone when the client has gone (of an export it can)")
    transaction_of(daemon, actions, grouped=mode == "grouped", client=client)


def transaction_of(daemon: Daemon, actions: list[dict[str, Any]], *, grouped: bool = False, client: Client | None = None) -> None:
    """Do ACTIONS, objects with type and data, as one. QmpError for one that is wrong; fastcbw.Error, OSError of what fails.

    grouped: jobs that they start complete together or not at all. client: what is made ends with its connection.
    """
    steps = []
    described = []      # nodes come first and together, so that they may name each other in any order
    for action in actions:
        if set(action) - {"type", "data"} or not isinstance(action.get("type"), str):
            raise QmpError("Parameter 'actions' expects objects with 'type' and 'data'")
        try:
            command = _ACTIONS.find(action["type"])
        except QmpError:
            raise QmpError(f"Parameter 'type' does not accept value '{action['type']}' "
                           f"(there is {', '.join(sorted(_ACTIONS.commands))})") from None
        given = command.check(action.get("data", {}))
        if command is _ADD:
            described.append(given)
        else:
            steps.append(lambda backups, command=command, given=given: command.run(daemon, backups, **given))
    with daemon.changing():
        run = [lambda backups: daemon.nodes.add(described), *steps]
        if client is None:
            daemon.nodes.run(run, grouped=grouped)
            return
        with daemon.bound.noting(client) as jobs:
            jobs += daemon.nodes.run(run, grouped=grouped)


def _alone(command: Command) -> Command:
    """COMMAND as one that is sent by itself: a transaction of one action."""

    def run(daemon: Daemon, **given: Any) -> None:
        with daemon.changing():
            daemon.nodes.run([lambda backups: command.run(daemon, backups, **given)])

    return Command(command.name, command.doc, run, command.arguments, open_ended=command.open_ended)


def _export_del(daemon: Daemon, id: str, mode: str = "safe") -> None:
    with daemon.changing():
        daemon.nodes.remove_export(id, mode)


def _commit(daemon: Daemon, device: str, **options: Any) -> None:
    _fixed(options, {"on-error": "report"})
    with daemon.changing():
        daemon.nodes.commits.start(device, **options)


COMMANDS = (
    *(_alone(command) for command in _ACTIONS.commands.values()),
    Command("block-export-del", "end an export", _export_del, (
        Argument("id", "str", "the export", required=True),
        Argument("mode", "str", "safe: only without clients (default); hard: disconnect them"))),
    Command("block-commit", "copy what an overlay has of its own into its backing file, and keep up with its guest until job-complete", _commit, (
        Argument("job-id", "str", "the job (default: the node's name)"),
        Argument("device", "str", "the overlay", required=True),
        Argument("base-node", "str", "the node of its backing file, a raw image (default: whichever shows it)"),
        Argument("base", "str", "the path of the backing file"),
        Argument("top-node", "str", "the overlay: only the active layer is committed"),
        Argument("top", "str", "the path of the overlay"),
        Argument("speed", "int", "bytes per second at most; 0: no limit"),
        Argument("on-error", "str", "report"),
        Argument("auto-finalize", "bool", "the job ends when its work is done (default true), else it is pending until job-finalize"),
        Argument("auto-dismiss", "bool", "the job is forgotten when it has ended (default true)"))),
    Command("transaction", "several changes as one: all or none", _transaction, (
        Argument("actions", "objects", "objects with type and data", required=True),
        Argument("properties", "object", "completion-mode: individual (default), grouped: the jobs complete together or not at all; "
                 f"{_BIND}: what it makes is undone when this connection ends"))),
    Command("query-named-block-nodes", "all nodes", _query_nodes, (
        Argument("flat", "bool", "without what is below them; it never is there"),), paged=True),
    Command("fastcbw-graph", "all nodes with children, roles and permissions, children first", _graph, paged=True),
    Command("nbd-server-start", "listen on one more socket", _server_start, (
        Argument("addr", "object", "a unix or inet address", required=True),
        Argument("max-connections", "int", "0: the server's own limit"))),
    Command("nbd-server-stop", "close that socket; its clients stay", _server_stop),
)
