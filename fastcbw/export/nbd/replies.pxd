# The replies of one connection: encoded into a batch, sent in as few calls as possible.
from libc.stdint cimport int64_t, uint16_t, uint64_t

from fastcbw.export.nbd.flights cimport Flights

cdef enum:
    BATCH_LENGTH = 262144       # bytes of encoded replies at most; touched only as far as used

cdef class Replies:
    cdef int fd                 # borrowed
    cdef Flights flights        # what must go on while the client does not read; None: nothing
    cdef bint structured        # negotiated
    cdef bint background        # set by who made it: of a snapshot
    cdef char *batch            # our own mapping, BATCH_LENGTH bytes
    cdef int64_t length         # bytes in it
    cdef int64_t since_ns       # when the first of them was put there (monotonic), valid while length > 0
    cdef int failed             # errno of the first send that failed; from then on nothing is sent

    cdef char *room(self, int64_t length) noexcept nogil        # LENGTH <= BATCH_LENGTH bytes to fill; NULL: the client is gone
    cdef void commit(self, int64_t length) noexcept nogil       # they are filled
    cdef void chunk(self, char *at, uint16_t flags, uint16_t kind, uint64_t cookie, int64_t length) noexcept nogil
    # Send the batch and then PAYLOAD. 0 or -errno; waits while the client does not read.
    cdef int send(self, const void *payload, int64_t length) noexcept nogil
    cdef void guests_first(self, bint payload) noexcept nogil
    cdef int done(self, uint64_t cookie) noexcept nogil
    # ERROR is a number of the protocol; OFFSET < 0: the error has no offset of its own.
    cdef int error(self, uint64_t cookie, int error, const char *text, int64_t offset) noexcept nogil
