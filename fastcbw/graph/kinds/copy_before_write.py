"""`copy-before-write`: the filter on a live disk, and the snapshot that begins with it.

The engine is on every disk from its first guest on (a dormant filter costs nothing that can be measured), so that
inserting this node above a disk in use takes a snapshot and moves nobody: guests keep their connections, and no request
waits. Old data goes to RAM first, up to `ram`, then to `target` as a log of checksummed records: the target needs the
room that the guest's writes need, not the length of the disk.

With the layout `in-place` the target is to be a backup: each cluster's old data goes to the disk's own offset in it, and a
blockdev-backup of the snapshot to that very node copies the clusters that are not there yet.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from fastcbw.errors import Error
from fastcbw.graph.kinds.base import Kind
from fastcbw.graph.live import HOLD_SECONDS
from fastcbw.graph.node import Node
from fastcbw.graph.options import NodeOption
from fastcbw.graph.permissions import TARGET, Needs, Permission

CLUSTER_SIZE_QEMU = 64 << 10
RAM_DEFAULT = "256M"
ON_CBW_ERROR_QEMU = "break-guest-write"
POLL_SECONDS = 0.005

log = logging.getLogger("fastcbw.graph")


class CopyBeforeWrite(Kind):
    driver = "copy-before-write"
    options = (
        NodeOption("bitmap", "dict", '{"node": …, "name": …}: preserve only what this bitmap marks'),
        NodeOption("on-cbw-error", "str", "who suffers when old data can't be kept (default break-guest-write, as in QEMU)",
                   choices=("break-guest-write", "break-snapshot")),
        NodeOption("cbw-timeout", "int", "seconds that a guest write may wait; 0: for ever (default 0)", least=0),
        NodeOption("min-cluster-size", "int", "bytes of a cluster at least (default 65536)", least=1),
        NodeOption("ram", "int", "bytes of RAM before the target is used; 0: none (default 256 MiB; ours)", least=0),
        NodeOption("layout", "str", "of the target: log, records as they come; in-place, each cluster at the disk's own offset, for a backup to "
                   "the same node (default log; ours)", choices=("log", "in-place")),
    )
    children = {"file": "filtered", "target": "store"}
    through = "file"
    changeable = ("on-cbw-error", "ram")

    def open(self, node: Node) -> None:
        disk = node.disk()
        if is_in_place(node):
            _check_in_place(node)
        node.device = node.children["file"].child.device
        node.snapshot = disk.snapshot(node.name, spill=node.joint("target"), **snapshot_options(node))

    def change(self, node: Node, options: dict[str, Any]) -> None:
        policy = options.get("on-cbw-error", ON_CBW_ERROR_QEMU)
        try:
            node.snapshot.set_limits(ram=options.get("ram", RAM_DEFAULT))       # what may fail comes first
        except ValueError as error:
            raise Error(f"node '{node.name}': {error}") from None
        node.snapshot.set_policy(on_full=policy, on_cbw_error=policy)

    def check_leave(self, node: Node, going: Sequence[Node]) -> None:
        """What is in the target stays there for older snapshots. And a write of old data that hangs in a target that is to be a backup would
        land there later, whoever has it by then."""
        if node.snapshot is None:
            return
        leaving = [other.snapshot.name for other in going if other.snapshot is not None]
        heirs = [name for name in node.disk()._engine.heirs_of_tier(node.snapshot.name, node.joints["target"]) if name not in leaving]
        if heirs:
            raise Error(f"node '{node.name}': its node '{node.children['target'].child.name}' holds what the older snapshot {', '.join(heirs)} "
                        "needs (remove that first, or both as one)")
        if is_in_place(node) and not _is_quiet(node):
            raise Error(f"node '{node.name}': a write of old data to node '{node.children['target'].child.name}' is under way, and does not end "
                        f"within {HOLD_SECONDS:g} s (try again when its device answers)")

    def close(self, node: Node) -> None:
        if node.snapshot is None:
            return
        node.snapshot.close()
        if is_in_place(node) and not _is_quiet(node):
            log.warning("node '%s': a write of old data to node '%s' hangs, and may land there later", node.name, node.children["target"].child.name)

    def check_replace(self, node: Node, child: str) -> None:
        for edge in node.children[child].child.parents:
            if edge.beside is node:
                raise Error(f"node '{node.name}': {edge.label} copies to its {child} what is not there yet (wait for its end, or cancel it)")

    def needs(self, node: Node, child: str, above: Needs) -> Needs:
        if child == "target":
            return TARGET
        # Old data is read before the guest's write; nobody else may write below the filter.
        return Needs(above.taken | Permission.CONSISTENT_READ, above.shared & ~(Permission.WRITE | Permission.RESIZE))


def is_in_place(node: Node) -> bool:
    """Whether the target of the copy-before-write NODE holds each cluster at the disk's own offset."""
    return node.options.get("layout") == "in-place"


def _check_in_place(node: Node) -> None:
    target, disk = node.children["target"].child, node.children["file"].child
    if target.device.length < disk.device.length:
        raise Error(f"node '{target.name}': its {target.device.length} bytes are less than the {disk.device.length} of node '{disk.name}', whose "
                    "clusters are to lie at their own offsets (layout in-place)")


def _is_quiet(node: Node) -> bool:
    until = time.monotonic() + HOLD_SECONDS
    while not node.disk()._engine.tier_is_quiet(node.joints["target"]):
        if time.monotonic() > until:
            return False
        time.sleep(POLL_SECONDS)
    return True


def snapshot_options(node: Node) -> dict[str, Any]:
    """The options of the snapshot that NODE takes; defaults are QEMU's, but for RAM."""
    options = node.options
    size = options.get("min-cluster-size", CLUSTER_SIZE_QEMU)
    size = max(4096, 1 << (size - 1).bit_length())
    given: dict[str, Any] = {"ram": options.get("ram", RAM_DEFAULT)}
    if "min-cluster-size" in options or node.disk()._engine.cluster_size is None:
        given["cluster_size"] = size
    bitmap = options.get("bitmap")
    if bitmap is not None:
        if set(bitmap) != {"node", "name"} or not all(isinstance(value, str) for value in bitmap.values()):
            raise Error("Parameter 'bitmap' expects an object with the strings node and name")
        given["bitmap"] = bitmap["name"]
    given["on_cbw_error"] = options.get("on-cbw-error", ON_CBW_ERROR_QEMU)
    given["on_full"] = given["on_cbw_error"]
    given["in_place"] = is_in_place(node)
    seconds = options.get("cbw-timeout", 0)
    given["cbw_timeout"] = seconds * 1000 if seconds else 86_400_000
    return given
