# Discarding parts of a snapshot: its reader does not need them any more.
from libc.stdint cimport int64_t, uint64_t

from fastcbw.cbw.state cimport EngineState, Snap
from fastcbw.kernels.atomic cimport load_acquire

cdef enum:
    GRANULE_BYTES_MIN = 512     # no part of a cluster that is discarded is finer

# Bytes of a granule: what a discard must be cut in (the disk may end within one). 64 make a cluster, or less of small ones.
cdef inline int64_t granule_bytes(int cluster_bits) noexcept nogil:
    return (<int64_t>1) << (cluster_bits - 6) if cluster_bits > 15 else GRANULE_BYTES_MIN

cdef bint is_granular(EngineState state, int cluster_bits, int64_t offset, int64_t length) noexcept nogil
# Drops the range, which is_granular, from the snapshot. 0, -ENOMEM (a part of the range was dropped), or -ESTALE: it has ended.
# Waits for claims; called not counted, with no claim held. Dropping what has gone already is no error.
cdef int snapshot_discard(EngineState state, Snap *snap, int64_t offset, int64_t length) noexcept nogil
# How far offset..end, clusters that are in `copy`, is alike: all of it discarded granules (*absent), or none of it.
cdef int64_t parts_run(const Snap *snap, int64_t offset, int64_t end, bint *absent) noexcept nogil

cdef inline bint has_parts(const Snap *snap) noexcept nogil:
    return load_acquire(&snap.parts_used) != 0
