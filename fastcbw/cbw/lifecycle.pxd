# Beginning and end of snapshots. Everything here is called with the engine's control lock held, and may wait for device
# I/O of guest writes that are under way; the guest waits for none of it.
from cpython.ref cimport PyObject
from libc.stdint cimport int64_t, uint64_t

from fastcbw.bitmaps.dirty cimport dirty_words
from fastcbw.cbw.state cimport DIRTY_MAX, EngineState, Epoch, Geometry, Snap

# One snapshot being taken; several of them, of different engines, are flipped in at one instant.
cdef struct Creation:
    PyObject *state         # EngineState
    Snap *snap
    uint64_t *settled       # of the new epoch: untouched zeroes
    int index               # of the epoch before, to drain
    dirty_words *frozen     # a bitmap that this instant takes out of the writers' hands and makes `copy` of; or NULL
    int dirty_count         # what the writers mark from the instant on
    dirty_words *dirty[DIRTY_MAX]

cdef void creations_flip(Creation *creations, int count) noexcept nogil         # the instant, the same for all
cdef void creation_finish(Creation *creation) noexcept nogil                    # the view is constant when it returns
cdef void retire(EngineState state, Snap *snap, uint64_t why) noexcept nogil    # DELETED or BROKEN; hands over, frees, unlinks
# Takes SNAP's word of a cluster away, whose claim is held: to the older snapshot that needs it, counted in EPOCH. Else the word is
# returned, to be dropped by drop_word once the claim is released.
cdef uint64_t hand_over_claimed(EngineState state, Epoch *epoch, Snap *snap, int64_t cluster) noexcept nogil
cdef void drop_word(EngineState state, uint64_t word) noexcept nogil            # may give space back to a file system
# Ends the epoch that waits for recorded discards without a snapshot. False: not all are carried out yet.
cdef bint end_lingering(EngineState state) noexcept nogil
cdef int find_store_index(EngineState state) noexcept nogil                     # or -1
cdef void sweep_stores(EngineState state) noexcept nogil                        # frees what can go: its place in the table is NULL then
