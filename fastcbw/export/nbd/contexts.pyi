from fastcbw.block.device import BlockDevice

class MetaContext:
    @property
    def name(self) -> str: ...

class AllocationContext(MetaContext):
    def __init__(self, device: BlockDevice) -> None: ...
