from fastcbw.block.device import BlockDevice

class Filter(BlockDevice):
    """The base of devices that stand on another one."""

    child: BlockDevice
