from fastcbw.bitmaps.dirty import DirtyWords
from fastcbw.block.device import BlockDevice

class SnapshotDevice(BlockDevice):
    cluster_bits: int
    retired: bool
    bitmap: DirtyWords | None
    bitmap_name: str | None
    @property
    def broken(self) -> str | None: ...
