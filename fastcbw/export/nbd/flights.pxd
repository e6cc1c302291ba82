# Flights: the requests of one connection that wait for their device.
from cpython.ref cimport PyObject
from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.block.device cimport BlockDevice
from fastcbw.block.queue cimport IoQueue
from fastcbw.export.nbd.request cimport Request

cdef enum:
    FLIGHTS_MAX = 64            # requests under way of one connection, pieces of large ones counted
    FLIGHTS_BACKGROUND = 16     # of a background export: guests share the device with it
    OWN_LENGTH = 65536          # bytes of the buffer that each has; longer ones take a pool buffer

cdef enum FlightKind:
    FLIGHT_PLAIN = 0            # answered by its code alone: write, zeroes, trim, flush
    FLIGHT_READ                 # answered with the buffer
    FLIGHT_READ_PIECES          # the same, piece by piece
    FLIGHT_WRITE_PIECE          # a piece of the large write `whole`
    FLIGHT_WRITE_LARGE          # a large write: nothing of its own is under way but the flush at its end

# One request, or a piece of one. The thread of the connection's; BUFFER is the device's while it is under way.
cdef struct Flight:
    Request request
    FlightKind kind
    int code                    # 0 or -errno; of a large write the first of its pieces
    char *own                   # OWN_LENGTH bytes, page-aligned as direct I/O wants it
    char *buffer                # `own`, or of the pool
    int64_t from_pool           # bytes of the pool to be given back
    int64_t offset              # of what is under way
    int64_t length
    Flight *whole
    int pieces                  # of a large write: under way
    bint received               # of a large write: all of it
    Flight *next

cdef class Flights:
    cdef IoQueue queue
    cdef PyObject *device       # borrowed of the connection
    cdef int limit
    cdef Flight *table
    cdef Flight *unused         # NULL: no request may be begun that could wait
    cdef char *memory           # of all `own`
    cdef Flight *ended          # in the order of ending; who takes one answers it
    cdef Flight *ended_last

    cdef Flight *begin(self, const Request *request, FlightKind kind) noexcept nogil    # there must be an unused one
    cdef void release(self, Flight *flight) noexcept nogil
    cdef bint is_busy(self) noexcept nogil      # something is under way, or waits to be answered
    # Give the operation to the queue. It ends in `ended`, also when it is refused.
    cdef void submit(self, Flight *flight, int operation, uint32_t flags) noexcept nogil
    cdef Flight *take_ended(self) noexcept nogil
    # Hand over what was submitted, and look for what has ended. Never waits. Everything of the device's own (epochs, claims, ranges
    # of direct writes) is given back here, not when the request is answered.
    cdef void collect(self) noexcept nogil
    cdef void look(self, int least) noexcept nogil
    cdef void add_ended(self, Flight *flight) noexcept nogil
    cdef void wait(self) noexcept nogil         # until one has ended; there must be one under way
    # Sleep until FD has EVENTS, or something has ended. Collects meanwhile; with UNTIL_ENDED returns as soon as there is something to
    # answer. True: FD is ready.
    cdef bint sleep(self, int fd, short events, bint until_ended) noexcept nogil
