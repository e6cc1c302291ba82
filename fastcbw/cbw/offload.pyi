from fastcbw.block.device import BlockDevice

class Offload:
    copied_bytes: int
    rewritten_bytes: int

class Behind: ...

def offload_for(source: BlockDevice, target: BlockDevice, gate: BlockDevice | None = ...) -> Offload | None: ...
def behind_for(target: BlockDevice, limit: int) -> Behind | None: ...
