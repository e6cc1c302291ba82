# Location words: where the old data of a preserved cluster is, one atomic 64-bit word per cluster and snapshot.
#
#   bit  63                         38 37            12 11       2 1 0
#        +------------------------------+---------------+----------+----+
#   RAM  | generation of the slot (26)  | slot (26)     | store    | 2  |
#        +------------------------------+---------------+----------+----+
#   DISK | position in the store's log, in clusters (52) | store    | 3  |
#        +----------------------------------------------+----------+----+
#   ZERO | 0                                                        | 1  |
#   NONE | 0: not preserved in this snapshot                        | 0  |
#
# The store is named in the word, so that a word can move to an older snapshot while its data stays where it is.
# Words are written under the cluster's claim only, with release; look-ups load with acquire and take no claim.
from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.sync cimport pthread_mutex_t

cdef enum:
    WORD_NONE = 0
    WORD_ZERO = 1
    WORD_RAM = 2
    WORD_DISK = 3
    LEAF_CLUSTERS = 64          # clusters of a leaf: the clusters of one bitmap word
    ROOTS_PER_PAGE = 512        # leaf pointers in a page of the root
    STORES_MAX = 1024           # of live snapshots, and of ended ones whose data an older one still reads
    STORE_WORDS = 1024 >> 6     # of a bit per store
    SLOTS_MAX = 1 << 26
    GENERATION_MASK = (1 << 26) - 1

cdef struct LocationMap:
    int64_t clusters
    uint64_t *roots             # [clusters / 64] pointers to leaves of 64 words, 0: none; atomic, installed once
    uint64_t *touched           # one bit per page of roots: set when a leaf was installed there; atomic
    char *arena                 # leaves are cut from here; chunks are linked through their first word
    int64_t arena_left          # bytes left in the newest chunk; under `lock`
    pthread_mutex_t lock        # installing a leaf; never held over anything else

cdef inline uint32_t word_tag(uint64_t word) noexcept nogil:
    return <uint32_t>(word & 3)

cdef inline uint32_t word_store(uint64_t word) noexcept nogil:
    return <uint32_t>((word >> 2) & (STORES_MAX - 1))

cdef inline int64_t word_slot(uint64_t word) noexcept nogil:
    return <int64_t>((word >> 12) & (SLOTS_MAX - 1))

cdef inline int64_t word_position(uint64_t word) noexcept nogil:
    return <int64_t>(word >> 12)

cdef inline uint64_t ram_word(int store, int64_t slot, uint32_t generation) noexcept nogil:
    return (<uint64_t>(generation & GENERATION_MASK) << 38) | (<uint64_t>slot << 12) | (<uint64_t>store << 2) | WORD_RAM

cdef inline uint64_t disk_word(int store, int64_t position) noexcept nogil:
    return (<uint64_t>position << 12) | (<uint64_t>store << 2) | WORD_DISK

cdef int map_init(LocationMap *map, int64_t clusters) noexcept nogil                # 0 or -ENOMEM (nothing is held then)
cdef void map_free(LocationMap *map) noexcept nogil
cdef const uint64_t *map_leaf(LocationMap *map, int64_t cluster) noexcept nogil     # the 64 words around it, or NULL
cdef uint64_t map_get(LocationMap *map, int64_t cluster) noexcept nogil             # acquire
cdef uint64_t *map_place(LocationMap *map, int64_t cluster) noexcept nogil          # its word, leaf made as needed; NULL: no memory
cdef int64_t map_next_leaf(LocationMap *map, int64_t cluster) noexcept nogil        # first cluster of the next leaf at or after, or clusters
# As map_next_leaf, but looks no further than END: anything from END on when there is none before it.
cdef int64_t map_next_leaf_before(LocationMap *map, int64_t cluster, int64_t end) noexcept nogil
