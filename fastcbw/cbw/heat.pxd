# Heat: where the guest wrote for the first time lately, as a small table that decays. Hints for the copy order, nothing else.
from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.cbw.state cimport Geometry, RECENT
from fastcbw.kernels.atomic cimport add_relaxed, store_relaxed

cdef enum:
    HEAT_REGIONS = 64           # regions known at one time
    HEAT_REGION_BYTES = 1 << 20 # bytes of a region, at least; and at least 4 clusters

cdef struct Heat:
    int region_bits             # log2 of the clusters of a region
    int used
    int64_t region[HEAT_REGIONS]        # cluster >> region_bits, no two alike
    uint32_t score[HEAT_REGIONS]
    uint32_t fed                # touches since the last decay
    uint64_t seen               # of geometry.recent_count

# A first touch of first..first+count, of at most 65535 clusters, was preserved. Any thread; an addition and a store.
cdef inline void heat_note(Geometry *geometry, int64_t first, int64_t count) noexcept nogil:
    store_relaxed(geometry.recent + (add_relaxed(&geometry.recent_count, 1) & (RECENT - 1)), <uint64_t>(first << 16 | count))

cdef void heat_init(Heat *heat, int cluster_bits) noexcept nogil
cdef void heat_feed(Heat *heat, const Geometry *geometry) noexcept nogil
cdef int heat_hottest(const Heat *heat) noexcept nogil                          # index of a region, or -1
cdef void heat_forget(Heat *heat, int index) noexcept nogil
# Whether CLUSTER lies in a region of the table, and in *stop where that changes (at most END).
cdef bint heat_covers(const Heat *heat, int64_t cluster, int64_t end, int64_t *stop) noexcept nogil
