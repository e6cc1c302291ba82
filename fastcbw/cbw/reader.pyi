from fastcbw.block.device import BlockDevice

class SnapshotDevice(BlockDevice):
    cluster_bits: int
    retired: bool
    @property
    def broken(self) -> str | None: ...
