"""The dirty bitmaps of a daemon in another process, each method one QMP command."""

from __future__ import annotations

from fastcbw.errors import Error


class RemoteBitmap:
    """A dirty bitmap of a daemon's disk. What it marks is read over NBD, as the meta context `qemu:dirty-bitmap:NAME`."""

    def __init__(self, daemon, disk: str, name: str):
        self.daemon = daemon
        self.disk = disk
        self.name = name

    def _execute(self, verb: str, **arguments) -> None:
        self.daemon.client.execute(f"block-dirty-bitmap-{verb}", node=self.disk, **arguments)

    def report(self) -> dict:
        """Return what the daemon knows of it: name, granularity, count (bytes marked), recording, busy, persistent."""
        for found in self.daemon.status()["disks"].get(self.disk, {}).get("bitmaps", ()):
            if found["name"] == self.name:
                return found
        raise Error(f"bitmap {self.name!r} of {self.disk}: not found")

    @property
    def granularity(self) -> int:
        """Bytes of the disk that one bit stands for."""
        return self.report()["granularity"]

    @property
    def enabled(self) -> bool:
        """Whether guest writes mark it."""
        return self.report()["recording"]

    def clear(self) -> None:
        """Forget what is marked: from here on it is what changes."""
        self._execute("clear", name=self.name)

    def enable(self) -> None:
        """Mark guest writes from here on."""
        self._execute("enable", name=self.name)

    def disable(self) -> None:
        """Mark no more guest writes."""
        self._execute("disable", name=self.name)

    def merge(self, *sources: str | RemoteBitmap) -> None:
        """Mark also what the bitmaps SOURCES of the same disk mark."""
        names = [source if isinstance(source, str) else source.name for source in sources]
        self._execute("merge", target=self.name, bitmaps=names)

    def remove(self) -> None:
        """Remove the bitmap."""
        self._execute("remove", name=self.name)
