"""FileDevice: a raw image in a regular file or on a block device, read and written through the page cache.

A leaf of the data plane. Invariants: a request is either done in full or an error; the end of a file that somebody
shrank is -EIO and never zeroes; a failed flush stays failed (the kernel reports a lost write-back once, and what
was lost does not come back). The system calls are in csrc/sysio.h; the image locks, which go with the descriptor, in
block/locks.py.
"""

from libc.errno cimport EAGAIN, EINVAL, EOPNOTSUPP
from libc.stdint cimport int64_t, uint32_t, uint64_t

import errno as _errno
import os as _os
import stat as _stat

from fastcbw.block import locks as _locks
from fastcbw.block.device import os_error as _os_error
from fastcbw.block.device cimport (BlockDevice, FAST_ONLY, FUA, IO_READ, IO_SYNC, IO_WRITE, KernelIo, MAY_UNMAP,
                                   QUEUE_ENDED, STATUS_HOLE, STATUS_ZERO)
from fastcbw.block.queue import check_engine as _check_engine
from fastcbw.block.sys cimport iovec
from fastcbw.kernels.atomic cimport load32_relaxed, load_relaxed, store32_relaxed, store_relaxed
from fastcbw.units import parse_size

cdef extern from "sysio.h" nogil:
    int fcbw_pread_all(int fd, char *buffer, int64_t offset, int64_t length) noexcept
    int fcbw_pwrite_all(int fd, const char *buffer, int64_t offset, int64_t length) noexcept
    int fcbw_preadv_all(int fd, const iovec *vector, int count, int64_t offset, int64_t length) noexcept
    int fcbw_pwritev_all(int fd, const iovec *vector, int count, int64_t offset, int64_t length) noexcept
    int fcbw_pwritev_durable(int fd, const iovec *vector, int count, int64_t offset, int64_t length) noexcept
    int fcbw_preadv_cached(int fd, const iovec *vector, int count, int64_t offset, int64_t length) noexcept
    int fcbw_punch_hole(int fd, int64_t offset, int64_t length) noexcept
    int fcbw_zero_range(int fd, int64_t offset, int64_t length) noexcept
    int fcbw_fdatasync(int fd) noexcept
    int fcbw_discard_sectors(int fd, int64_t offset, int64_t length) noexcept
    int fcbw_sector_bytes(int fd) noexcept
    bint fcbw_in_memory(int fd) noexcept
    int fcbw_read_ahead(int fd, int64_t offset, int64_t length) noexcept
    bint fcbw_all_cached(int fd, int64_t offset, int64_t length) noexcept
    int64_t fcbw_first_extent(int fd, int64_t offset, int64_t length, bint *hole, int64_t *data_end) noexcept

cdef int64_t SHORT_RANGE = 1 << 20

_KINDS = [
    (_stat.S_ISFIFO, "a fifo"), (_stat.S_ISSOCK, "a socket"), (_stat.S_ISCHR, "a character device"),
]


def _refuse(code, why, path):
    """Raise the OSError of CODE for PATH, with WHY in place of the system's text."""
    raise OSError(code, why, path)


def _check_kind(status, path):
    """Raise OSError with the file's name unless STATUS is that of a regular file or a block device."""
    if _stat.S_ISREG(status.st_mode) or _stat.S_ISBLK(status.st_mode):
        return
    if _stat.S_ISDIR(status.st_mode):
        _refuse(_errno.EISDIR, "is a directory, not an image (a regular file or a block device)", path)
    for test, kind in _KINDS:
        if test(status.st_mode):
            break
    else:
        kind = "of an unknown kind"
    _refuse(_errno.EINVAL, f"is {kind}, not an image (a regular file or a block device)", path)


