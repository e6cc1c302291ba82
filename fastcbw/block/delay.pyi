from types import TracebackType
from typing import Literal

from fastcbw.block.device import BlockDevice
from fastcbw.block.filter import Filter

Operation = Literal["read", "write", "zero", "discard", "flush"]

OPERATION_NAMES: tuple[str, ...]

class DelayDevice(Filter):
    """A filter that makes requests late, or holds them at a gate."""

    @property
    def child(self) -> BlockDevice: ...
    def __init__(
        self,
        child: BlockDevice,
        *,
        read_ms: float = 0,
        write_ms: float = 0,
        zero_ms: float = 0,
        discard_ms: float = 0,
        flush_ms: float = 0,
        bytes_per_s: float = 0,
        offset: int = 0,
        length: int | None = None,
        name: str | None = None,
    ) -> None: ...
    def set(
        self,
        *,
        read_ms: float | None = None,
        write_ms: float | None = None,
        zero_ms: float | None = None,
        discard_ms: float | None = None,
        flush_ms: float | None = None,
        bytes_per_s: float | None = None,
        offset: int | None = None,
        length: int | None = None,
    ) -> None: ...
    def hold(self, operation: Operation, offset: int = 0, length: int | None = None, *, after: bool = False) -> Gate: ...
    def open_all(self) -> None: ...

class Gate:
    """A closed gate of a DelayDevice; opens at the end of a `with` block."""

    @property
    def arrived(self) -> int: ...
    def wait_arrived(self, n: int = 1, timeout: float = 10) -> None: ...
    def open(self) -> None: ...
    def __enter__(self) -> Gate: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
