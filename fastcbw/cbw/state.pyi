from fastcbw.block.device import BlockDevice

class EngineState:
    def __init__(self, child: BlockDevice) -> None: ...
