from fastcbw.block.device import BlockDevice

class MemoryDevice(BlockDevice):
    """A disk of zero bytes in memory; what is never written costs no memory."""

    def __init__(self, length: int | str, name: str = "memory", read_only: bool = False) -> None: ...
