# The store of one snapshot: a RAM tier of slots and a disk tier, an append-only log; both with hard limits.
#
# A store outlives its snapshot as long as a location word names something in it (words move to older snapshots).
from libc.stdint cimport int64_t, uint32_t, uint64_t
from cpython.ref cimport PyObject

from fastcbw.sync cimport pthread_mutex_t

cdef enum:
    SLOT_NONE = 0xFFFFFFFF
    SEGMENT_HEADER = 4096           # bytes at the head of each segment of the log, for its descriptors
    SEGMENT_CLUSTERS_MAX = 255      # as many as the header has descriptors for

cdef struct Slot:
    uint32_t generation     # +1 at every allocation; changed by the owner of the free slot only
    uint32_t refs           # atomic: 1 for the map word, 1 for each pin; 0: on the free list
    uint32_t next           # free list; under the store's lock

# Descriptor of one cluster in the log, kept in memory and laid out as the segment header holds it on disk.
cdef struct Descriptor:
    uint64_t cluster
    uint32_t snapshot
    uint32_t crc            # CRC-32C of the data

cdef struct Store:
    int index               # in the engine's table; the number in location words
    int64_t cluster_bytes
    pthread_mutex_t lock    # free list, log head, counters; held for a few instructions, never over I/O
    uint64_t pins           # atomic: readers of the log and copies under way that are not counted in an epoch
    bint retired            # its snapshot has ended: it goes when no word names anything in it (control)
    # RAM tier
    char *pages             # slots_limit clusters, populated on use
    Slot *slots
    int64_t slots_limit     # hard limit
    int64_t slots_fresh     # slots 0..slots_fresh have been used before (and are warm)
    int64_t slots_used      # allocated now
    int64_t slots_used_max
    uint32_t free_head      # last in, first out: the warmest memory first
    int64_t populated       # bytes of `pages` that were populated
    # disk tier
    PyObject *log           # BlockDevice, borrowed (the Python owner of the store keeps it); NULL: no disk tier
    Descriptor *descriptors # [positions_limit], by position
    uint32_t *live          # [segments]: clusters of the segment that a word names
    int64_t segment_clusters
    int64_t segments_limit  # hard limit: segments on disk at once
    int64_t segments_used
    int64_t positions_limit # end of the log
    int64_t head            # next position; positions are never reused
    int64_t log_used        # clusters that a word names

cdef Store *store_new(int index, int64_t cluster_bytes, int64_t ram_bytes, PyObject *log, int64_t log_bytes) noexcept nogil
cdef void store_free(Store *store) noexcept nogil
# RAM: up to COUNT slots into slots[]; how many there were. Contents are undefined, refs 1, generation bumped.
cdef int64_t slots_take(Store *store, uint32_t *slots, int64_t count) noexcept nogil
cdef void slot_unref(Store *store, int64_t slot) noexcept nogil
# Disk: up to COUNT consecutive positions; how many (0: full), *first the first. A run never spans a segment.
cdef int64_t log_take(Store *store, int64_t count, int64_t *first) noexcept nogil
cdef void log_give_back(Store *store, int64_t position) noexcept nogil
cdef int64_t log_offset(const Store *store, int64_t position) noexcept nogil
# Writes DATA, the clusters CLUSTER.. of the snapshot with that id, at positions taken before. 0 or -errno.
cdef int log_write(Store *store, int64_t position, const void *data, int64_t count, int64_t cluster, uint64_t snapshot) noexcept nogil
cdef int log_read(Store *store, int64_t position, void *data) noexcept nogil        # one cluster; -EIO when its crc is wrong
# Drops what WORD names (RAM slot or log record; nothing for ZERO).
cdef void store_drop(Store *store, uint64_t word) noexcept nogil

cdef inline char *slot_data(const Store *store, int64_t slot) noexcept nogil:
    return store.pages + slot * store.cluster_bytes
