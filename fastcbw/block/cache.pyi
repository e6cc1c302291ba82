from fastcbw.block.device import BlockDevice

SIZE_MIN: int
SIZE_MAX: int

class CacheDevice(BlockDevice):
    """A bounded RAM cache over a slow device."""

    child: BlockDevice
    size: int
    writeback: bool
    def __init__(self, child: BlockDevice, *, size: int | str, writeback: bool = ..., name: str | None = ...) -> None: ...
    def counters(self) -> dict[str, int]: ...
