import os

from fastcbw.block.device import BlockDevice

class FileDevice(BlockDevice):
    """The bytes of a regular file or a block device, through the page cache."""

    @property
    def path(self) -> str: ...
    @property
    def in_memory(self) -> bool: ...
    def __init__(
        self,
        path: str | bytes | os.PathLike[str],
        *,
        read_only: bool = False,
        create_length: int | str | None = None,
        name: str | None = None,
        lock: bool = True,
        exclusive: bool = False,
        io: str = "sync",
    ) -> None: ...
    def fileno(self) -> int: ...
