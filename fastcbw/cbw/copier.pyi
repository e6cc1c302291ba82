from fastcbw.bitmaps.dirty import DirtyWords
from fastcbw.block.device import BlockDevice
from fastcbw.cbw.offload import Offload
from fastcbw.cbw.pace import Pace

class Copier:
    source: BlockDevice
    target: BlockDevice
    chunk: int
    pace: Pace
    offload: Offload | None
    def __init__(
        self, source: BlockDevice, target: BlockDevice, *, chunk: int = ..., order: str = ..., target_is_zero: bool = ...,
        comparing: bool = ..., consuming: bool = ..., pace: Pace | None = ..., offload: Offload | None = ...,
        copied: DirtyWords | None = ...,
    ) -> None: ...
    def run(self, in_background: bool = ...) -> None: ...
    def cancel(self) -> None: ...
    @property
    def is_cancelled(self) -> bool: ...
    @property
    def done(self) -> int: ...
    def counters(self) -> dict[str, int]: ...
    @property
    def error(self) -> str | None: ...
