# What can be said of clusters of a snapshot beside their data: may they be read, where is their old data, did the guest change them.
from libc.stdint cimport int64_t, uint32_t

from fastcbw.cbw.reader cimport SnapshotDevice

cdef enum:
    # the bits of x-fastcbw:access
    ACCESS_READABLE = 1
    ACCESS_RAM = 2
    ACCESS_DISK = 4
    ACCESS_ZERO = 8
    ACCESS_CHANGED = 16

# The access bits of FIRST, and in *stop where the run of equal ones ends, at most END (clusters). A run may be cut short.
cdef uint32_t access_extent(SnapshotDevice snapshot, int64_t first, int64_t end, int64_t *stop) noexcept nogil
# The same in bytes: how long the extent at OFFSET is, at most LENGTH.
cdef int64_t access_status(SnapshotDevice snapshot, int64_t offset, int64_t length, uint32_t *flags) noexcept nogil
