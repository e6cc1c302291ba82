"""`x-fastcbw-memory`: a disk of zero bytes in memory, for tests, and for a store that lives no longer than the daemon."""

from __future__ import annotations

from fastcbw.block.memory import MemoryDevice
from fastcbw.graph.kinds.base import Kind
from fastcbw.graph.node import Node
from fastcbw.graph.options import NodeOption


class Memory(Kind):
    driver = "x-fastcbw-memory"
    options = (NodeOption("size", "int", "bytes", required=True, least=1),)

    def open(self, node: Node) -> None:
        node.device = MemoryDevice(node.options["size"], name=node.name, read_only=node.options.get("read-only", False))
