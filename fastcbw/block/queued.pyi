from typing import Any

from numpy.typing import NDArray
from typing_extensions import Buffer

from fastcbw.block.device import BlockDevice
from fastcbw.block.queue import IoQueue

class QueuedDevice(BlockDevice):
    """A device whose every request goes through a queue."""

    @property
    def child(self) -> BlockDevice: ...
    def __init__(self, child: BlockDevice, engine: str) -> None: ...

def drive(
    queue: IoQueue, device: BlockDevice, offsets: NDArray[Any], memory: Buffer, block: int, *, write: bool = False
) -> float: ...

class HungDevice(BlockDevice):
    """A device whose queued reads hang until they are fed."""

    @property
    def child(self) -> BlockDevice: ...
    def __init__(self, child: BlockDevice) -> None: ...
    def feed(self, data: bytes) -> None: ...
