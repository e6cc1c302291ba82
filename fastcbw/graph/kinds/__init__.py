"""Every kind of node, by the name of its driver."""

from __future__ import annotations

from fastcbw.graph.kinds.base import Kind
from fastcbw.graph.kinds.cache import Cache, CopyOnRead
from fastcbw.graph.kinds.copy_before_write import CopyBeforeWrite
from fastcbw.graph.kinds.delay import Delay
from fastcbw.graph.kinds.fault import Fault
from fastcbw.graph.kinds.file import File, HostDevice
from fastcbw.graph.kinds.foreign import FORMATS, Foreign
from fastcbw.graph.kinds.memory import Memory
from fastcbw.graph.kinds.nbd import Nbd
from fastcbw.graph.kinds.raw import Raw
from fastcbw.graph.kinds.snapshot_access import SnapshotAccess
from fastcbw.graph.kinds.throttle import Throttle
from fastcbw.graph.kinds.trace import Trace
from fastcbw.graph.kinds.write_notifier import WriteNotifierKind

KINDS: dict[str, Kind] = {
    kind.driver: kind
    for kind in (File(), HostDevice(), *map(Foreign, FORMATS), Raw(), Nbd(), Memory(), Delay(), Fault(), Throttle(), Cache(), CopyOnRead(), CopyBeforeWrite(),
                 SnapshotAccess(), WriteNotifierKind(), Trace())
}
