"""Our own anonymous memory: zero pages on first touch, no reserve, no huge pages.

A 2 GiB array from a general allocator may come as huge pages, and 64 scattered writes then cost 126 MiB; a plain mapping
without them costs 64 pages. Engine bitmaps of sparse disks live here, wrapped for Python by numpy.frombuffer.
"""

from cpython.buffer cimport PyBuffer_FillInfo
from libc.errno cimport errno
from libc.stdint cimport INT64_MAX, int64_t

from fastcbw.units import parse_size

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t length, int protection, int flags, int fd, long offset)
    int munmap(void *address, size_t length)
    int madvise(void *address, size_t length, int advice)
    int mincore(void *address, size_t length, unsigned char *resident)
    int PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE
    int MADV_NOHUGEPAGE, MADV_DONTNEED
    void *MAP_FAILED

cdef extern from "<unistd.h>" nogil:
    long sysconf(int name)
    int _SC_PAGESIZE, _SC_PHYS_PAGES

cdef extern from *:
    """
    #ifndef MADV_POPULATE_WRITE
    #define MADV_POPULATE_WRITE 23
    #endif
    """
    int MADV_POPULATE_WRITE

cdef int64_t page_size = sysconf(_SC_PAGESIZE)


cdef int64_t whole_pages(int64_t length) noexcept nogil:
    return (length + page_size - 1) & ~(page_size - 1)


cdef void *map_pages(int64_t length) noexcept nogil:
    cdef void *pages
    if length <= 0 or length > INT64_MAX - page_size:
        return NULL
    pages = mmap(NULL, <size_t>whole_pages(length), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if pages == MAP_FAILED:
        return NULL
    madvise(pages, <size_t>whole_pages(length), MADV_NOHUGEPAGE)
    return pages


cdef void unmap_pages(void *pages, int64_t length) noexcept nogil:
    munmap(pages, <size_t>whole_pages(length))


cdef void populate_pages(void *pages, int64_t length) noexcept nogil:
    # The kernel wants whole pages; all that the range touches belong to the same mapping.
    cdef char *at = <char *>(<size_t>pages & ~<size_t>(page_size - 1))
    madvise(at, <size_t>whole_pages(<char *>pages - at + length), MADV_POPULATE_WRITE)


cdef void forget_pages(void *pages, int64_t length) noexcept nogil:
    cdef char *at = <char *>((<size_t>pages + <size_t>page_size - 1) & ~<size_t>(page_size - 1))
    cdef char *end = <char *>((<size_t>pages + <size_t>length) & ~<size_t>(page_size - 1))
    if end > at:
        madvise(at, <size_t>(end - at), MADV_DONTNEED)


cdef int64_t memory_bytes() noexcept nogil:
    return sysconf(_SC_PHYS_PAGES) * page_size


cdef int64_t resident_pages(void *pages, int64_t length) noexcept nogil:
    cdef unsigned char resident[4096]
    cdef char *at = <char *>(<size_t>pages & ~<size_t>(page_size - 1))
    cdef int64_t left = whole_pages(<char *>pages - at + length)
    cdef int64_t piece, i, total = 0
    while left > 0:
        piece = left if left < 4096 * page_size else 4096 * page_size
        if mincore(at, <size_t>piece, resident) != 0:
            return -errno
        for i in range(piece // page_size):
            total += resident[i] & 1
        at += piece
        left -= piece
    return total * page_size


cdef class Mapping:
    """LENGTH bytes of zeroed anonymous memory that costs nothing until it is written; a writable buffer.

    length: bytes, or a string with a suffix. Raises ValueError for 0, MemoryError when it can't be mapped. The memory
    goes when the object and every buffer taken of it (numpy.frombuffer, memoryview) are gone.
    """

    def __cinit__(self, length):
        self.length = parse_size(length, "length")
        if self.length == 0:
            raise ValueError("length: a mapping needs at least one byte, got 0")
        self.pages = <char *>map_pages(self.length)
        if self.pages == NULL:
            raise MemoryError(f"mapping: {self.length} bytes cannot be mapped")

    def __dealloc__(self):
        if self.pages != NULL:
            unmap_pages(self.pages, self.length)

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.pages, self.length, 0, flags)

    def __len__(self):
        return self.length

    def resident(self):
        """Return the bytes of it that are in memory now, in whole pages."""
        cdef int64_t total
        with nogil:
            total = resident_pages(self.pages, self.length)
        if total < 0:
            raise OSError(-total, f"mapping: mincore of {self.length} bytes")
        return total
