"""The transmission phase of one NBD connection, from the first request to the end, without the interpreter.

Connection.run() gives up the interpreter lock once and takes it again when the connection has ended. In between:
receive as much as the socket holds in one call, serve every complete request in the buffer, collect the replies, send
them in one call, wait for more: a receive that does not wait, then one that does. What a device can do without waiting is done in the
loop. What would wait becomes a flight (flights.pyx) and is answered when it has ended, in that order; the wait is then for the
socket or the flights. A device without an engine (in memory, in Python, or opened so) is asked in the loop, waiting or not.

Copies. The payload of a write goes to the device from the receive buffer. A write longer than WHOLE_WRITE_MAX
goes there in pieces as it arrives, so that its memory is bounded (when its client dies on the way, a part of it may be
on the disk, as with any write that was not acknowledged). Reads are in reads.pyx.

Memory. Per connection BUFFER_LENGTH + BATCH_LENGTH (1 MiB, touched only as far as used), and one pool buffer while a large
read is served: PIECE_LENGTH, or the whole of it where the reply must be one chunk (DF, simple replies).

A client can do what it likes with its socket: requests are checked before anything uses them, a bad magic ends the
connection, a client that stalls pins what is named above and the thread, nothing else.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy, memmove, strerror

from fastcbw.bitmaps.mapping cimport map_pages, unmap_pages
from fastcbw.block.device cimport (BlockDevice, ENGINE_SYNC, FAST_ONLY, FUA, IO_DISCARD, IO_SYNC, IO_WRITE, IO_ZERO, MAY_UNMAP)
from fastcbw.block.sys cimport iovec
from fastcbw.block.threads cimport IO_CACHE
from fastcbw.export.nbd.answers cimport RECEIVES, REQUESTS, count
from fastcbw.export.nbd.contexts cimport MetaContext
from fastcbw.export.nbd.flights cimport (FLIGHT_PLAIN, FLIGHT_READ, FLIGHT_READ_PIECES, FLIGHT_WRITE_LARGE, FLIGHT_WRITE_PIECE,
                                         Flight, Flights)
from fastcbw.export.nbd.pool cimport PIECE_LENGTH, BufferPool
from fastcbw.export.nbd.pthread cimport pthread_self, pthread_setname_np
from fastcbw.export.nbd.reads cimport PIECE_ALIGN, Reads
from fastcbw.export.nbd.replies cimport Replies
from fastcbw.export.nbd.request cimport Request
from fastcbw.kernels.atomic cimport load32_acquire, store32_release
from fastcbw.sync cimport give_way, now_ns, wake_at_once
from fastcbw.wire.constants cimport (
    CMD_BLOCK_STATUS, CMD_CACHE, CMD_DISC, CMD_FLAG_FAST_ZERO, CMD_FLAG_FUA, CMD_FLAG_NO_HOLE, CMD_FLUSH, CMD_READ, CMD_TRIM,
    CMD_WRITE, CONTEXTS_MAX, REQUEST_LENGTH, REQUEST_MAGIC)
from fastcbw.wire.integers cimport load16, load32, load64
from fastcbw.wire.socket cimport MSG_DONTWAIT, POLLIN, recv


cdef class Connection(Reads):
    """One client in its transmission phase on the connected, blocking socket FD.

    device: what is served. pool: the server's BufferPool. name: of the export, for error texts.
    structured: structured replies were negotiated. contexts: pairs (id, MetaContext), as negotiated.
    drops: see Server.add_export. background: class of the export in the pool. spin_us: how long to poll the socket before sleeping, 0 = not;
    spin_adaptive: only where that has paid lately. Background exports never poll.
    run() is called by one thread, once; everything else from any thread.
    """

    def __cinit__(self, int fd, BlockDevice device not None, BufferPool pool not None, str name, *, bint structured=False,
                  contexts=(), bint read_only=False, str drops=None, bint background=False, int spin_us=0,
                  bint spin_adaptive=False):
        cdef int i
        self.fd = fd
        self.device = device
        self.pool = pool
        self.read_only = read_only or device.read_only and drops is None
        self.trims_only = drops is not None
        self.read_once = drops == "read-once"
        self.background = background
        # Guest first: who reads a snapshot sleeps, and leaves the processor to others.
        self.spin_max_ns = 0 if background else <int64_t>spin_us * 1000
        self.spin_ns = self.spin_max_ns
        self.spin_adaptive = spin_adaptive
        self.export_name = name.encode(errors="replace")[:200]
        self.name = self.export_name
        self.contexts = tuple(contexts)
        if len(self.contexts) > CONTEXTS_MAX:
            raise ValueError(f"contexts: {len(self.contexts)} are more than {CONTEXTS_MAX}")
        for i, (identifier, context) in enumerate(self.contexts):
            if not isinstance(context, MetaContext):
                raise TypeError(f"contexts: expected a MetaContext, got {type(context).__name__}")
            self.context[i] = <void *>context
            self.context_id[i] = identifier
        self.contexts_count = len(self.contexts)
        self.replies = Replies(fd, structured)
        self.replies.background = background
        # What waits may leave this thread where the device is made for it, and its opener has chosen an engine.
        # A read-once export answers one read after the other: what has gone out is consumed before the next.
        if device.queueable and device.io_engine != ENGINE_SYNC and not self.read_once:
            self.flights = self.replies.flights = Flights(device, background)
        self.need = REQUEST_LENGTH
        self.buffer = <char *>map_pages(BUFFER_LENGTH)
        if self.buffer == NULL:
            raise MemoryError(f"{BUFFER_LENGTH} bytes to receive into cannot be mapped")

    def __dealloc__(self):
        if self.buffer != NULL:
            unmap_pages(self.buffer, BUFFER_LENGTH)

    # -- control plane

    def run(self):
        """Serve the connection until it ends; return why, as a phrase for the log."""
        if self.running:
            raise RuntimeError("a connection runs once")
        self.running = 1
        pthread_setname_np(pthread_self(), b"nbd-" + self.export_name[:11])     # as `top -H` shows it, 15 bytes at most
        try:
            with nogil:
                if self.background:
                    give_way()          # who pulls takes the processor only where no guest wants it
                else:
                    wake_at_once()
                self.serve()
        finally:
            if self.flights is not None:
                self.flights.close()
        detail = f": {strerror(self.ending_code).decode()}" if self.ending_code else ""
        return {
            DISCONNECT: "the client disconnected",
            END_OF_STREAM: "the client closed the socket",
            CUT: "the client went away in the middle of a request",
            STOPPED: "ended by the server",
            BAD_MAGIC: "a request without the protocol's magic number",
            RECEIVE_FAILED: "receiving failed",
            SEND_FAILED: "the client went away before its replies were sent",
        }[self.ending] + detail

    def stop(self, *, bint kill=False):
        """Ask the connection to end after what it has received. The caller shuts the socket down to wake it.

        kill: give up a wait for a pool buffer too.
        """
        store32_release(&self.stopping, 1)
        if kill:
            store32_release(&self.killing, 1)
            self.pool.wake()

    # -- data plane: the loop

    cdef void serve(self) noexcept nogil:
        while self.ending == RUNNING:
            self.serve_buffered()
            if self.flights is not None and self.flights.is_busy():
                self.flights.collect()      # the kernel gets what was begun
                self.land()
            if self.stalled:
                self.stalled = False
                if self.flights.unused == NULL:
                    self.replies.send(NULL, 0)
                    self.flights.wait()
                    self.land()
                if self.replies.failed == 0:
                    continue
            if self.replies.length:
                self.replies.send(NULL, 0)
            if self.replies.failed and self.ending == RUNNING:
                self.ending = SEND_FAILED
                self.ending_code = self.replies.failed
            if self.ending == RUNNING:
                self.receive()
        if self.flights is not None:
            self.land_all()
            self.replies.send(NULL, 0)

    cdef void serve_buffered(self) noexcept nogil:
        """Serve every request that is complete in the buffer."""
        cdef Request request
        cdef const char *at
        while self.ending == RUNNING and self.replies.failed == 0:
            if self.flights is not None and self.flights.unused == NULL:
                self.stalled = True     # the next one might have to wait: it must itself wait until there is a place for it
                return
            if self.write_left > 0:
                if not self.continue_write():
                    return
                continue
            if self.end - self.start < REQUEST_LENGTH:
                self.need = REQUEST_LENGTH
                return
            at = self.buffer + self.start
            if load32(at) != <uint32_t>REQUEST_MAGIC:
                self.ending = BAD_MAGIC
                return
            request.flags = load16(at + 4)
            request.kind = load16(at + 6)
            request.cookie = load64(at + 8)
            request.offset = <int64_t>load64(at + 16)
            request.length = load32(at + 24)
            # A slow request must not hold back the replies of those before it for long.
            if self.replies.length and (self.flights is None and (request.kind == CMD_FLUSH or request.flags & CMD_FLAG_FUA)
                                        or now_ns() - self.replies.since_ns > HOLD_REPLY_NS):
                self.replies.send(NULL, 0)
            if request.kind == CMD_WRITE:
                if not self.begin_write(&request):
                    return
            else:
                self.start += REQUEST_LENGTH
                self.dispatch(&request)

    cdef void receive(self) noexcept nogil:
        """Receive at least one byte, up to what the buffer is meant to hold; or none, when something that was under way has ended."""
        cdef int64_t have = self.end - self.start
        cdef int64_t limit, until, idle_since = 0
        cdef ssize_t got
        if have == 0:
            self.start = self.end = 0
            limit = RECEIVE_LENGTH
        elif have <= MOVE_MAX or self.start + self.need > BUFFER_LENGTH:
            memmove(self.buffer, self.buffer + self.start, <size_t>have)
            self.start = 0
            self.end = have
            limit = (self.need if self.need > RECEIVE_LENGTH else RECEIVE_LENGTH) - have
        else:
            limit = self.need - have        # exactly the request under way, in place: the buffer is empty after it
        got = recv(self.fd, self.buffer + self.end, <size_t>limit, MSG_DONTWAIT)
        if got < 0 and errno == EAGAIN and self.spin_max_ns and (self.flights is None or not self.flights.is_busy()):
            idle_since = now_ns()
            until = idle_since + self.spin_ns
            while got < 0 and errno == EAGAIN and now_ns() < until:
                got = recv(self.fd, self.buffer + self.end, <size_t>limit, MSG_DONTWAIT)
        while got < 0 and (errno == EAGAIN or errno == EINTR):
            if load32_acquire(&self.stopping):
                break
            if self.flights is not None and self.flights.is_busy():
                if not self.flights.sleep(self.fd, POLLIN, True):
                    return
                got = recv(self.fd, self.buffer + self.end, <size_t>limit, MSG_DONTWAIT)
            else:
                got = recv(self.fd, self.buffer + self.end, <size_t>limit, 0)
        if idle_since and self.spin_adaptive:
            self.learn_from(now_ns() - idle_since)
        if load32_acquire(&self.stopping):
            self.ending = STOPPED
        elif got < 0:
            self.ending = RECEIVE_FAILED
            self.ending_code = errno
        elif got == 0:
            self.ending = CUT if have or self.write_left else END_OF_STREAM
        else:
            self.end += got
            count(&self.counters[RECEIVES], 1)

    cdef void learn_from(self, int64_t idle_ns) noexcept nogil:
        """Adaptive polling: poll in full after a wait that polling could have covered, half as long after each that was longer.

        A busy client thus gets the fixed bound, and one that went quiet costs at most twice the bound before the
        thread sleeps at once; the sleeping wait is measured as well, so that a client that comes back is noticed.
        """
        self.spin_ns = self.spin_max_ns if idle_ns <= self.spin_max_ns else self.spin_ns // 2

    # -- writes

    cdef bint begin_write(self, const Request *request) noexcept nogil:
        """Serve a write whose payload is in the buffer, or start one in pieces. False: more must be received first."""
        cdef const char *why = NULL
        cdef int code = self.check(request, &why)
        if code == 0 and request.length <= WHOLE_WRITE_MAX:
            if self.end - self.start < REQUEST_LENGTH + request.length:
                self.need = REQUEST_LENGTH + request.length
                return False
            self.start += REQUEST_LENGTH
            count(&self.counters[REQUESTS], 1)
            if request.length:
                code = self.write(request, self.buffer + self.start, FUA if request.flags & CMD_FLAG_FUA else 0)
            self.start += request.length
            if code != UNDER_WAY:
                self.answer(request, code, NULL)
            return True
        self.start += REQUEST_LENGTH
        count(&self.counters[REQUESTS], 1)
        if request.length == 0:
            self.answer(request, code, why)
            return True
        self.large = self.flights.begin(request, FLIGHT_WRITE_LARGE) if self.flights is not None and code == 0 else NULL
        self.large_request = request[0]
        self.write_offset = request.offset
        self.write_left = request.length
        self.write_code = code
        self.write_why = why
        return True

    cdef int write(self, const Request *request, const char *data, uint32_t flags) noexcept nogil:
        """0 or -errno, or UNDER_WAY."""
        cdef Flight *flight
        cdef int code
        if self.flights is None:
            return self.device.pwrite(data, request.offset, request.length, flags)
        code = self.write_now(data, request.offset, request.length, flags)
        if code != -EAGAIN:
            return code
        flight = self.flights.begin(request, FLIGHT_PLAIN)
        if self.give_buffer(flight, request.length):
            memcpy(flight.buffer, data, <size_t>request.length)
            self.flights.submit(flight, IO_WRITE, flags)
            return UNDER_WAY
        self.flights.release(flight)
        self.land_all()         # a write never waits for the pool; here it may wait, when nothing of ours is under way
        return self.device.pwrite(data, request.offset, request.length, flags)

    cdef int write_now(self, const char *data, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef iovec vector
        if self.device.always_waits:
            return -EAGAIN
        vector.iov_base = <void *>data
        vector.iov_len = <size_t>length
        return self.device.pwritev_nowait(&vector, 1, offset, length, flags)

    cdef bint continue_write(self) noexcept nogil:
        """Write (or drop, after a failure) what is there of the write under way. False: more must be received first."""
        cdef int64_t have = self.end - self.start
        cdef int64_t piece
        if self.large != NULL and self.large.code:
            self.write_code = self.large.code
        if self.write_code:
            piece = have if have < self.write_left else self.write_left
        elif have >= self.write_left:
            piece = self.write_left
        elif have >= WRITE_PIECE_MIN:
            # Cut where no cluster or page of the device is split between two pieces.
            piece = ((self.write_offset + have) & ~(<int64_t>PIECE_ALIGN - 1)) - self.write_offset
        else:
            piece = 0
        if piece == 0:
            self.need = WRITE_PIECE_MIN if self.write_left > WRITE_PIECE_MIN else self.write_left
            return False
        if self.write_code == 0:
            if self.large != NULL:
                if piece > PIECE_LENGTH:
                    piece = ((self.write_offset + PIECE_LENGTH) & ~(<int64_t>PIECE_ALIGN - 1)) - self.write_offset
                self.write_code = self.write_piece(piece)
            else:
                self.write_code = self.device.pwrite(self.buffer + self.start, self.write_offset, piece, 0)
        self.start += piece
        self.write_offset += piece
        self.write_left -= piece
        if self.write_left == 0:
            self.end_large()
        return True

    cdef int write_piece(self, int64_t length) noexcept nogil:
        """0, also when the piece is under way, or -errno."""
        cdef const char *data = self.buffer + self.start
        cdef Flight *flight
        cdef int code = self.write_now(data, self.write_offset, length, 0)
        if code != -EAGAIN:
            return code
        flight = self.flights.begin(&self.large_request, FLIGHT_WRITE_PIECE)
        if not self.give_buffer(flight, length):
            self.flights.release(flight)
            self.land_all()
            return self.device.pwrite(data, self.write_offset, length, 0)
        memcpy(flight.buffer, data, <size_t>length)
        flight.whole = self.large
        flight.offset = self.write_offset
        flight.length = length
        self.large.pieces += 1
        self.flights.submit(flight, IO_WRITE, 0)
        return 0

    cdef void end_large(self) noexcept nogil:
        """All of a large write was received. With pieces under way, the last of them answers it."""
        cdef Flight *large = self.large
        self.large = NULL
        if large == NULL:
            if self.write_code == 0 and self.large_request.flags & CMD_FLAG_FUA:
                self.write_code = self.device.sync()
            self.answer(&self.large_request, self.write_code, self.write_why)
            return
        large.received = True
        if large.code == 0:
            large.code = self.write_code
        if large.pieces == 0:
            self.complete_large(large)

    cdef void complete_large(self, Flight *large) noexcept nogil:
        cdef int code = large.code
        if code == 0 and large.request.flags & CMD_FLAG_FUA:
            if self.device.may_wait(IO_SYNC):
                large.kind = FLIGHT_PLAIN
                self.flights.submit(large, IO_SYNC, 0)
                return
            code = self.device.sync()
        self.answer(&large.request, code, NULL)
        self.release(large)

    cdef void arrived(self, Flight *flight) noexcept nogil:
        cdef Flight *large = flight.whole
        if flight.kind == FLIGHT_PLAIN:
            self.answer(&flight.request, flight.code, NULL)
            self.release(flight)
        elif flight.kind == FLIGHT_WRITE_PIECE:
            large.pieces -= 1
            if large.code == 0:
                large.code = flight.code
            self.release(flight)
            if large.received and large.pieces == 0:
                self.complete_large(large)
        else:
            Reads.arrived(self, flight)

    # -- the other requests


    cdef void dispatch(self, const Request *request) noexcept nogil:
        """Serve one request that has no payload."""
        cdef const char *why = NULL
        cdef uint32_t flags = FUA if request.flags & CMD_FLAG_FUA else 0
        cdef int code
        if request.kind == CMD_DISC:
            self.ending = DISCONNECT
            return
        count(&self.counters[REQUESTS], 1)
        code = self.check(request, &why)
        if code:
            self.answer(request, code, why)
        elif request.kind == CMD_READ:
            self.read(request)
        elif request.kind == CMD_BLOCK_STATUS:
            self.block_status(request)
        else:
            if request.kind == CMD_FLUSH:
                code = 0 if self.read_only else self.operate(request, IO_SYNC, 0)
            elif request.length == 0:
                code = 0
            elif request.kind == CMD_CACHE:
                code = self.cache(request)
            elif request.kind == CMD_TRIM:
                code = self.operate(request, IO_DISCARD, flags)
            else:
                if not request.flags & CMD_FLAG_NO_HOLE:
                    flags |= MAY_UNMAP
                if request.flags & CMD_FLAG_FAST_ZERO:
                    flags |= FAST_ONLY
                code = self.operate(request, IO_ZERO, flags)
            if code != UNDER_WAY:
                self.answer(request, code, NULL)

    cdef int operate(self, const Request *request, int operation, uint32_t flags) noexcept nogil:
        """A request without data: 0 or -errno, or UNDER_WAY."""
        if self.flights is not None and self.device.may_wait(operation):
            self.flights.submit(self.flights.begin(request, FLIGHT_PLAIN), operation, flags)
            return UNDER_WAY
        if operation == IO_SYNC:
            return self.device.sync()
        if operation == IO_DISCARD:
            return self.device.discard_at(request.offset, request.length, flags)
        return self.device.write_zeroes_at(request.offset, request.length, flags)

    cdef int cache(self, const Request *request) noexcept nogil:
        """0 or -errno, or UNDER_WAY. It reads as much as it was asked to: never in this thread where another can do it."""
        if not self.device.can_cache:
            return 0
        if self.flights is not None and self.device.queueable:
            self.flights.submit(self.flights.begin(request, FLIGHT_PLAIN), IO_CACHE, 0)
            return UNDER_WAY
        return self.device.cache_at(request.offset, request.length)
