"""Answers: what the handlers of one connection's requests share.

Here is what can be said of a request without the device (check), the reply to one without data (answer), an error with its
text (refuse), and block status. One level above stand the reads (reads.pyx), above them the loop (transmission.pyx).
"""

from libc.errno cimport EACCES, EFBIG, EINVAL, EIO, ENOMEM, ENOSPC, EPERM, EROFS
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport memmove

from fastcbw.export.nbd.contexts cimport MetaContext
from fastcbw.export.nbd.replies cimport BATCH_LENGTH
from fastcbw.wire.constants cimport (
    CHUNK_LENGTH, CMD_BLOCK_STATUS, CMD_CACHE, CMD_FLAG_DF, CMD_FLAG_FAST_ZERO, CMD_FLAG_FUA, CMD_FLAG_NO_HOLE,
    CMD_FLAG_REQ_ONE, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, CONTEXTS_MAX, PAYLOAD_LENGTH_MAX, REPLY_FLAG_DONE,
    REPLY_TYPE_BLOCK_STATUS)
from fastcbw.wire.integers cimport load32, store32

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
cdef const char *TRIMS_ONLY = b"the export is a snapshot: it can be trimmed, not written"
cdef const char *OUT_OF_RANGE = b"beyond the end of the export"
cdef const char *TOO_LONG = b"longer than 32 MiB"
cdef const char *UNKNOWN_FLAG = b"a flag that this request does not have"
cdef const char *UNKNOWN_REQUEST = b"no such request"
cdef const char *NO_CONTEXT = b"no meta context was negotiated"
cdef const char *NO_LENGTH = b"a length of zero has no status"


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


cdef class Answers:
    """What the handlers of requests need. Made by Connection, which fills everything in; one thread only."""

    def counts(self):
        """Return the counters of this moment, a dict by the names in COUNTERS."""
        return {name: load_relaxed(&self.counters[i]) for i, name in enumerate(COUNTERS)}

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
        if self.trims_only and (kind == CMD_WRITE or kind == CMD_WRITE_ZEROES):
            why[0] = TRIMS_ONLY
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

    cdef void block_status(self, const Request *request) noexcept nogil:
        """One chunk per negotiated context, all up to the same byte: neighbours with equal flags merged, EXTENTS_MAX at most.

        The chunks are put into the batch with the room that each may need, each up to where the shortest before it ends; then
        what is longer than the shortest of all is cut off, and they are moved together.
        """
        cdef int64_t extents_max = BATCH_LENGTH // self.contexts_count // 8 - (CHUNK_LENGTH + 4 + 7) // 8
        cdef int64_t stride, offset, end, got, length
        cdef int64_t extents[CONTEXTS_MAX]
        cdef uint32_t flags = 0, last = 0
        cdef char *first
        cdef char *row
        cdef int i
        if extents_max > EXTENTS_MAX:
            extents_max = EXTENTS_MAX
        if request.flags & CMD_FLAG_REQ_ONE:
            extents_max = 1
        stride = CHUNK_LENGTH + 4 + 8 * extents_max
        first = self.replies.room(stride * self.contexts_count)
        if first == NULL:
            return
        end = request.offset + request.length
        for i in range(self.contexts_count):
            row = first + i * stride + CHUNK_LENGTH + 4
            offset = request.offset
            extents[i] = 0
            length = 0
            got = 0
            while offset < end:
                got = (<MetaContext>self.context[i]).status(offset, end - offset, &flags)
                if got <= 0:
                    break
                if extents[i] == 0 or flags != last:
                    if extents[i] == extents_max:
                        break
                    extents[i] += 1
                    length = 0
                    last = flags
                length += got
                offset += got
                store32(row + 8 * (extents[i] - 1), <uint32_t>length)
                store32(row + 8 * (extents[i] - 1) + 4, last)
            if extents[i] == 0:
                self.refuse(request, <int>got if got else -EIO, NULL, -1)
                return
            end = offset
        for i in range(self.contexts_count):
            self.put_status(request, i, first + i * stride, extents[i], end - request.offset)
        count(&self.counters[STATUSES], 1)

    cdef void put_status(self, const Request *request, int context, const char *chunk, int64_t extents, int64_t length) noexcept nogil:
        """Send the rows of one context, which lie at or behind the end of the batch, cut to LENGTH bytes of the disk."""
        cdef char *at = self.replies.batch + self.replies.length
        cdef int64_t i, covered = 0
        memmove(at + CHUNK_LENGTH + 4, chunk + CHUNK_LENGTH + 4, <size_t>extents * 8)
        for i in range(extents):
            covered += load32(at + CHUNK_LENGTH + 4 + 8 * i)
            if covered >= length:
                store32(at + CHUNK_LENGTH + 4 + 8 * i, load32(at + CHUNK_LENGTH + 4 + 8 * i) - <uint32_t>(covered - length))
                extents = i + 1
                break
        self.replies.chunk(at, REPLY_FLAG_DONE if context == self.contexts_count - 1 else 0, REPLY_TYPE_BLOCK_STATUS,
                           request.cookie, 4 + 8 * extents)
        store32(at + CHUNK_LENGTH, self.context_id[context])
        self.replies.commit(CHUNK_LENGTH + 4 + 8 * extents)

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
