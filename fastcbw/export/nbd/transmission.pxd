# One connection in its transmission phase.
from libc.stdint cimport int64_t, uint32_t

from fastcbw.export.nbd.flights cimport Flight
from fastcbw.export.nbd.reads cimport Reads
from fastcbw.export.nbd.request cimport Request

cdef enum:
    RECEIVE_LENGTH = 524288         # bytes that one receive may take when the buffer is empty
    WHOLE_WRITE_MAX = 262144        # a write up to this length is received whole before the device sees any of it
    WRITE_PIECE_MIN = 131072        # a longer one goes to the device in pieces of at least this, cut at PIECE_ALIGN
    MOVE_MAX = 8192                 # an incomplete request of at most this is moved to the front of the buffer
    # A request begins at most at RECEIVE_LENGTH and needs at most this more to be complete.
    BUFFER_LENGTH = 524288 + 262144 + 4096
    HOLD_REPLY_NS = 200000          # replies wait this long at most before the next request is begun

    UNDER_WAY = 1                   # in place of a code: the request has a flight

cdef enum Ending:
    RUNNING = 0
    DISCONNECT                      # the client said so
    END_OF_STREAM                   # between two requests
    CUT                             # in the middle of a request
    STOPPED                         # we ended it
    BAD_MAGIC
    RECEIVE_FAILED
    SEND_FAILED

cdef class Connection(Reads):
    cdef int64_t spin_max_ns        # bound of busy-polling, 0: none
    cdef int64_t spin_ns            # how long the next wait is polled: the bound, or less when adaptive
    cdef bint spin_adaptive
    cdef uint32_t running           # run() may be called once
    # the receive buffer: what was received and not served is [start, end)
    cdef char *buffer               # our own mapping, BUFFER_LENGTH bytes
    cdef int64_t start
    cdef int64_t end
    cdef int64_t need               # bytes from start on that the next step needs
    # a write longer than WHOLE_WRITE_MAX, or one that is refused: its payload is under way
    cdef Request large_request
    cdef Flight *large              # it, where its pieces may be under way
    cdef int64_t write_offset       # where the next piece goes
    cdef int64_t write_left         # bytes of payload to come; 0: no such write
    cdef int write_code             # -errno of the first failure: the rest is received and dropped
    cdef const char *write_why      # its text, NULL: of the errno
    cdef bint stalled               # a request was left in the buffer, since no flight was unused
    cdef Ending ending
    cdef int ending_code            # errno of RECEIVE_FAILED and SEND_FAILED

    cdef void serve(self) noexcept nogil
    cdef void serve_buffered(self) noexcept nogil
    cdef void receive(self) noexcept nogil
    cdef void learn_from(self, int64_t idle_ns) noexcept nogil
    cdef bint begin_write(self, const Request *request) noexcept nogil
    cdef int write(self, const Request *request, const char *data, uint32_t flags) noexcept nogil
    cdef int write_now(self, const char *data, int64_t offset, int64_t length, uint32_t flags) noexcept nogil
    cdef int write_piece(self, int64_t length) noexcept nogil
    cdef bint continue_write(self) noexcept nogil
    cdef void end_large(self) noexcept nogil
    cdef void complete_large(self, Flight *large) noexcept nogil
    cdef int operate(self, const Request *request, int operation, uint32_t flags) noexcept nogil
    cdef int cache(self, const Request *request) noexcept nogil
    cdef void dispatch(self, const Request *request) noexcept nogil
