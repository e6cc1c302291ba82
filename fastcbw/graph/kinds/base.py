"""What a kind of node is: its options and children as data, how it opens and closes, what it needs of its children."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from fastcbw.graph.options import NodeOption
from fastcbw.graph.permissions import Needs

if TYPE_CHECKING:
    from fastcbw.graph.node import Node


class Kind:
    """One driver. Kinds hold no state: what belongs to a node is in the node.

    children: QEMU's name of each child -> its role. through: the child whose very device the node uses, so that a
    guest above it is a guest of that child's disk; None: the node has bytes of its own. live: guests may write through it.
    """

    driver: str
    options: ClassVar[tuple[NodeOption, ...]] = ()
    children: ClassVar[dict[str, str]] = {}
    through: ClassVar[str | None] = None
    live: ClassVar[bool] = True

    def open(self, node: Node) -> None:
        """Give NODE its device; its children are open and linked. An error leaves nothing open."""
        raise NotImplementedError

    def close(self, node: Node) -> None:
        """Undo open(). Nobody uses the node any more."""
        if node.device is not None:
            node.device.close()

    def needs(self, node: Node, child: str, above: Needs) -> Needs:
        """What the edge to CHILD needs when the parents of NODE together need ABOVE. A filter passes that on."""
        return above
