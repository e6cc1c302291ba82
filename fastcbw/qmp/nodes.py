"""The daemon's graph and what hangs on it: exports by id, jobs of nodes (backups.py), transactions.

Names, arguments, defaults and texts are those of QEMU's storage daemon; docs/qmp.md lists the differences.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from fastcbw.block.switch import SwitchDevice
from fastcbw.disk import Disk
from fastcbw.errors import Error
from fastcbw.export.nbd.dirty import PREFIX
from fastcbw.export.nbd.listen import listen_tcp, listen_unix
from fastcbw.graph.graph import Graph, below
from fastcbw.graph.node import Node, User
from fastcbw.graph.permissions import GUEST, READER
from fastcbw.qmp.backups import Backup, Backups
from fastcbw.qmp.commits import Commits
from fastcbw.qmp.live import Live
from fastcbw.qmp.loops import check_targets

if TYPE_CHECKING:
    from fastcbw.qmp.daemon import Daemon
    from fastcbw.qmp.jobs import JobRecord


class NodeExport:
    """One export made by block-export-add."""

    def __init__(self, id: str, name: str, node: Node, user: User, switch: SwitchDevice | None = None):
        self.id, self.name, self.node, self.user = id, name, node, user
        self.switch = switch        # of a live disk: where its clients' requests are sent to another node


class Nodes:
    """The graph of DAEMON. Methods are called with the daemon's change lock held."""

    def __init__(self, daemon: Daemon):
        self.daemon = daemon
        self.graph = Graph()
        self.backups = Backups(daemon, self.graph)
        self.commits = Commits(daemon, self.graph)
        self.live = Live(self.graph)
        self.exports: dict[str, NodeExport] = {}        # made by block-export-add, by id
        self._served: dict[str, NodeExport] = {}        # of the disks that the daemon serves by itself, by name
        self._listening: str | None = None

    def adopt(self, disk: Disk) -> None:
        """Make the node of a disk that the daemon serves by itself, with its export as a parent."""
        node = self.graph.adopt(disk)
        user = self.graph.attach(f"export '{disk.name}'", [(node, "root", "source", READER if disk.read_only else GUEST)])
        self._served[disk.name] = NodeExport(disk.name, disk.name, node, user)

    def all_exports(self) -> list[NodeExport]:
        """Return those that clients made and those that the daemon serves by itself."""
        return [*self._served.values(), *self.exports.values()]

    # -- nodes

    def add(self, descriptions: list[dict[str, Any]]) -> None:
        self.graph.add(descriptions)

    def remove(self, name: str) -> None:
        self.graph.remove(name)

    def describe_all(self) -> list[dict[str, Any]]:
        """Return the members of query-named-block-nodes that have a meaning here."""
        described = []
        for node in self.graph.nodes.values():
            image = {"filename": node.options.get("filename", node.device.name), "format": node.kind.driver,
                     "virtual-size": node.device.length, "dirty-flag": False}
            described.append({
                "node-name": node.name, "drv": node.kind.driver, "ro": node.read_only, "file": image["filename"],
                "encrypted": False, "detect_zeroes": "off", "backing_file_depth": 0, "active": True, "write_threshold": 0,
                "cache": {"writeback": True, "direct": bool(node.options.get("cache", {}).get("direct")), "no-flush": False},
                **({} if node.base is None else {"dirty-bitmaps": node.base._engine.bitmaps.report()}),
                "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0, "image": image,
            })
        return described

    # -- the second listener

    def start_server(self, address: dict[str, Any], connections: int | None) -> None:
        if self.daemon.nbd is None:
            raise Error("NBD server not running (fastcbw serve was given no socket)")
        if self._listening is not None:
            raise Error("NBD server already running")
        kind, data = address.get("type"), address.get("data")
        if kind not in ("unix", "inet") or not isinstance(data, dict):
            raise Error("Parameter 'addr' expects {'type': 'unix' or 'inet', 'data': {…}}")
        wanted = ("path",) if kind == "unix" else ("host", "port")
        for name in wanted:
            if not isinstance(data.get(name), str):
                raise Error(f"Parameter 'addr.data.{name}' is missing")
        if set(data) - set(wanted):
            raise Error(f"Parameter 'addr.data.{sorted(set(data) - set(wanted))[0]}' is unexpected")
        if connections not in (None, 0):
            raise Error("max-connections: the limit is the server's, for all its sockets (leave it out)")
        if kind == "unix":
            listener = listen_unix(data["path"])
        else:
            if not data["port"].isdigit() or int(data["port"]) > 65535:
                raise Error(f"address resolution failed for port '{data['port']}': expected a number to 65535")
            listener = listen_tcp(int(data["port"]), data["host"])
        self._listening = self.daemon.nbd.listen(listener)

    def stop_server(self) -> None:
        if self._listening is None:
            raise Error("NBD server not running")
        self.daemon.nbd.stop_listening(self._listening)
        self._listening = None

    # -- exports

    def add_export(self, id: str, node_name: str, *, name: str | None = None, writable: bool = False, description: str = "",
                   bitmaps: Sequence[str] = ()) -> None:
        """BITMAPS have to exist; every bitmap of the disk is offered, these and the others."""
        if self.daemon.nbd is None:
            raise Error("NBD server not running")
        if id in self.exports or id in self._served:
            raise Error(f"Block export id '{id}' is already in use")
        node = self.graph.find(node_name)
        name = node.name if name is None else name
        if name in self.daemon.nbd.exports:
            raise Error(f"NBD server already has export named '{name}'")
        if writable and (node.read_only or not node.kind.live):
            raise Error(f"Block node is read-only: node '{node.name}'")
        offered = (node.disk() if node.kind.live else node.snapshot).contexts() if bitmaps else {}
        for bitmap in bitmaps:
            if PREFIX + bitmap not in offered:
                raise Error(f"Bitmap '{bitmap}' is not found")
        user = self.graph.attach(f"export '{id}'", [(node, "root", "source", GUEST if writable else READER)])
        snapshot = node.snapshot
        export = NodeExport(id, name, node, user, SwitchDevice(node.guest(), name=node.name) if node.kind.live else None)
        hooks = {"contexts": lambda: export.node.disk().contexts()} if node.kind.live else {
            "contexts": snapshot.contexts, "on_connect": snapshot.hold, "on_disconnect": snapshot.release}
        try:
            self.daemon.nbd.add_export(name, export.switch or node.guest(), read_only=not writable, description=description,
                                       background=not node.kind.live, **hooks)
        except BaseException:
            self.graph.detach(user)
            raise
        self.exports[id] = export

    def remove_export(self, id: str, mode: str = "safe") -> None:
        if mode not in ("safe", "hard"):
            raise Error(f"Parameter 'mode' does not accept value '{mode}' (there is safe, hard)")
        export = self.exports.get(id)
        if export is None:
            raise Error(f"Export '{id}' is not found")
        try:
            self.daemon.nbd.remove_export(export.name, force=mode == "hard")
        except Error as error:
            raise Error(f"export '{id}' still in use ({error})") from None
        del self.exports[id]
        self.graph.detach(export.user)
        self.daemon.emit("BLOCK_EXPORT_DELETED", {"id": id})

    def replace(self, parent: str, node_name: str, child: str | None = None) -> Callable[[], None] | None:
        """Have an export, or the CHILD of the node PARENT, be another node; clients stay. Return what a transaction undoes it by."""
        node = self.graph.find(node_name)
        if child is not None:
            self.live.replace_child(parent, child, node)
            return None
        export = self.exports.get(parent) or self._served.get(parent)
        if export is None:
            raise Error(f"export '{parent}': not found (exports by id: {', '.join([*self._served, *self.exports]) or 'none'})")
        if not node.kind.live:
            raise Error(f"node '{node.name}': shows a snapshot, no live disk (name a node of the disk itself)")
        return self.live.replace_root(export, node)

    # -- transactions

    def run(self, actions: list[Callable[[list[Backup]], Callable[[], None] | None]], *, grouped: bool = False) -> list[JobRecord]:
        """Do ACTIONS as one: each appends to the list what is to start at the end, and returns how it is undone. Return the jobs.

        grouped: the jobs complete together or not at all.
        """
        backups: list[Backup] = []
        undo: list[Callable[[], None]] = []
        with self.graph.transaction(), self.live.collecting():
            try:
                for action in actions:
                    step = action(backups)
                    if step is not None:
                        undo.append(step)
                self.graph.check()
                check_targets(self)
                self.live.check_use([*((node, f"node '{node.name}', which goes") for node in self.graph.to_settle() if node.kind.settles),
                                     *((node, f"job '{backup.id}'") for backup in backups for node in (backup.source, backup.target))])
                with self.live.carried_out():
                    self.graph.settle_leaving()
                    return self.backups.start(backups, grouped=grouped)
            except BaseException:
                for backup in backups:
                    self.daemon.jobs.give_back(backup.id)
                for step in reversed(undo):
                    step()
                raise

    def let_go(self) -> None:
        """Let whoever waits in a node on purpose, a throttle say, go on: jobs could not end otherwise."""
        for node in self.graph.nodes.values():
            node.kind.let_go(node)

    def give_up(self, name: str) -> None:
        """End what the devices of the node NAME, and below it, do not answer: the process is about to end."""
        if name in self.graph.nodes:
            for node in below(self.graph.nodes[name]):
                node.kind.give_up(node)

    def close(self, left: Collection[JobRecord] = ()) -> None:
        """Close every node; exports and jobs have ended, but those of LEFT, whose nodes stay open."""
        self.exports.clear()
        named = [self.graph.nodes[name] for record in left for name in (record.disk, record.target) if name in self.graph.nodes]
        keep = {other for node in named for other in below(node)}
        for node in self.graph.nodes.values():
            node.parents = [edge for edge in node.parents if not isinstance(edge.parent, User)]
        self.graph.close(keep)
