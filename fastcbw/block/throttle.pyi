from collections.abc import Mapping

from fastcbw.block.device import BlockDevice
from fastcbw.block.filter import Filter

LIMIT_NAMES: tuple[str, ...]
LIMIT_MAX: int
LENGTH_MAX: int

class ThrottleDevice(Filter):
    """A filter that lets no more through than its limits."""

    def __init__(self, child: BlockDevice, *, name: str | None = ..., **limits: int) -> None: ...
    def set(self, **limits: int) -> None: ...
    @property
    def limits(self) -> dict[str, int]: ...
    def counters(self) -> dict[str, int]: ...

def check_limits(limits: Mapping[str, int]) -> dict[str, int]: ...
