# GuestDevice: the filter, with what an export needs so as never to wait.
from libc.stdint cimport int64_t, uint32_t

from fastcbw.block.device cimport KernelIo
from fastcbw.block.sys cimport iovec
from fastcbw.cbw.intercept cimport FilterDevice
from fastcbw.cbw.state cimport Ticket
from fastcbw.cbw.worker cimport Copy

cdef enum:
    STAGE_PIECES = 32           # pieces of memory that one stage reads into at most

# A guest write of a queue with something to preserve, from queue_begin until it goes to the disk. On the heap; KernelIo.above
# names it. The thread of the queue's.
cdef struct Touch:
    Copy copy                   # claims are held while a stage of it is under way
    Ticket ticket               # counted all the time
    int64_t began_ns            # of latency_begin
    int64_t started_ns          # each limit counts from here
    int64_t end                 # cluster behind the last that is written
    int item                    # the first that this stage reads
    int next_item               # behind the last
    bint late                   # the request goes on without it; not counted any more
    iovec vector[STAGE_PIECES]

cdef class GuestDevice(FilterDevice):
    cdef bint settle_now(self, Ticket *ticket, int64_t offset, int64_t length) noexcept nogil
    cdef int go_on(self, Touch *touch, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags,
                   KernelIo *io) noexcept nogil
    cdef bint ask_for_old(self, Touch *touch, KernelIo *io) noexcept nogil
