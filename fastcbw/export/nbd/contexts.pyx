"""Meta contexts: what an NBD client can ask about a range (BLOCK_STATUS).

An export has a table of them, name to MetaContext; the handshake negotiates by name and gives each an id, the
transmission loop asks by pointer without the interpreter. A further context (a dirty bitmap, the copy order) is a
subclass with a `status` method, registered with Server.add_export(contexts=...).
"""

from libc.errno cimport EOPNOTSUPP
from libc.stdint cimport int64_t, uint32_t

from fastcbw.block.device cimport BlockDevice, STATUS_HOLE, STATUS_ZERO


cdef class MetaContext:
    """Base: a context that answers nothing. Subclasses set `name` and override `status`."""

    cdef int64_t status(self, int64_t offset, int64_t length, uint32_t *flags) noexcept nogil:
        return -EOPNOTSUPP


cdef class AllocationContext(MetaContext):
    """base:allocation of DEVICE: bit 0 hole, bit 1 reads as zeroes, which are block_status's own bits; of what is in no snapshot 0."""

    def __cinit__(self, BlockDevice device not None):
        self.name = "base:allocation"
        self.device = device

    cdef int64_t status(self, int64_t offset, int64_t length, uint32_t *flags) noexcept nogil:
        cdef int64_t got = self.device.block_status(offset, length, flags)
        flags[0] &= STATUS_HOLE | STATUS_ZERO
        return got
