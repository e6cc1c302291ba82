"""Recognise the image formats that must not be opened as raw bytes.

Whoever serves a qcow2 file as raw hands the guest the container instead of the disk, and the first write destroys
it. LUKS is not in the table: a guest may well have encrypted its whole disk, and such a disk is a good raw image.
Neither is what QEMU itself cannot tell from a raw disk. Sources: the probe functions of QEMU's block drivers.
"""

from __future__ import annotations

from collections.abc import Callable

from fastcbw.errors import FormatRefused

#: (format, offset, bytes found there); a negative offset counts from the end of the file.
_MAGICS = (
    ("qcow2", 0, b"QFI\xfb\x00\x00\x00\x02"),
    ("qcow2", 0, b"QFI\xfb\x00\x00\x00\x03"),
    ("qcow", 0, b"QFI\xfb"),
    ("qed", 0, b"QED\x00"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vhdx", 0, b"vhdxfile"),
    ("vdi", 64, b"\x7f\x10\xda\xbe"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
    ("vpc", 0, b"conectix"),
    ("vpc", -512, b"conectix"),     # of a fixed VHD the footer is all there is
)


def probe_format(read: Callable[[int, int], bytes], length: int) -> str | None:
    """Return the name that qemu-img gives the format of an image of LENGTH bytes, None for raw bytes.

    read: read(offset, length) returns those bytes, a device's door.
    """
    head = read(0, min(512, length))
    tail = read(length - 512, 512) if length >= 1024 else b""
    for name, offset, magic in _MAGICS:
        if head.startswith(magic, offset) if offset >= 0 else tail.startswith(magic):
            return name
    return None


def refuse_format(read: Callable[[int, int], bytes], length: int, path: str) -> None:
    """Raise FormatRefused, naming PATH, the format and what to do, unless the image is raw bytes."""
    found = probe_format(read, length)
    if found is not None:
        raise FormatRefused(
            f"{path}: the image is in format {found}, not raw (convert it: qemu-img convert -f {found} -O raw IMAGE "
            "RAW-IMAGE; or, if these bytes are the disk, open it with --format raw)")
