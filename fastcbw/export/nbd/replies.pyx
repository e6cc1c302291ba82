"""Replies: the encoder and sender of one connection's replies.

Replies are collected in a batch and go out in one call when the transmission loop has served what it received, before
it does something slow, or when the batch is full. Data of small reads is read from the device straight into the batch;
data of large reads goes to the socket from its own buffer, in the same call as the batch before it.

Success without data is answered by a simple reply in both modes (the protocol leaves the choice, it is 4 bytes
shorter); errors and data are chunks when structured replies were negotiated.
"""

from libc.errno cimport EAGAIN, EINTR, EPIPE, errno
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset, strlen

from fastcbw.bitmaps.mapping cimport map_pages, unmap_pages
from fastcbw.block.sys cimport iovec
from fastcbw.kernels.atomic cimport load32_relaxed, store32_relaxed
from fastcbw.sync cimport now_ns, sched_yield
from fastcbw.wire.constants cimport (
    CHUNK_LENGTH, REPLY_FLAG_DONE, REPLY_TYPE_ERROR, REPLY_TYPE_ERROR_OFFSET, SIMPLE_REPLY_LENGTH,
    SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC)
from fastcbw.wire.integers cimport store16, store32, store64
from fastcbw.wire.socket cimport MSG_DONTWAIT, MSG_NOSIGNAL, POLLOUT, msghdr, sendmsg

cdef enum:
    OFFERS = 256

# How many payloads of snapshots are still followed by an offer of the processor; every guest that is answered fills it up.
cdef uint32_t offers = 0


cdef class Replies:
    """The replies of the connection on file descriptor FD (borrowed). One thread only."""

    def __cinit__(self, int fd, bint structured):
        self.fd = fd
        self.structured = structured
        self.batch = <char *>map_pages(BATCH_LENGTH)
        if self.batch == NULL:
            raise MemoryError(f"{BATCH_LENGTH} bytes for replies cannot be mapped")

    def __dealloc__(self):
        if self.batch != NULL:
            unmap_pages(self.batch, BATCH_LENGTH)

    cdef char *room(self, int64_t length) noexcept nogil:
        if self.length + length > BATCH_LENGTH:
            self.send(NULL, 0)
        if self.failed:
            return NULL
        return self.batch + self.length

    cdef void commit(self, int64_t length) noexcept nogil:
        if self.length == 0:
            self.since_ns = now_ns()
        self.length += length

    cdef void chunk(self, char *at, uint16_t flags, uint16_t kind, uint64_t cookie, int64_t length) noexcept nogil:
        store32(at, <uint32_t>STRUCTURED_REPLY_MAGIC)
        store16(at + 4, flags)
        store16(at + 6, kind)
        store64(at + 8, cookie)
        store32(at + 16, <uint32_t>length)

    cdef int send(self, const void *payload, int64_t length) noexcept nogil:
        cdef iovec vector[2]
        cdef msghdr message
        cdef ssize_t sent
        cdef size_t part
        cdef int first = 0
        vector[0].iov_base = self.batch
        vector[0].iov_len = <size_t>self.length
        vector[1].iov_base = <void *>payload
        vector[1].iov_len = <size_t>length
        self.length = 0
        memset(&message, 0, sizeof(message))
        while self.failed == 0:
            while first < 2 and vector[first].iov_len == 0:
                first += 1
            if first == 2:
                return 0
            message.msg_iov = &vector[first]
            message.msg_iovlen = <size_t>(2 - first)
            if self.flights is not None and not self.flights.queue.is_idle():
                sent = sendmsg(self.fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT)
                if sent < 0 and errno == EAGAIN:
                    self.flights.sleep(self.fd, POLLOUT, False)
                    continue
            else:
                sent = sendmsg(self.fd, &message, MSG_NOSIGNAL)
            if sent < 0:
                if errno != EINTR:
                    self.failed = errno
                continue
            while sent > 0:
                part = <size_t>sent if <size_t>sent < vector[first].iov_len else vector[first].iov_len
                vector[first].iov_base = <char *>vector[first].iov_base + part
                vector[first].iov_len -= part
                sent -= <ssize_t>part
                if vector[first].iov_len == 0:
                    first += 1
        self.guests_first(length != 0)
        return -self.failed

    cdef void guests_first(self, bint payload) noexcept nogil:
        """After a send. The scheduler lets who runs run on until the next tick, up to 4 ms, when the one that wakes has just had its
        share; so while guests are answered, who pulls offers the processor after each payload. Without guests that
        would only make those who pull take turns, which costs them 3 %.
        """
        cdef uint32_t left = load32_relaxed(&offers)
        if not self.background:
            if left < OFFERS / 2:
                store32_relaxed(&offers, OFFERS)
        elif payload and left:
            store32_relaxed(&offers, left - 1)      # some get lost between threads
            sched_yield()

    cdef int done(self, uint64_t cookie) noexcept nogil:
        cdef char *at = self.room(SIMPLE_REPLY_LENGTH)
        if at == NULL:
            return -EPIPE
        store32(at, <uint32_t>SIMPLE_REPLY_MAGIC)
        store32(at + 4, 0)
        store64(at + 8, cookie)
        self.commit(SIMPLE_REPLY_LENGTH)
        return 0

    cdef int error(self, uint64_t cookie, int error, const char *text, int64_t offset) noexcept nogil:
        cdef int64_t text_length = <int64_t>strlen(text)
        cdef int64_t length = 6 + text_length + (8 if offset >= 0 else 0)
        cdef char *at = self.room(CHUNK_LENGTH + length)
        if at == NULL:
            return -EPIPE
        if not self.structured:
            store32(at, <uint32_t>SIMPLE_REPLY_MAGIC)
            store32(at + 4, <uint32_t>error)
            store64(at + 8, cookie)
            self.commit(SIMPLE_REPLY_LENGTH)
            return 0
        self.chunk(at, REPLY_FLAG_DONE, REPLY_TYPE_ERROR_OFFSET if offset >= 0 else REPLY_TYPE_ERROR, cookie, length)
        store32(at + CHUNK_LENGTH, <uint32_t>error)
        store16(at + CHUNK_LENGTH + 4, <uint16_t>text_length)
        memcpy(at + CHUNK_LENGTH + 6, text, <size_t>text_length)
        if offset >= 0:
            store64(at + CHUNK_LENGTH + 6 + text_length, <uint64_t>offset)
        self.commit(CHUNK_LENGTH + length)
        return 0
