"""Nodes that lead back into the daemon: an `nbd` node of one of its own exports shows, and writes, what that export does.

No permission goes that way, and none is refused; so what is written, the target of a job or a store, is followed by names, and must not
come out at what its user reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fastcbw.block.image import same_image
from fastcbw.block.nbd import NbdDevice
from fastcbw.errors import Error
from fastcbw.graph.graph import below
from fastcbw.graph.node import Edge, Node

if TYPE_CHECKING:
    from fastcbw.qmp.nodes import Nodes

WRITTEN = ("target", "store")


def check_targets(nodes: Nodes) -> None:
    """Error for the first target or store of the graph of NODES that is, by way of exports of this daemon, what its user reads."""
    for node in nodes.graph.nodes.values():
        for edge in node.parents:
            if edge.role in WRITTEN and edge.needs.taken:
                _check_target(nodes, edge)


def _check_target(nodes: Nodes, edge: Edge) -> None:
    written = _reached(nodes, edge.child)
    if not written - below(edge.child):
        return                                  # it leads nowhere: permissions see all of it
    for source in _sources(nodes, edge):
        if _reached(nodes, source) & written:
            raise Error(f"{edge.label}: its {edge.name} node '{edge.child.name}' is, by way of this daemon's own export, what it reads from node "
                        f"'{source.name}' (Source and target cannot be the same)")


def _sources(nodes: Nodes, edge: Edge) -> Iterable[Node]:
    """What EDGE's parent has beside it."""
    if isinstance(edge.parent, Node):
        return [other.child for other in edge.parent.children.values() if other is not edge]
    return [node for node in nodes.graph.nodes.values() for other in node.parents if other.parent is edge.parent and other is not edge]


def _reached(nodes: Nodes, node: Node) -> set[Node]:
    """NODE, all below it, and so on from the exports of this daemon that `nbd` nodes among these are clients of."""
    reached: set[Node] = set()
    todo = {node}
    while todo:
        found = below(todo.pop()) - reached
        reached |= found
        for one in found:
            if isinstance(one.device, NbdDevice):
                todo |= {export.node for export in nodes.all_exports() if _names(nodes, one.device.uri, export.name)} - reached
    return reached


def _names(nodes: Nodes, uri: str, export: str) -> bool:
    server = nodes.daemon.nbd
    if server is None:
        return False
    names = (export, "") if list(server.exports) == [export] else (export,)     # a single one answers to the empty name
    return any(same_image(uri, own) for name in names for own in server.uris(name))
