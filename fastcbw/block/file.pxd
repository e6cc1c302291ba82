# FileDevice: a raw image in a regular file or on a block device, through the page cache.
from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.block.device cimport BlockDevice
from fastcbw.block.sys cimport iovec

cdef class FileDevice(BlockDevice):
    cdef int fd                     # -1 once closed; the image locks lie on it
    cdef readonly str path
    cdef readonly bint in_memory    # tmpfs or ramfs: a read never waits for a device
    cdef int64_t sector             # zeroing and discarding go by this many bytes: 1 for a regular file
    # What the file system was found to lack, 0 or 1; only ever set, relaxed (a late reader asks the kernel once more)
    cdef uint32_t lacks_punch
    cdef uint32_t lacks_zero_range
    cdef uint32_t lacks_nowait
    cdef uint32_t lacks_durable
    # errno of the first sync that failed, 0 while none did; relaxed. The kernel reports a lost write-back once, so from
    # then on every flush and FUA fails with it.
    cdef uint32_t sync_errno
    # A range that was data when the file system was asked, for block status; relaxed, forgotten by whatever makes holes.
    # Two threads may mix their ends: at worst a hole is called data, which is always true enough.
    cdef uint64_t data_begin
    cdef uint64_t data_end

    cdef int pwritev_durable(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil
    cdef int zero_sectors(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil
    cdef int zero_by_kernel(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil
