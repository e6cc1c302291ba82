"""fastcbw: a point-in-time view of a virtual disk while the guest keeps writing, and backups made from it."""

from fastcbw.bitmaps.bitmap import ClusterBitmap
from fastcbw.block.device import BlockDevice
from fastcbw.block.python import Device
from fastcbw.disk import Disk, Snapshot, group, open
from fastcbw.errors import (
    Error,
    FormatRefused,
    ImageLocked,
    JobCancelled,
    JobFailed,
    LimitReached,
    NotInSnapshot,
    SnapshotBroken,
)
from fastcbw.qmp.remote import connect
from fastcbw.version import __version__

__all__ = [
    "BlockDevice", "ClusterBitmap", "Device", "Disk", "Error", "FormatRefused", "ImageLocked", "JobCancelled",
    "JobFailed", "LimitReached", "NotInSnapshot", "Snapshot", "SnapshotBroken", "__version__", "connect", "group", "open",
]
