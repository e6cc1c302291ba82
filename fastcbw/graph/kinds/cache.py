"""`x-fastcbw-cache`, RAM in front of a slow node; `copy-on-read`, the same for who only wants to read it once from there."""

from __future__ import annotations

from fastcbw.block.cache import SIZE_MAX, SIZE_MIN, CacheDevice
from fastcbw.errors import Error
from fastcbw.graph.kinds.base import Kind
from fastcbw.graph.node import Node
from fastcbw.graph.options import NodeOption
from fastcbw.graph.permissions import Needs, Permission

COPY_ON_READ_SIZE = 64 << 20


class Cache(Kind):
    driver = "x-fastcbw-cache"
    options = (
        NodeOption("size", "int", f"bytes of RAM, from {SIZE_MIN} on", required=True, least=SIZE_MIN),
        NodeOption("mode", "str", "writeback: writes stay in RAM until a flush, or until their room is wanted; writethrough (default writeback)",
                   choices=("writeback", "writethrough")),
    )
    children = {"file": "filtered"}
    settles = True

    def open(self, node: Node) -> None:
        size = node.options.get("size", COPY_ON_READ_SIZE)
        if size > SIZE_MAX:
            raise Error(f"Parameter 'size' expects a value of at most {SIZE_MAX}, not {size}")
        node.device = CacheDevice(node.joint("file"), size=size, writeback=self._writeback(node), name=node.name)

    def _writeback(self, node: Node) -> bool:
        return node.options.get("mode", "writeback") == "writeback"

    def settle(self, node: Node) -> None:
        """What no flush has covered yet goes to the child; when that fails, the node stays."""
        if self._writeback(node) and not node.device.read_only:
            node.device.flush()

    def keeps(self, node: Node) -> str | None:
        return "has some of them in RAM"

    def close(self, node: Node) -> None:
        """The child is not ours."""
        self.settle(node)

    def needs(self, node: Node, child: str, above: Needs) -> Needs:
        # What others write below would not be seen above.
        return Needs(above.taken, above.shared & ~(Permission.WRITE | Permission.RESIZE))


class CopyOnRead(Cache):
    """QEMU's driver leaves what was read in the image, this one in RAM: the image stays as it is."""

    driver = "copy-on-read"
    options = (NodeOption("size", "int", f"bytes of RAM, from {SIZE_MIN} on (default {COPY_ON_READ_SIZE}; ours)", least=SIZE_MIN),)

    def _writeback(self, node: Node) -> bool:
        return False
