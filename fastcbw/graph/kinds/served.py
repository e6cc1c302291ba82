"""A disk that was opened outside the graph (`fastcbw serve IMAGE`), as a node: it can be used, and is closed by its owner."""

from __future__ import annotations

from fastcbw.graph.kinds.base import Kind
from fastcbw.graph.node import Node


class Served(Kind):
    driver = "raw"

    def open(self, node: Node) -> None:
        """It is open."""

    def close(self, node: Node) -> None:
        """The device is its owner's."""


SERVED = Served()
