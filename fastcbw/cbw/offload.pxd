# What the kernel does for a copier whose ends are regular files in the page cache. See offload.pyx.
from libc.stdint cimport int64_t, uint64_t

from fastcbw.block.device cimport BlockDevice
from fastcbw.block.file cimport FileDevice
from fastcbw.cbw.reader cimport SnapshotDevice

cdef enum:
    OFFLOAD_LACKING = -2001     # no error: this kernel does not copy between these files, and nothing was copied
    BEHIND_RANGES = 16

cdef class Offload:
    cdef SnapshotDevice snapshot
    cdef FileDevice disk        # what the snapshot is of
    cdef FileDevice target
    cdef BlockDevice gate       # for tests: read between the look-up of a range and its copy; else None
    cdef uint64_t proven        # a range has been copied: from then on an error is one (atomic)
    cdef uint64_t lacking       # nothing more is tried (atomic)
    cdef readonly uint64_t copied_bytes         # by the kernel (atomic counter)
    cdef readonly uint64_t rewritten_bytes      # of these, that a guest write had come between (atomic counter)

    # The reader's: bytes at the head of the range that no store holds; whether the range may be read, after its look-ups.
    cdef int64_t nowhere(self, int64_t offset, int64_t length) noexcept nogil
    cdef int verdict(self, int64_t offset, int64_t length) noexcept nogil
    # Bytes at the head of the range whose data is in a store, up to a whole cluster's end.
    cdef int64_t held(self, int64_t offset, int64_t length) noexcept nogil
    # The range, which no store held just now, from file to file: 0, OFFLOAD_LACKING or -errno of the copy. What of it is the
    # snapshot's is not known before nowhere() has been asked again.
    cdef int copy(self, int64_t offset, int64_t length) noexcept nogil

# The last ranges that a worker wrote to a file on a device, or a block device, in a ring.
cdef class Behind:
    cdef FileDevice target
    cdef int64_t limit          # bytes that may be under way to the device
    cdef int64_t pending        # bytes that are
    cdef int first
    cdef int count
    cdef int64_t offsets[BEHIND_RANGES]
    cdef int64_t lengths[BEHIND_RANGES]

    cdef int send(self, int which) noexcept nogil
    cdef int retire(self) noexcept nogil
    cdef int wrote(self, int64_t offset, int64_t length) noexcept nogil
