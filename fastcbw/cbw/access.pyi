import numpy
from numpy.typing import NDArray

from fastcbw.block.device import BlockDevice

MAP_DTYPE: numpy.dtype
READABLE: int
IN_RAM: int
ON_DISK: int
IS_ZERO: int
CHANGED: int

def map_extents(
    device: BlockDevice, offset: int = ..., length: int | None = ..., *, limit: int = ...,
) -> tuple[NDArray[numpy.void], int | None]: ...
def cluster_states(snapshot: BlockDevice) -> NDArray[numpy.uint32]: ...
