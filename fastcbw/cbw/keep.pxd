# Copy-on-read: what reads leave in RAM, guest reads that are served from there, and dropping it again.
from libc.stdint cimport int64_t, uint64_t

from fastcbw.block.sys cimport iovec
from fastcbw.cbw.state cimport EngineState, Epoch, Snap

cdef enum:
    NO_ROOM = 1                 # keep_fetch: no slot is free that guest writes can spare

# Brings clusters that no store holds for SNAP into RAM, as far as slots are free; at most ROUND_CLUSTERS and about
# ROUND_BYTES at a time. NOWAIT: only what the disk has in memory, else -EAGAIN. 0, NO_ROOM, or the -errno of reading the disk (of which a snapshot's reader has its own news).
cdef int keep_fetch(EngineState state, Snap *snap, int64_t first, int64_t count, bint nowait) noexcept nogil
cdef int64_t keep_step(const Snap *snap) noexcept nogil             # clusters of one keep_fetch

# Drops unchanged RAM clusters of SNAP, and what older ones have inherited there, until WANT slots of its own store are free again,
# or nothing is left that can be dropped; how many slots. The caller is counted in EPOCH; it may hold claims, nothing here waits for one.
cdef int64_t keep_make_room(EngineState state, const Epoch *epoch, Snap *snap, int64_t want) noexcept nogil
cdef bint keep_has_any(const Snap *snap) noexcept nogil             # whether there may be anything of that kind
# After a guest write took slots: has the keeper drop some when few are left.
cdef void keep_ask(EngineState state, const Snap *snap) noexcept nogil
cdef void keep_trim(EngineState state, Snap *snap) noexcept nogil   # what it does then, after a sweep
# Drops the unchanged RAM clusters of first..end, whatever brought them there; how many. Not counted, control lock held.
cdef int64_t keep_drop_range(EngineState state, Snap *snap, int64_t first, int64_t end) noexcept nogil

# Guest reads while something is kept (state.kept): from RAM what is there and unchanged, the rest from the disk.
cdef int keep_pread(EngineState state, char *buffer, int64_t offset, int64_t length) noexcept nogil
cdef int keep_preadv(EngineState state, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil
# Whether a part of the range may be there. A guess.
cdef bint keep_has(EngineState state, int64_t offset, int64_t length) noexcept nogil
# All of it from RAM, or -EAGAIN.
cdef int keep_preadv_nowait(EngineState state, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil

cdef void keep_counts(EngineState state, Snap *snap, uint64_t *unchanged, uint64_t *spared) noexcept nogil     # for reports
# Whether it is kept and unchanged: to be dropped, never to be moved to the disk tier. The caller is counted in EPOCH.
cdef bint keep_is_clean(const Epoch *epoch, const Snap *snap, int64_t cluster) noexcept nogil
