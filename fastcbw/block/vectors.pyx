"""Requests that the doors of BlockDevice do not offer, for tests and benchmarks: vectors, no-wait reads, all flags.

Nothing in the package calls it. Each function is one call of the data plane, made without the interpreter lock; it
returns 0 or -errno, as the device gave it, and raises only for a range that is not within the device.
"""

from libc.stdint cimport int64_t, uint32_t
from libc.stdlib cimport free, malloc

from fastcbw.block.device cimport BlockDevice, FAST_ONLY as _FAST_ONLY, FUA as _FUA, MAY_UNMAP as _MAY_UNMAP
from fastcbw.block.sys cimport iovec
from fastcbw.kernels.lent cimport Lent, lend

FUA = _FUA
MAY_UNMAP = _MAY_UNMAP
FAST_ONLY = _FAST_ONLY


cdef iovec *cut(char *buffer, pieces, int64_t length) except NULL:
    """Return a vector over LENGTH bytes at BUFFER cut into PIECES (a list of lengths); free() it."""
    cdef iovec *vector
    cdef Py_ssize_t i
    if sum(pieces) != length or min(pieces) < 0:
        raise ValueError(f"pieces: they are {sum(pieces)} bytes, the buffer {length}")
    vector = <iovec *>malloc(sizeof(iovec) * len(pieces))
    if vector == NULL:
        raise MemoryError
    for i in range(len(pieces)):
        vector[i].iov_base = buffer
        vector[i].iov_len = <size_t>pieces[i]
        buffer += <int64_t>pieces[i]
    return vector


def readv(BlockDevice device not None, int64_t offset, buffer, pieces, *, bint nowait=False):
    """Fill BUFFER (bytes, writable) through one preadv, or preadv_nowait, over PIECES; return 0 or -errno."""
    cdef Lent lent = lend(buffer, "buffer", "uint8", True)
    cdef int64_t length = lent.count
    cdef int count = len(pieces)
    cdef iovec *vector
    cdef int code
    device.check_range(offset, length)
    vector = cut(<char *>lent.start, pieces, length)
    with nogil:
        if nowait:
            code = device.preadv_nowait(vector, count, offset, length)
        else:
            code = device.preadv(vector, count, offset, length)
    free(vector)
    return code


def writev(BlockDevice device not None, int64_t offset, data, pieces, uint32_t flags=0):
    """Write DATA (bytes) through one pwritev over PIECES; return 0 or -errno."""
    cdef Lent lent = lend(data, "data", "uint8", False)
    cdef int64_t length = lent.count
    cdef int count = len(pieces)
    cdef iovec *vector
    cdef int code
    device.check_range(offset, length)
    vector = cut(<char *>lent.start, pieces, length)
    with nogil:
        code = device.pwritev(vector, count, offset, length, flags)
    free(vector)
    return code


def write_zeroes_at(BlockDevice device not None, int64_t offset, int64_t length, uint32_t flags):
    """Call write_zeroes_at with FLAGS (FUA, MAY_UNMAP, FAST_ONLY); return 0 or -errno."""
    cdef int code
    device.check_range(offset, length)
    with nogil:
        code = device.write_zeroes_at(offset, length, flags)
    return code


def discard_at(BlockDevice device not None, int64_t offset, int64_t length, uint32_t flags):
    """Call discard_at with FLAGS (FUA); return 0 or -errno."""
    cdef int code
    device.check_range(offset, length)
    with nogil:
        code = device.discard_at(offset, length, flags)
    return code


def block_status(BlockDevice device not None, int64_t offset, int64_t length):
    """Call block_status once; return (length or -errno, flags)."""
    cdef uint32_t flags = 0
    cdef int64_t got
    device.check_range(offset, length)
    with nogil:
        got = device.block_status(offset, length, &flags)
    return got, flags
