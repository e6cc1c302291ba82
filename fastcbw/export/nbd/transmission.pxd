# One connection in its transmission phase.
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

from fastcbw.block.device cimport BlockDevice
from fastcbw.export.nbd.pool cimport BufferPool
from fastcbw.export.nbd.replies cimport Replies
from fastcbw.wire.constants cimport CONTEXTS_MAX

cdef enum:
    RECEIVE_LENGTH = 524288         # bytes that one receive may take when the buffer is empty
    WHOLE_WRITE_MAX = 262144        # a write up to this length is received whole before the device sees any of it
    WRITE_PIECE_MIN = 131072        # a longer one goes to the device in pieces of at least this, cut at WRITE_PIECE_ALIGN
    WRITE_PIECE_ALIGN = 65536
    MOVE_MAX = 8192                 # an incomplete request of at most this is moved to the front of the buffer
    # A request begins at most at RECEIVE_LENGTH and needs at most this more to be complete.
    BUFFER_LENGTH = 524288 + 262144 + 4096
    SMALL_READ_MAX = 131072         # a read up to this length goes through the batch of replies, a longer one takes a pool buffer
    EXTENTS_MAX = 4096              # extents of one context in a reply to BLOCK_STATUS
    HOLD_REPLY_NS = 200000          # replies wait this long at most before the next request is begun

cdef enum Ending:
    RUNNING = 0
    DISCONNECT                      # the client said so
    END_OF_STREAM                   # between two requests
    CUT                             # in the middle of a request
    STOPPED                         # we ended it
    BAD_MAGIC
    RECEIVE_FAILED
    SEND_FAILED

cdef enum:                # order of COUNTERS in transmission.pyx
    REQUESTS = 0
    READS
    WRITES
    ZEROES
    TRIMS
    FLUSHES
    CACHES
    STATUSES
    BYTES_READ
    BYTES_WRITTEN
    BYTES_ZEROED
    BYTES_TRIMMED
    ERRORS
    RECEIVES                        # calls to recv that brought something: requests / receives is the batching
    COUNTERS_COUNT

cdef struct Request:
    uint16_t flags
    uint16_t kind
    uint64_t cookie
    int64_t offset                  # checked to be within the device before anything uses it
    int64_t length

cdef class Connection:
    cdef int fd                     # borrowed from the Python socket, which outlives run()
    cdef BlockDevice device
    cdef BufferPool pool
    cdef Replies replies
    cdef bint read_only
    cdef bint background            # class in the pool
    cdef int64_t spin_max_ns        # bound of busy-polling, 0: none
    cdef int64_t spin_ns            # how long the next wait is polled: the bound, or less when adaptive
    cdef bint spin_adaptive
    cdef bytes export_name          # kept for `name`
    cdef const char *name           # of the export, for messages
    cdef tuple contexts             # keeps the MetaContexts alive
    cdef void *context[CONTEXTS_MAX]
    cdef uint32_t context_id[CONTEXTS_MAX]
    cdef int contexts_count
    cdef uint32_t running           # run() may be called once
    # the receive buffer: what was received and not served is [start, end)
    cdef char *buffer               # our own mapping, BUFFER_LENGTH bytes
    cdef int64_t start
    cdef int64_t end
    cdef int64_t need               # bytes from start on that the next step needs
    # a write longer than WHOLE_WRITE_MAX, or one that is refused: its payload is under way
    cdef Request write
    cdef int64_t write_offset       # where the next piece goes
    cdef int64_t write_left         # bytes of payload to come; 0: no such write
    cdef int write_code             # -errno of the first failure: the rest is received and dropped
    cdef const char *write_why      # its text, NULL: of the errno
    # shared with the control plane (atomic)
    cdef uint32_t stopping          # receive no more; what was received is served and answered
    cdef uint32_t killing           # give up waiting for a pool buffer as well
    cdef uint64_t counters[COUNTERS_COUNT]      # written by the thread of run() only
    cdef Ending ending
    cdef int ending_code            # errno of RECEIVE_FAILED and SEND_FAILED

    cdef void serve(self) noexcept nogil
    cdef void serve_buffered(self) noexcept nogil
    cdef void receive(self) noexcept nogil
    cdef void learn_from(self, int64_t idle_ns) noexcept nogil
    cdef bint begin_write(self, const Request *request) noexcept nogil
    cdef bint continue_write(self) noexcept nogil
    cdef void dispatch(self, const Request *request) noexcept nogil
    cdef int check(self, const Request *request, const char **why) noexcept nogil
    cdef void read(self, const Request *request) noexcept nogil
    cdef void read_small(self, const Request *request) noexcept nogil
    cdef void read_pieces(self, const Request *request) noexcept nogil
    cdef void read_whole(self, const Request *request) noexcept nogil
    cdef int take(self, int64_t length, void **buffer) noexcept nogil
    cdef void block_status(self, const Request *request) noexcept nogil
    cdef void answer(self, const Request *request, int code, const char *why) noexcept nogil
    cdef void refuse(self, const Request *request, int code, const char *why, int64_t offset) noexcept nogil
