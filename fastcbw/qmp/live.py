"""Live editing of a daemon's graph: another node for an export or for a child (fastcbw-replace), other options (blockdev-reopen).

Within one run of actions the graph's edges move first, so that permissions are checked as the graph will be; the devices are changed at
the end, all as one (graph/live.py), or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fastcbw.errors import Error
from fastcbw.graph.graph import Graph, below, from_the_top
from fastcbw.graph.live import HOLD_SECONDS, Change, changed
from fastcbw.graph.node import Node, device_for
from fastcbw.graph.options import check_options

if TYPE_CHECKING:
    from fastcbw.block.switch import SwitchDevice
    from fastcbw.qmp.nodes import NodeExport

Undo = Callable[[], None]


class Live:
    """Changes of GRAPH under load. Methods are called with the daemon's change lock held."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self._changes: dict[SwitchDevice, Change] | None = None     # of the run under way
        self._ranks: dict[Node, int] = {}                           # of the nodes at its beginning: the lower, the further up
        self._seconds = HOLD_SECONDS

    @contextmanager
    def collecting(self) -> Iterator[Live]:
        """Collect the changes of the block's actions; carried_out() makes them."""
        self._changes, self._seconds = {}, HOLD_SECONDS
        self._ranks = {node: rank for rank, node in enumerate(from_the_top(self.graph.nodes.values()))}
        try:
            yield self
        finally:
            self._changes, self._ranks = None, {}

    @contextmanager
    def carried_out(self) -> Iterator[None]:
        """Hold all places, run the block, make the changes."""
        # Exports are above all nodes; what is new has no requests yet.
        changes = sorted(self._changes.values(), key=lambda change: -2 if change.above is None else self._ranks.get(change.above, -1))
        with changed(changes, self._seconds):
            for change in changes:
                _forget_discards(change, self._seconds)
            yield

    def check_use(self, users: Iterable[tuple[Node, str]]) -> None:
        """Error when one of USERS, nodes that are used while the places are held and the words for why, is above a place that is: its
        requests wait there, and whoever waited for their end would wait for ever. Exports' places are above everything."""
        changes = list(self._changes.values())
        stores = [(node, f"a store that is copied from node '{node.name}' or to it") for change in changes if change.takes_content
                  for node in (change.before, change.after)]
        for change in changes:
            if change.above is None:
                continue
            # The old data that a copy-before-write node keeps by its place is that of every guest write to its disk.
            held = change.above.bottom
            for node, words in [*users, *stores]:
                if held in below(node):
                    raise Error(f"{words}: is above node '{change.above.name}', whose child is replaced in the same transaction, and would "
                                f"wait for it (replace the child in a transaction of its own)")

    def _change(self, change: Change) -> None:
        if self._changes is not None and change.place in self._changes:
            change.before = self._changes[change.place].before      # an action before this one wanted another: nothing is there yet
        if self._changes is None:
            if change.device is not change.place.child:
                with changed([change]):
                    _forget_discards(change, HOLD_SECONDS)
        elif change.device is change.place.child:
            self._changes.pop(change.place, None)       # there already: an action before this one wanted another
        else:
            self._changes[change.place] = change

    def within(self, milliseconds: int | None) -> None:
        """Let the changes of this run take no longer than that."""
        if milliseconds is not None:
            if not 0 < milliseconds <= 60_000:
                raise Error(f"Parameter 'timeout' expects milliseconds from 1 to 60000, not {milliseconds}")
            self._seconds = milliseconds / 1000

    # -- fastcbw-replace

    def replace_root(self, export: NodeExport, node: Node) -> Undo:
        """Have EXPORT end at NODE; its clients stay. Within one disk nothing waits."""
        before = export.node
        if export.switch is None and node.bottom is not before.bottom:
            raise Error(f"{export.user.label}: the daemon serves this disk by itself, so that it can only be moved within it, not to node "
                        f"'{node.name}' (serve it with block-export-add)")
        if export.switch is None:
            self.graph.move(export.user, node)
        else:
            self._move_to(export, Change(export.switch, node.guest(), before=before, after=node), node)
        export.node = node
        return lambda: setattr(export, "node", before)

    def _move_to(self, export: NodeExport, change: Change, node: Node) -> None:
        before = export.node
        change.check()
        (edge,) = [edge for edge in before.parents if edge.parent is export.user]
        self.graph.redirect(edge, node)
        try:
            self._change(change)
        except BaseException:
            self.graph.redirect(edge, before)
            raise

    def replace_child(self, parent: str, child: str, node: Node) -> None:
        """Have the node PARENT use NODE as CHILD."""
        above = self.graph.find(parent)
        edge = above.children.get(child)
        if edge is None:
            raise Error(f"node '{parent}' has no child '{child}' (there is {', '.join(above.children) or 'none'})")
        place = above.joints.get(child)
        if place is None:
            raise Error(f"node '{parent}': its child '{child}' is what it shows (replace '{parent}' itself where it is used)")
        if edge.child is node:
            return
        above.kind.check_replace(above, child)
        if edge.role == "filtered" and not node.kind.live:
            raise Error(f"node '{node.name}': shows a snapshot, no live disk")
        if edge.role == "filtered" and node.shows is not edge.child.shows:
            _check_not_kept(above, edge.child, node)
        change = Change(place, device_for(edge.role, node), takes_content=edge.role == "store", above=above, before=edge.child, after=node)
        change.check()
        self.graph.redirect(edge, node)
        self._change(change)

    # -- blockdev-reopen

    def reopen(self, description: dict[str, Any]) -> Undo:
        """Have a node follow DESCRIPTION, a whole one: what it leaves out gets its default, but children, which stay."""
        name = description.get("node-name")
        if not isinstance(name, str):
            raise Error("node-name not specified")
        node = self.graph.find(name)
        if description.get("driver") != node.kind.driver:
            raise Error(f"Cannot change the option 'driver' (node '{name}' is '{node.kind.driver}')")
        children = {child: edge.child.name for child, edge in node.children.items()}
        given = children | description
        options = check_options(node.kind.driver, node.kind.options, tuple(children), given)
        for option in sorted(set(options) | set(node.options)):
            if option == "read-only":
                self._check_read_only(node, options)
            elif options.get(option) != node.options.get(option) and option not in node.kind.changeable:
                words = ", ".join(node.kind.changeable) or "none"
                raise Error(f"Cannot change the option '{option}' (of driver '{node.kind.driver}' these can be changed: {words})")
        for child, before in children.items():
            if not isinstance(given[child], str):
                raise Error(f"Invalid parameter type for '{child}', expected: a node-name (a node is not described in place here)")
            if given[child] != before:
                self.replace_child(name, child, self.graph.find(given[child]))
        before_options = node.options

        def change(to: dict[str, Any]) -> None:
            if any(to.get(option) != node.options.get(option) for option in node.kind.changeable):
                node.kind.change(node, to)
            node.options = to

        if options != before_options:
            change(options)
        return lambda: change(before_options) if node.options is not before_options else None

    @staticmethod
    def _check_read_only(node: Node, options: dict[str, Any]) -> None:
        """Whether a node may be written is the graph's to say, as long as its device can be: nothing is opened anew."""
        if node.options.get("read-only") and not options.get("read-only") and node.device.read_only:
            raise Error(f"Cannot change the option 'read-only': node '{node.name}' is open for reading only (remove it, and add it anew)")


def _check_not_kept(above: Node, before: Node, after: Node) -> None:
    """Error when something from ABOVE on upwards keeps bytes of BEFORE, or what it knows of them, which AFTER does not show."""
    todo = [above]
    for node in todo:       # it grows
        words = node.keeps()
        if words is not None:
            raise Error(f"node '{after.name}': shows other bytes than node '{before.name}', and node '{node.name}' {words} (end that first, or put "
                        f"the export on another node above '{after.name}')")
        todo += [edge.parent for edge in node.parents if edge.role == "filtered" and edge.parent not in todo]


def _forget_discards(change: Change, seconds: float) -> None:
    """Forget what the guest has discarded and the engines that it leaves have recorded: carried out later, it would be carried out over
    what the guest writes from then on, which these engines do not see."""
    for node in below(change.before) - below(change.after):
        if node.base is not None:
            node.base._engine.forget_discards(seconds)
