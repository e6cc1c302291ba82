"""Nodes and edges of the graph. Data and small questions; what changes the graph is in graph.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastcbw.block.switch import SwitchDevice
from fastcbw.disk import Disk, Snapshot
from fastcbw.errors import Error
from fastcbw.graph.permissions import Needs, Permission

if TYPE_CHECKING:
    from fastcbw.block.device import BlockDevice
    from fastcbw.graph.kinds import Kind

NOTHING = Needs(Permission.NONE, Permission.ALL)


@dataclass(eq=False)
class User:
    """A parent that is no node: an export, a job. label: for messages, as in "export 'e'"."""

    label: str


@dataclass(eq=False)
class Edge:
    """PARENT has CHILD under NAME (QEMU's name of the child) in ROLE: source, store, target or filtered."""

    parent: Node | User
    child: Node
    name: str
    role: str
    needs: Needs = NOTHING
    guards: bool = False        # whoever writes below CHILD must write through it
    beside: Node | None = None  # of a job: the node whose store is CHILD, in place, and gets the same from it as from the job

    @property
    def label(self) -> str:
        return self.parent.label

    def is_beside(self, other: Edge) -> bool:
        """Whether OTHER is the edge of the store that this one completes."""
        return self.beside is not None and self.beside is other.parent and other.role == "store"


@dataclass(eq=False)
class Node:
    """One node. device: what readers read; guest(): what guests and exports get, the same with the filter on it.

    owned: somebody asked for it by name; else it was written inside its parent, and goes with it.
    """

    name: str
    kind: Kind
    options: dict[str, Any]
    owned: bool
    device: BlockDevice | None = None
    children: dict[str, Edge] = field(default_factory=dict)
    parents: list[Edge] = field(default_factory=list)
    base: Disk | None = None            # the disk that a node at the bottom becomes when a guest or a snapshot needs it
    rules: list[Any] = field(default_factory=list)      # of a fault node: what fails
    server: Any = None                  # of a format that another process reads: that process
    snapshot: Snapshot | None = None    # of a copy-before-write node: what its snapshot-access nodes show

    committed_to: str | None = None     # the node below, in another process, that the guest writes since a commit: no image of any moment

    joints: dict[str, SwitchDevice] = field(default_factory=dict)       # by child: where another can be put in its stead, under load

    @property
    def label(self) -> str:
        return f"node '{self.name}'"

    @property
    def read_only(self) -> bool:
        """Whether nobody may write through the node."""
        return bool(self.options.get("read-only")) or self.device is None or self.device.read_only

    @property
    def bottom(self) -> Node:
        """The node whose bytes this one shows, through filters: itself when it is no filter."""
        node = self
        while node.kind.through is not None:
            node = node.children[node.kind.through].child
        return node

    @property
    def filtered(self) -> Edge | None:
        """The edge to the node whose bytes this one shows when it is a filter, else None."""
        return next((edge for edge in self.children.values() if edge.role == "filtered"), None)

    @property
    def shows(self) -> Node:
        """The node whose bytes this one shows, through all that stands on it, caches and throttles too."""
        node = self
        while (edge := node.filtered) is not None:
            node = edge.child
        return node

    def keeps(self) -> str | None:
        """Words for what of the bytes that this node shows is kept in it; None: nothing."""
        disk = self.base
        if disk is not None and disk.snapshots:
            return f"has the snapshot {', '.join(disk.snapshots)} of them"
        if disk is not None and disk.bitmaps:
            return f"has the bitmap {', '.join(disk.bitmaps)} of what has changed in them"
        return self.kind.keeps(self)

    def check_content(self) -> None:
        """Error when what the node shows is no image of any moment."""
        if self.bottom.committed_to is not None:
            raise Error(f"node '{self.bottom.name}' was committed to node '{self.bottom.committed_to}', which its guest writes: what it shows is "
                        f"neither the image of then nor that of now (name '{self.bottom.committed_to}', and remove '{self.bottom.name}')")

    def disk(self) -> Disk:
        """The live disk at the bottom, with the engine that snapshots of it need; made with the first call."""
        bottom = self.bottom
        if bottom.base is None:
            bottom.base = Disk(bottom.device, name=bottom.name, owned=False)
        return bottom.base

    def guest(self) -> BlockDevice:
        """What an export of the node serves. Every write to a live disk passes its filter, whichever node it enters by."""
        return self.device if not self.kind.live else self.disk().device

    def joint(self, child: str) -> SwitchDevice:
        """What the node is to read and write as CHILD, for good: replacing the child changes what is behind it. For open()."""
        edge = self.children[child]
        self.joints[child] = SwitchDevice(device_for(edge.role, edge.child), name=edge.child.name)
        return self.joints[child]

    def describe(self) -> dict[str, Any]:
        """Return the node for `fastcbw graph`: driver, length, children with roles and permissions, parents."""
        return {
            "node": self.name,
            "driver": self.kind.driver,
            "length": self.device.length if self.device is not None else 0,
            "read_only": self.read_only,
            "children": [{"name": edge.name, "node": edge.child.name, "role": edge.role, "taken": edge.needs.taken.words,
                          "shared": edge.needs.shared.words} for edge in self.children.values()],
            "parents": [{"parent": edge.label, "name": edge.name, "role": edge.role} for edge in self.parents],
        }


def device_for(role: str, child: Node) -> BlockDevice:
    """What a parent in ROLE gets of CHILD: the disk with the filter on it, so that its bitmaps see what is written and its snapshots are
    kept; or, of a store or target, which is nobody else's, the bytes."""
    return child.device if role in ("store", "target") else child.guest()
