from collections.abc import Iterable

from fastcbw.block.device import BlockDevice
from fastcbw.export.nbd.contexts import MetaContext
from fastcbw.export.nbd.pool import BufferPool
from fastcbw.export.nbd.reads import Reads

class Connection(Reads):
    def __init__(
        self,
        fd: int,
        device: BlockDevice,
        pool: BufferPool,
        name: str,
        *,
        structured: bool = False,
        contexts: Iterable[tuple[int, MetaContext]] = (),
        read_only: bool = False,
        drops: str | None = None,
        background: bool = False,
        spin_us: int = 0,
        spin_adaptive: bool = False,
    ) -> None: ...
    def run(self) -> str: ...
    def stop(self, *, kill: bool = False) -> None: ...
