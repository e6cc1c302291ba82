"""`snapshot-access`: the disk as it was when the copy-before-write node below began. Read-only; needs no helper node."""

from __future__ import annotations

from fastcbw.errors import Error
from fastcbw.graph.kinds.base import Kind
from fastcbw.graph.node import Node
from fastcbw.graph.permissions import READER, Needs


class SnapshotAccess(Kind):
    driver = "snapshot-access"
    children = {"file": "source"}
    live = False

    def open(self, node: Node) -> None:
        below = node.children["file"].child
        if below.snapshot is None:
            raise Error(f"node '{below.name}' (driver '{below.kind.driver}') has no snapshot to show (name a copy-before-write node)")
        node.snapshot = below.snapshot
        node.device = below.snapshot.device

    def close(self, node: Node) -> None:
        """The snapshot is the copy-before-write node's."""

    def needs(self, node: Node, child: str, above: Needs) -> Needs:
        return READER
