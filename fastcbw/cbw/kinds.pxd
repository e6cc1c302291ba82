# Where the old data of clusters is, 64 at a time, from the summary bitmaps along the chain. For order and reports, never for a read.
from libc.stdint cimport int64_t, uint64_t

from fastcbw.cbw.state cimport Epoch, Snap

cdef struct Kinds:
    uint64_t ram                # bit per cluster of the word; no cluster is in two of these
    uint64_t disk
    uint64_t zero

# All of a snapshot's look-ups below are for who is counted in EPOCH; FIRST, END are clusters.
# Where the stretch that begins at FIRST and has no location word in the chain ends; FIRST itself when its word may have some.
cdef int64_t kinds_untouched(const Epoch *epoch, const Snap *snap, int64_t first, int64_t end) noexcept nogil
cdef void kinds_of_word(const Epoch *epoch, const Snap *snap, int64_t word, Kinds *kinds) noexcept nogil
