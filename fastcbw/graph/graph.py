"""The graph: nodes by name, added and removed all or nothing, permissions checked before anything is seen to change.

A description is a dict as blockdev-add takes it; children are names of nodes or descriptions in place. Several are
opened as one: they may name each other in any order, and when one fails, those before it are closed again. All methods
are the control plane's and O(nodes); the caller serialises them (the daemon's lock).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastcbw.cbw.options import check_name
from fastcbw.disk import Disk
from fastcbw.errors import Error
from fastcbw.graph import permissions
from fastcbw.graph.kinds import KINDS
from fastcbw.graph.kinds.served import SERVED
from fastcbw.graph.live import HOLD_SECONDS
from fastcbw.graph.node import Edge, Node, User
from fastcbw.graph.options import check_options
from fastcbw.graph.permissions import Needs, Permission

NODES_LIMIT = 1024
DEPTH_LIMIT = 64


class Graph:
    """All nodes of one process. Nothing is open at first; close() closes what is left."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self._undo: list[Callable[[], None]] | None = None      # of the transaction under way
        self._leaving: list[Node] = []                          # to be closed when it commits
        self._settled = False                                   # they have been asked whether they can go

    # -- nodes

    def find(self, name: str) -> Node:
        """Return the node NAME."""
        try:
            return self.nodes[name]
        except KeyError:
            raise Error(f"Cannot find device='' nor node-name='{name}'") from None

    def add(self, descriptions: Iterable[Mapping[str, Any]]) -> list[Node]:
        """Open all the nodes that DESCRIPTIONS describe, or none; return those that were asked for by name.

        Error for a driver, option or name that is wrong, a cycle, a conflict of permissions; OSError, ImageLocked and what
        else the kinds raise. Nothing is left open then.
        """
        planned: dict[str, tuple[Node, dict[str, str]]] = {}
        asked = [self._plan(description, planned, None, 0) for description in descriptions]
        opened: list[Node] = []
        try:
            for name in _in_order(planned, self.nodes):
                node, names = planned[name]
                self._open(node, names)
                opened.append(node)
            self._refresh()
        except BaseException:
            self._close_all(opened)
            raise
        self._on_undo(lambda: self._close_all(opened))
        return asked

    def _close_all(self, opened: list[Node]) -> None:
        for node in reversed(opened):
            if self.nodes.get(node.name) is node:
                self._close(node)
        self._refresh()

    def adopt(self, disk: Disk) -> Node:
        """Make a node of DISK, which stays the caller's. Error when the name is taken."""
        if disk.name in self.nodes:
            raise Error(f"Duplicate nodes with node-name='{disk.name}'")
        node = Node(disk.name, SERVED, {}, False, disk.device, base=disk)
        self.nodes[disk.name] = node
        return node

    def remove(self, name: str) -> None:
        """Close the node NAME and what was written inside it. Error when it is used, or belongs to another node."""
        node = self.nodes.get(name)
        if node is None:
            raise Error(f"Failed to find node with node-name='{name}'")
        if not node.owned:
            raise Error(f"Node {name} is not owned by the monitor")
        if self._undo is not None:
            self._leaving.append(node)
            return
        self._check_unused(node, [])
        self._settle(self._going([node]))
        self._close(node)
        self._refresh()

    @staticmethod
    def _check_unused(node: Node, leaving: list[Node]) -> None:
        users = ", ".join(edge.label for edge in node.parents if edge.parent not in leaving)
        if users:
            raise Error(f"Node {node.name} is in use: by {users} (remove that first)")
        theirs = {other.name for other in leaving}
        kept = [name for name in (node.base.snapshots if node.base is not None else ()) if name not in theirs]
        if kept:
            raise Error(f"Node {node.name} is in use: its disk has the snapshot {', '.join(kept)} (delete that first)")

    # -- several changes as one

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make the changes of the block as one: permissions are checked at its end, and an error in it undoes all of them."""
        assert self._undo is None, "one transaction at a time"
        self._undo, self._leaving, self._settled = [], [], False
        try:
            yield
            undo, leaving = self._undo, self._leaving
            self._undo = None
            self._check_leaving(leaving)
            self.settle_leaving()
        except BaseException:
            undo = self._undo if self._undo is not None else undo
            self._undo = []             # checks are put off until all is as it was
            try:
                for step in reversed(undo):
                    step()
            finally:
                self._undo = None
                self._refresh()
            raise
        for node in leaving:
            self._close(node)
        self._refresh()

    def to_settle(self) -> list[Node]:
        """Within a transaction: the nodes that settle_leaving() asks."""
        return self._going(self._leaving)

    def _going(self, leaving: Iterable[Node]) -> list[Node]:
        """LEAVING and what was described inside them, and so goes with them: parents before children."""
        going = list(leaving)
        for node in going:      # it grows
            going += {edge.child: None for edge in node.children.values() if not edge.child.owned and edge.child not in going
                      and all(above.parent in going for above in edge.child.parents)}
        return [node for node in from_the_top(self.nodes.values()) if node in going]

    def settle_leaving(self) -> None:
        """Within a transaction, once it can't fail otherwise: have what is to go do what may fail before."""
        if not self._settled:
            self._settle(self.to_settle())
            self._settled = True

    @staticmethod
    def _settle(going: list[Node]) -> None:
        for node in going:
            node.kind.check_leave(node, going)
        for node in going:
            node.kind.settle(node)

    def _check_leaving(self, leaving: list[Node]) -> None:
        """Check the graph as it will be without LEAVING; nothing is closed."""
        for node in leaving:
            self._check_unused(node, leaving)
        edges = [edge for node in leaving for edge in node.children.values()]
        before = {edge.child: list(edge.child.parents) for edge in edges}
        for edge in edges:
            edge.child.parents.remove(edge)
        try:
            self._refresh()
        finally:
            for child, parents in before.items():
                child.parents[:] = parents

    def _on_undo(self, step: Callable[[], None]) -> None:
        if self._undo is not None:
            self._undo.append(step)

    def _plan(self, description: Mapping[str, Any], planned: dict[str, tuple[Node, dict[str, str]]], place: str | None, depth: int) -> Node:
        """Check one description, and those inside it; nothing is opened. PLACE: PARENT.CHILD of what is written inside another, else None."""
        if not isinstance(description, Mapping):
            raise Error(f"Invalid parameter type for a node, expected: object, got {type(description).__name__}")
        if depth > DEPTH_LIMIT or len(planned) + len(self.nodes) >= NODES_LIMIT:
            raise Error(f"the graph is too large: at most {NODES_LIMIT} nodes, {DEPTH_LIMIT} deep")
        driver = description.get("driver")
        if driver is None:
            raise Error("Parameter 'driver' is missing")
        kind = KINDS.get(driver) if isinstance(driver, str) else None
        if kind is None:
            raise Error(f"Parameter 'driver' does not accept value '{driver}' (there is {', '.join(sorted(KINDS))})")
        options = check_options(driver, kind.options, tuple(kind.children), description)
        name = options.get("node-name")
        if name is None:
            if place is None:
                raise Error("'node-name' must be specified for the root node")
            name = self._free_name(place, planned)
        try:
            check_name(name, "node-name")
        except ValueError as error:
            raise Error(f"Invalid node-name: '{name}' ({error})") from None
        if name in self.nodes or name in planned:
            raise Error(f"Duplicate nodes with node-name='{name}'")
        node = Node(name, kind, options, place is None)
        names: dict[str, str] = {}
        planned[name] = node, names
        for child in kind.children:
            below = description[child]
            if isinstance(below, str):
                names[child] = below
            elif isinstance(below, Mapping):
                names[child] = self._plan(below, planned, f"{name}.{child}", depth + 1).name
            else:
                raise Error(f"Invalid parameter type for '{child}', expected: a node-name or an object")
        return node

    def _free_name(self, place: str, planned: Mapping[str, object]) -> str:
        """PLACE, with a number behind it where another node has that name."""
        name, number = place, 1
        while name in self.nodes or name in planned:
            number += 1
            name = f"{place}-{number}"
        return name

    def _open(self, node: Node, names: Mapping[str, str]) -> None:
        for name, below in names.items():
            child = self.nodes[below]
            edge = Edge(node, child, name, node.kind.children[name])
            node.children[name] = edge
            child.parents.append(edge)
        try:
            self._refresh()         # a conflict is found before the kind's open() does anything
            node.kind.open(node)
        except BaseException:
            self._unlink(node)
            raise
        self.nodes[node.name] = node

    def _close(self, node: Node) -> None:
        self.nodes.pop(node.name, None)
        try:
            if node.base is not None and node.kind is not SERVED:
                node.base.close()
            node.kind.close(node)
        finally:
            inside = [edge.child for edge in node.children.values() if not edge.child.owned]
            self._unlink(node)
            for child in inside:
                if not child.parents:
                    self._close(child)

    @staticmethod
    def _unlink(node: Node) -> None:
        for edge in node.children.values():
            edge.child.parents.remove(edge)
        node.children.clear()

    def close(self, keep: Collection[Node] = ()) -> None:
        """Close every node, parents before children; the first error is raised after all were tried. KEEP: nodes that somebody still uses,
        with all that is below them: they are left open, for the end of the process."""
        first: Exception | None = None
        while self.nodes:
            node = next(node for node in self.nodes.values() if not any(isinstance(edge.parent, Node) for edge in node.parents))
            if node in keep:
                del self.nodes[node.name]
                self._unlink(node)
                if node.base is not None:
                    node.base.leave_open()
                continue
            try:
                self._close(node)
            except Exception as error:
                first = first or error
        if first is not None:
            raise first

    # -- those who use nodes

    def attach(self, label: str, uses: Iterable[tuple[Node, str, str, Needs]], *, guarded: Node | None = None,
               beside: Node | None = None) -> User:
        """Let a parent that is no node use nodes: (node, name, role, needs) each. Error on a conflict; then nothing changed.

        guarded: one of them that is live, and below which nobody may write but through it. beside: a node whose store, in place, is the target.
        """
        user = User(label)
        for node, name, role, needs in uses:
            node.parents.append(Edge(user, node, name, role, needs, guards=node is guarded, beside=beside if role == "target" else None))
        try:
            self._refresh()
        except Error:
            self.detach(user)
            raise
        self._on_undo(lambda: self.detach(user))
        try:
            for node, _, _, needs in uses:
                if needs.taken & Permission.WRITE:
                    self.forget_discards_above(node)
        except BaseException:
            self.detach(user)
            raise
        return user

    def forget_discards_above(self, node: Node) -> None:
        """Forget what guests above NODE, whose engines are others, have discarded and a snapshot that has ended kept waiting: somebody is
        about to write there past them. TimeoutError when some is being carried out, and does not end in time."""
        for other in list(self.nodes.values()):
            if other.base is not None and other.bottom is not node.bottom and node.bottom in below(other):
                other.base._engine.forget_discards(HOLD_SECONDS)

    def check_undisturbed(self, node: Node) -> None:
        """Error when somebody writes below NODE past it: a snapshot of what it shows would not be of one moment."""
        above = node.bottom
        while above.kind.children and (edge := above.filtered):
            for other in edge.child.parents:
                if other is not edge and other.needs.taken & Permission.WRITE:
                    raise Error(f"{other.label} writes node '{edge.child.name}' as '{other.name}', below node '{node.name}' and past it: a snapshot "
                                f"of that would show it (take one of '{edge.child.name}')")
            above = edge.child

    def detach(self, user: User) -> None:
        """Undo attach(). Twice is no error."""
        for node in self.nodes.values():
            node.parents = [edge for edge in node.parents if edge.parent is not user]
        self._refresh()

    def move(self, user: User, node: Node) -> None:
        """Have USER's edges to NODE's bottom end at NODE, or at another node of the same bottom: nothing is copied or paused.

        Error when nothing of USER has that bottom, or on a conflict; then nothing has changed.
        """
        moved = [edge for other in self.nodes.values() for edge in other.parents if edge.parent is user and other.bottom is node.bottom]
        if not moved:
            raise Error(f"{user.label} uses nothing that node '{node.name}' shows (replace within one disk)")
        before = [edge.child for edge in moved]
        self._move(moved, [node] * len(moved))
        try:
            self._refresh()
        except Error:
            self._move(moved, before)
            self._refresh()
            raise
        self._on_undo(lambda: self._move(moved, before))

    def change_needs(self, edge: Edge, needs: Needs) -> None:
        """Within a transaction: have EDGE, of a parent that is no node, need NEEDS."""
        before, edge.needs = edge.needs, needs
        self._on_undo(lambda: setattr(edge, "needs", before))

    def redirect(self, edge: Edge, node: Node) -> None:
        """Have EDGE end at NODE; what its parent reads and writes is the caller's to change (live.py). Error: nothing has changed.

        A child that was described inside the parent goes with the change.
        """
        if isinstance(edge.parent, Node) and edge.parent in below(node):
            raise Error(f"node '{edge.parent.name}' would be below itself, by way of node '{node.name}' (a graph has no cycles)")
        before, place = edge.child, edge.child.parents.index(edge)

        def move_back() -> None:
            self._move([edge], [before])
            before.parents.insert(place, before.parents.pop())

        self._move([edge], [node])
        try:
            self._refresh()
        except Error:
            move_back()
            self._refresh()
            raise
        self._on_undo(move_back)
        if self._undo is not None and not before.owned and not before.parents:
            self._leaving.append(before)

    @staticmethod
    def _move(edges: list[Edge], children: list[Node]) -> None:
        for edge, child in zip(edges, children):
            edge.child.parents.remove(edge)
            edge.child = child
            child.parents.append(edge)

    # -- permissions

    def check(self) -> None:
        """Within a transaction: check the permissions as they are now. Error on a conflict."""
        undo, self._undo = self._undo, None
        try:
            self._check_leaving(self._leaving)
        finally:
            self._undo = undo

    def _refresh(self) -> None:
        """Work out every edge's needs from the top down and check every node; Error leaves the needs as they were."""
        if self._undo is not None:
            return                      # at the end of the transaction
        fresh: dict[Edge, Needs] = {}
        guarded: set[Node] = set()
        for node in from_the_top(self.nodes.values()):
            known = [(edge, fresh.get(edge, edge.needs)) for edge in node.parents]
            permissions.check(node.name, known)
            taken, shared = Permission.NONE, Permission.ALL
            for _, needs in known:
                taken |= needs.taken
                shared &= needs.shared
            if node.committed_to is not None and taken & (Permission.CONSISTENT_READ | Permission.WRITE):
                node.check_content()
            if taken & Permission.WRITE and node.options.get("read-only"):
                raise Error(f"node '{node.name}' is read-only: {known[0][0].label} needs 'write' on it")
            if any(edge.guards for edge in node.parents) or self._has_others_snapshots(node):
                guarded.add(node)
            for edge in node.children.values():
                needs = node.kind.needs(node, edge.name, Needs(taken, shared))
                if node in guarded and edge.role == "filtered":
                    needs = Needs(needs.taken, needs.shared & ~(Permission.WRITE | Permission.RESIZE))
                    guarded.add(edge.child)
                fresh[edge] = needs
        for edge, needs in fresh.items():
            edge.needs = needs

    def _has_others_snapshots(self, node: Node) -> bool:
        """Whether the disk of NODE has snapshots that are no node's, which would have edges of its own."""
        if node.base is None or not node.base.snapshots:
            return False
        nodes = [other.snapshot for other in self.nodes.values()]
        return any(snapshot not in nodes for snapshot in node.base.snapshots.values())

    def describe(self) -> list[dict[str, Any]]:
        """Return every node, children before parents, ready for JSON."""
        return [node.describe() for node in reversed(list(from_the_top(self.nodes.values())))]


