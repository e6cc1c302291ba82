"""The file of a disk tier: nameless, sparse, gone with the process."""

from __future__ import annotations

import errno
import os
import tempfile

from fastcbw.block.file import FileDevice

#: The log is written through up to this many times its limit; its length is only address space, the file is sparse.
_TURNOVER = 64
_LENGTH_MAX = 1 << 43        # below what ext4 (16 TiB) and tmpfs can address


def open_spill(folder: str | os.PathLike, limit: int) -> FileDevice:
    """Make a file for the disk tier in FOLDER and return it as a device.

    limit: bytes that the tier may hold. The file has no name: nothing is left behind, even by kill -9.
    Raises OSError naming FOLDER when it is no folder, is not writable, or its file system can't make such a file.
    """
    path = os.fsdecode(folder)
    if not os.path.isdir(path):
        code = errno.ENOTDIR if os.path.exists(path) else errno.ENOENT
        raise OSError(code, "spill: needs a folder for the disk tier: " + os.strerror(code), path)
    descriptor = _nameless(path)
    try:
        length = min(_LENGTH_MAX, limit * _TURNOVER)
        while True:
            try:
                os.ftruncate(descriptor, length)
                break
            except OSError as error:
                if error.errno != errno.EFBIG or length // 2 < limit:
                    raise OSError(error.errno, f"spill: a file of {length} bytes cannot be made: {error.strerror}", path) from None
                length //= 2
        return FileDevice(f"/proc/self/fd/{descriptor}", name=f"disk tier in {path}", lock=False)
    finally:
        os.close(descriptor)


def _nameless(folder: str) -> int:
    """A descriptor of a new file without a name in FOLDER."""
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise OSError(error.errno, "spill: " + os.strerror(error.errno), folder) from None
    descriptor, name = tempfile.mkstemp(prefix=".fastcbw-", dir=folder)
    os.unlink(name)
    return descriptor
