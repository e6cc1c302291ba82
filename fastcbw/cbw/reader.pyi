from fastcbw.bitmaps.dirty import DirtyWords
from fastcbw.block.device import BlockDevice

class SnapshotDevice(BlockDevice):
    cluster_bits: int
    retired: bool
    in_place: BlockDevice | None
    bitmap: DirtyWords | None
    bitmap_name: str | None
    @property
    def broken(self) -> str | None: ...
    export: str
    @property
    def granule(self) -> int: ...
    @property
    def discarded(self) -> int: ...
    def discard(self, offset: int, length: int) -> None: ...
    def take(self, offset: int, length: int) -> bytes: ...
