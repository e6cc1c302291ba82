"""Devices written in Python: the base class, and the adapter that makes one a BlockDevice.

The adapter is the only place below the doors that takes the interpreter lock. No buffer of the data plane is ever
handed to Python code: a read copies what the device returned, a write gives it bytes of its own, so that what a
device keeps can never be read or written behind our back. The price is a memcpy, small beside the interpreter.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EIO, EOPNOTSUPP
from libc.stdint cimport int64_t, uint32_t
from libc.string cimport memcpy

import errno as _errno
import logging as _logging
import threading as _threading

from fastcbw.block.device import HOLE, ZERO
from fastcbw.block.device cimport BlockDevice, FAST_ONLY, FUA, MAY_UNMAP, STATUS_HOLE, STATUS_ZERO
from fastcbw.block.sys cimport iovec

_log = _logging.getLogger("fastcbw.block")


class Device:
    """Base of a device written in Python; hand an instance to fastcbw.open().

    Set `length` (bytes, more than 0; fixed from the moment it is opened), and override `read`; also `write`, unless
    the device is read-only. The rest has defaults. Ranges are within the device and not empty.

    Threading: methods are called from any thread, several at once; requests that overlap in time have no order.
    Errors: raise OSError with an errno. Any other exception is logged, becomes EIO for who asked, and stays in
    `last_error` of the adapter.
    """

    #: Bytes; set it in the class, in __init__, or as a property.
    length = 0
    #: For messages; default: the name of the class.
    name = None
    #: True when it cannot be written; also when `write` is not overridden.
    read_only = False

    def read(self, offset, length):
        """Return LENGTH bytes at OFFSET (any bytes-like object of exactly that length)."""
        raise NotImplementedError(f"{type(self).__name__}.read")

    def write(self, offset, data):
        """Write DATA (bytes) at OFFSET."""
        raise OSError(_errno.EROFS, f"{type(self).__name__} has no write")

    def write_zeroes(self, offset, length, *, unmap=True):
        """Make a range read as zeroes; with UNMAP it may become a hole. Default, also on EOPNOTSUPP: write() of zeroes."""
        raise OSError(_errno.EOPNOTSUPP, f"{type(self).__name__} has no write_zeroes")

    def discard(self, offset, length):
        """A range is not needed any more; what it reads as afterwards does not matter. Default: nothing."""

    def flush(self):
        """Return when everything written before is on stable storage. Default: nothing. Also called for a FUA write."""

    def extents(self, offset, length):
        """Yield (length, flags) from OFFSET on, at least one; flags: sum of HOLE and ZERO. Default: all data."""
        yield length, 0

    def close(self):
        """Release what the device holds; called once."""


cdef class PythonDevice(BlockDevice):
    """DEVICE (a Device) as a BlockDevice. Closing it closes DEVICE.

    Raises TypeError for what is no Device, ValueError for a length that is no whole number of bytes above 0.
    """

    def __cinit__(self, device, *, name=None):
        if not isinstance(device, Device):
            raise TypeError(f"device: expected a fastcbw.Device, got {type(device).__name__}")
        kind = type(device)
        self.device = device
        self.name = name or device.name or kind.__name__
        length = device.length
        if isinstance(length, bool) or not isinstance(length, int) or not 0 < length < 1 << 63:
            raise ValueError(f"{self.name}: length: expected a whole number of bytes above 0, got {length!r}")
        self.length = length
        self.read_only = bool(device.read_only) or kind.write is Device.write
        self.has_zeroes = kind.write_zeroes is not Device.write_zeroes

    def close(self):
        """Close the user's device. Closing twice is no error."""
        if not self.closed:
            self.closed = True
            self.device.close()

    cdef int fail(self, int code, str operation, int64_t offset, int64_t length) except -1:
        """As every door, but with the device's own exception as the cause, and Ctrl-C as what it is."""
        error = self.last_error
        if error is None or self.last_thread != _threading.get_ident():
            return BlockDevice.fail(self, code, operation, offset, length)
        self.last_thread = None     # told once: a later failure has a cause of its own
        if not isinstance(error, Exception):
            raise error
        try:
            return BlockDevice.fail(self, code, operation, offset, length)
        except OSError as ours:
            raise ours from error

    cdef int remember(self, str operation, int64_t offset, int64_t length, error):
        """Keep the exception of a request, log it unless it is an OSError with an errno; return its -errno."""
        self.last_error = error
        self.last_thread = _threading.get_ident()
        if isinstance(error, OSError) and isinstance(error.errno, int) and 0 < error.errno < 4096:
            return -error.errno
        try:
            _log.error("%s: %s %d+%d: %s", self.name, operation, offset, length, type(error).__name__, exc_info=error)
        except BaseException as second:     # a broken log handler must not hide the first
            error.add_note(f"and it could not be logged: {second!r}")
        return -EIO

    # -- with the interpreter lock, one per request

    cdef int give_read(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept with gil:
        cdef Py_buffer view
        cdef const char *data
        cdef int i
        try:
            PyObject_GetBuffer(self.device.read(offset, length), &view, PyBUF_SIMPLE)
            try:
                if view.len != length:
                    raise ValueError(f"{type(self.device).__name__}.read returned {view.len} bytes for {length}")
                data = <const char *>view.buf
                for i in range(count):
                    memcpy(vector[i].iov_base, data, vector[i].iov_len)
                    data += vector[i].iov_len
            finally:
                PyBuffer_Release(&view)
            return 0
        except BaseException as error:
            return self.remember("read", offset, length, error)

    cdef int give_write(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept with gil:
        cdef char *data
        cdef int i
        try:
            copy = PyBytes_FromStringAndSize(NULL, length)
            data = PyBytes_AS_STRING(copy)
            for i in range(count):
                memcpy(data, vector[i].iov_base, vector[i].iov_len)
                data += vector[i].iov_len
            self.device.write(offset, copy)
            if flags & FUA:
                self.device.flush()
            return 0
        except BaseException as error:
            return self.remember("write", offset, length, error)

    cdef int give_zeroes(self, int64_t offset, int64_t length, uint32_t flags) noexcept with gil:
        try:
            self.device.write_zeroes(offset, length, unmap=bool(flags & MAY_UNMAP))
            if flags & FUA:
                self.device.flush()
            return 0
        except BaseException as error:
            return self.remember("write zeroes", offset, length, error)

    cdef int give_discard(self, int64_t offset, int64_t length, uint32_t flags) noexcept with gil:
        try:
            self.device.discard(offset, length)
            if flags & FUA:
                self.device.flush()
            return 0
        except BaseException as error:
            return self.remember("discard", offset, length, error)

    cdef int give_flush(self) noexcept with gil:
        try:
            self.device.flush()
            return 0
        except BaseException as error:
            return self.remember("flush", 0, self.length, error)

    cdef int64_t give_extent(self, int64_t offset, int64_t length, uint32_t *flags) noexcept with gil:
        try:
            got, bits = next(iter(self.device.extents(offset, length)))
            if not 0 < got or bits & ~(STATUS_HOLE | STATUS_ZERO):
                raise ValueError(f"{type(self.device).__name__}.extents gave length {got}, flags {bits}")
            flags[0] = bits
            return min(got, length)
        except BaseException as error:
            if isinstance(error, StopIteration):
                error = ValueError(f"{type(self.device).__name__}.extents gave nothing")
            return self.remember("block status", offset, length, error)

    # -- data plane

    cdef int preadv(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        return self.give_read(vector, count, offset, length)

    cdef int pwritev(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        return self.give_write(vector, count, offset, length, flags)

    cdef int write_zeroes_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef int code
        if self.has_zeroes:
            code = self.give_zeroes(offset, length, flags)
            if code != -EOPNOTSUPP:
                return code
        return BlockDevice.write_zeroes_at(self, offset, length, flags)

    cdef int discard_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        return self.give_discard(offset, length, flags)

    cdef int sync(self) noexcept nogil:
        return self.give_flush()

    cdef int64_t block_status(self, int64_t offset, int64_t length, uint32_t *flags) noexcept nogil:
        return self.give_extent(offset, length, flags)
