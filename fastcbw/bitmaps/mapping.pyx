"""Our own anonymous memory: zero pages on first touch, no reserve, no huge pages.

A 2 GiB array from a general allocator may come as huge pages, and 64 scattered writes then cost 126 MiB; a plain mapping
without them costs 64 pages. Engine bitmaps of sparse disks live here, wrapped for Python by numpy.frombuffer.
"""

from libc.stdint cimport int64_t

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t length, int protection, int flags, int fd, long offset)
    int munmap(void *address, size_t length)
    int madvise(void *address, size_t length, int advice)
    int PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE
    int MADV_NOHUGEPAGE
    void *MAP_FAILED

cdef extern from *:
    """
    #ifndef MADV_POPULATE_WRITE
    #define MADV_POPULATE_WRITE 23
    #endif
    """
    int MADV_POPULATE_WRITE


cdef int64_t whole_pages(int64_t length) noexcept nogil:
    return (length + 4095) & ~(<int64_t>4095)


cdef void *map_pages(int64_t length) noexcept nogil:
    cdef void *pages = mmap(NULL, <size_t>whole_pages(length), PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if pages == MAP_FAILED:
        return NULL
    madvise(pages, <size_t>whole_pages(length), MADV_NOHUGEPAGE)
    return pages


cdef void unmap_pages(void *pages, int64_t length) noexcept nogil:
    munmap(pages, <size_t>whole_pages(length))


cdef void populate_pages(void *pages, int64_t length) noexcept nogil:
    madvise(pages, <size_t>length, MADV_POPULATE_WRITE)
