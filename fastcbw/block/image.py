"""Open what the user calls an image: the one place where a path or an NBD URI becomes a device."""

from __future__ import annotations

import os
import stat

from fastcbw.block.device import BlockDevice
from fastcbw.block.direct import DirectDevice
from fastcbw.block.file import FileDevice
from fastcbw.block.nbd import NbdDevice
from fastcbw.block.nbd_uri import is_nbd_uri, parse_nbd_uri
from fastcbw.block.probe import refuse_format
from fastcbw.block.python import Device, PythonDevice
from fastcbw.block.queue import check_engine

#: The values of `format` that are built.
FORMATS = ("raw",)

Path = str | bytes | os.PathLike


def open_image(
    path: Path,
    *,
    format: str | None = None,
    read_only: bool = False,
    lock: bool = True,
    name: str | None = None,
    direct: bool = False,
    io: str | None = None,
) -> FileDevice | DirectDevice | NbdDevice:
    """Open an image file, a block device, or an NBD export by its URI.

    path: what begins as an NBD URI is one; a file of such a name is opened as ./NAME.
    format: "raw" takes the bytes as they are; None also, unless they carry the magic of another format.
    read_only, lock, name: as for FileDevice; who else has an export is its server's business, so lock has no meaning there.
    direct: past the page cache (O_DIRECT); ValueError for an NBD URI.
    io: "sync", "threads" or "uring": who does requests that would wait, for queues and exports; None: choose_engine(). An NBD
        connection has requests under way by itself: any other than None and "sync" is a ValueError.
    Raises FormatRefused, ImageLocked, OSError with the file's name or the URI; ValueError for a format or a kind of URI that is
    not built; nothing is left open.
    """
    check_format(format)
    text = os.fsdecode(path)
    device: FileDevice | DirectDevice | NbdDevice
    if is_nbd_uri(text):
        if direct:
            raise ValueError(f"direct: {text}: is the NBD server's to choose (open a file or a block device past the page cache)")
        if io not in (None, "sync"):
            raise ValueError(f"io: {text}: {io!r} is for files and block devices (an NBD connection has requests under way by itself)")
        device = NbdDevice(text, read_only=read_only, name=name)
    else:
        device = (DirectDevice if direct else FileDevice)(text, read_only=read_only, lock=lock, name=name,
                                                          io=choose_engine(direct) if io is None else io)
    try:
        if format is None:
            refuse_format(device, text)
    except BaseException:
        device.close()
        raise
    return device


def choose_engine(direct: bool) -> str:
    """Return the engine for those who name none: what was measured to be fastest.

    Through the page cache most requests don't wait and the rest goes to threads; past it all wait, and io_uring is ahead where the
    kernel has it.
    """
    if not direct:
        return "threads"
    try:
        check_engine("uring")
    except OSError:
        return "threads"
    return "uring"


def as_device(
    image: Path | BlockDevice | Device,
    *,
    format: str | None = None,
    read_only: bool = False,
    lock: bool = True,
    name: str | None = None,
    direct: bool = False,
    io: str | None = None,
) -> BlockDevice:
    """Return the device that IMAGE is, or is made into: a BlockDevice as it is, a Device adapted, a path opened.

    Raises as open_image does; ValueError where an option has no meaning for a device that exists already.
    """
    if isinstance(image, (BlockDevice, Device)):
        check_format(format)
        device = PythonDevice(image, name=name) if isinstance(image, Device) else image
        if direct:
            raise ValueError(f"direct: {device.name}: the device exists already (open the file itself with direct)")
        if io not in (None, "sync"):
            raise ValueError(f"io: {device.name}: the device exists already (open the file itself with io={io!r})")
        if read_only and not device.read_only:
            raise ValueError(f"read_only: {device.name}: the device exists already and is writable (open it read-only itself)")
        return device
    return open_image(image, format=format, read_only=read_only, lock=lock, name=name, direct=direct, io=io)


def check_format(format: str | None) -> None:
    """Raise ValueError unless FORMAT is None or one that is built."""
    if format is not None and format not in FORMATS:
        raise ValueError(f"format: {format!r} is not built yet (there is {', '.join(FORMATS)})")


def same_image(one: Path | int, other: Path | int) -> bool:
    """Tell whether two paths, NBD URIs or descriptors are one image, as far as names can tell.

    Raises OSError as same_file; ValueError for a URI that makes no sense.
    """
    uris = [not isinstance(image, int) and is_nbd_uri(os.fsdecode(image)) for image in (one, other)]
    if all(uris):
        return parse_nbd_uri(os.fsdecode(one)).same_as(parse_nbd_uri(os.fsdecode(other)))
    return not any(uris) and same_file(one, other)


def same_file(one: Path | int, other: Path | int) -> bool:
    """Tell whether two paths or descriptors are one file: the same inode, or two nodes of the same block device.

    Raises OSError with the file's name when one of them does not exist.
    """
    a, b = os.stat(one), os.stat(other)
    if stat.S_ISBLK(a.st_mode) and stat.S_ISBLK(b.st_mode):
        return a.st_rdev == b.st_rdev
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)
