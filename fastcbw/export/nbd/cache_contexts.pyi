from fastcbw.block.device import BlockDevice
from fastcbw.cbw.reader import SnapshotDevice
from fastcbw.export.nbd.contexts import MetaContext

class AccessContext(MetaContext):
    def __init__(self, snapshot: SnapshotDevice) -> None: ...

class OrderContext(MetaContext):
    def __init__(self, snapshot: SnapshotDevice, policy: str = ...) -> None: ...

class DepthContext(MetaContext):
    def __init__(self, device: BlockDevice) -> None: ...

def contexts_of(device: BlockDevice) -> dict[str, MetaContext]: ...
