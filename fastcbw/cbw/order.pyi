from collections.abc import Iterator

import numpy
from numpy.typing import NDArray

from fastcbw.block.device import BlockDevice

ORDERS: tuple[str, ...]
ORDER_DTYPE: numpy.dtype

class Order(Iterator[NDArray[numpy.void]]):
    source: BlockDevice
    policy: str
    chunk: int
    stretches: int
    def __init__(self, source: BlockDevice, policy: str = ..., *, chunk: int = ...) -> None: ...
    def next_piece(self) -> tuple[int, int] | None: ...
    def __iter__(self) -> Order: ...
    def __next__(self) -> NDArray[numpy.void]: ...

def order_page(snapshot: BlockDevice, policy: str, start: int = ..., limit: int = ...) -> tuple[NDArray[numpy.void], int | None]: ...
