# Reads: how data gets from the device to the client.
from libc.stdint cimport int64_t

from fastcbw.export.nbd.answers cimport Answers
from fastcbw.export.nbd.flights cimport Flight
from fastcbw.export.nbd.request cimport Request

cdef enum:
    SMALL_READ_MAX = 131072         # a read up to this length goes through the batch of replies, a longer one takes a pool buffer
    COPIED_READ_MAX = 16384         # data of at most this is copied into the batch when it comes; more goes to the socket from its buffer
    PIECE_ALIGN = 65536             # where large reads and writes are cut, so that no cluster or page is split

cdef class Reads(Answers):
    cdef int read_now(self, void *buffer, int64_t offset, int64_t length) noexcept nogil
    cdef void read(self, const Request *request) noexcept nogil
    cdef void read_any(self, const Request *request) noexcept nogil
    cdef void read_small(self, const Request *request) noexcept nogil
    cdef void read_pieces(self, const Request *request) noexcept nogil
    cdef void read_whole(self, const Request *request) noexcept nogil
    cdef bint begin_read(self, const Request *request) noexcept nogil
    cdef int take(self, int64_t length, void **buffer) noexcept nogil
    cdef bint give_buffer(self, Flight *flight, int64_t length) noexcept nogil
    cdef void release(self, Flight *flight) noexcept nogil
    cdef void header(self, char *at, const Request *request, bint last, int64_t offset, int64_t length) noexcept nogil
    cdef int64_t header_length(self) noexcept nogil
    # Answer what has ended. Whoever overrides arrived() leaves the reads to this one.
    cdef void land(self) noexcept nogil
    cdef void land_all(self) noexcept nogil         # and wait until nothing is under way
    cdef void arrived(self, Flight *flight) noexcept nogil
    cdef void next_piece(self, Flight *flight) noexcept nogil
