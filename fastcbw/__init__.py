"""fastcbw: a point-in-time view of a virtual disk while the guest keeps writing, and backups made from it."""

from fastcbw.version import __version__
