"""BlockDevice: the one data-plane interface, and the door from Python to it.

The cdef methods are the data plane: subclasses override pread or preadv, pwrite or pwritev, and what else they can
do better than the defaults here. The def methods are the control plane's door, written once for every device: they
check the arguments, give up the interpreter lock for the whole request, and turn -errno into OSError.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EINVAL, EOPNOTSUPP
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free
from libc.string cimport strerror

import errno as _errno
import os as _os

import numpy as _np

#: dtype of an array of extents: bytes, bytes, STATUS_* bits (1 hole, 2 zero, 4 not in the snapshot).
EXTENT_DTYPE = _np.dtype([("offset", "<i8"), ("length", "<i8"), ("flags", "<u4")])

HOLE = STATUS_HOLE
ZERO = STATUS_ZERO
ABSENT = STATUS_ABSENT

cdef int64_t ZEROES_CHUNK = 1 << 20


#: Names of the engines of a queue, by number.
ENGINES = ("sync", "threads", "uring")


def engine_number(name):
    """Return the number of the engine NAME; ValueError naming what exists."""
    if name not in ENGINES:
        raise ValueError(f"io: {name!r} is no engine (there are {', '.join(ENGINES)})")
    return ENGINES.index(name)


def os_error(code, what):
    """Return the OSError for errno CODE with WHAT (device, operation, offset, length) in the message.

    Built as OSError(errno, text), so that Python picks the subclass (PermissionError, TimeoutError, ...).
    """
    return OSError(code, f"{what}: {_os.strerror(code)}")


cdef class BlockDevice:
    """Bytes at offsets, with holes.

    Doors are safe from any thread. Errors: ValueError for a range outside the device or a closed device; TypeError
    for what is no buffer; OSError for I/O, after which a written range holds any mixture of old and new bytes.
    """

    # -- data plane: defaults

    cdef int pread(self, void *buffer, int64_t offset, int64_t length) noexcept nogil:
        cdef iovec vector
        vector.iov_base = buffer
        vector.iov_len = <size_t>length
        return self.preadv(&vector, 1, offset, length)

    cdef int preadv(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        return -EOPNOTSUPP

    cdef int preadv_nowait(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        return -EAGAIN

    cdef int pwritev_nowait(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        if self.queueable:
            return -EAGAIN
        return self.pwritev(vector, count, offset, length, flags)

    cdef bint may_wait(self, int operation) noexcept nogil:
        return self.queueable

    cdef int pwrite(self, const void *buffer, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef iovec vector
        vector.iov_base = <void *>buffer
        vector.iov_len = <size_t>length
        return self.pwritev(&vector, 1, offset, length, flags)

    cdef int pwritev(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        return -EOPNOTSUPP

    cdef int write_zeroes_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        """Default: write zero bytes in pieces; never fast."""
        cdef void *zeroes
        cdef int64_t piece
        cdef int code = 0
        if flags & FAST_ONLY:
            return -EOPNOTSUPP
        piece = length if length < ZEROES_CHUNK else ZEROES_CHUNK
        zeroes = calloc(1, <size_t>piece)
        if zeroes == NULL:
            return -12      # ENOMEM
        while length > 0 and code == 0:
            if piece > length:
                piece = length
            code = self.pwrite(zeroes, offset, piece, flags & FUA)
            offset += piece
            length -= piece
        free(zeroes)
        return code

    cdef int discard_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        """Default: advisory, so nothing; but FUA still means what it says."""
        if flags & FUA:
            return self.sync()
        return 0

    cdef int check_once(self, int64_t offset, int64_t length) noexcept nogil:
        return -EOPNOTSUPP

    cdef int delivered(self, int64_t offset, int64_t length) noexcept nogil:
        return -EOPNOTSUPP

    cdef int sync(self) noexcept nogil:
        return 0

    cdef int64_t block_status(self, int64_t offset, int64_t length, uint32_t *flags) noexcept nogil:
        """Default: all data."""
        flags[0] = 0
        return length

    cdef int cache_at(self, int64_t offset, int64_t length) noexcept nogil:
        """Default: nothing."""
        return 0

    cdef bint queue_begin(self, int operation, const iovec *vector, int count, int64_t offset, int64_t length,
                          uint32_t flags, KernelIo *io) noexcept nogil:
        return False

    cdef int queue_end(self, int operation, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags,
                       KernelIo *io, int code) noexcept nogil:
        return QUEUE_ENDED

    cdef void queue_late(self, int operation, KernelIo *io) noexcept nogil:
        pass

    cdef int explain(self, int code, char *text, size_t size) noexcept nogil:
        snprintf(text, size, "%s", strerror(-code))
        return -code

    # -- control plane: the door

    cdef int check_open(self) except -1:
        if self.closed:
            raise ValueError(f"{self.name}: the device is closed")
        return 0

    cdef int check_range(self, int64_t offset, int64_t length) except -1:
        self.check_open()
        if offset < 0 or length < 0 or offset > self.length - length:
            raise ValueError(
                f"{self.name}: range {offset}+{length} is not within the device's {self.length} bytes")
        return 0

    cdef int check_writable(self) except -1:
        if self.read_only:
            raise PermissionError(_errno.EACCES, f"{self.name}: opened read-only")
        return 0

    cdef int fail(self, int code, str operation, int64_t offset, int64_t length) except -1:
        """Raise for -errno. Subclasses whose errors carry more (a broken snapshot) override it."""
        raise os_error(-code, f"{self.name}: {operation} {offset}+{length}")

    @property
    def io(self):
        """The engine that queues for this device are to be made with: "sync", "threads" or "uring"."""
        return ENGINES[self.io_engine]

    def read(self, int64_t offset, int64_t length):
        """Return LENGTH bytes at OFFSET."""
        cdef int code = 0
        cdef char *buffer
        self.check_range(offset, length)
        data = PyBytes_FromStringAndSize(NULL, length)
        buffer = PyBytes_AS_STRING(data)
        if length:
            with nogil:
                code = self.pread(buffer, offset, length)
        if code:
            self.fail(code, "read", offset, length)
        return data

    def readinto(self, int64_t offset, buffer):
        """Fill BUFFER (contiguous, writable) from OFFSET on; return its length in bytes."""
        cdef Py_buffer view
        cdef int code = 0
        PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
        try:
            self.check_range(offset, view.len)
            if view.len:
                with nogil:
                    code = self.pread(view.buf, offset, view.len)
            if code:
                self.fail(code, "read", offset, view.len)
            return view.len
        finally:
            PyBuffer_Release(&view)

    def write(self, int64_t offset, data, *, bint fua=False):
        """Write DATA (bytes-like) at OFFSET; with FUA it is on stable storage before the return."""
        cdef Py_buffer view
        cdef int code = 0
        cdef uint32_t flags = FUA if fua else 0
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            self.check_range(offset, view.len)
            self.check_writable()
            if view.len:
                with nogil:
                    code = self.pwrite(view.buf, offset, view.len, flags)
            if code:
                self.fail(code, "write", offset, view.len)
        finally:
            PyBuffer_Release(&view)

    def write_zeroes(self, int64_t offset, int64_t length, *, bint fua=False, bint unmap=True):
        """Make LENGTH bytes at OFFSET read as zeroes; with UNMAP the device may leave a hole."""
        cdef int code = 0
        cdef uint32_t flags = (FUA if fua else 0) | (MAY_UNMAP if unmap else 0)
        self.check_range(offset, length)
        self.check_writable()
        if length:
            with nogil:
                code = self.write_zeroes_at(offset, length, flags)
        if code:
            self.fail(code, "write zeroes", offset, length)

    def discard(self, int64_t offset, int64_t length):
        """Tell the device that LENGTH bytes at OFFSET are not needed; what they read as afterwards is undefined."""
        cdef int code = 0
        self.check_range(offset, length)
        self.check_writable()
        if length:
            with nogil:
                code = self.discard_at(offset, length, 0)
        if code:
            self.fail(code, "discard", offset, length)

    def flush(self):
        """Return when everything written before is on stable storage."""
        cdef int code
        self.check_open()
        with nogil:
            code = self.sync()
        if code:
            self.fail(code, "flush", 0, self.length)

    def cache(self, int64_t offset=0, length=None):
        """Tell the device that LENGTH bytes at OFFSET (default: to the end) will be read: it may bring them nearer.

        A snapshot takes them into its RAM tier as far as room is free, a file has the page cache read them.
        """
        cdef int64_t left = self.length - offset if length is None else length
        cdef int code = 0
        self.check_range(offset, left)
        if left:
            with nogil:
                code = self.cache_at(offset, left)
        if code:
            self.fail(code, "cache", offset, left)

    def extents(self, int64_t offset=0, length=None):
        """Return the extents of a range (default: to the end) as a structured array of EXTENT_DTYPE.

        offset, length in bytes; flags: 1 hole, 2 reads as zeroes, 4 not in the snapshot (a read is an error). Neighbours with equal flags are merged.
        """
        cdef int64_t left = self.length - offset if length is None else length
        cdef int64_t got = 0
        cdef uint32_t flags = 0
        self.check_range(offset, left)
        rows = []
        while left > 0:
            with nogil:
                got = self.block_status(offset, left, &flags)
            if got < 0:
                self.fail(<int>got, "block status", offset, left)
            if rows and rows[-1][2] == flags:
                rows[-1] = (rows[-1][0], rows[-1][1] + got, flags)
            else:
                rows.append((offset, got, flags))
            offset += got
            left -= got
        return _np.array(rows, dtype=EXTENT_DTYPE)

    def close(self):
        """Release what the device holds. Closing twice is no error. The caller has ended all requests."""
        self.closed = True

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def __len__(self):
        return self.length


cdef int read_each(BlockDevice device, const iovec *vector, int count, int64_t offset) noexcept nogil:
    cdef int i, code
    for i in range(count):
        code = device.pread(vector[i].iov_base, offset, <int64_t>vector[i].iov_len)
        if code:
            return code
        offset += <int64_t>vector[i].iov_len
    return 0
