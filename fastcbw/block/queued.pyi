from fastcbw.block.device import BlockDevice

class QueuedDevice(BlockDevice):
    """A device whose every request goes through a queue."""

    @property
    def child(self) -> BlockDevice: ...
    def __init__(self, child: BlockDevice, engine: str) -> None: ...
