"""Where an increment goes: into a full backup that exists, in place, under a name that says incomplete meanwhile.

An increment is only what a bitmap marks, and raw has no place to say what is not in it; so there must be something to write it
into. While it is being written the file is neither the old backup nor the new one: it is called NAME.incomplete, also after a
crash, and gets its name back when all of it is there.
"""

from __future__ import annotations

import errno
import os
import stat

from fastcbw.block.device import BlockDevice
from fastcbw.block.file import FileDevice
from fastcbw.block.nbd_uri import is_nbd_uri
from fastcbw.jobs.target import INCOMPLETE, Target


class IncrementTarget(Target):
    """As Target, but an existing regular file is written in place, and a file that does not exist is refused."""

    def __init__(self, target: str | os.PathLike | BlockDevice, length: int, *, sources: list[str | int] = (), force: bool = False):
        path = None if isinstance(target, BlockDevice) else os.fsdecode(target)
        if not path or is_nbd_uri(path) or (os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode)):
            super().__init__(target, length, sources=sources, force=force)
            return
        if not os.path.lexists(path):
            left = f" ({path + INCOMPLETE} is there: give it its name back)" if os.path.lexists(path + INCOMPLETE) else ""
            raise FileNotFoundError(errno.ENOENT, f"an increment is written into a full backup, which must exist{left}", path)
        path = os.path.realpath(path)
        self._check_other(path, sources)
        if not force:
            raise FileExistsError(errno.EEXIST, "exists (--force writes the increment into it)", path)
        self._path, self._temporary = path, path + INCOMPLETE
        self._owned = True
        self._force = False         # nobody else's file is replaced when it gets its name back
        self.is_zero = False
        if os.path.lexists(self._temporary):
            raise FileExistsError(errno.EEXIST, "is in the way: an earlier backup left it (rename or remove it)", self._temporary)
        self.device = FileDevice(path, exclusive=True)
        try:
            self._check_length(length)
            os.rename(path, self._temporary)
        except BaseException:
            self.device.close()
            raise

    def discard(self) -> bool:
        """What was there before is gone: it stays, under the name that says incomplete."""
        return False

    def leave(self) -> str:
        self._close()
        if self._temporary is None:
            return super().leave()
        return (f"the target is incomplete and called {self._temporary} (give it its name back and run the increment again: "
                "the bitmap still marks all of it)")
