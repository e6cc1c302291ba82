"""The kinds of clusters: in RAM, in the disk tier, known zeroes, or in no store, as a snapshot sees them.

A snapshot's cluster is where its own location word says, else where that of the next newer snapshot says. The summary
bitmaps of the chain, looked at from the newest to the snapshot, give that for 64 clusters in a few loads; leaves of the
location maps tell where nothing was ever preserved, so that a walk over a large disk costs what is used.
"""

from libc.stdint cimport int64_t, uint64_t

from fastcbw.cbw.locmap cimport LEAF_CLUSTERS, map_leaf, map_next_leaf_before
from fastcbw.cbw.state cimport Epoch, Snap
from fastcbw.kernels.atomic cimport load_relaxed


cdef int64_t kinds_untouched(const Epoch *epoch, const Snap *snap, int64_t first, int64_t end) noexcept nogil:
    cdef int64_t leaf
    cdef int i
    if epoch.geometry != snap.geometry:
        return end              # the snapshot has ended, and another cluster size begun
    for i in range(epoch.chain_count):
        leaf = map_next_leaf_before(&(<Snap *>epoch.chain[i]).map, first, end)
        if leaf <= first:
            return first
        if leaf < end:
            end = leaf
        if epoch.chain[i] == snap:
            break
    return end


cdef void kinds_of_word(const Epoch *epoch, const Snap *snap, int64_t word, Kinds *kinds) noexcept nogil:
    cdef Snap *at
    cdef uint64_t ram, disk, zero, other
    cdef int i
    kinds.ram = kinds.disk = kinds.zero = 0
    if epoch.geometry != snap.geometry:
        return
    for i in range(epoch.chain_count):
        at = <Snap *>epoch.chain[i]
        if map_leaf(&at.map, word * LEAF_CLUSTERS) != NULL:
            ram = load_relaxed(at.ram + word)
            disk = load_relaxed(at.disk + word) & ~ram
            zero = load_relaxed(at.zero + word) & ~ram & ~disk
            other = ~(ram | disk | zero)
            kinds.ram = kinds.ram & other | ram
            kinds.disk = kinds.disk & other | disk
            kinds.zero = kinds.zero & other | zero
        if at == snap:
            break
