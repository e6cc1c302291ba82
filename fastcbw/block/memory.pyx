"""MemoryDevice: a disk in anonymous memory. The complete reference of the interface, and the null floor of benchmarks."""

from libc.stdint cimport int64_t, uint32_t
from libc.string cimport memcpy, memset

from fastcbw.bitmaps.mapping cimport map_pages, unmap_pages
from fastcbw.block.device cimport BlockDevice, STATUS_ZERO
from fastcbw.block.sys cimport iovec
from fastcbw.kernels.bytes cimport is_zero
from fastcbw.units import parse_size

cdef extern from "torn.h" nogil:
    void fcbw_torn_begin() noexcept         # what overlaps may tear, see the class: nothing for the thread sanitizer
    void fcbw_torn_end() noexcept


cdef class MemoryDevice(BlockDevice):
    """A disk of LENGTH zero bytes in memory; what is never written costs no memory.

    length: bytes, or a string with a suffix. Raises ValueError for 0 or less, MemoryError when it can't be mapped.
    Reads and writes that overlap in time may tear at any byte, as a disk's may at any sector.
    """

    def __cinit__(self, length, str name="memory", bint read_only=False):
        self.length = parse_size(length, "length")
        if self.length == 0:
            raise ValueError("length: a memory device needs at least one byte, got 0")
        self.name = name
        self.read_only = read_only
        self.pages = <char *>map_pages(self.length)
        if self.pages == NULL:
            raise MemoryError(f"{name}: {self.length} bytes cannot be mapped")

    def __dealloc__(self):
        if self.pages != NULL:
            unmap_pages(self.pages, self.length)

    cdef int preadv(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        cdef int i
        fcbw_torn_begin()
        for i in range(count):
            memcpy(vector[i].iov_base, self.pages + offset, vector[i].iov_len)
            offset += <int64_t>vector[i].iov_len
        fcbw_torn_end()
        return 0

    cdef int preadv_nowait(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        return self.preadv(vector, count, offset, length)

    cdef int pwritev(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef int i
        fcbw_torn_begin()
        for i in range(count):
            memcpy(self.pages + offset, vector[i].iov_base, vector[i].iov_len)
            offset += <int64_t>vector[i].iov_len
        fcbw_torn_end()
        return 0

    cdef int write_zeroes_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        fcbw_torn_begin()
        memset(self.pages + offset, 0, <size_t>length)
        fcbw_torn_end()
        return 0

    cdef int discard_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        fcbw_torn_begin()
        memset(self.pages + offset, 0, <size_t>length)
        fcbw_torn_end()
        return 0

    cdef int64_t block_status(self, int64_t offset, int64_t length, uint32_t *flags) noexcept nogil:
        """By content, in blocks of 4 KiB: what is all zeroes reads as zeroes; nothing is ever a hole."""
        cdef int64_t at = offset
        cdef int64_t end = offset + length
        cdef int64_t piece
        cdef bint zero, first = True, kind = False
        while at < end:
            piece = 4096 - (at & 4095)
            if piece > end - at:
                piece = end - at
            zero = is_zero(self.pages + at, piece)
            if first:
                kind = zero
                first = False
            elif zero != kind:
                break
            at += piece
        flags[0] = STATUS_ZERO if kind else 0
        return at - offset
