"""The exceptions of the package.

Arguments that make no sense raise ValueError or TypeError before anything has changed; I/O that fails raises
OSError with the errno of the system call. What is left, the verdicts of fastcbw itself, is here.
"""


class Error(Exception):
    """Base of what only fastcbw can find wrong."""


class SnapshotBroken(Error):
    """The snapshot was given up to keep the guest going; the message says why and since when."""


class NotInSnapshot(Error):
    """The range, or a part of it, lies outside what the snapshot keeps (never copied, or discarded)."""


class LimitReached(Error):
    """A hard limit (snapshots, connections, memory, disk) leaves no room for what was asked."""


class ImageLocked(Error):
    """Another process holds the image; the message names the file and the permission in conflict."""


class FormatRefused(Error):
    """The image is not raw: it carries the magic of a format that must not be opened as raw."""


class JobFailed(Error):
    """A job ended with an error; the message names the operation, the offset and the reason."""


class JobCancelled(Error):
    """A job ended because it was cancelled."""
