"""Flights: the requests of one connection that wait for their device, in an IoQueue, so that the others need not.

A request whose device can do it without waiting never comes here. What comes takes a flight: a slot with a buffer that stays put
until the device has ended, since the receive buffer and the batch of replies are about to be used again. There is a fixed number
of flights; with none left the connection reads no further request, so memory and queue are bounded and the limit reaches the
client as back-pressure.

Whoever sleeps in the thread of the connection, on its socket or for a pool buffer, must let the queue go on meanwhile (sleep, wait,
collect): a write under way is counted in an epoch of the engine, and may hold claims, and a client that does not read its replies
must not keep those.
"""

from cpython.ref cimport PyObject
from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from fastcbw.bitmaps.mapping cimport map_pages, unmap_pages
from fastcbw.block.device cimport BlockDevice, IO_READ, IO_WRITE
from fastcbw.block.queue cimport IoDone, IoQueue
from fastcbw.block.sys cimport iovec
from fastcbw.export.nbd.request cimport Request
from fastcbw.sync cimport now_ns
from fastcbw.wire.socket cimport POLLIN, poll, pollfd

cdef enum:
    COLLECTED = 64


cdef class Flights:
    """The flights of a connection to DEVICE, which the caller keeps. One thread only."""

    def __cinit__(self, BlockDevice device not None, bint background):
        cdef int i
        self.limit = FLIGHTS_BACKGROUND if background else FLIGHTS_MAX
        self.device = <PyObject *>device
        self.queue = IoQueue(device.io, self.limit)
        self.table = <Flight *>calloc(<size_t>self.limit, sizeof(Flight))
        self.memory = <char *>map_pages(<int64_t>self.limit * OWN_LENGTH)
        if self.table == NULL or self.memory == NULL:
            raise MemoryError(f"{self.limit * OWN_LENGTH} bytes for requests under way cannot be mapped")
        for i in range(self.limit - 1, -1, -1):     # last in, first out: what is touched is as deep as the client goes
            self.table[i].own = self.memory + <int64_t>i * OWN_LENGTH
            self.table[i].next = self.unused
            self.unused = &self.table[i]

    def __dealloc__(self):
        if self.queue is not None:
            self.queue.close()      # before the memory that requests point into goes
        free(self.table)
        if self.memory != NULL:
            unmap_pages(self.memory, <int64_t>self.limit * OWN_LENGTH)

    def close(self):
        """Wait for what is under way, end the threads."""
        self.queue.close()

    cdef Flight *begin(self, const Request *request, FlightKind kind) noexcept nogil:
        cdef Flight *flight = self.unused
        self.unused = flight.next
        flight.request = request[0]
        flight.kind = kind
        flight.code = 0
        flight.buffer = flight.own
        flight.from_pool = 0
        flight.offset = request.offset
        flight.length = request.length
        flight.whole = NULL
        flight.pieces = 0
        flight.received = False
        flight.next = NULL
        return flight

    cdef void release(self, Flight *flight) noexcept nogil:
        flight.next = self.unused
        self.unused = flight

    cdef bint is_busy(self) noexcept nogil:
        return self.ended != NULL or not self.queue.is_idle()

    cdef void submit(self, Flight *flight, int operation, uint32_t flags) noexcept nogil:
        cdef iovec vector
        cdef bint has_data = operation == IO_READ or operation == IO_WRITE
        vector.iov_base = flight.buffer
        vector.iov_len = <size_t>flight.length
        flight.code = self.queue.submit(operation, self.device, &vector, 1 if has_data else 0, flight.offset, flight.length, flags,
                                        <uint64_t>flight)
        if flight.code:
            self.add_ended(flight)

    cdef void add_ended(self, Flight *flight) noexcept nogil:
        flight.next = NULL
        if self.ended == NULL:
            self.ended = flight
        else:
            self.ended_last.next = flight
        self.ended_last = flight

    cdef Flight *take_ended(self) noexcept nogil:
        cdef Flight *flight = self.ended
        if flight != NULL:
            self.ended = flight.next
        return flight

    cdef void collect(self) noexcept nogil:
        self.look(0)

    cdef void wait(self) noexcept nogil:
        if self.ended == NULL:
            self.look(1)

    cdef void look(self, int least) noexcept nogil:
        cdef IoDone done[COLLECTED]
        cdef Flight *flight
        cdef int got, i
        while True:
            got = self.queue.poll(done, COLLECTED, least, -1)
            for i in range(got):
                flight = <Flight *>done[i].cookie
                flight.code = done[i].code
                self.add_ended(flight)
            if got <= 0:
                return
            least = 0       # until it says that there is nothing: only then its descriptor can be slept on

    cdef bint sleep(self, int fd, short events, bint until_ended) noexcept nogil:
        cdef pollfd waited[2]
        cdef int64_t deadline_ns, left
        cdef int timeout_ms, got
        memset(waited, 0, sizeof(waited))
        waited[0].fd = fd
        waited[0].events = events
        waited[1].fd = self.queue.fd()
        waited[1].events = POLLIN
        while True:
            self.collect()
            if until_ended and self.ended != NULL:
                return False
            timeout_ms = -1
            deadline_ns = self.queue.next_deadline()
            if deadline_ns:
                left = deadline_ns - now_ns()
                timeout_ms = 1 if left < 1000000 else <int>(left // 1000000 + 1)
            got = poll(waited, 2, timeout_ms)
            if got < 0 and errno != EINTR:
                return True     # the caller's own call tells what is wrong
            if got > 0 and waited[0].revents:
                return True
