"""`x-fastcbw-delay`: its child, made slow: milliseconds for each kind of request, a bandwidth in all."""

from __future__ import annotations

from typing import Any

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
    changeable = (*_MS, "bytes-per-s")

    def open(self, node: Node) -> None:
        node.device = DelayDevice(node.joint("file"), name=node.name, io="threads", **self._delays(node.options))

    def change(self, node: Node, options: dict[str, Any]) -> None:
        node.device.set(**self._delays(options))

    def _delays(self, options: dict[str, Any]) -> dict[str, Any]:
        return {name.replace("-", "_"): options.get(name, 0) for name in self.changeable}

    def close(self, node: Node) -> None:
        """The child is not ours."""
        node.device.open_all()
