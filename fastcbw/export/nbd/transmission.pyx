"""The transmission phase of one NBD connection, from the first request to the end, without the interpreter.

Connection.run() gives up the interpreter lock once and takes it again when the connection has ended. In between:
receive as much as the socket holds in one call, serve every complete request in the buffer, collect the replies, send
them in one call, wait for more. There is no event loop: a receive that does not wait, then one that does.

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
from libc.string cimport memmove, strerror

from fastcbw.bitmaps.mapping cimport map_pages, unmap_pages
from fastcbw.block.device cimport BlockDevice, FAST_ONLY, FUA, MAY_UNMAP
from fastcbw.export.nbd.answers cimport RECEIVES, REQUESTS, count
from fastcbw.export.nbd.contexts cimport MetaContext
from fastcbw.export.nbd.pool cimport BufferPool
from fastcbw.export.nbd.pthread cimport pthread_self, pthread_setname_np
from fastcbw.export.nbd.reads cimport PIECE_ALIGN, Reads
from fastcbw.export.nbd.replies cimport Replies
from fastcbw.export.nbd.request cimport Request
from fastcbw.kernels.atomic cimport load32_acquire, store32_release
from fastcbw.sync cimport now_ns
from fastcbw.wire.constants cimport (
    CMD_BLOCK_STATUS, CMD_CACHE, CMD_DISC, CMD_FLAG_FAST_ZERO, CMD_FLAG_FUA, CMD_FLAG_NO_HOLE, CMD_FLUSH, CMD_READ, CMD_TRIM,
    CMD_WRITE, CONTEXTS_MAX, REQUEST_LENGTH, REQUEST_MAGIC)
from fastcbw.wire.integers cimport load16, load32, load64
from fastcbw.wire.socket cimport MSG_DONTWAIT, recv


cdef class Connection(Reads):
    """One client in its transmission phase on the connected, blocking socket FD.

    device: what is served. pool: the server's BufferPool. name: of the export, for error texts.
    structured: structured replies were negotiated. contexts: pairs (id, MetaContext), as negotiated.
    background: class of the export in the pool. spin_us: how long to poll the socket before sleeping, 0 = not;
    spin_adaptive: only where that has paid lately. Background exports never poll.
    run() is called by one thread, once; everything else from any thread.
    """

    def __cinit__(self, int fd, BlockDevice device not None, BufferPool pool not None, str name, *, bint structured=False,
                  contexts=(), bint read_only=False, bint background=False, int spin_us=0,
                  bint spin_adaptive=False):
        cdef int i
        self.fd = fd
        self.device = device
        self.pool = pool
        self.read_only = read_only or device.read_only
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
        with nogil:
            self.serve()
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
            if self.replies.length:
                self.replies.send(NULL, 0)
            if self.replies.failed and self.ending == RUNNING:
                self.ending = SEND_FAILED
                self.ending_code = self.replies.failed
            if self.ending == RUNNING:
                self.receive()

    cdef void serve_buffered(self) noexcept nogil:
        """Serve every request that is complete in the buffer."""
        cdef Request request
        cdef const char *at
        while self.ending == RUNNING and self.replies.failed == 0:
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
            if self.replies.length and (request.kind == CMD_FLUSH or request.flags & CMD_FLAG_FUA
                                        or now_ns() - self.replies.since_ns > HOLD_REPLY_NS):
                self.replies.send(NULL, 0)
            if request.kind == CMD_WRITE:
                if not self.begin_write(&request):
                    return
            else:
                self.start += REQUEST_LENGTH
                self.dispatch(&request)

    cdef void receive(self) noexcept nogil:
        """Receive at least one byte, up to what the buffer is meant to hold."""
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
        if got < 0 and errno == EAGAIN and self.spin_max_ns:
            idle_since = now_ns()
            until = idle_since + self.spin_ns
            while got < 0 and errno == EAGAIN and now_ns() < until:
                got = recv(self.fd, self.buffer + self.end, <size_t>limit, MSG_DONTWAIT)
        while got < 0 and (errno == EAGAIN or errno == EINTR):
            if load32_acquire(&self.stopping):
                break
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
                code = self.device.pwrite(self.buffer + self.start, request.offset, request.length,
                                          FUA if request.flags & CMD_FLAG_FUA else 0)
            self.start += request.length
            self.answer(request, code, NULL)
            return True
        self.start += REQUEST_LENGTH
        count(&self.counters[REQUESTS], 1)
        if request.length == 0:
            self.answer(request, code, why)
            return True
        self.write = request[0]
        self.write_offset = request.offset
        self.write_left = request.length
        self.write_code = code
        self.write_why = why
        return True

    cdef bint continue_write(self) noexcept nogil:
        """Write (or drop, after a failure) what is there of the write under way. False: more must be received first."""
        cdef int64_t have = self.end - self.start
        cdef int64_t piece
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
            self.write_code = self.device.pwrite(self.buffer + self.start, self.write_offset, piece, 0)
        self.start += piece
        self.write_offset += piece
        self.write_left -= piece
        if self.write_left == 0:
            if self.write_code == 0 and self.write.flags & CMD_FLAG_FUA:
                self.write_code = self.device.sync()
            self.answer(&self.write, self.write_code, self.write_why)
        return True

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
                code = 0 if self.read_only else self.device.sync()
            elif request.length == 0:
                code = 0
            elif request.kind == CMD_CACHE:
                code = 0        # advisory, and no device wants to know
            elif request.kind == CMD_TRIM:
                code = self.device.discard_at(request.offset, request.length, flags)
            else:
                if not request.flags & CMD_FLAG_NO_HOLE:
                    flags |= MAY_UNMAP
                if request.flags & CMD_FLAG_FAST_ZERO:
                    flags |= FAST_ONLY
                code = self.device.write_zeroes_at(request.offset, request.length, flags)
            self.answer(request, code, NULL)
