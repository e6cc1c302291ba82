"""Reads: how data gets from the device to the client.

A small read is read into the batch of replies; a large one into a pool buffer, by pieces, each sent before the next is read, or
whole where the reply must be one chunk (DF, simple replies).
"""

from libc.errno cimport EAGAIN, ENOMEM
from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.export.nbd.answers cimport BYTES_READ, READS, count
from fastcbw.export.nbd.pool cimport PIECE_LENGTH
from fastcbw.wire.constants cimport (
    CHUNK_LENGTH, CMD_FLAG_DF, REPLY_FLAG_DONE, REPLY_TYPE_NONE, REPLY_TYPE_OFFSET_DATA, SIMPLE_REPLY_LENGTH, SIMPLE_REPLY_MAGIC)
from fastcbw.wire.integers cimport store32, store64

cdef extern from "<errno.h>" nogil:
    int EOVERFLOW

cdef const char *NO_BUFFER = b"longer than one unfragmented reply of this export may be"


cdef class Reads(Answers):
    """The reads of a connection."""

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
            piece = ((offset + PIECE_LENGTH) & ~(<int64_t>PIECE_ALIGN - 1)) - offset
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
