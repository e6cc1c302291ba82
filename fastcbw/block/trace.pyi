import os

from fastcbw.block.device import BlockDevice
from fastcbw.block.filter import Filter

HEAD: str
REQUESTS_LIMIT: int

class TraceDevice(Filter):
    """A filter that writes down each request that passes, as text."""

    @property
    def child(self) -> BlockDevice: ...
    @property
    def path(self) -> str: ...
    @property
    def requests(self) -> int: ...
    @property
    def error(self) -> str | None: ...
    def __init__(self, child: BlockDevice, path: str | os.PathLike[str], *, requests: int = ..., name: str | None = None) -> None: ...
    def stop(self) -> None: ...
