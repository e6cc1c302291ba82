# Our own anonymous memory: zero pages on first touch, no reserve, no huge pages unless asked.
from libc.stdint cimport int64_t

cdef void *map_pages(int64_t length) noexcept nogil        # NULL on failure; length rounded up to pages; zero-filled on touch
cdef void unmap_pages(void *pages, int64_t length) noexcept nogil
# Populates LENGTH bytes at PAGES for writing in one call (MADV_POPULATE_WRITE) where the kernel has it; else nothing.
cdef void populate_pages(void *pages, int64_t length) noexcept nogil
cdef void forget_pages(void *pages, int64_t length) noexcept nogil         # gives whole pages of it back: zeroes on the next touch
cdef int64_t memory_bytes() noexcept nogil                                 # of this machine
cdef int64_t resident_pages(void *pages, int64_t length) noexcept nogil     # bytes in memory now, whole pages; -errno

cdef class Mapping:
    cdef char *pages                # live as long as the object and every buffer taken of it
    cdef readonly int64_t length    # bytes
