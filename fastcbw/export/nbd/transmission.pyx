"""The transmission phase of one NBD connection, from the first request to the end, without the interpreter.

Connection.run() gives up the interpreter lock once and takes it again when the connection has ended. In between:
receive as much as the socket holds in one call, serve every complete request in the buffer, collect the replies, send
them in one call, wait for more. There is no event loop: a receive that does not wait, then one that does.

Copies. The payload of a write goes to the device from the receive buffer. A write longer than WHOLE_WRITE_MAX
goes there in pieces as it arrives, so that its memory is bounded (when its client dies on the way, a part of it may be
on the disk, as with any write that was not acknowledged). A small read is read into the batch of replies; a large one
into a pool buffer, by pieces, each sent before the next is read.

Memory. Per connection BUFFER_LENGTH + BATCH_LENGTH (1 MiB, touched only as far as used), and one pool buffer while a large
read is served: PIECE_LENGTH, or the whole of it where the reply must be one chunk (DF, simple replies).

A client can do what it likes with its socket: requests are checked before anything uses them, a bad magic ends the
connection, a client that stalls pins what is named above and the thread, nothing else.
"""

from libc.errno cimport (
    EACCES, EAGAIN, EFBIG, EINTR, EINVAL, EIO, ENOMEM, ENOSPC, EPERM, EROFS, errno)
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport memcpy, memmove, strerror

from fastcbw.bitmaps.mapping cimport map_pages, unmap_pages
from fastcbw.block.device cimport BlockDevice, FAST_ONLY, FUA, MAY_UNMAP
from fastcbw.export.nbd.contexts cimport MetaContext
from fastcbw.export.nbd.pool cimport PIECE_LENGTH, BufferPool
from fastcbw.export.nbd.pthread cimport pthread_self, pthread_setname_np
from fastcbw.export.nbd.replies cimport Replies
from fastcbw.kernels.atomic cimport (
    load32_acquire, load_relaxed, store32_release, store_relaxed)
from fastcbw.sync cimport now_ns
from fastcbw.wire.constants cimport (
    CHUNK_LENGTH, CMD_BLOCK_STATUS, CMD_CACHE, CMD_DISC, CMD_FLAG_DF, CMD_FLAG_FAST_ZERO, CMD_FLAG_FUA, CMD_FLAG_NO_HOLE,
    CMD_FLAG_REQ_ONE, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, PAYLOAD_LENGTH_MAX, REPLY_FLAG_DONE,
    REPLY_TYPE_BLOCK_STATUS, REPLY_TYPE_NONE, REPLY_TYPE_OFFSET_DATA, REQUEST_LENGTH, REQUEST_MAGIC,
    SIMPLE_REPLY_LENGTH, SIMPLE_REPLY_MAGIC)
from fastcbw.wire.integers cimport load16, load32, load64, store32, store64
from fastcbw.wire.socket cimport MSG_DONTWAIT, recv

cdef extern from "<errno.h>" nogil:        # what libc.errno does not have
    int ECANCELED, EDQUOT, EOPNOTSUPP, EOVERFLOW, ESHUTDOWN

#: Names of the counters, in the order of the enum Counter.
COUNTERS = (
    "requests", "reads", "writes", "zeroes", "trims", "flushes", "caches", "statuses",
    "bytes_read", "bytes_written", "bytes_zeroed", "bytes_trimmed", "errors", "receives")

cdef const char *OPERATIONS[8]
OPERATIONS[:] = [b"read", b"write", b"disconnect", b"flush", b"trim", b"cache", b"write zeroes", b"block status"]

cdef const char *SOME_REQUEST = b"request"
cdef const char *NOT_WRITABLE = b"the export is read-only"
cdef const char *OUT_OF_RANGE = b"beyond the end of the export"
cdef const char *TOO_LONG = b"longer than 32 MiB"
cdef const char *UNKNOWN_FLAG = b"a flag that this request does not have"
cdef const char *UNKNOWN_REQUEST = b"no such request"
cdef const char *NO_CONTEXT = b"no meta context was negotiated"
cdef const char *NO_LENGTH = b"a length of zero has no status"
cdef const char *NO_BUFFER = b"longer than one unfragmented reply of this export may be"


