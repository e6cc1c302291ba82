import os

from fastcbw.block.file import FileDevice

class DirectDevice(FileDevice):
    """The bytes of a regular file or a block device, past the page cache."""

    @property
    def alignment(self) -> int: ...
    @property
    def memory_alignment(self) -> int: ...
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
        alignment: int | None = None,
    ) -> None: ...
