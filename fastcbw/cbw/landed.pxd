# What guest writes have put into a target, of a snapshot that keeps old data in place there. See landed.pyx.
from libc.stdint cimport int64_t

from fastcbw.cbw.reader cimport SnapshotDevice

cdef class Landed:
    cdef SnapshotDevice snapshot

    # Bytes at the head of the range whose data is in the target already; or, missing, of which none is.
    cdef int64_t there(self, int64_t offset, int64_t length) noexcept nogil
    cdef int64_t missing(self, int64_t offset, int64_t length) noexcept nogil
    cdef int64_t run(self, int64_t offset, int64_t length, bint there) noexcept nogil
