from fastcbw.block.device import BlockDevice
from fastcbw.block.filter import Filter

SIZE_MIN: int
SIZE_MAX: int

class CacheDevice(Filter):
    """A bounded RAM cache over a slow device."""

    size: int
    writeback: bool
    def __init__(self, child: BlockDevice, *, size: int | str, writeback: bool = ..., name: str | None = ...) -> None: ...
    def counters(self) -> dict[str, int]: ...
