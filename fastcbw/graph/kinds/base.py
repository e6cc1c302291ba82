"""What a kind of node is: its options and children as data, how it opens and closes, what it needs of its children."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fastcbw.graph.options import NodeOption
from fastcbw.graph.permissions import Needs

if TYPE_CHECKING:
    from fastcbw.graph.node import Node


class Kind:
    """One driver. Kinds hold no state: what belongs to a node is in the node.

    children: QEMU's name of each child -> its role. through: the child whose very device the node uses, so that a
    guest above it is a guest of that child's disk; None: the node has bytes of its own. live: guests may write through it.
    changeable: options that blockdev-reopen may change. settles: settle() does anything.

    What has a device of its own above a child reads and writes `node.joint(name)`, behind which another child can be put.
    """

    driver: str
    options: ClassVar[tuple[NodeOption, ...]] = ()
    children: ClassVar[dict[str, str]] = {}
    through: ClassVar[str | None] = None
    live: ClassVar[bool] = True
    changeable: ClassVar[tuple[str, ...]] = ()
    settles: ClassVar[bool] = False

    def open(self, node: Node) -> None:
        """Give NODE its device; its children are open and linked. An error leaves nothing open."""
        raise NotImplementedError

    def let_go(self, node: Node) -> None:
        """Have whoever waits in NODE go on, now and later: the process is about to end."""

    def give_up(self, node: Node) -> None:
        """Have requests that NODE's device does not answer fail: the process is about to end, and a job waits for them."""

    def check_leave(self, node: Node, going: Sequence[Node]) -> None:
        """Error when NODE can't go though nobody uses it. GOING: all that go with it."""

    def settle(self, node: Node) -> None:
        """Do what may fail before NODE goes; nobody uses it. An error keeps it."""

    def close(self, node: Node) -> None:
        """Undo open(). Nobody uses the node any more."""
        if node.device is not None:
            node.device.close()

    def change(self, node: Node, options: dict[str, Any]) -> None:
        """Have NODE follow OPTIONS, checked ones, of which only `changeable` differ from its own. An error leaves it as it was."""
        raise NotImplementedError

    def check_replace(self, node: Node, child: str) -> None:
        """Error when another node cannot be put in the stead of CHILD just now."""

    def keeps(self, node: Node) -> str | None:
        """Words for what NODE itself keeps of the bytes that it shows, so that others can't be put in their stead; None: nothing."""
        return None

    def needs(self, node: Node, child: str, above: Needs) -> Needs:
        """What the edge to CHILD needs when the parents of NODE together need ABOVE. A filter passes that on."""
        return above
