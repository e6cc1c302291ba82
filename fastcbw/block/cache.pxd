# CacheDevice: a bounded RAM cache over a device: what was read stays in RAM, what is written goes through it or waits for a flush.
from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.block.filter cimport Filter
from fastcbw.block.sys cimport iovec
from fastcbw.sync cimport pthread_cond_t, pthread_mutex_t

cdef enum:
    CACHE_BLOCK_BITS = 15               # 32 KiB: 64 sectors, a bit of a word each
    CACHE_BLOCK = 1 << CACHE_BLOCK_BITS
    SECTOR_BITS = 9

# Fields under the mutex, but that who has set `busy` owns `valid`, `dirty` and the data until it clears it.
cdef struct CacheSlot:
    int64_t block               # of the device; -1: none
    uint64_t valid              # sectors that are here
    uint64_t dirty              # of these, not yet in the child
    bint busy                   # somebody reads, fills, changes or writes it back
    bint recent                 # used since the hand came by

# Where a request is in its vector.
cdef struct VectorPlace:
    const iovec *vector
    size_t done                 # bytes of *vector

cdef class CacheDevice(Filter):
    cdef readonly int64_t size          # bytes of RAM
    cdef readonly bint writeback
    cdef CacheSlot *slots               # [slot_count]
    cdef char *pages                    # slot i's data at i * CACHE_BLOCK
    cdef uint32_t *slot_of              # block -> its slot + 1, 0: none (mutex)
    cdef int64_t slot_count
    cdef int64_t hand                   # where the search for room goes on (mutex)
    cdef int64_t barrier_first          # blocks that are zeroed or discarded just now, in the child (mutex)
    cdef int64_t barrier_end            # 0: none
    cdef int64_t waiting                # threads in cond_wait (mutex)
    cdef uint64_t hit_bytes             # counters (atomic)
    cdef uint64_t read_bytes            # from the child
    cdef uint64_t written_bytes         # to the child, written back
    cdef pthread_mutex_t mutex
    cdef pthread_cond_t changed         # a slot is busy no more, the barrier is gone
    cdef bint ready

    cdef int64_t blocks(self) noexcept nogil
    cdef bint is_dirty(self, int64_t block) noexcept nogil
    cdef CacheSlot *acquire(self, int64_t block, int how, int *code) noexcept nogil
    cdef CacheSlot *usable(self, int64_t block, int how) noexcept nogil
    cdef bint is_barred(self, int64_t block) noexcept nogil
    cdef void release(self, CacheSlot *slot) noexcept nogil
    cdef CacheSlot *find_room(self) noexcept nogil
    cdef void wait_changed(self) noexcept nogil
    cdef void unlink(self, CacheSlot *slot) noexcept nogil
    cdef char *data_of(self, const CacheSlot *slot) noexcept nogil
    cdef int fill(self, CacheSlot *slot, uint64_t wanted) noexcept nogil
    cdef int write_back(self, CacheSlot *slot) noexcept nogil
    cdef int write_all_back(self) noexcept nogil
    cdef int read_part(self, CacheSlot *slot, VectorPlace *place, int64_t at, int64_t length) noexcept nogil
    cdef int read_past(self, VectorPlace *place, int64_t offset, int64_t length) noexcept nogil
    cdef int write_part(self, CacheSlot *slot, VectorPlace *place, int64_t at, int64_t length, uint32_t flags) noexcept nogil
    cdef int write_range(self, const iovec *vector, int64_t offset, int64_t length, uint32_t flags) noexcept nogil
    cdef int clear_blocks(self, int64_t first, int64_t end, bint zero, uint32_t flags) noexcept nogil
