"""One connection of the NBD client device: many threads' requests under way at once, answered in any order.

    thread A ── claim a slot ── send ─┐                              ┌─ receive: A's reply, B's, ... ── hand over
    thread B ── claim a slot ── send ─┴─ socket ── server ── socket ─┴─ B sleeps on its slot until it is done

Roles. There is no thread of the connection's own. A request's thread sends it (`send_lock`: one at a time) and then waits
for the answer: when nobody has the receive role it takes it and parses replies, its own and the others', payloads straight
into the vectors of the threads that asked; it wakes them as they are done, and when its own request is done it hands the
role to one that still waits. So a lone request costs two system calls and no switch of threads, which a thread that
only receives would double, and nothing is left to be joined. No deadlock: whoever has sent a request is on its way to
wait for it, so as long as the server owes replies somebody will receive them, however long a sender is held up.

In flight. A request takes a slot first: at most `requests_limit`, and `bytes_limit` bytes of payload; who finds no room
waits, first come, first served. A request that is larger than the bytes alone goes when nothing else is under way.

The end. The first error of the socket, reply that makes no sense, request that waits for longer than `timeout_ns`, or
close() kills the connection: the socket is shut down, and all who wait get the code at once. A thread whose buffer the receiver
may be filling leaves only after the receiver has: shutdown() wakes it, and it looks at `dead` after every system call.

What the server sends is believed only after a check: a cookie must be that of a request under way, a chunk must lie
within what was asked, and no reply writes more bytes than that. Source: NetworkBlockDevice/nbd, doc/proto.md.
"""

from libc.errno cimport EAGAIN, EINTR, EINVAL, EIO, ENOMEM, ENOSPC, EPERM, EPIPE, errno
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport memcpy, memset, strerror
from posix.unistd cimport close as _close

from fastcbw.bitmaps.mapping cimport map_pages, unmap_pages
from fastcbw.block.sys cimport iovec
from fastcbw.kernels.atomic cimport load32_acquire, store32_relaxed, store32_release
from fastcbw.sync cimport (
    cond_init, cond_wait_until, now_ns, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_signal, pthread_cond_wait,
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock)
from fastcbw.wire.constants cimport (
    CHUNK_LENGTH, CMD_BLOCK_STATUS, CMD_DISC, CMD_READ, CMD_WRITE, REPLY_FLAG_DONE, REPLY_TYPE_BLOCK_STATUS, REPLY_TYPE_ERROR,
    REPLY_TYPE_ERROR_BIT, REPLY_TYPE_ERROR_OFFSET, REPLY_TYPE_NONE, REPLY_TYPE_OFFSET_DATA, REPLY_TYPE_OFFSET_HOLE,
    REQUEST_LENGTH, REQUEST_MAGIC, SIMPLE_REPLY_LENGTH, SIMPLE_REPLY_MAGIC, STRING_LENGTH_MAX, STRUCTURED_REPLY_MAGIC)
from fastcbw.wire.integers cimport load16, load32, load64, store16, store32, store64
from fastcbw.wire.socket cimport (
    MSG_DONTWAIT, MSG_NOSIGNAL, POLLIN, POLLOUT, SHUT_RDWR, msghdr, poll, pollfd, recvmsg, send, sendmsg, shutdown)

cdef extern from "<errno.h>" nogil:        # what libc.errno does not have
    int ECONNRESET, EOPNOTSUPP, EOVERFLOW, ESHUTDOWN, ETIMEDOUT

cdef enum:
    VECTOR_MAX = 64             # entries of one system call
    NEXT_HEADER_LENGTH = 28     # received together with the end of a payload: the header of the next data chunk, no more

#: The most requests that a connection can have in flight.
SLOTS = REQUESTS_MAX


# -- cursors

cdef inline void advance(Cursor *cursor, int64_t length) noexcept nogil:
    """Move on by LENGTH bytes, which are there."""
    cdef size_t left = <size_t>length
    cdef size_t part
    while left > 0 and cursor.entries > 0:
        part = cursor.entry.iov_len - cursor.skip
        if part > left:
            cursor.skip += left
            return
        left -= part
        cursor.entry += 1
        cursor.entries -= 1
        cursor.skip = 0


