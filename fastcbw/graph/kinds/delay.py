"""`x-fastcbw-delay`: its child, made slow: milliseconds for each kind of request, a bandwidth in all."""

from __future__ import annotations

from typing import Any

from fastcbw.block.delay import DelayDevice
from fastcbw.errors import Error
from fastcbw.graph.kinds.base import Kind
from fastcbw.graph.node import Node
from fastcbw.graph.options import NodeOption

_MS = ("read-ms", "write-ms", "zero-ms", "discard-ms", "flush-ms")
MS_MAX = 60_000


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
        for name in _MS:
            if options.get(name, 0) > MS_MAX:
                raise Error(f"Parameter '{name}' expects a value of at most {MS_MAX}, not {options[name]}")
        return {name.replace("-", "_"): options.get(name, 0) for name in self.changeable}

    def let_go(self, node: Node) -> None:
        """No delays from now on; one that has begun ends."""
        node.device.set(**self._delays({}))
        node.device.open_all()

    def close(self, node: Node) -> None:
        """The child is not ours."""
        self.let_go(node)
