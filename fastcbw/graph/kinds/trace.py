"""`x-fastcbw-trace`: its child, and a record of what is asked of it, for `fastcbw compare --trace`."""

from __future__ import annotations

from fastcbw.block.trace import TraceDevice
from fastcbw.errors import Error
from fastcbw.graph.kinds.base import Kind
from fastcbw.graph.node import Node
from fastcbw.graph.options import NodeOption


class Trace(Kind):
    driver = "x-fastcbw-trace"
    options = (NodeOption("trace", "str", "the file to write; there may be none yet", required=True),)
    children = {"file": "filtered"}

    def open(self, node: Node) -> None:
        path = node.options["trace"]
        try:
            node.device = TraceDevice(node.joint("file"), path, name=node.name)
        except OSError as error:
            raise Error(f"Could not create '{path}': {error.strerror}") from None

    def close(self, node: Node) -> None:
        """The child is not ours."""
        node.device.stop()