cdef inline int gather(const Cursor *cursor, int64_t length, iovec *out, int room, int64_t *covered) noexcept nogil:
    """Fill OUT with what the next LENGTH bytes are, at most ROOM entries; return their count, their bytes in *covered."""
    cdef size_t left = <size_t>length
    cdef size_t skip = cursor.skip
    cdef size_t part
    cdef int count = 0
    cdef int i = 0
    while left > 0 and count < room and i < cursor.entries:
        part = cursor.entry[i].iov_len - skip
        if part > left:
            part = left
        if part:
            out[count].iov_base = <char *>cursor.entry[i].iov_base + skip
            out[count].iov_len = part
            count += 1
            left -= part
        i += 1
        skip = 0
    covered[0] = length - <int64_t>left
    return count


cdef int code_of(uint32_t error) noexcept nogil:
    """-errno of the protocol's number, which is Linux's; a number that the protocol does not have is EIO."""
    cdef int known = <int>error
    if (known == EPERM or known == ENOMEM or known == EINVAL or known == ENOSPC or known == EOVERFLOW
            or known == EOPNOTSUPP or known == ESHUTDOWN):
        return -known
    return -EIO


cdef class NbdConnection:
    """The transmission phase on the connected, blocking socket FD, which it takes over.

    context: id of base:allocation, or None. requests, bytes: bounds of what is in flight. timeout_ns: of each request, 0 none.
    """

    def __cinit__(self, int fd, *, bint structured, context, int requests, int64_t bytes, int64_t timeout_ns):
        cdef int i
        self.fd = -1
        pthread_mutex_init(&self.send_lock, NULL)
        pthread_mutex_init(&self.lock, NULL)
        cond_init(&self.room)
        for i in range(REQUESTS_MAX):
            cond_init(&self.slots[i].wake)
        if not 1 <= requests <= REQUESTS_MAX:
            raise ValueError(f"requests: {requests} is not within 1 to {REQUESTS_MAX}")
        self.structured = structured
        self.has_context = context is not None
        self.context = context or 0
        self.requests_limit = requests
        self.bytes_limit = bytes
        self.timeout_ns = timeout_ns
        self.buffer = <char *>map_pages(RECEIVE_LENGTH)
        if self.buffer == NULL:
            raise MemoryError(f"{RECEIVE_LENGTH} bytes to receive into cannot be mapped")
        self.fd = fd

    def __dealloc__(self):
        cdef int i
        if self.fd >= 0:
            _close(self.fd)
        if self.buffer != NULL:
            unmap_pages(self.buffer, RECEIVE_LENGTH)
        for i in range(REQUESTS_MAX):
            pthread_cond_destroy(&self.slots[i].wake)
        pthread_cond_destroy(&self.room)
        pthread_mutex_destroy(&self.lock)
        pthread_mutex_destroy(&self.send_lock)

    def close(self):
        """Say goodbye when nothing is under way, end what is, and close the socket. Closing twice is no error."""
        cdef char goodbye[REQUEST_LENGTH]
        if self.fd < 0:
            return
        with nogil:
            if load32_acquire(&self.dead) == 0 and self.requests == 0:
                memset(goodbye, 0, sizeof(goodbye))
                store32(goodbye, <uint32_t>REQUEST_MAGIC)
                store16(goodbye + 6, CMD_DISC)
                send(self.fd, goodbye, sizeof(goodbye), MSG_DONTWAIT | MSG_NOSIGNAL)
            self.kill(-ESHUTDOWN, b"the device was closed")
            pthread_mutex_lock(&self.lock)
            while self.requests:
                pthread_cond_wait(&self.room, &self.lock)
            pthread_mutex_unlock(&self.lock)
        _close(self.fd)
        self.fd = -1

    # -- a request

    cdef int call(self, int kind, uint32_t flags, int64_t offset, int64_t length, const Cursor *data, int64_t *extent,
                  uint32_t *status) noexcept nogil:
        cdef int64_t payload = length if kind == CMD_READ or kind == CMD_WRITE else 0
        cdef int64_t deadline_ns = now_ns() + self.timeout_ns if self.timeout_ns else 0
        cdef Slot *slot = self.claim(kind, offset, length, data, payload, deadline_ns)
        cdef int code
        if slot == NULL:
            return self.death_code
        self.send(slot, flags, deadline_ns)
        self.wait(slot, deadline_ns)
        code = slot.code if slot.done else self.death_code
        if code == 0 and extent != NULL:
            extent[0] = slot.received
            status[0] = slot.status
        self.release(slot, payload)
        return code

    cdef Slot *claim(self, int kind, int64_t offset, int64_t length, const Cursor *data, int64_t payload,
                     int64_t deadline_ns) noexcept nogil:
        """Take a slot for the request, waiting for room; NULL when the connection is dead."""
        cdef Slot *slot = NULL
        cdef uint64_t turn
        cdef int i
        pthread_mutex_lock(&self.lock)
        store32_relaxed(&self.requests, self.requests + 1)
        turn = self.turn_next
        self.turn_next += 1
        while self.dead == 0 and (turn != self.turn_now or self.in_flight >= self.requests_limit
                                  or (self.bytes_in_flight and self.bytes_in_flight + payload > self.bytes_limit)):
            if self.sleep(&self.room, deadline_ns) == ETIMEDOUT:
                self.kill_locked(-ETIMEDOUT, b"the server has not answered in time")
        if self.dead:
            store32_relaxed(&self.requests, self.requests - 1)
            pthread_cond_broadcast(&self.room)
        else:
            self.turn_now += 1
            if self.turn_now != self.turn_next:
                pthread_cond_broadcast(&self.room)      # there may be room for the next one, too
            for i in range(REQUESTS_MAX):
                if self.slots[i].cookie == 0:
                    slot = &self.slots[i]
                    break
            self.in_flight += 1
            self.bytes_in_flight += payload
            self.cookies += 1
            # All of it here, under the lock: a server may guess the cookie before it has seen it.
            slot.kind = kind
            slot.offset = offset
            slot.length = length
            slot.data.entries = 0
            if data != NULL:
                slot.data = data[0]
            slot.waiting = slot.done = slot.begun = False
            slot.code = 0
            slot.received = 0
            slot.status = 0
            slot.cookie = self.cookies << 8 | <uint64_t>i
        pthread_mutex_unlock(&self.lock)
        return slot

    cdef void release(self, Slot *slot, int64_t payload) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        slot.cookie = 0
        self.in_flight -= 1
        self.bytes_in_flight -= payload
        store32_relaxed(&self.requests, self.requests - 1)
        if self.dead or self.turn_now != self.turn_next:
            pthread_cond_broadcast(&self.room)
        pthread_mutex_unlock(&self.lock)

    cdef int sleep(self, pthread_cond_t *on, int64_t deadline_ns) noexcept nogil:
        """Sleep on ON, with the lock; 0 or ETIMEDOUT."""
        if deadline_ns:
            return cond_wait_until(on, &self.lock, deadline_ns)
        pthread_cond_wait(on, &self.lock)
        return 0

    # -- the end

    cdef void kill(self, int code, const char *why) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        self.kill_locked(code, why)
        pthread_mutex_unlock(&self.lock)

    cdef void kill_locked(self, int code, const char *why) noexcept nogil:
        cdef int i
        if self.dead:
            return
        self.death_code = code
        snprintf(self.death, sizeof(self.death), "%s", why)
        store32_release(&self.dead, 1)
        shutdown(self.fd, SHUT_RDWR)        # wakes the receiver and the sender
        pthread_cond_broadcast(&self.room)
        for i in range(REQUESTS_MAX):
            if self.slots[i].waiting:
                pthread_cond_signal(&self.slots[i].wake)

    cdef void kill_errno(self, const char *doing, int error) noexcept nogil:
        cdef char why[REASON_LENGTH]
        if error == EPIPE or error == ECONNRESET:
            snprintf(why, sizeof(why), "the server closed the connection")
        else:
            snprintf(why, sizeof(why), "%s: %s", doing, strerror(error))
        self.kill(-EIO, why)

    cdef bint malformed(self, const char *what) noexcept nogil:
        """End the connection for a reply that makes no sense; False."""
        cdef char why[REASON_LENGTH]
        snprintf(why, sizeof(why), "the server's reply makes no sense: %s", what)
        self.kill(-EIO, why)
        return False

    # -- sending

    cdef void send(self, const Slot *slot, uint32_t flags, int64_t deadline_ns) noexcept nogil:
        """Send the request of SLOT; what fails kills the connection, since half of a request can't be taken back."""
        cdef char header[REQUEST_LENGTH]
        cdef iovec vector[VECTOR_MAX]
        cdef msghdr message
        cdef Cursor data = slot.data
        cdef int64_t left = slot.length if slot.kind == CMD_WRITE else 0
        cdef int64_t covered = 0
        cdef int header_sent = 0
        cdef int first
        cdef ssize_t sent
        store32(header, <uint32_t>REQUEST_MAGIC)
        store16(header + 4, <uint16_t>flags)
        store16(header + 6, <uint16_t>slot.kind)
        store64(header + 8, slot.cookie)
        store64(header + 16, <uint64_t>slot.offset)
        store32(header + 24, <uint32_t>slot.length)
        memset(&message, 0, sizeof(message))
        pthread_mutex_lock(&self.send_lock)
        while (header_sent < REQUEST_LENGTH or left > 0) and load32_acquire(&self.dead) == 0:
            first = 0
            if header_sent < REQUEST_LENGTH:
                vector[0].iov_base = header + header_sent
                vector[0].iov_len = <size_t>(REQUEST_LENGTH - header_sent)
                first = 1
            message.msg_iov = vector
            message.msg_iovlen = <size_t>(first + gather(&data, left, &vector[first], VECTOR_MAX - first, &covered))
            sent = sendmsg(self.fd, &message, MSG_NOSIGNAL | (MSG_DONTWAIT if deadline_ns else 0))
            if sent < 0:
                if errno == EAGAIN:
                    if self.await_socket(POLLOUT, deadline_ns):
                        self.kill(-ETIMEDOUT, b"the server has not taken a request in time")
                elif errno != EINTR:
                    self.kill_errno(b"sending", errno)
                continue
            if first:
                first = <int>sent if sent < <ssize_t>vector[0].iov_len else <int>vector[0].iov_len
                header_sent += first
                sent -= first
            advance(&data, sent)
            left -= sent
        pthread_mutex_unlock(&self.send_lock)

    cdef int await_socket(self, short events, int64_t deadline_ns) noexcept nogil:
        """Sleep until the socket is ready or the deadline has passed: 0 or ETIMEDOUT."""
        cdef pollfd wanted
        cdef int64_t left_ms
        wanted.fd = self.fd
        wanted.events = events
        while True:
            left_ms = -1
            if deadline_ns:
                left_ms = (deadline_ns - now_ns() + 999999) // 1000000
                if left_ms <= 0:
                    return ETIMEDOUT
            if poll(&wanted, 1, <int>left_ms if left_ms < 3600000 else 3600000) > 0:
                return 0

    # -- waiting, and the receive role

    cdef void wait(self, Slot *slot, int64_t deadline_ns) noexcept nogil:
        """Return when SLOT is done, or the connection dead and nobody near its buffer."""
        pthread_mutex_lock(&self.lock)
        while not slot.done:
            if self.receiving:
                slot.waiting = True
                # Once dead the receiver is about to leave; no deadline is needed.
                if self.sleep(&slot.wake, 0 if self.dead else deadline_ns) == ETIMEDOUT and not slot.done:
                    self.kill_locked(-ETIMEDOUT, b"the server has not answered in time")
                slot.waiting = False
            elif self.dead:
                break
            else:
                self.receiving = True
                pthread_mutex_unlock(&self.lock)
                self.receive(slot, deadline_ns)
                pthread_mutex_lock(&self.lock)
                self.receiving = False
                self.hand_over()
        pthread_mutex_unlock(&self.lock)

    cdef void hand_over(self) noexcept nogil:
        """Wake one that still waits, to take the receive role; all of them when there is nothing more to receive."""
        cdef int i
        for i in range(REQUESTS_MAX):
            if self.slots[i].waiting and not self.slots[i].done:
                pthread_cond_signal(&self.slots[i].wake)
                if not self.dead:
                    return

    cdef void receive(self, const Slot *mine, int64_t deadline_ns) noexcept nogil:
        """Serve replies until MINE is done or the connection dead. Stops between two replies or chunks only."""
        cdef uint32_t magic
        cdef bint going = True
        while going and not mine.done and load32_acquire(&self.dead) == 0:
            if not self.fetch(SIMPLE_REPLY_LENGTH, deadline_ns):
                return
            magic = load32(self.buffer + self.start)
            if magic == <uint32_t>SIMPLE_REPLY_MAGIC:
                going = self.simple_reply(deadline_ns)
            elif magic == <uint32_t>STRUCTURED_REPLY_MAGIC and self.structured:
                going = self.fetch(CHUNK_LENGTH, deadline_ns) and self.chunk(deadline_ns)
            else:
                going = self.malformed(b"it does not begin with the protocol's magic number")

    # -- bytes

    cdef int64_t receive_some(self, iovec *vector, int count, int64_t deadline_ns) noexcept nogil:
        """Receive at least one byte; -1 when the connection is dead then."""
        cdef msghdr message
        cdef ssize_t got
        memset(&message, 0, sizeof(message))
        message.msg_iov = vector
        message.msg_iovlen = <size_t>count
        while load32_acquire(&self.dead) == 0:
            got = recvmsg(self.fd, &message, MSG_DONTWAIT if deadline_ns else 0)
            if got > 0:
                return got
            if got == 0:
                self.kill(-EIO, b"the server closed the connection")
            elif errno == EAGAIN:
                if self.await_socket(POLLIN, deadline_ns):
                    self.kill(-ETIMEDOUT, b"the server has not answered in time")
            elif errno != EINTR:
                self.kill_errno(b"receiving", errno)
        return -1

    cdef bint fetch(self, int need, int64_t deadline_ns) noexcept nogil:
        """Have at least NEED bytes in the buffer, which is much larger; False when the connection is dead."""
        cdef iovec vector
        cdef int64_t got
        if self.start == self.end:
            self.start = self.end = 0
        elif RECEIVE_LENGTH - self.start < need:
            memcpy(self.buffer, self.buffer + self.start, <size_t>(self.end - self.start))     # less than NEED: no overlap
            self.end -= self.start
            self.start = 0
        while self.end - self.start < need:
            vector.iov_base = self.buffer + self.end
            vector.iov_len = <size_t>(RECEIVE_LENGTH - self.end)
            got = self.receive_some(&vector, 1, deadline_ns)
            if got < 0:
                return False
            self.end += <int>got
        return True

    cdef bint take_data(self, Cursor *to, int64_t length, int64_t deadline_ns) noexcept nogil:
        """Move the next LENGTH bytes of the stream to TO: what the buffer has by copying, the rest from the socket into place."""
        cdef iovec vector[VECTOR_MAX]
        cdef int64_t covered = 0
        cdef int64_t got
        cdef int count, i
        while length > 0:
            got = self.end - self.start
            count = gather(to, length, vector, VECTOR_MAX - 1, &covered)
            if count == 0:
                return self.malformed(b"more data than was asked for")      # not reached: within() was asked before
            if got > 0:
                if got > covered:
                    got = covered
                covered = got
                i = 0
                while got > 0:
                    if got < <int64_t>vector[i].iov_len:
                        vector[i].iov_len = <size_t>got
                    memcpy(vector[i].iov_base, self.buffer + self.start, vector[i].iov_len)
                    self.start += <int>vector[i].iov_len
                    got -= <int64_t>vector[i].iov_len
                    i += 1
                advance(to, covered)
                length -= covered
                continue
            self.start = self.end = 0
            if covered == length:
                vector[count].iov_base = self.buffer
                vector[count].iov_len = NEXT_HEADER_LENGTH
                count += 1
            got = self.receive_some(vector, count, deadline_ns)
            if got < 0:
                return False
            if got > covered:
                self.end = <int>(got - covered)
                got = covered
            advance(to, got)
            length -= got
        return True

    cdef bint drop(self, int64_t length, int64_t deadline_ns) noexcept nogil:
        """Skip the next LENGTH bytes of the stream."""
        cdef int64_t have
        while length > 0:
            if not self.fetch(1, deadline_ns):
                return False
            have = self.end - self.start
            if have > length:
                have = length
            self.start += <int>have
            length -= have
        return True

    # -- replies

    cdef Slot *slot_of(self, uint64_t cookie) noexcept nogil:
        """The request under way with COOKIE, or NULL. It stays under way until the receiver says that it is done."""
        cdef int i = <int>(cookie & 0xFF)
        cdef Slot *found = NULL
        if i >= REQUESTS_MAX or cookie == 0:
            return NULL
        pthread_mutex_lock(&self.lock)
        if self.slots[i].cookie == cookie and not self.slots[i].done:
            found = &self.slots[i]
        pthread_mutex_unlock(&self.lock)
        return found

    cdef void complete(self, Slot *slot) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        slot.done = True
        if slot.waiting:
            pthread_cond_signal(&slot.wake)
        pthread_mutex_unlock(&self.lock)

    cdef bint simple_reply(self, int64_t deadline_ns) noexcept nogil:
        cdef const char *at = self.buffer + self.start
        cdef uint32_t error = load32(at + 4)
        cdef Slot *slot = self.slot_of(load64(at + 8))
        cdef Cursor to
        self.start += SIMPLE_REPLY_LENGTH
        if slot == NULL:
            return self.malformed(b"it answers no request")
        if slot.begun:
            return self.malformed(b"a simple reply in the middle of a structured one")
        if error:
            slot.code = code_of(error)
        elif slot.kind == CMD_BLOCK_STATUS or (slot.kind == CMD_READ and self.structured):
            return self.malformed(b"a simple reply where only a structured one can be")
        elif slot.kind == CMD_READ:
            to = slot.data
            if not self.take_data(&to, slot.length, deadline_ns):
                return False
        self.complete(slot)
        return True

    cdef bint chunk(self, int64_t deadline_ns) noexcept nogil:
        cdef const char *at = self.buffer + self.start
        cdef uint32_t flags = load16(at + 4)
        cdef int kind = load16(at + 6)
        cdef Slot *slot = self.slot_of(load64(at + 8))
        cdef int64_t length = load32(at + 16)
        cdef bint going
        self.start += CHUNK_LENGTH
        if slot == NULL:
            return self.malformed(b"a chunk that answers no request")
        slot.begun = True
        if kind & REPLY_TYPE_ERROR_BIT:
            going = self.error_chunk(slot, kind, length, deadline_ns)
        elif kind == REPLY_TYPE_NONE:
            going = (length == 0 and flags & REPLY_FLAG_DONE) or self.malformed(b"an empty chunk that is not the last")
        elif kind == REPLY_TYPE_OFFSET_DATA:
            going = self.data_chunk(slot, length, deadline_ns)
        elif kind == REPLY_TYPE_OFFSET_HOLE:
            going = self.hole_chunk(slot, length, deadline_ns)
        elif kind == REPLY_TYPE_BLOCK_STATUS:
            going = self.status_chunk(slot, length, deadline_ns)
        else:
            going = self.malformed(b"a chunk of an unknown type")
        if not going or not flags & REPLY_FLAG_DONE:
            return going
        if slot.code == 0 and slot.kind == CMD_READ and slot.received != slot.length:
            return self.malformed(b"a read without all of its data")
        if slot.code == 0 and slot.kind == CMD_BLOCK_STATUS and slot.received == 0:
            return self.malformed(b"a block status without an extent")
        self.complete(slot)
        return True

    cdef bint within(self, const Slot *slot, uint64_t offset, int64_t length) noexcept nogil:
        """Whether LENGTH bytes at OFFSET are part of what SLOT reads, and not more than it still has to get."""
        cdef uint64_t skip = offset - <uint64_t>slot.offset
        if slot.kind != CMD_READ or length <= 0 or offset < <uint64_t>slot.offset or skip > <uint64_t>slot.length:
            return False
        return length <= slot.length - <int64_t>skip and length <= slot.length - slot.received

    cdef bint data_chunk(self, Slot *slot, int64_t length, int64_t deadline_ns) noexcept nogil:
        cdef uint64_t offset
        cdef Cursor to
        if length <= 8:
            return self.malformed(b"a data chunk without data")
        if not self.fetch(8, deadline_ns):
            return False
        offset = load64(self.buffer + self.start)
        self.start += 8
        length -= 8
        if not self.within(slot, offset, length):
            return self.malformed(b"data that was not asked for")
        to = slot.data
        advance(&to, <int64_t>offset - slot.offset)
        slot.received += length
        return self.take_data(&to, length, deadline_ns)

    cdef bint hole_chunk(self, Slot *slot, int64_t length, int64_t deadline_ns) noexcept nogil:
        cdef iovec vector[VECTOR_MAX]
        cdef int64_t covered = 0
        cdef uint64_t offset
        cdef Cursor to
        cdef int count, i
        if length != 12:
            return self.malformed(b"a hole chunk of a wrong length")
        if not self.fetch(12, deadline_ns):
            return False
        offset = load64(self.buffer + self.start)
        length = load32(self.buffer + self.start + 8)
        self.start += 12
        if not self.within(slot, offset, length):
            return self.malformed(b"a hole that was not asked for")
        to = slot.data
        advance(&to, <int64_t>offset - slot.offset)
        slot.received += length
        while length > 0:
            count = gather(&to, length, vector, VECTOR_MAX, &covered)
            if count == 0:
                return self.malformed(b"more data than was asked for")      # not reached: within() was asked before
            for i in range(count):
                memset(vector[i].iov_base, 0, vector[i].iov_len)
            advance(&to, covered)
            length -= covered
        return True

    cdef bint status_chunk(self, Slot *slot, int64_t length, int64_t deadline_ns) noexcept nogil:
        """Keep the first extent; servers may answer a request for one with several all the same."""
        if slot.kind != CMD_BLOCK_STATUS or not self.has_context or slot.received:
            return self.malformed(b"a block status that was not asked for")
        if length < 12 or (length - 4) % 8:
            return self.malformed(b"a block status of a wrong length")
        if not self.fetch(12, deadline_ns):
            return False
        if load32(self.buffer + self.start) != self.context:
            return self.malformed(b"a block status of another context")
        slot.received = load32(self.buffer + self.start + 4)
        slot.status = load32(self.buffer + self.start + 8)
        self.start += 12
        if slot.received == 0:
            return self.malformed(b"an extent of no length")
        return self.drop(length - 12, deadline_ns)

    cdef bint error_chunk(self, Slot *slot, int kind, int64_t length, int64_t deadline_ns) noexcept nogil:
        """Keep the first error of the request, and the text of the connection's last one."""
        cdef char text[REASON_LENGTH]
        cdef iovec vector
        cdef Cursor to
        cdef int64_t text_length, kept
        cdef uint32_t error
        cdef int i
        if length < 6:
            return self.malformed(b"an error chunk without an error")
        if not self.fetch(6, deadline_ns):
            return False
        error = load32(self.buffer + self.start)
        text_length = load16(self.buffer + self.start + 4)
        self.start += 6
        length -= 6
        if error == 0:
            return self.malformed(b"an error chunk without an error")
        if (text_length > length or text_length > STRING_LENGTH_MAX or (kind == REPLY_TYPE_ERROR and length != text_length)
                or (kind == REPLY_TYPE_ERROR_OFFSET and length != text_length + 8) or length > 2 * STRING_LENGTH_MAX):
            return self.malformed(b"an error chunk of a wrong length")
        kept = text_length if text_length < REASON_LENGTH - 1 else REASON_LENGTH - 1
        vector.iov_base = text
        vector.iov_len = <size_t>kept
        to.entry = &vector
        to.entries = 1
        to.skip = 0
        if not self.take_data(&to, kept, deadline_ns) or not self.drop(length - kept, deadline_ns):
            return False
        for i in range(<int>kept):
            if 0 <= text[i] < 32:
                text[i] = 32                    # ' '
        text[kept] = 0
        if slot.code == 0:
            slot.code = code_of(error)
        if kept:
            pthread_mutex_lock(&self.lock)
            self.text_code = code_of(error)
            self.text_ns = now_ns()
            memcpy(self.text, text, <size_t>kept + 1)
            pthread_mutex_unlock(&self.lock)
        return True
