"""Reads: how data gets from the device to the client.

What is in memory is read at once: a small read into the batch of replies; a large one into a pool buffer, by pieces, each sent before
the next is read, or whole where the reply must be one chunk (DF, simple replies). What would wait for a device becomes a flight at that
point, and goes on when it has arrived. Without flights every read is done at once, waiting or not.

Of a read-once export, which has no flights, a reply is sent at once, and when all of it has gone out the device is told. An error,
or a socket that failed, keeps the data.
"""

from libc.errno cimport EAGAIN, ENOMEM
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy

from fastcbw.block.device cimport IO_READ
from fastcbw.block.sys cimport iovec
from fastcbw.export.nbd.answers cimport BYTES_READ, ERRORS, READS, count
from fastcbw.export.nbd.flights cimport FLIGHT_READ, FLIGHT_READ_PIECES, OWN_LENGTH, Flight
from fastcbw.export.nbd.pool cimport PIECE_LENGTH
from fastcbw.kernels.atomic cimport load_relaxed
from fastcbw.wire.constants cimport (
    CHUNK_LENGTH, CMD_FLAG_DF, REPLY_FLAG_DONE, REPLY_TYPE_NONE, REPLY_TYPE_OFFSET_DATA, SIMPLE_REPLY_LENGTH, SIMPLE_REPLY_MAGIC)
from fastcbw.wire.integers cimport store32, store64

cdef extern from "<errno.h>" nogil:
    int EOVERFLOW

cdef const char *NO_BUFFER = b"longer than one unfragmented reply of this export may be"


cdef inline int64_t piece_from(int64_t offset, int64_t left) noexcept nogil:
    cdef int64_t piece = ((offset + PIECE_LENGTH) & ~(<int64_t>PIECE_ALIGN - 1)) - offset
    return piece if piece < left else left


