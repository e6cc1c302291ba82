"""`x-fastcbw-delay`: its child, made slow: milliseconds for each kind of request, a bandwidth in all."""

from __future__ import annotations

from fastcbw.block.delay import DelayDevice
from fastcbw.graph.kinds.base import Kind
from fastcbw.graph.node import Node
from fastcbw.graph.options import NodeOption

_MS = ("read-ms", "write-ms", "zero-ms", "discard-ms", "flush-ms")


class Delay(Kind):
    driver = "x-fastcbw-delay"
    options = (*(NodeOption(name, "int", f"milliseconds of a {name[:-3]}", least=0) for name in _MS),
               NodeOption("bytes-per-s", "int", "bandwidth of all requests together; 0: as it is", least=0))
    children = {"file": "filtered"}

    def open(self, node: Node) -> None:
        delays = {name.replace("-", "_"): value for name, value in node.options.items() if name in (*_MS, "bytes-per-s")}
        node.device = DelayDevice(node.children["file"].child.device, name=node.name, **delays)