cdef class FileDevice(BlockDevice):
    """The bytes of a file.

    path: str, bytes or PathLike; a regular file of any length but 0, or a block device.
    read_only: opened so; writing through a door is a PermissionError.
    create_length: bytes or a size with a suffix; the file must not exist and is made with that length, all hole.
    name: for messages; default: the path.
    lock: take the image locks that QEMU understands (block/locks.py).
    exclusive: with lock, share nothing with anybody: what the target of a backup wants.
    io: the engine of queues for this device, "sync", "threads" or "uring"; one that is not there is an OSError.

    Raises OSError with the file's name (FileNotFoundError, PermissionError, IsADirectoryError, FileExistsError, ...),
    fastcbw.ImageLocked, ValueError for a length that makes no sense; nothing is left open, and no file is left made.
    """

    def __cinit__(self, path, *, bint read_only=False, create_length=None, str name=None, bint lock=True,
                  bint exclusive=False, str io="sync", alignment=None):
        self.fd = -1
        self.io_engine = _check_engine(io)
        if alignment is not None and type(self) is FileDevice:
            raise ValueError(f"alignment: {alignment} means nothing through the page cache (it is DirectDevice's)")
        self.path = _os.fsdecode(path)
        self.name = self.path if name is None else name
        self.read_only = read_only
        self.sector = 1
        if create_length is not None:
            create_length = parse_size(create_length, "create_length")
            if create_length == 0:
                raise ValueError(f"create_length: {self.path}: a device needs at least one byte, got 0")
            if read_only:
                raise ValueError(f"read_only: {self.path}: a file that is created cannot be read-only")
        self.fd = self._open(create_length is not None)
        try:
            self._set_up(create_length, lock, exclusive)
        except BaseException:
            _os.close(self.fd)
            self.fd = -1
            if create_length is not None:
                _os.unlink(self.path)
            raise

    def _open(self, create):
        """Return a descriptor of the file. Called before anything else exists; a subclass may open it another way."""
        if create:
            return _os.open(self.path, _os.O_RDWR | _os.O_CREAT | _os.O_EXCL | _os.O_CLOEXEC, 0o666)
        # Look before opening: opening a fifo would wait, opening a character device may do things.
        _check_kind(_os.stat(self.path), self.path)
        return _os.open(self.path, (_os.O_RDONLY if self.read_only else _os.O_RDWR) | _os.O_CLOEXEC)

    def _set_up(self, create_length, lock, exclusive):
        cdef int sector
        status = _os.fstat(self.fd)
        _check_kind(status, self.path)
        if lock:
            _locks.lock_image(self.fd, self.path, _locks.target() if exclusive else _locks.image(self.read_only))
        if create_length is not None:
            try:
                _os.ftruncate(self.fd, create_length)
            except OSError as error:
                _refuse(error.errno, f"cannot be made {create_length} bytes long: {error.strerror}", self.path)
        if _stat.S_ISBLK(status.st_mode):
            sector = fcbw_sector_bytes(self.fd)
            if sector < 0:
                _refuse(-sector, "does not tell its sector size: " + _os.strerror(-sector), self.path)
            self.sector = sector
        else:
            self.in_memory = fcbw_in_memory(self.fd)
        self.queueable = not self.in_memory     # a thread or the kernel would only take longer
        self.can_cache = type(self) is FileDevice
        self.length = _os.lseek(self.fd, 0, _os.SEEK_END)
        if self.length == 0:
            _refuse(_errno.EINVAL, "is empty; an image has at least one byte", self.path)

    def __dealloc__(self):
        # Never raises, and a warning would come too late: the owner that forgot to close has gone.
        if self.fd >= 0:
            try:
                _os.close(self.fd)
            except (OSError, AttributeError, TypeError):    # the interpreter is going down
                pass

    def fileno(self):
        """Return the descriptor (for fstat and the like); the device keeps it. ValueError when closed."""
        self.check_open()
        return self.fd

    def close(self):
        """Close the file and with it drop the image locks. Closing twice is no error. The caller has ended all requests."""
        cdef int fd = self.fd
        self.closed = True
        self.fd = -1
        if fd >= 0:
            _os.close(fd)

    cdef int fail(self, int code, str operation, int64_t offset, int64_t length) except -1:
        if code == -_errno.EIO and operation == "read":
            end = _os.lseek(self.fd, 0, _os.SEEK_END)
            if end < offset + length:
                raise _os_error(_errno.EIO, f"{self.name}: read {offset}+{length}: the image is shorter than announced, "
                                            f"{end} of {self.length} bytes (somebody shrank it)")
        return BlockDevice.fail(self, code, operation, offset, length)

    # -- data plane

    cdef int pread(self, void *buffer, int64_t offset, int64_t length) noexcept nogil:
        return fcbw_pread_all(self.fd, <char *>buffer, offset, length)

    cdef int preadv(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        return fcbw_preadv_all(self.fd, vector, count, offset, length)

    cdef int preadv_nowait(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        cdef int code
        if self.in_memory:
            return fcbw_preadv_all(self.fd, vector, count, offset, length)
        if load32_relaxed(&self.lacks_nowait):
            return -EAGAIN
        code = fcbw_preadv_cached(self.fd, vector, count, offset, length)
        if code == -EOPNOTSUPP:
            store32_relaxed(&self.lacks_nowait, 1)
            return -EAGAIN
        return code

    cdef int pwrite(self, const void *buffer, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef iovec vector
        if flags & FUA:
            vector.iov_base = <void *>buffer
            vector.iov_len = <size_t>length
            return self.pwritev_durable(&vector, 1, offset, length)
        return fcbw_pwrite_all(self.fd, <const char *>buffer, offset, length)

    cdef int pwritev_nowait(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        # The page cache takes a write at once (or slows the writer down, when the disk can't keep up: that is meant).
        if flags & FUA and not self.in_memory:
            return -EAGAIN
        return self.pwritev(vector, count, offset, length, flags)

    cdef int pwritev(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        if flags & FUA:
            return self.pwritev_durable(vector, count, offset, length)
        return fcbw_pwritev_all(self.fd, vector, count, offset, length)

    cdef int pwritev_durable(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        """Write, and sync only this range where the kernel can (RWF_DSYNC), else all of the file."""
        cdef uint32_t failed = load32_relaxed(&self.sync_errno)
        cdef int code, durable = -EOPNOTSUPP
        if failed:
            return -<int>failed
        if not load32_relaxed(&self.lacks_durable):
            durable = fcbw_pwritev_durable(self.fd, vector, count, offset, length)
            if durable == 0:
                return 0
            if durable == -EOPNOTSUPP:
                store32_relaxed(&self.lacks_durable, 1)
        # Lacking, or failed: the plain write tells whether it was the write that failed, or the sync.
        code = fcbw_pwritev_all(self.fd, vector, count, offset, length)
        if code:
            return code
        if durable == -EOPNOTSUPP:
            return self.sync()
        store32_relaxed(&self.sync_errno, <uint32_t>(-durable))
        return durable

    cdef int write_zeroes_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        """Zero whole sectors by fallocate, the ends of a range that cuts a block device's sectors by writing."""
        cdef int64_t head = 0, tail = 0
        cdef int code
        if self.sector > 1:
            head = -offset % self.sector
            if head < 0:
                head += self.sector
            if head > length:
                head = length
            tail = (length - head) % self.sector
        if head or tail:
            if flags & FAST_ONLY:
                return -EOPNOTSUPP
            code = 0
            if head:
                code = BlockDevice.write_zeroes_at(self, offset, head, 0)
            if code == 0 and tail:
                code = BlockDevice.write_zeroes_at(self, offset + length - tail, tail, 0)
            if code == 0 and head + tail < length:
                code = self.zero_sectors(offset + head, length - head - tail, flags)
        else:
            code = self.zero_sectors(offset, length, flags)
        if code == 0 and flags & FUA:
            return self.sync()
        return code

    cdef int zero_sectors(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        """A hole where allowed, else allocated zeroes, else (the file system has neither) a write of zeroes."""
        cdef int code = self.zero_by_kernel(offset, length, flags)
        if code == -EOPNOTSUPP:
            return BlockDevice.write_zeroes_at(self, offset, length, flags & FAST_ONLY)
        return code

    cdef int zero_by_kernel(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        """Zero without writing, or -EOPNOTSUPP.

        Linux takes the same two calls on block devices: unmap with zeroes guaranteed, and WRITE ZEROES without unmap.
        """
        cdef int code
        if flags & MAY_UNMAP and not load32_relaxed(&self.lacks_punch):
            code = fcbw_punch_hole(self.fd, offset, length)
            store_relaxed(&self.data_end, 0)
            if code != -EOPNOTSUPP and code != -EINVAL:
                return code
            if code == -EOPNOTSUPP:
                store32_relaxed(&self.lacks_punch, 1)
        # On a block device the kernel may write the zeroes itself, so that is not known to be fast.
        if not load32_relaxed(&self.lacks_zero_range) and not (self.sector > 1 and flags & FAST_ONLY):
            code = fcbw_zero_range(self.fd, offset, length)
            if code != -EOPNOTSUPP and code != -EINVAL:
                return code
            if code == -EOPNOTSUPP:
                store32_relaxed(&self.lacks_zero_range, 1)
        return -EOPNOTSUPP

    cdef int discard_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef int64_t end = offset + length
        cdef int code = 0
        if not load32_relaxed(&self.lacks_punch):
            if self.sector > 1:
                offset = (offset + self.sector - 1) // self.sector * self.sector
                end = end // self.sector * self.sector
                if offset < end:
                    code = fcbw_discard_sectors(self.fd, offset, end - offset)
            else:
                code = fcbw_punch_hole(self.fd, offset, length)
                store_relaxed(&self.data_end, 0)
            if code == -EOPNOTSUPP or code == -EINVAL:
                code = 0        # advisory
        if code == 0 and flags & FUA:
            return self.sync()
        return code

    cdef int sync(self) noexcept nogil:
        cdef uint32_t failed = load32_relaxed(&self.sync_errno)
        cdef int code
        if failed:
            return -<int>failed
        code = fcbw_fdatasync(self.fd)
        if code:
            store32_relaxed(&self.sync_errno, <uint32_t>(-code))
        return code

    cdef int cache_at(self, int64_t offset, int64_t length) noexcept nogil:
        """Have the page cache begin to read it; waits for nothing but a place in the disk's queue. Advisory, so no error."""
        if self.can_cache and not self.in_memory:
            fcbw_read_ahead(self.fd, offset, length)
        return 0

    cdef bint queue_begin(self, int operation, const iovec *vector, int count, int64_t offset, int64_t length,
                          uint32_t flags, KernelIo *io) noexcept nogil:
        # Not a durable write: pwritev_durable tells a write that failed from a sync that failed.
        io.fd = self.fd
        if operation == IO_SYNC:
            return load32_relaxed(&self.sync_errno) == 0
        return operation == IO_READ or operation == IO_WRITE and not flags & FUA

    cdef int queue_end(self, int operation, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags,
                       KernelIo *io, int code) noexcept nogil:
        if operation == IO_SYNC and code:
            store32_relaxed(&self.sync_errno, <uint32_t>(-code))
        return QUEUE_ENDED

    cdef int64_t block_status(self, int64_t offset, int64_t length, uint32_t *flags) noexcept nogil:
        """Ask the file system, once for each extent of data: it walks page by page, on tmpfs, to where the data ends.

        Whoever asks range by range would else have it walk from each range to the end of the file. A short range of a file in
        memory is looked up by itself first: an increment has few of them, and the walk takes 7 us for each MiB of data behind it.
        """
        cdef bint hole = False
        cdef int64_t got, end = <int64_t>load_relaxed(&self.data_end)
        flags[0] = 0
        if self.sector > 1:     # block devices don't tell
            return length
        if <int64_t>load_relaxed(&self.data_begin) <= offset < end:
            return end - offset if end - offset < length else length
        if self.in_memory and length <= SHORT_RANGE and fcbw_all_cached(self.fd, offset, length):
            return length
        got = fcbw_first_extent(self.fd, offset, length, &hole, &end)
        if hole:
            flags[0] = STATUS_HOLE | STATUS_ZERO
        elif end:
            store_relaxed(&self.data_end, 0)
            store_relaxed(&self.data_begin, <uint64_t>offset)
            store_relaxed(&self.data_end, <uint64_t>end)
        return got
