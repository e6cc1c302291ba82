"""`x-fastcbw-write-notifier`: the filter of the old backup scheme: a guest write copies what it overwrites straight to the target.

The point in time is not the node's beginning but its job's: blockdev-backup of the node to its own target, which copies the rest. Until
then nothing is intercepted, and after it nothing any more.
"""

from __future__ import annotations

from fastcbw.cbw.notifier import CLUSTER_MAX, CLUSTER_MIN, POLICIES, WriteNotifier
from fastcbw.errors import Error
from fastcbw.graph.kinds.base import Kind
from fastcbw.graph.node import Node
from fastcbw.graph.options import NodeOption
from fastcbw.graph.permissions import TARGET, Needs, Permission


class WriteNotifierKind(Kind):
    driver = "x-fastcbw-write-notifier"
    options = (
        NodeOption("cluster-size", "int", f"bytes that are copied at once, a power of two from {CLUSTER_MIN} to {CLUSTER_MAX} (default 65536)"),
        NodeOption("on-cbw-error", "str", "who suffers when old data can't be copied (default break-guest-write, as in QEMU's old job)",
                   choices=POLICIES),
    )
    children = {"file": "filtered", "target": "target"}

    def open(self, node: Node) -> None:
        options = node.options
        try:
            node.device = WriteNotifier(node.joint("file"), node.joint("target"), name=node.name,
                                        cluster_size=options.get("cluster-size", 65536),
                                        on_cbw_error=options.get("on-cbw-error", "break-guest-write"))
        except ValueError as error:
            raise Error(str(error)) from None

    def close(self, node: Node) -> None:
        """The child is not ours."""
        node.device.end()

    def check_replace(self, node: Node, child: str) -> None:
        if node.device.has_begun and not node.device.is_ended:
            raise Error(f"node '{node.name}': its backup runs (wait for its end, or cancel it)")

    def keeps(self, node: Node) -> str | None:
        return "is copying them to its target" if node.device.has_begun and not node.device.is_ended else None

    def needs(self, node: Node, child: str, above: Needs) -> Needs:
        if child == "target":
            return TARGET
        # What others write below would be in the target as if it had been there at the beginning.
        return Needs(above.taken | Permission.CONSISTENT_READ, above.shared & ~(Permission.WRITE | Permission.RESIZE))
