# Reads: how data gets from the device to the client.
from libc.stdint cimport int64_t

from fastcbw.export.nbd.answers cimport Answers
from fastcbw.export.nbd.request cimport Request

cdef enum:
    SMALL_READ_MAX = 131072         # a read up to this length goes through the batch of replies, a longer one takes a pool buffer
    PIECE_ALIGN = 65536             # where large reads and writes are cut, so that no cluster or page is split

cdef class Reads(Answers):
    cdef void read(self, const Request *request) noexcept nogil
    cdef void read_small(self, const Request *request) noexcept nogil
    cdef void read_pieces(self, const Request *request) noexcept nogil
    cdef void read_whole(self, const Request *request) noexcept nogil
    cdef int take(self, int64_t length, void **buffer) noexcept nogil
