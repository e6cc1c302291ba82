# The intercept: what stands between the guest and the active disk.
from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.block.device cimport BlockDevice
from fastcbw.cbw.state cimport EngineState, Epoch, Line, Ticket
from fastcbw.cbw.worker cimport Copy

cdef class FilterDevice(BlockDevice):
    cdef EngineState state
    cdef BlockDevice child
    cdef object engine      # keeps the owner of what guest writes touch alive; None once it is closed

    cdef int mark_closed(self) except -1

cdef enum:
    # what prepare() says
    COPY_READY = 0      # the copy has items, and the claims of these, and no others
    COPY_NOTHING = 1    # what was free is settled now; no claim is held. Look again
    COPY_BUSY = 2       # others hold the claims
    COPY_STALE = 3      # R3: the epoch is over; no claim is held

# Counts the guest write in, marks it, preserves what it is about to overwrite. 0 (all was settled) or 1 with *ticket counted:
# the write may go to the disk, then leave(ticket). Negative: a code of cbw/policy: a snapshot's policy refuses it, and nothing is counted.
# It waits for nothing but its own copy, claims, old writes, and room where a snapshot asks for that; with one deadline.
cdef int guest_begin(EngineState state, int64_t offset, int64_t length, bint zeroing, Ticket *ticket) noexcept nogil

# The steps of a copy, for those who make it another way (cbw/guest). In this order; none of them waits.
cdef int64_t next_to_preserve(const Epoch *epoch, int64_t first, int64_t end, int64_t *round_end) noexcept nogil
cdef int prepare(EngineState state, Epoch *epoch, Copy *copy, int64_t first, int64_t end) noexcept nogil
cdef bint make_leaves(Copy *copy) noexcept nogil                # False: no memory
cdef void take_slots(EngineState state, Epoch *epoch, Copy *copy) noexcept nogil        # the first items get those that there are
cdef void publish(Copy *copy) noexcept nogil                    # the data is there, and tested for zeroes
# Returns the first cluster that found no room, when `left` says that there is one.
cdef int64_t settle_and_release(EngineState state, Epoch *epoch, Copy *copy) noexcept nogil
cdef void count_write(Line *line, int64_t length) noexcept nogil
cdef void count_touch(Line *line, int64_t started_ns) noexcept nogil     # started_ns: when it began to preserve
