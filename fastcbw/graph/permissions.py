"""What a parent may do to a child, and what it lets others do: the bits on each edge of the graph, and their conflicts.

An edge takes permissions and shares permissions. Two edges into one node agree when each shares what the other takes;
the first pair that does not is a conflict, and its message names both parents, the node and the permission.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from fastcbw.errors import Error


class Permission(enum.Flag):
    """CONSISTENT_READ: reads are one consistent image. WRITE: the content may change. WRITE_UNCHANGED: writes that leave
    the visible content as it is. RESIZE: the length may change."""

    NONE = 0
    CONSISTENT_READ = enum.auto()
    WRITE = enum.auto()
    WRITE_UNCHANGED = enum.auto()
    RESIZE = enum.auto()
    ALL = CONSISTENT_READ | WRITE | WRITE_UNCHANGED | RESIZE

    @property
    def words(self) -> list[str]:
        """The single permissions, as QEMU writes them."""
        return [one.name.lower().replace("_", "-") for one in Permission if one in self and one.name]


class Needs(NamedTuple):
    """What an edge takes, and what it lets others take."""

    taken: Permission
    shared: Permission


#: A reader that stands for itself: an export or a job that reads.
READER = Needs(Permission.CONSISTENT_READ, Permission.ALL)
#: A guest: it reads and writes, and so may others.
GUEST = Needs(Permission.CONSISTENT_READ | Permission.WRITE, Permission.ALL)
#: What a job or a store writes: its content is nobody's business until the writer is done.
TARGET = Needs(Permission.WRITE, Permission.NONE)


class Side(Protocol):
    """One edge, as far as a conflict concerns it: who is above (`label`), under which name it has the node, whom it goes with."""

    label: str
    name: str

    def is_beside(self, other: Side) -> bool:
        """Whether this one writes what OTHER writes, so that their permissions need not agree."""


def check(node: str, edges: Sequence[tuple[Side, Needs]]) -> None:
    """Raise Error for the first two of EDGES, all into NODE, that do not agree."""
    for one, mine in edges:
        for other, theirs in edges:
            refused = mine.taken & ~theirs.shared
            if one is not other and refused and not one.is_beside(other) and not other.is_beside(one):
                words = ", ".join(refused.words)
                raise Error(f"{one.label} needs '{words}' on node '{node}' as '{one.name}': conflicts with use by {other.label} "
                            f"as '{other.name}', which does not allow '{words}' on it")
