"""`copy-before-write`: the filter on a live disk, and the snapshot that begins with it.

The engine is on every disk from its first guest on (a dormant filter costs nothing that can be measured), so that
inserting this node above a disk in use takes a snapshot and moves nobody: guests keep their connections, and no request
waits. Old data goes to RAM first, up to `ram`, then to `target` as a log of checksummed records: the target needs the
room that the guest's writes need, not the length of the disk.
"""

from __future__ import annotations

from typing import Any

from fastcbw.errors import Error
from fastcbw.graph.kinds.base import Kind
from fastcbw.graph.node import Node
from fastcbw.graph.options import NodeOption
from fastcbw.graph.permissions import TARGET, Needs, Permission

CLUSTER_SIZE_QEMU = 64 << 10
RAM_DEFAULT = "256M"


class CopyBeforeWrite(Kind):
    driver = "copy-before-write"
    options = (
        NodeOption("bitmap", "dict", '{"node": …, "name": …}: preserve only what this bitmap marks'),
        NodeOption("on-cbw-error", "str", "who suffers when old data can't be kept (default break-guest-write, as in QEMU)",
                   choices=("break-guest-write", "break-snapshot")),
        NodeOption("cbw-timeout", "int", "seconds that a guest write may wait; 0: for ever (default 0)", least=0),
        NodeOption("min-cluster-size", "int", "bytes of a cluster at least (default 65536)", least=1),
        NodeOption("ram", "int", "bytes of RAM before the target is used; 0: none (default 256 MiB; ours)", least=0),
    )
    children = {"file": "filtered", "target": "store"}
    through = "file"

    def open(self, node: Node) -> None:
        disk = node.disk()
        node.device = node.children["file"].child.device
        node.snapshot = disk.snapshot(node.name, spill=node.joint("target"), **snapshot_options(node))

    def close(self, node: Node) -> None:
        if node.snapshot is not None:
            node.snapshot.close()

    def needs(self, node: Node, child: str, above: Needs) -> Needs:
        if child == "target":
            return TARGET
        # Old data is read before the guest's write; nobody else may write below the filter.
        return Needs(above.taken | Permission.CONSISTENT_READ, above.shared & ~(Permission.WRITE | Permission.RESIZE))


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
    given["on_cbw_error"] = options.get("on-cbw-error", "break-guest-write")
    given["on_full"] = given["on_cbw_error"]
    seconds = options.get("cbw-timeout", 0)
    given["cbw_timeout"] = seconds * 1000 if seconds else 86_400_000
    return given