def _in_order(planned: Mapping[str, tuple[Node, dict[str, str]]], existing: Mapping[str, Node]) -> list[str]:
    """Names of PLANNED, children first. Error for a name that exists nowhere, and for a cycle."""
    order: list[str] = []
    state: dict[str, int] = {}      # 1: being visited, 2: in the order

    def visit(name: str, parent: str) -> None:
        if state.get(name) == 1:
            raise Error(f"node '{name}' is below itself, by way of node '{parent}' (a graph has no cycles)")
        if name in state or name in existing:
            return
        if name not in planned:
            raise Error(f"Cannot find device='' nor node-name='{name}'")
        state[name] = 1
        for child in planned[name][1].values():
            visit(child, name)
        state[name] = 2
        order.append(name)

    for name in planned:
        visit(name, name)
    return order


def below(node: Node) -> set[Node]:
    """NODE and all that is below it."""
    found, todo = set(), [node]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += [edge.child for edge in node.children.values()]
    return found


def from_the_top(nodes: Iterable[Node]) -> list[Node]:
    """Nodes, each after all that are above it; those that are just being opened (above NODES, in no table yet) included."""
    order: list[Node] = []
    seen: set[Node] = set()

    def visit(node: Node) -> None:
        if node in seen:
            return
        seen.add(node)
        for edge in node.parents:
            if isinstance(edge.parent, Node):
                visit(edge.parent)
        order.append(node)

    for node in nodes:
        visit(node)
    return order
