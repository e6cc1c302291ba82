from types import TracebackType
from typing import Literal

from fastcbw.block.device import BlockDevice
from fastcbw.block.filter import Filter

Operation = Literal["read", "write", "zero", "discard", "flush", "status"]

RULES_LIMIT: int
OPERATION_NAMES: tuple[str, ...]

class FaultDevice(Filter):
    """A filter that counts requests and fails those that a rule names."""

    @property
    def child(self) -> BlockDevice: ...
    @property
    def requests(self) -> dict[str, int]: ...
    @property
    def bytes(self) -> dict[str, int]: ...
    def __init__(self, child: BlockDevice, *, name: str | None = None, io: str | None = None) -> None: ...
    def fail_on(
        self,
        operation: Operation,
        offset: int = 0,
        length: int | None = None,
        *,
        errno: int = ...,
        count: int = -1,
        after: int = 0,
        after_bytes: int = 0,
        stall_ms: float = 0,
    ) -> Rule: ...
    def reset_counts(self) -> None: ...

class Rule:
    """A rule of a FaultDevice; lasts until it is removed."""

    @property
    def hits(self) -> int: ...
    def remove(self) -> None: ...
    def __enter__(self) -> Rule: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
