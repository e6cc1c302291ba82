"""`throttle`: its child, no faster than its limits. Those of QEMU's throttle groups, in the node itself: there are no groups."""

from __future__ import annotations

from typing import Any

from fastcbw.block.throttle import LIMIT_NAMES, ThrottleDevice, check_limits
from fastcbw.errors import Error
from fastcbw.graph.kinds.base import Kind
from fastcbw.graph.node import Node
from fastcbw.graph.options import NodeOption

_LIMITS = [name.replace("_", "-") + suffix for name in LIMIT_NAMES for suffix in ("", "-max", "-max-length")] + ["iops-size"]


class Throttle(Kind):
    driver = "throttle"
    options = (
        NodeOption("limits", "dict", "bps-total, bps-read, bps-write (bytes a second), iops-total, iops-read, iops-write (requests a second), each "
                   "with -max (what may come at once) and -max-length (seconds of -max a second); iops-size", required=True),
    )
    children = {"file": "filtered"}
    changeable = ("limits",)

    def open(self, node: Node) -> None:
        node.device = ThrottleDevice(node.joint("file"), name=node.name, **_limits(node.options))

    def change(self, node: Node, options: dict[str, Any]) -> None:
        node.device.set(**_limits(options))

    def let_go(self, node: Node) -> None:
        node.device.set()

    def close(self, node: Node) -> None:
        """The child is not ours."""
        self.let_go(node)


def _limits(options: dict[str, Any]) -> dict[str, int]:
    for name in options["limits"]:
        if name not in _LIMITS:
            raise Error(f"Parameter 'limits.{name}' is unexpected")
    limits = {name.replace("-", "_"): value for name, value in options["limits"].items()}
    try:
        return check_limits(limits)
    except (ValueError, TypeError) as error:
        raise Error(f"Parameter 'limits': {error}") from None
