# A load whose every sector says what it is: for tests.
from libc.stdint cimport int64_t, uint64_t

from fastcbw.block.device cimport BlockDevice

cdef class SectorLoad:
    cdef BlockDevice device
    cdef object arrays              # keeps the two below alive
    cdef uint64_t *issued           # [sectors] versions: stored before a write is sent ...
    cdef uint64_t *acknowledged     # ... and after it has returned (atomic)
    cdef int64_t sectors
    cdef uint64_t turn              # sweeps begun (atomic)
    cdef uint64_t first             # sectors of the present sweep: set before `turn`
    cdef uint64_t count
    cdef uint64_t ended             # writers that are through with it (atomic)
    cdef uint64_t stopping          # atomic
    cdef uint64_t writes            # atomic counter
    cdef uint64_t error             # errno of the first write that failed (atomic)

    cdef int write(self, int64_t sector, uint64_t *data) noexcept nogil
