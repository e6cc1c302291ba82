"""Image locks: byte-range locks that QEMU's file driver understands, so that it and we refuse each other.

As in QEMU's block/file-posix.c: for each permission taken on an image a shared lock lies on byte 100 + n, for each
permission that is not shared with others one on byte 200 + n, with n from PERMISSIONS. A conflict is a lock of
somebody else on 100 + n when we don't share n, or on 200 + n when we take n; it is looked for after our own locks lie,
so that of two who open at the same time at least one sees the other. Nobody ever takes an exclusive lock.

The locks are OFD locks: they belong to the open file, conflict with another open of the same process, and go when
its last descriptor is closed. On a block device they lie on the device node's inode.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import NamedTuple

from fastcbw.errors import ImageLocked

#: Bit n of a permission set, and its name for messages.
PERMISSIONS = ("consistent read", "write", "write unchanged", "resize")
CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE = 1, 2, 4, 8

_TAKEN_BASE = 100
_UNSHARED_BASE = 200
# struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid, padded to 8 bytes.
_FLOCK = struct.Struct("@hhqqi0q")


class Permissions(NamedTuple):
    """What an opener does with an image (taken), and what it lets others do meanwhile (shared): sums of the bits."""

    taken: int
    shared: int


def image(read_only: bool) -> Permissions:
    """Return what an image wants: nobody else may write or resize it; readers are welcome."""
    taken = CONSISTENT_READ if read_only else CONSISTENT_READ | WRITE | WRITE_UNCHANGED
    return Permissions(taken, CONSISTENT_READ | WRITE_UNCHANGED)


def target() -> Permissions:
    """Return what the target of a backup wants: to be alone, for until the job has ended nothing in it is good."""
    return Permissions(CONSISTENT_READ | WRITE, 0)


def lock_image(fd: int, path: str, permissions: Permissions) -> None:
    """Take the locks of PERMISSIONS on the open file FD, or raise ImageLocked naming PATH and the permission.

    On error some of the locks may lie on FD; the caller closes it. OSError (with the file's name) where the file
    system cannot lock.
    """
    unshared = ~permissions.shared
    for bit, _ in enumerate(PERMISSIONS):
        if permissions.taken >> bit & 1:
            _take(fd, _TAKEN_BASE + bit, path)
        if unshared >> bit & 1:
            _take(fd, _UNSHARED_BASE + bit, path)
    for bit, permission in enumerate(PERMISSIONS):
        if unshared >> bit & 1 and _is_taken(fd, _TAKEN_BASE + bit, path):
            raise ImageLocked(
                f"{path}: the image is in use: somebody else holds the permission \"{permission}\", which is not "
                "shared here (end the other one, or open without the lock if you know that it does no harm)")
        if permissions.taken >> bit & 1 and _is_taken(fd, _UNSHARED_BASE + bit, path):
            raise ImageLocked(
                f"{path}: the image is in use: somebody else does not share the permission \"{permission}\" "
                "(end the other one, or open without the lock if you know that it does no harm)")


def _take(fd: int, byte: int, path: str) -> None:
    """Put a shared lock on one byte. Only an exclusive lock, which nobody of this protocol takes, is in the way."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise ImageLocked(f"{path}: the image is in use: somebody holds an exclusive lock on it") from None
        raise OSError(error.errno, f"cannot be locked: {error.strerror} (open it without the lock)", path) from None


def _is_taken(fd: int, byte: int, path: str) -> bool:
    """Tell whether another open file has any lock on the byte."""
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    except OSError as error:
        raise OSError(error.errno, f"cannot be locked: {error.strerror} (open it without the lock)", path) from None
    return _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK
