"""Heat: the regions that the guest touched for the first time lately.

First touches leave their clusters in a ring of the geometry (heat_note: an addition and a store beside a copy of
kilobytes; the settled path does not come here). Who chooses what to copy next feeds its own table from that ring: each touch adds
to its region, and less to the region after it, since guests write ahead; after HALF_LIFE touches all scores are halved, and a
new region takes the place of the coolest. The ring is a hint: an entry that is overwritten, or not yet written, costs an order, no data.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.cbw.state cimport Geometry, RECENT
from fastcbw.kernels.atomic cimport load_relaxed

cdef enum:
    HALF_LIFE = 256
    HERE = 4            # score of a touch for its region
    AHEAD = 1           # and for the next


cdef void heat_init(Heat *heat, int cluster_bits) noexcept nogil:
    heat.used = 0
    heat.fed = 0
    heat.seen = 0
    heat.region_bits = 2
    while (<int64_t>1) << (heat.region_bits + cluster_bits) < HEAT_REGION_BYTES:
        heat.region_bits += 1


cdef void heat_feed(Heat *heat, const Geometry *geometry) noexcept nogil:
    """Take in what was touched since the last call, at most RECENT touches."""
    cdef uint64_t now = load_relaxed(&geometry.recent_count)
    cdef uint64_t entry
    cdef int64_t first, region
    if now - heat.seen > RECENT:
        heat.seen = now - RECENT
    while heat.seen != now:
        entry = load_relaxed(geometry.recent + (heat.seen & (RECENT - 1)))
        heat.seen += 1
        first = <int64_t>(entry >> 16)
        region = (first + <int64_t>(entry & 0xFFFF) - 1) >> heat.region_bits
        if entry & 0xFFFF == 0 or first >= geometry.clusters:
            continue            # counted and not yet written
        add(heat, region, HERE)
        if (region + 1) << heat.region_bits < geometry.clusters:
            add(heat, region + 1, AHEAD)
        heat.fed += 1
        if heat.fed == HALF_LIFE:
            decay(heat)


cdef void add(Heat *heat, int64_t region, uint32_t score) noexcept nogil:
    cdef int i, coolest = 0
    for i in range(heat.used):
        if heat.region[i] == region:
            heat.score[i] += score
            return
        if heat.score[i] < heat.score[coolest]:
            coolest = i
    if heat.used < HEAT_REGIONS:
        coolest = heat.used
        heat.used += 1
    heat.region[coolest] = region
    heat.score[coolest] = score


cdef void decay(Heat *heat) noexcept nogil:
    cdef int i = 0
    heat.fed = 0
    while i < heat.used:
        heat.score[i] //= 2
        if heat.score[i]:
            i += 1
        else:
            heat_forget(heat, i)


cdef int heat_hottest(const Heat *heat) noexcept nogil:
    cdef int i, best = -1
    for i in range(heat.used):
        if best < 0 or heat.score[i] > heat.score[best]:
            best = i
    return best


cdef void heat_forget(Heat *heat, int index) noexcept nogil:
    heat.used -= 1
    heat.region[index] = heat.region[heat.used]
    heat.score[index] = heat.score[heat.used]


cdef bint heat_covers(const Heat *heat, int64_t cluster, int64_t end, int64_t *stop) noexcept nogil:
    cdef int64_t region = cluster >> heat.region_bits
    cdef int i
    stop[0] = end
    for i in range(heat.used):
        if heat.region[i] == region:
            if (region + 1) << heat.region_bits < end:
                stop[0] = (region + 1) << heat.region_bits
            return True
        if heat.region[i] > region and heat.region[i] << heat.region_bits < stop[0]:
            stop[0] = heat.region[i] << heat.region_bits
    return False