cdef inline void count(uint64_t *counter, int64_t more) noexcept nogil:
    """One writer, so no atomic addition; readers see a whole word."""
    store_relaxed(counter, load_relaxed(counter) + <uint64_t>more)


cdef int protocol_error(int code) noexcept nogil:
    """The protocol's number for -errno CODE; what it has no number for is EIO."""
    code = -code
    if code == EPERM or code == EACCES or code == EROFS:
        return 1
    if code == ENOMEM:
        return 12
    if code == EINVAL:
        return 22
    if code == ENOSPC or code == EDQUOT or code == EFBIG:
        return 28
    if code == EOVERFLOW:
        return 75
    if code == EOPNOTSUPP:
        return 95
    if code == ESHUTDOWN:
        return 108
    return 5


cdef class Connection:
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

    def counts(self):
        """Return the counters of this moment, a dict by the names in COUNTERS."""
        return {name: load_relaxed(&self.counters[i]) for i, name in enumerate(COUNTERS)}

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
            piece = ((self.write_offset + have) & ~(<int64_t>WRITE_PIECE_ALIGN - 1)) - self.write_offset
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

    cdef int check(self, const Request *request, const char **why) noexcept nogil:
        """0, or -errno with a text: what can be said without the device. Sets no state."""
        cdef uint32_t allowed = CMD_FLAG_FUA        # valid everywhere, ignored where nothing is written
        cdef int kind = request.kind
        cdef bint writes = kind == CMD_WRITE or kind == CMD_TRIM or kind == CMD_WRITE_ZEROES
        if kind > CMD_BLOCK_STATUS:
            why[0] = UNKNOWN_REQUEST
            return -EINVAL
        if kind == CMD_READ and self.replies.structured:
            allowed |= CMD_FLAG_DF
        elif kind == CMD_WRITE_ZEROES:
            allowed |= CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO
        elif kind == CMD_BLOCK_STATUS:
            allowed |= CMD_FLAG_REQ_ONE
        if request.flags & ~allowed:
            why[0] = UNKNOWN_FLAG
            return -EINVAL
        if writes and self.read_only:
            why[0] = NOT_WRITABLE
            return -EPERM
        if kind == CMD_FLUSH:
            return 0
        if (kind == CMD_READ or kind == CMD_WRITE) and request.length > PAYLOAD_LENGTH_MAX:
            why[0] = TOO_LONG
            return -EOVERFLOW if request.flags & CMD_FLAG_DF else -EINVAL
        if request.offset < 0 or request.offset > self.device.length - request.length:
            why[0] = OUT_OF_RANGE
            return -ENOSPC if kind == CMD_WRITE or kind == CMD_WRITE_ZEROES else -EINVAL
        if kind == CMD_BLOCK_STATUS and self.contexts_count == 0:
            why[0] = NO_CONTEXT
            return -EINVAL
        if kind == CMD_BLOCK_STATUS and request.length == 0:
            why[0] = NO_LENGTH
            return -EINVAL
        return 0

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
            elif request.kind == CMD_CACHE or request.length == 0:
                code = 0
            elif request.kind == CMD_TRIM:
                code = self.device.discard_at(request.offset, request.length, flags)
            else:
                if not request.flags & CMD_FLAG_NO_HOLE:
                    flags |= MAY_UNMAP
                if request.flags & CMD_FLAG_FAST_ZERO:
                    flags |= FAST_ONLY
                code = self.device.write_zeroes_at(request.offset, request.length, flags)
            self.answer(request, code, NULL)

    cdef void read(self, const Request *request) noexcept nogil:
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

    cdef void read_small(self, const Request *request) noexcept nogil:
        """From the device straight into the batch, behind a header that is filled in when it has succeeded."""
        cdef int64_t header = CHUNK_LENGTH + 8 if self.replies.structured else SIMPLE_REPLY_LENGTH
        cdef char *at = self.replies.room(header + request.length)
        cdef int code
        if at == NULL:
            return
        code = self.device.pread(at + header, request.offset, request.length)
        if code:
            self.refuse(request, code, NULL, request.offset)
            return
        if self.replies.structured:
            self.replies.chunk(at, REPLY_FLAG_DONE, REPLY_TYPE_OFFSET_DATA, request.cookie, 8 + request.length)
            store64(at + CHUNK_LENGTH, <uint64_t>request.offset)
        else:
            store32(at, <uint32_t>SIMPLE_REPLY_MAGIC)
            store32(at + 4, 0)
            store64(at + 8, request.cookie)
        self.replies.commit(header + request.length)
        count(&self.counters[READS], 1)
        count(&self.counters[BYTES_READ], request.length)

    cdef int take(self, int64_t length, void **buffer) noexcept nogil:
        """A pool buffer, or -errno. Replies that are ready go out before it waits."""
        cdef int code = self.pool.take(length, self.background, False, &self.killing, buffer)
        if code == -EAGAIN:
            self.replies.send(NULL, 0)
            code = self.pool.take(length, self.background, True, &self.killing, buffer)
        return code

    cdef void read_pieces(self, const Request *request) noexcept nogil:
        """A large read as several chunks through one pool buffer. An error ends it with an error chunk at its offset."""
        cdef void *buffer = NULL
        cdef char *at
        cdef int64_t offset = request.offset
        cdef int64_t left = request.length
        cdef int64_t piece
        cdef int code = self.take(PIECE_LENGTH, &buffer)
        if code:
            self.refuse(request, code, NULL, -1)
            return
        while left > 0:
            piece = ((offset + PIECE_LENGTH) & ~(<int64_t>WRITE_PIECE_ALIGN - 1)) - offset
            if piece > left:
                piece = left
            code = self.device.pread(buffer, offset, piece)
            if code:
                self.refuse(request, code, NULL, offset)
                break
            at = self.replies.room(CHUNK_LENGTH + 8)
            if at == NULL:
                break
            self.replies.chunk(at, REPLY_FLAG_DONE if piece == left else 0, REPLY_TYPE_OFFSET_DATA, request.cookie, 8 + piece)
            store64(at + CHUNK_LENGTH, <uint64_t>offset)
            self.replies.commit(CHUNK_LENGTH + 8)
            if self.replies.send(buffer, piece):
                break
            offset += piece
            left -= piece
        self.pool.give(buffer, PIECE_LENGTH, self.background)
        if left == 0:
            count(&self.counters[READS], 1)
            count(&self.counters[BYTES_READ], request.length)

    cdef void read_whole(self, const Request *request) noexcept nogil:
        """A large read that must be answered in one piece (DF, simple replies): read first, so that an error can be told."""
        cdef void *buffer = NULL
        cdef int64_t header = CHUNK_LENGTH + 8 if self.replies.structured else SIMPLE_REPLY_LENGTH
        cdef char *at
        cdef int code = self.take(request.length, &buffer)
        if code:
            if code == -ENOMEM and self.replies.structured:
                code = -EOVERFLOW
            self.refuse(request, code, NO_BUFFER, -1)
            return
        code = self.device.pread(buffer, request.offset, request.length)
        if code:
            self.refuse(request, code, NULL, request.offset)
        else:
            at = self.replies.room(header)
            if at != NULL:
                if self.replies.structured:
                    self.replies.chunk(at, REPLY_FLAG_DONE, REPLY_TYPE_OFFSET_DATA, request.cookie, 8 + request.length)
                    store64(at + CHUNK_LENGTH, <uint64_t>request.offset)
                else:
                    store32(at, <uint32_t>SIMPLE_REPLY_MAGIC)
                    store32(at + 4, 0)
                    store64(at + 8, request.cookie)
                self.replies.commit(header)
                self.replies.send(buffer, request.length)
                count(&self.counters[READS], 1)
                count(&self.counters[BYTES_READ], request.length)
        self.pool.give(buffer, request.length, self.background)

    cdef void block_status(self, const Request *request) noexcept nogil:
        """One chunk per negotiated context: neighbours with equal flags merged, EXTENTS_MAX at most, all within the request."""
        cdef int64_t extents_max = 1 if request.flags & CMD_FLAG_REQ_ONE else EXTENTS_MAX
        cdef int64_t offset, end, got, extents, length
        cdef uint32_t flags = 0, last = 0
        cdef char *at
        cdef char *row
        cdef int i
        end = request.offset + request.length
        for i in range(self.contexts_count):
            at = self.replies.room(CHUNK_LENGTH + 4 + 8 * extents_max)
            if at == NULL:
                return
            row = at + CHUNK_LENGTH + 4
            offset = request.offset
            extents = 0
            length = 0
            got = 0
            while offset < end:
                got = (<MetaContext>self.context[i]).status(offset, end - offset, &flags)
                if got <= 0:
                    break
                if extents == 0 or flags != last:
                    if extents == extents_max:
                        break
                    extents += 1
                    length = 0
                    last = flags
                length += got
                offset += got
                store32(row + 8 * (extents - 1), <uint32_t>length)
                store32(row + 8 * (extents - 1) + 4, last)
            if extents == 0:
                self.refuse(request, <int>got if got else -EIO, NULL, -1)
                return
            self.replies.chunk(at, REPLY_FLAG_DONE if i == self.contexts_count - 1 else 0, REPLY_TYPE_BLOCK_STATUS,
                               request.cookie, 4 + 8 * extents)
            store32(at + CHUNK_LENGTH, self.context_id[i])
            self.replies.commit(CHUNK_LENGTH + 4 + 8 * extents)
        count(&self.counters[STATUSES], 1)

    # -- answers

    cdef void answer(self, const Request *request, int code, const char *why) noexcept nogil:
        """The one reply of a request without data to return, and its counters."""
        if code:
            self.refuse(request, code, why, -1)
            return
        if request.kind == CMD_WRITE:
            count(&self.counters[WRITES], 1)
            count(&self.counters[BYTES_WRITTEN], request.length)
        elif request.kind == CMD_WRITE_ZEROES:
            count(&self.counters[ZEROES], 1)
            count(&self.counters[BYTES_ZEROED], request.length)
        elif request.kind == CMD_TRIM:
            count(&self.counters[TRIMS], 1)
            count(&self.counters[BYTES_TRIMMED], request.length)
        elif request.kind == CMD_FLUSH:
            count(&self.counters[FLUSHES], 1)
        elif request.kind == CMD_CACHE:
            count(&self.counters[CACHES], 1)
        else:
            count(&self.counters[READS], 1)
        self.replies.done(request.cookie)

    cdef void refuse(self, const Request *request, int code, const char *why, int64_t offset) noexcept nogil:
        """An error reply for -errno CODE: the text names the export, the request and the reason (WHY, or the device's words)."""
        cdef char text[768]
        cdef char words[512]
        cdef const char *operation = SOME_REQUEST
        count(&self.counters[ERRORS], 1)
        if why == NULL:
            code = -self.device.explain(code, words, sizeof(words))
            why = words
        if code == -ECANCELED:
            code = -ESHUTDOWN
        if request.kind <= CMD_BLOCK_STATUS:
            operation = OPERATIONS[request.kind]
        snprintf(text, sizeof(text), b"%s: %s %lld+%lld: %s", self.name, operation,
                 <long long>request.offset, <long long>request.length, why)
        self.replies.error(request.cookie, protocol_error(code), text, offset)
