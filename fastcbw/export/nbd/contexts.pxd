# A meta context of block status: a name for the handshake, and extents with 32 bits of flags for the transmission.
from libc.stdint cimport int64_t, uint32_t

from fastcbw.block.device cimport BlockDevice

cdef class MetaContext:
    cdef readonly str name
    # The first extent of the range: its length (1..length) with *flags, or -errno. Any thread, any number at once.
    cdef int64_t status(self, int64_t offset, int64_t length, uint32_t *flags) noexcept nogil

cdef class AllocationContext(MetaContext):
    cdef BlockDevice device
