# The flusher: moves the oldest clusters of a RAM tier to the disk tier.
from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.cbw.state cimport EngineState
from fastcbw.cbw.store cimport SEGMENT_CLUSTERS_MAX, Store

cdef enum:
    BATCH_CLUSTERS = SEGMENT_CLUSTERS_MAX       # one write of the log, at most a segment

# Clusters on their way to the log.
cdef struct Batch:
    Store *store                # pinned
    int64_t count
    int64_t position            # of the first, the others follow
    int64_t slots[BATCH_CLUSTERS]       # each with a reference of ours
    int64_t clusters[BATCH_CLUSTERS]
    uint32_t generations[BATCH_CLUSTERS]
    uint64_t snapshots[BATCH_CLUSTERS]  # whose map names them

cdef class Flusher:
    cdef EngineState state
    cdef Batch batch            # the thread's own
    cdef int64_t retry_ns       # when to look again without being woken, 0: not before
    cdef uint64_t busy          # 1 while something may be moved; else it waits (atomic)
    cdef uint64_t soon          # 1: it looks again in a moment, for clusters that were busy (atomic)
    cdef uint64_t at            # the store that is pinned now (atomic)

    # Waits, at most until DEADLINE_NS, while STORE is the one that is pinned.
    cdef void await_unpinned(self, const Store *store, int64_t deadline_ns) noexcept nogil
    cdef bint pass_over(self) noexcept nogil
    cdef Store *pin_next(self, int64_t now, const uint64_t *seen) noexcept nogil
    cdef void look_again(self, int64_t at_ns) noexcept nogil
    cdef void look_again_soon(self) noexcept nogil
    cdef int64_t flush(self, Store *store) noexcept nogil
    cdef void take_pins(self) noexcept nogil
    cdef void drop_pins(self, int64_t first) noexcept nogil
    cdef int64_t switch_words(self, int code) noexcept nogil