cdef class Reads(Answers):
    """The reads of a connection."""

    cdef int read_now(self, void *buffer, int64_t offset, int64_t length) noexcept nogil:
        """-EAGAIN: it would wait, and there are flights for that."""
        cdef iovec vector
        if self.flights is None:
            return self.device.pread(buffer, offset, length)
        if self.device.always_waits:
            return -EAGAIN
        vector.iov_base = buffer
        vector.iov_len = <size_t>length
        return self.device.preadv_nowait(&vector, 1, offset, length)

    cdef void read(self, const Request *request) noexcept nogil:
        cdef uint64_t errors
        cdef int code
        if not self.read_once or request.length == 0:
            self.read_any(request)
            return
        code = self.device.check_once(request.offset, request.length)
        if code:
            self.refuse(request, code, NULL, request.offset)
            return
        errors = load_relaxed(&self.counters[ERRORS])
        self.read_any(request)
        # The whole reply has to be the socket's, or the data stays: a client that went away has not got it.
        if load_relaxed(&self.counters[ERRORS]) == errors and self.replies.send(NULL, 0) == 0:
            self.device.delivered(request.offset, request.length)

    cdef void read_any(self, const Request *request) noexcept nogil:
        cdef char *at
        if request.length == 0 and self.replies.structured:
            at = self.replies.room(CHUNK_LENGTH)        # a data chunk has at least one byte
            if at != NULL:
                self.replies.chunk(at, REPLY_FLAG_DONE, REPLY_TYPE_NONE, request.cookie, 0)
                self.replies.commit(CHUNK_LENGTH)
            count(&self.counters[READS], 1)
        elif request.length == 0:
            self.answer(request, 0, NULL)
        elif request.length <= SMALL_READ_MAX:
            self.read_small(request)
        elif self.replies.structured and not request.flags & CMD_FLAG_DF:
            self.read_pieces(request)
        else:
            self.read_whole(request)

    cdef int64_t header_length(self) noexcept nogil:
        return CHUNK_LENGTH + 8 if self.replies.structured else SIMPLE_REPLY_LENGTH

    cdef void header(self, char *at, const Request *request, bint last, int64_t offset, int64_t length) noexcept nogil:
        """What stands before the data of a reply, or of its LAST or an earlier chunk."""
        if self.replies.structured:
            self.replies.chunk(at, REPLY_FLAG_DONE if last else 0, REPLY_TYPE_OFFSET_DATA, request.cookie, 8 + length)
            store64(at + CHUNK_LENGTH, <uint64_t>offset)
        else:
            store32(at, <uint32_t>SIMPLE_REPLY_MAGIC)
            store32(at + 4, 0)
            store64(at + 8, request.cookie)

    cdef void read_small(self, const Request *request) noexcept nogil:
        """From the device straight into the batch, behind a header that is filled in when it has succeeded."""
        cdef int64_t header = self.header_length()
        cdef char *at = self.replies.room(header + request.length)
        cdef int code
        if at == NULL:
            return
        code = self.read_now(at + header, request.offset, request.length)
        if code == -EAGAIN and self.flights is not None:
            if self.begin_read(request):
                return
            at = self.replies.room(header + request.length)
            if at == NULL:
                return
            code = self.device.pread(at + header, request.offset, request.length)
        if code:
            self.refuse(request, code, NULL, request.offset)
            return
        self.header(at, request, True, request.offset, request.length)
        self.replies.commit(header + request.length)
        count(&self.counters[READS], 1)
        count(&self.counters[BYTES_READ], request.length)

    cdef bint begin_read(self, const Request *request) noexcept nogil:
        """Read with a flight. False: the pool has no buffer for it now; nothing is under way any more, so it may be read here."""
        cdef Flight *flight = self.flights.begin(request, FLIGHT_READ)
        if not self.give_buffer(flight, request.length):
            self.flights.release(flight)
            self.land_all()
            return False
        self.flights.submit(flight, IO_READ, 0)
        return True

    cdef bint give_buffer(self, Flight *flight, int64_t length) noexcept nogil:
        """A buffer of LENGTH (at most PIECE_LENGTH) for FLIGHT, without waiting."""
        cdef void *buffer = NULL
        if length <= OWN_LENGTH:
            return True
        if self.pool.take(PIECE_LENGTH, self.background, False, &self.killing, &buffer):
            return False
        flight.buffer = <char *>buffer
        flight.from_pool = PIECE_LENGTH
        return True

    cdef void release(self, Flight *flight) noexcept nogil:
        if flight.from_pool:
            self.pool.give(flight.buffer, flight.from_pool, self.background)
        self.flights.release(flight)

    cdef int take(self, int64_t length, void **buffer) noexcept nogil:
        """A pool buffer, or -errno. Replies that are ready go out before it waits, and what is under way ends: it may have buffers."""
        cdef int code = self.pool.take(length, self.background, False, &self.killing, buffer)
        if code == -EAGAIN:
            self.replies.send(NULL, 0)
            if self.flights is not None:
                self.land_all()
                self.replies.send(NULL, 0)
            code = self.pool.take(length, self.background, True, &self.killing, buffer)
        return code

    cdef void read_pieces(self, const Request *request) noexcept nogil:
        """A large read as several chunks through one pool buffer. An error ends it with an error chunk at its offset."""
        cdef void *buffer = NULL
        cdef Flight *flight
        cdef char *at
        cdef int64_t offset = request.offset
        cdef int64_t left = request.length
        cdef int64_t piece
        cdef int code = self.take(PIECE_LENGTH, &buffer)
        if code:
            self.refuse(request, code, NULL, -1)
            return
        while left > 0:
            piece = piece_from(offset, left)
            code = self.read_now(buffer, offset, piece)
            if code == -EAGAIN and self.flights is not None:
                flight = self.flights.begin(request, FLIGHT_READ_PIECES)
                flight.buffer = <char *>buffer
                flight.from_pool = PIECE_LENGTH
                flight.offset = offset
                flight.length = piece
                self.flights.submit(flight, IO_READ, 0)
                return
            if code:
                self.refuse(request, code, NULL, offset)
                break
            at = self.replies.room(CHUNK_LENGTH + 8)
            if at == NULL:
                break
            self.header(at, request, piece == left, offset, piece)
            self.replies.commit(CHUNK_LENGTH + 8)
            if self.replies.send(buffer, piece):
                break
            offset += piece
            left -= piece
        self.pool.give(buffer, PIECE_LENGTH, self.background)
        if left == 0:
            count(&self.counters[READS], 1)
            count(&self.counters[BYTES_READ], request.length)

    cdef void next_piece(self, Flight *flight) noexcept nogil:
        """A piece of read_pieces() has arrived: send it, begin the next."""
        cdef int64_t left = flight.request.offset + flight.request.length - flight.offset
        cdef char *at
        if flight.code:
            self.refuse(&flight.request, flight.code, NULL, flight.offset)
            self.release(flight)
            return
        at = self.replies.room(CHUNK_LENGTH + 8)
        if at == NULL:
            self.release(flight)
            return
        self.header(at, &flight.request, flight.length == left, flight.offset, flight.length)
        self.replies.commit(CHUNK_LENGTH + 8)
        self.replies.send(flight.buffer, flight.length)
        left -= flight.length
        if left == 0:
            count(&self.counters[READS], 1)
            count(&self.counters[BYTES_READ], flight.request.length)
        if left == 0 or self.replies.failed:
            self.release(flight)
            return
        flight.offset += flight.length
        flight.length = piece_from(flight.offset, left)
        self.flights.submit(flight, IO_READ, 0)

    cdef void read_whole(self, const Request *request) noexcept nogil:
        """A large read that must be answered in one piece (DF, simple replies): read first, so that an error can be told."""
        cdef void *buffer = NULL
        cdef Flight *flight
        cdef char *at
        cdef int code = self.take(request.length, &buffer)
        if code:
            if code == -ENOMEM and self.replies.structured:
                code = -EOVERFLOW
            self.refuse(request, code, NO_BUFFER, -1)
            return
        code = self.read_now(buffer, request.offset, request.length)
        if code == -EAGAIN and self.flights is not None:
            flight = self.flights.begin(request, FLIGHT_READ)
            flight.buffer = <char *>buffer
            flight.from_pool = request.length
            self.flights.submit(flight, IO_READ, 0)
            return
        if code:
            self.refuse(request, code, NULL, request.offset)
        else:
            at = self.replies.room(self.header_length())
            if at != NULL:
                self.header(at, request, True, request.offset, request.length)
                self.replies.commit(self.header_length())
                self.replies.send(buffer, request.length)
                count(&self.counters[READS], 1)
                count(&self.counters[BYTES_READ], request.length)
        self.pool.give(buffer, request.length, self.background)

    # -- what was under way

    cdef void land(self) noexcept nogil:
        cdef Flight *flight = self.flights.take_ended()
        while flight != NULL:
            self.arrived(flight)
            flight = self.flights.take_ended()

    cdef void land_all(self) noexcept nogil:
        self.land()
        while self.flights.queue.in_flight > 0:
            self.flights.wait()
            self.land()

    cdef void arrived(self, Flight *flight) noexcept nogil:
        cdef Request *request = &flight.request
        cdef int64_t header = self.header_length()
        cdef bint copied = request.length <= COPIED_READ_MAX
        cdef char *at
        if flight.kind == FLIGHT_READ_PIECES:
            self.next_piece(flight)
            return
        if flight.code:
            self.refuse(request, flight.code, NULL, request.offset)
        else:
            at = self.replies.room(header + request.length if copied else header)
            if at != NULL:
                self.header(at, request, True, request.offset, request.length)
                if copied:
                    memcpy(at + header, flight.buffer, <size_t>request.length)
                    self.replies.commit(header + request.length)
                else:
                    self.replies.commit(header)
                    self.replies.send(flight.buffer, request.length)
                count(&self.counters[READS], 1)
                count(&self.counters[BYTES_READ], request.length)
        self.release(flight)
