"""`raw`: the bytes of its child as a disk."""

from __future__ import annotations

from fastcbw.block.probe import refuse_format
from fastcbw.graph.kinds.base import Kind
from fastcbw.graph.node import Node


class Raw(Kind):
    driver = "raw"
    children = {"file": "filtered"}
    through = "file"

    def open(self, node: Node) -> None:
        # An image in another format is not raw, whoever says so: its guest would overwrite the format's own tables.
        child = node.children["file"].child
        refuse_format(child.device, child.name)
        node.device = child.device

    def close(self, node: Node) -> None:
        """The device is the child's."""
