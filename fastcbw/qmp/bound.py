"""What clients asked to be bound to their connections, and its undoing when one ends.

A transaction with the property `fastcbw-bind-to-connection` is noted here with all that it made: jobs, exports, nodes, bitmaps, and
exports that it moved. When the client's connection ends, however it ends, jobs are cancelled, exports closed with their
clients, and then, as one transaction of the graph, moved exports go back and nodes go. What somebody else has come to use
stays, and status() names it, the client, and why. Things are known by identity: a node that was removed and made again by
somebody else under the same name is theirs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastcbw.errors import Error
from fastcbw.qmp.clients import Client

if TYPE_CHECKING:
    from fastcbw.graph.node import Node
    from fastcbw.qmp.daemon import Daemon
    from fastcbw.qmp.jobs import JobRecord

log = logging.getLogger("fastcbw.qmp")

#: Of what is left over so many are named in the event; all are in the status.
TOLD = 32
POLL_SECONDS = 0.2


@dataclass
class Made:
    """All that the bound transactions of one client made, oldest first."""

    client: Client
    connected: bool = True
    jobs: list[JobRecord] = field(default_factory=list)
    exports: list[Any] = field(default_factory=list)
    moves: list[tuple[Any, Node, Node]] = field(default_factory=list)       # export, from, to
    nodes: list[Node] = field(default_factory=list)
    bitmaps: list[Any] = field(default_factory=list)
    why: dict[int, str] = field(default_factory=dict)                       # id of what is left over -> the reason


class Bound:
    """The bound things of DAEMON, by client."""

    def __init__(self, daemon: Daemon):
        self.daemon = daemon
        self._made: dict[int, Made] = {}

    # -- noting

    @contextmanager
    def noting(self, client: Client) -> Iterator[list[JobRecord]]:
        """Bind to CLIENT what the block makes, when it succeeds; it puts the jobs that it starts on the list. Change lock held."""
        graph, exports = self.daemon.nodes.graph, self.daemon.nodes.all_exports()
        before = set(graph.nodes.values()), {id(export): export.node for export in exports}, self._bitmaps()
        jobs: list[JobRecord] = []
        yield jobs
        made = self._made.setdefault(client.number, Made(client))
        made.jobs += jobs
        for export in self.daemon.nodes.all_exports():
            was = before[1].get(id(export))
            if was is None:
                made.exports.append(export)
            elif was is not export.node:
                made.moves.append((export, was, export.node))
        made.nodes += [node for node in graph.nodes.values() if node not in before[0] and node.owned]
        made.bitmaps += [bitmap for key, bitmap in self._bitmaps().items() if key not in before[2]]

    def _bitmaps(self) -> dict[int, Any]:
        disks = [node.base for node in self.daemon.nodes.graph.nodes.values() if node.base is not None]
        return {id(bitmap): bitmap for disk in disks for bitmap in disk.bitmaps.values()}

    # -- undoing

    def client_gone(self, client: Client) -> None:
        """Undo what is bound to CLIENT. In a thread of its own; without the change lock, since jobs need it to end."""
        with self.daemon.changing():
            made = self._made.get(client.number)
        if made is None:
            return
        made.connected = False
        for record in made.jobs:
            self._end_job(record)
        with self.daemon.changing():
            exports = self.daemon.nodes.exports
            for export in reversed(made.exports):
                if exports.get(export.id) is export:
                    self._try(made, export, lambda export=export: self.daemon.nodes.remove_export(export.id, "hard"))
            for bitmap in made.bitmaps:
                if self._lives(bitmap):
                    self._try(made, bitmap, bitmap.remove)
            self._undo_graph(made)
            left = self._describe_left(made)
            if not left:
                del self._made[client.number]
        log.info("qmp: client %d has gone; what was bound to it was undone, %d left over", client.number, len(left))
        self.daemon.emit("FASTCBW_CLIENT_UNDONE", client.describe() | {"left-over": left[:TOLD], "left-over-count": len(left)})

    def _end_job(self, record: JobRecord) -> None:
        try:
            record.job.cancel()
            self.daemon.jobs.cancel(record.id)
        except Error:
            pass            # it has ended
        while record.thread.is_alive() and not self.daemon.is_closing:      # which bounds it itself
            record.thread.join(POLL_SECONDS)
        try:
            if self.daemon.jobs.find(record.id) is record:
                self.daemon.jobs.dismiss(record.id)
        except Error:
            pass            # it is forgotten

    def _undo_graph(self, made: Made) -> None:
        """Moves and nodes as one, since apart they may conflict; where that can't be, as many of them as can."""
        moves = [move for move in reversed(made.moves) if self._is_moved(*move)]
        steps = [*(lambda jobs, move=move: self.daemon.nodes.replace(move[0].id, move[1].name) for move in moves),
                 *(lambda jobs, node=node: self.daemon.nodes.remove(node.name) for node in reversed(made.nodes) if self._lives(node))]
        try:
            self.daemon.nodes.run(steps)
            return
        except (Error, OSError):
            pass
        for export, before, _ in moves:
            self._try(made, export, lambda export=export, before=before: self.daemon.nodes.replace(export.id, before.name))
        for node in reversed(made.nodes):
            if self._lives(node):
                self._try(made, node, lambda node=node: self.daemon.nodes.remove(node.name))

    def _is_moved(self, export: Any, before: Node, after: Node) -> bool:
        return any(export is other for other in self.daemon.nodes.all_exports()) and export.node is after and self._lives(before)

    def _lives(self, thing: Any) -> bool:
        return thing in self.daemon.nodes.graph.nodes.values() or id(thing) in self._bitmaps()

    @staticmethod
    def _try(made: Made, thing: Any, undo: Callable[[], None]) -> None:
        try:
            undo()
        except (Error, OSError) as error:
            made.why[id(thing)] = str(error)

    # -- telling

    def describe(self) -> list[dict[str, Any]]:
        """Return, for each client with bound things: client, pid, command, connected, and what it holds, or what is left over of it.

        Change lock held.
        """
        described = []
        for made in list(self._made.values()):
            things = self._describe_left(made)
            if things:
                described.append(made.client.describe() | {"connected": made.connected, "holds" if made.connected else "left-over": things})
            elif not made.connected:
                del self._made[made.client.number]
        return described

    def _describe_left(self, made: Made) -> list[dict[str, str]]:
        exports = self.daemon.nodes.all_exports()
        rows = [(record, f"job '{record.id}'") for record in made.jobs if any(record is other for other in self.daemon.jobs.all())]
        rows += [(export, f"export '{export.id}'") for export in made.exports if any(export is other for other in exports)]
        rows += [(move[0], f"export '{move[0].id}' at node '{move[2].name}'") for move in made.moves if self._is_moved(*move)]
        rows += [(node, f"node '{node.name}'") for node in made.nodes if self._lives(node)]
        rows += [(bitmap, f"bitmap '{bitmap.name}'") for bitmap in made.bitmaps if self._lives(bitmap)]
        return [{"what": words} | ({"why": made.why[id(thing)]} if id(thing) in made.why else {}) for thing, words in rows]
