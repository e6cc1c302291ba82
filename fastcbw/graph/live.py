"""Devices changed under load: at several places as one, in drained sections of these places only, bounded in time.

All places are held before any is changed; what goes on elsewhere in the graph goes on. When one does not come to rest in time, requests
go on everywhere to what was there before, and the error says where it was. A store takes its content along: it is copied while its
place is held, so that nobody writes it meanwhile, and within the same time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastcbw.block.device import ZERO, BlockDevice
from fastcbw.block.switch import SwitchDevice
from fastcbw.errors import Error

if TYPE_CHECKING:
    from fastcbw.graph.node import Node

#: Seconds for requests under way to end, and for a store to be copied.
HOLD_SECONDS = 2.0
_COPY_BYTES = 1 << 20


@dataclass
class Change:
    """DEVICE is to be behind PLACE; takes_content: what is behind it now is copied there first.

    above: the node whose joint the place is, None for an export's; before, after: the nodes that are there now and then.
    """

    place: SwitchDevice
    device: BlockDevice
    takes_content: bool = False
    above: Node | None = None
    before: Node | None = None
    after: Node | None = None

    def check(self) -> None:
        """Error when the device can't be put there."""
        try:
            self.place.check(self.device)
        except ValueError as error:
            raise Error(f"cannot replace '{self.place.name}': {error}") from None


@contextmanager
def changed(changes: Sequence[Change], seconds: float = HOLD_SECONDS) -> Iterator[None]:
    """Hold the places of CHANGES, run the block, then make all of them; an error before, or in the block, makes none.

    The uppermost come first, so that what is under way in them comes to its end through those below. The block, and the copy of a
    store, must not use what is above a place of theirs: it would wait for itself.
    Raises Error when a device can't be put there, TimeoutError when the places do not come to rest within SECONDS, OSError.
    """
    for change in changes:
        change.check()
    until = time.monotonic() + seconds
    held: list[SwitchDevice] = []
    try:
        for change in changes:
            change.place.hold(max(0.0, until - time.monotonic()))
            held.append(change.place)
        for change in changes:
            if change.takes_content:
                _copy(change.place.child, change.device, until, seconds)
        yield
        for change in changes:
            change.place.put(change.device)
    finally:
        for place in reversed(held):
            place.release()


def _copy(source: BlockDevice, target: BlockDevice, until: float, seconds: float) -> None:
    for offset, length, flags in source.extents().tolist():
        step = length if flags & ZERO else _COPY_BYTES
        for at in range(offset, offset + length, step):
            if time.monotonic() > until:
                raise TimeoutError(f"{source.name}: its content could not be copied to {target.name} within {seconds:g} s (nothing was changed)")
            if flags & ZERO:
                target.write_zeroes(at, step)
            else:
                target.write(at, source.read(at, min(step, offset + length - at)))
    target.flush()      # what the old one had on its disk is no less safe in the new one
