"""Where a backup goes: opened under a name that says it is incomplete, given its own name when it is done."""

from __future__ import annotations

import errno
import os
import stat

from fastcbw.block.device import ZERO, BlockDevice
from fastcbw.block.file import FileDevice
from fastcbw.block.image import same_image
from fastcbw.block.nbd import NbdDevice
from fastcbw.block.nbd_uri import is_nbd_uri
from fastcbw.errors import ImageLocked, JobFailed

#: What a target is called until it is complete.
INCOMPLETE = ".incomplete"
#: Bytes of an NBD target that are asked about at a time, to see whether it reads as zeroes.
_LOOK_BYTES = 1 << 30


class Target:
    """A target of LENGTH bytes. `device` is written; then complete(), or discard() after a cancel, or leave() after an error.

    target: a path; an NBD URI, whose export is written in place, since nothing can give it a name later; or a BlockDevice, which
        is the caller's and is written as it is.
    sources: paths, NBD URIs and descriptors of the images that are read or served; the target may be none of them.
    force: an existing regular file is replaced, at complete() and not before; a block device is overwritten.

    Raises FileExistsError, ValueError (target is a source, target smaller than the source, a directory, a URI that
    makes no sense), ImageLocked, OSError; then nothing was made or changed.
    """

    def __init__(self, target: str | os.PathLike | BlockDevice, length: int, *, sources: list[str | int] = (), force: bool = False):
        self.is_zero = False            # every byte of the device reads as zero
        self._path: str | None = None   # the name it gets in the end
        self._temporary: str | None = None
        self._owned = not isinstance(target, BlockDevice)
        self._force = force
        if isinstance(target, BlockDevice):
            self.device = target
            if isinstance(target, NbdDevice):
                self._check_other(target.uri, sources)
            elif hasattr(target, "fileno") and any(same_image(target.fileno(), source) for source in sources):
                raise ValueError(f"target {target.name}: is the source itself (name another device)")
            self._check_length(length)
            return
        path = os.fsdecode(target)
        if not path:
            raise ValueError("target: '' names no file")
        if is_nbd_uri(path):
            self._open_in_place(path, length, sources)
            return
        exists = os.path.lexists(path)
        if exists:
            path = os.path.realpath(path)
        if os.path.exists(path):
            self._check_other(path, sources)
            kind = os.stat(path).st_mode
            if stat.S_ISDIR(kind):
                raise IsADirectoryError(errno.EISDIR, "is a folder; the target is a file in it", path)
            if not stat.S_ISBLK(kind) and not stat.S_ISREG(kind):
                raise ValueError(f"target {path}: is a device node, fifo or socket (name a regular file or a block device)")
            if stat.S_ISBLK(kind):
                if not force:
                    raise FileExistsError(errno.EEXIST, "is a block device, whose content would be lost (--force overwrites it)", path)
                self.device = FileDevice(path, exclusive=True)
                try:
                    self._check_length(length)
                except ValueError:
                    self.device.close()
                    raise
                self._path = path
                return
            self._check_replaceable(path, force)
        self._path = path
        self._temporary = path + INCOMPLETE
        if not os.path.isdir(os.path.dirname(path) or "."):
            raise FileNotFoundError(errno.ENOENT, "the target's folder does not exist (make it first)", path)
        if os.path.exists(self._temporary) and any(same_image(self._temporary, source) for source in sources):
            raise ValueError(f"target {path}: its temporary name {self._temporary} is the source itself (name another file)")
        self._remove_stale(self._temporary)
        self.device = FileDevice(self._temporary, create_length=length, exclusive=True)
        self.is_zero = True

    def _open_in_place(self, uri: str, length: int, sources: list[str | int]) -> None:
        self._check_other(uri, sources)
        self.device = NbdDevice(uri)
        try:
            self._check_length(length)
            self.is_zero = self._reads_as_zeroes(length)
        except BaseException:
            self.device.close()
            raise

    def _reads_as_zeroes(self, length: int) -> bool:
        """Whether block status says so of all LENGTH bytes; looks no further than the first that it does not say it of."""
        for offset in range(0, length, _LOOK_BYTES):
            if not (self.device.extents(offset, min(_LOOK_BYTES, length - offset))["flags"] & ZERO).all():
                return False
        return True

    @staticmethod
    def _check_other(target: str, sources: list[str | int]) -> None:
        if any(same_image(target, source) for source in sources):
            raise ValueError(f"target {target}: is the source itself (name another)")

    def _check_length(self, length: int) -> None:
        if self.device.length < length:
            raise ValueError(f"target {self.device.name}: its {self.device.length} bytes are less than the source's {length}")
        if self.device.read_only:
            raise ValueError(f"target {self.device.name}: is read-only")

    @staticmethod
    def _check_replaceable(path: str, force: bool) -> None:
        if not force:
            raise FileExistsError(errno.EEXIST, "exists (--force replaces it)", path)
        if os.path.getsize(path):
            FileDevice(path, exclusive=True).close()        # in use by somebody? then ImageLocked says so

    @staticmethod
    def _remove_stale(path: str) -> None:
        """Remove what an earlier run left, unless a run is still writing it."""
        if not os.path.lexists(path):
            return
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "is in the way, and no file that a backup left (remove it)", path)
        try:
            if os.path.getsize(path):
                FileDevice(path, exclusive=True).close()
        except ImageLocked as error:
            raise ImageLocked(f"{error}: another backup is writing this target") from None
        os.unlink(path)

    @property
    def incomplete_name(self) -> str | None:
        """The file that a failed backup leaves, or None."""
        return self._temporary

    def sync(self) -> None:
        """Return when what was written is on stable storage."""
        self.device.flush()

    def complete(self) -> None:
        """Give the target its name. Call sync() before.

        The lock is kept until it has its name, so that no other backup takes it for a stale one. FileExistsError when
        somebody else made a file of that name meanwhile, JobFailed when the file that was written is no longer there.
        """
        try:
            if self._temporary is not None:
                self._check_still_ours()
                self._give_name()
        finally:
            self._close()

    def _check_still_ours(self) -> None:
        ours = os.fstat(self.device.fileno())
        try:
            found = os.lstat(self._temporary)
        except FileNotFoundError:
            found = None
        if found is None or (found.st_dev, found.st_ino) != (ours.st_dev, ours.st_ino):
            raise JobFailed(f"{self._temporary}: was removed or replaced by somebody else while it was written")

    def _give_name(self) -> None:
        if self._force:
            os.replace(self._temporary, self._path)
        else:
            try:
                os.link(self._temporary, self._path)
                os.unlink(self._temporary)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                # A file system without hard links (FAT and the like): not atomic against others, but nothing is replaced knowingly.
                if os.path.lexists(self._path):
                    raise FileExistsError(errno.EEXIST, "was made by somebody else meanwhile", self._path) from None
                os.rename(self._temporary, self._path)
        folder = os.open(os.path.dirname(self._path) or ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)        # the name, too, is to survive a power cut
        finally:
            os.close(folder)

    def discard(self) -> bool:
        """Remove what was written; False when it can't be removed (a device): it is incomplete and stays."""
        try:
            if self._temporary is None:
                return False
            self._check_still_ours()
            os.unlink(self._temporary)
            return True
        except JobFailed:
            return True         # somebody else removed it, and what is there now is theirs
        finally:
            self._close()

    def leave(self) -> str:
        """Leave it as it is, under the name that says incomplete; return the words for the error message."""
        self._close()
        if self._temporary is None:
            return f"{self.device.name} is incomplete"
        return f"the incomplete target is {self._temporary}"

    def _close(self) -> None:
        if self._owned:
            self.device.close()


def is_in_place(target: str | os.PathLike | BlockDevice) -> bool:
    """Whether TARGET is written where it is: a device object, an NBD export, a block device; not a file, which is made anew."""
    if isinstance(target, BlockDevice) or is_nbd_uri(os.fsdecode(target)):
        return True
    return os.path.exists(target) and stat.S_ISBLK(os.stat(target).st_mode)
