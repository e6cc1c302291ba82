# The intercept: what stands between the guest and the active disk.
from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.block.device cimport BlockDevice
from fastcbw.cbw.state cimport EngineState, Ticket

cdef class FilterDevice(BlockDevice):
    cdef EngineState state
    cdef BlockDevice child
    cdef object engine      # keeps the owner of what guest writes touch alive; None once it is closed

    cdef int mark_closed(self) except -1

# Counts the guest write in, marks it, preserves what it is about to overwrite. Returns with *ticket counted: the write may
# go to the disk, then leave(ticket). True: there was something to preserve. It waits for nothing but its own copy, claims, and old writes; each with a deadline.
cdef bint guest_begin(EngineState state, int64_t offset, int64_t length, Ticket *ticket) noexcept nogil
