# The store of one snapshot: a RAM tier of slots and a disk tier, an append-only log; both with hard limits.
#
# A store outlives its snapshot as long as a location word names something in it (words move to older snapshots).
from libc.stdint cimport int64_t, uint32_t, uint64_t
from cpython.ref cimport PyObject

from fastcbw.cbw.rate cimport Rate
from fastcbw.cbw.room cimport Room
from fastcbw.kernels.atomic cimport load_relaxed
from fastcbw.sync cimport pthread_cond_t, pthread_mutex_t

cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned long pthread_t

cdef enum:
    SLOT_NONE = 0xFFFFFFFF
    SLOT_OFF = 0xFFFFFFFE           # Slot.older of a slot that is not in the list by age
    SEGMENT_HEADER = 4096           # bytes at the head of each segment of the log, for its descriptors
    SEGMENT_CLUSTERS_MAX = 255      # as many as the header has descriptors for

cdef struct Slot:
    uint32_t generation     # +1 at every allocation; changed by the owner of the free slot only
    uint32_t refs           # atomic: 1 for the map word, 1 for each pin; 0: on the free list
    uint32_t next           # free list, or the next younger one in the list by age; under the store's lock
    uint32_t older          # the list by age: SLOT_NONE, the oldest; SLOT_OFF, not in it; under the store's lock
    uint64_t cluster        # what it holds while it is in the list by age

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
    uint64_t inherited      # 1: a cluster that reads left in its RAM is an older snapshot's now; a hint, see cbw/keep (atomic)
    bint retired            # its snapshot has ended: it goes when no word names anything in it (control)
    Room *room              # the engine's: who is told when room is freed, or when the flusher is wanted
    Rate filling            # net clusters taken, both tiers, without those that can be dropped; under `lock`
    # RAM tier
    char *pages             # slots_reserved clusters of address space, populated on use
    Slot *slots
    int64_t slots_reserved  # what the limit can grow to
    int64_t slots_limit     # hard limit of slots_used; changes live; this and the next are read without the lock, too (slots_free, slots_now)
    int64_t slots_fresh     # slots 0..slots_fresh have been used before
    int64_t slots_used      # allocated now
    int64_t slots_used_max
    uint32_t free_head      # last in, first out: the warmest memory first
    uint32_t cold_head      # free as well, their memory was given back to the system
    uint32_t oldest         # list by age of what the map names, for the flusher
    uint32_t youngest
    bint flush_asked        # above the high-water mark; until the flusher is at the low one
    int64_t populated       # bytes of `pages` that were populated, or are being so
    # the thread that keeps populated slots ahead (cbw/warm); all under `lock`
    pthread_cond_t warm_wanted      # it sleeps on this
    pthread_cond_t warmed           # broadcast when it has freed a block
    pthread_t warm_thread
    uint32_t warm_forks     # the process it lives in
    bint warm_started
    bint warm_asked         # until nothing is wanted any more
    bint warm_stopping
    int64_t warming         # slots that it is populating: neither free nor used
    # disk tier
    PyObject *log           # BlockDevice, borrowed (the Python owner of the store keeps it); NULL: no disk tier
    Descriptor *descriptors # [positions_limit], by position
    uint32_t *live          # [segments]: clusters of the segment that a word names
    int64_t segment_clusters
    int64_t segments_limit  # hard limit: segments on disk at once; changes live
    int64_t segments_used
    int64_t positions_limit # end of the log
    int64_t head            # next position; one that a word has named is never reused
    int64_t log_used        # clusters that a word names, or will
    bint in_place           # no log: a cluster's position is its number, its data lies at the disk's own offset
    int64_t disk_bytes      # in place: where the disk ends, within its last cluster
    # flusher
    uint64_t transits       # +1 when a batch takes log positions, +1 when its slots are free; odd: both are taken (atomic)
    uint64_t flushed        # clusters that were moved to the log (atomic counter)
    uint64_t log_error      # errno of the flusher's last write, 0: it succeeded (atomic)
    int64_t retry_ns        # not to be tried again before; the flusher's
    int64_t backoff_ns

# What is used, in clusters, of one moment.
cdef struct StoreFill:
    int64_t slots_used
    int64_t slots_used_max
    int64_t slots_limit
    int64_t log_used
    int64_t log_limit
    double rate             # clusters a second, net

# in_place_bytes: 0, or the length of the disk, whose clusters lie on LOG at their own offsets; then LOG_BYTES says nothing.
cdef Store *store_new(int index, int64_t cluster_bytes, int64_t ram_bytes, PyObject *log, int64_t log_bytes, int64_t in_place_bytes,
                      Room *room) noexcept nogil
cdef void store_free(Store *store) noexcept nogil
# RAM: up to COUNT slots into slots[]; how many there were. Contents are undefined, refs 1, generation bumped.
cdef int64_t slots_take(Store *store, uint32_t *slots, int64_t count) noexcept nogil
# The same, but the last slots stay free for the guest's first touches: for what can do without.
cdef int64_t slots_take_spare(Store *store, uint32_t *slots, int64_t count) noexcept nogil
cdef int64_t slots_reserve(const Store *store) noexcept nogil      # how many those are
cdef void slot_unref(Store *store, int64_t slot) noexcept nogil
# The slot holds CLUSTER now, and a word names it: it is the youngest. ask: wake the flusher above the high-water mark.
cdef void slots_enlist(Store *store, const int64_t *slots, const int64_t *clusters, int64_t count, bint ask) noexcept nogil
# Up to COUNT of the oldest that are in the list, with their clusters and generations; they go to its end, to be tried later.
cdef int64_t slots_oldest(Store *store, int64_t *slots, int64_t *clusters, uint32_t *generations, int64_t count) noexcept nogil
# Sets the limit of RAM; memory that is free above it goes back to the system. What is used above it goes as it is freed.
cdef void slots_set_limit(Store *store, int64_t limit) noexcept nogil
cdef StoreFill store_fill(Store *store) noexcept nogil
cdef int64_t store_room(Store *store, bint with_log) noexcept nogil     # clusters that could be taken now
# Of what is taken, COUNT more (or fewer) can be dropped at any time: they fill nothing, for the forecast.
cdef void store_droppable(Store *store, int64_t count) noexcept nogil
# Disk: up to COUNT consecutive positions; how many (0: full), *first the first. A run never spans a segment. In place: COUNT, see log_place.
cdef int64_t log_take(Store *store, int64_t count, int64_t *first) noexcept nogil
cdef void log_give_back(Store *store, int64_t position) noexcept nogil
# The same of a position that no word has named: the last one taken is there to be taken again. From the last to the first.
cdef void log_untake(Store *store, int64_t position) noexcept nogil
# Places that nothing names any more and that can't be used again before the rest of their segment has gone too.
cdef int64_t log_dead(Store *store) noexcept nogil
# There is room in the log that there was none of: wake the flusher, if it wants any, and who waits.
cdef void log_came_free(Store *store) noexcept nogil
cdef int64_t log_offset(const Store *store, int64_t position) noexcept nogil
# Sets the limit of the log, in segments. What is used above it goes as it is freed.
cdef void log_set_limit(Store *store, int64_t segments) noexcept nogil
# Writes DATA, the clusters CLUSTER.. of the snapshot with that id, at positions taken before. 0 or -errno.
cdef int log_write(Store *store, int64_t position, const void *data, int64_t count, int64_t cluster, uint64_t snapshot) noexcept nogil
# As log_write, from COUNT slots at clusters of any order, in one write.
cdef int log_write_slots(Store *store, int64_t position, const int64_t *slots, const int64_t *clusters, const uint64_t *snapshots,
                         int64_t count) noexcept nogil
cdef int log_read(Store *store, int64_t position, void *data) noexcept nogil        # one cluster; -EIO when its crc is wrong
# Drops what WORD names (RAM slot or log record; nothing for ZERO).
cdef void store_drop(Store *store, uint64_t word) noexcept nogil

cdef inline int64_t log_place(const Store *store, int64_t position, int64_t cluster) noexcept nogil:
    # Where CLUSTER goes for which POSITION was taken.
    return cluster if store.in_place else position

cdef inline int64_t slots_now(const Store *store) noexcept nogil:
    # slots_used of some moment, without the lock.
    return <int64_t>load_relaxed(<const uint64_t *>&store.slots_used)

cdef inline int64_t slots_free(const Store *store) noexcept nogil:
    # What is left to the limit, without the lock; negative above a limit that shrank.
    return <int64_t>load_relaxed(<const uint64_t *>&store.slots_limit) - slots_now(store)

cdef inline int64_t high_water(const Store *store) noexcept nogil:
    # Slots used above which the flusher works ...
    return store.slots_limit * 3 // 4

cdef inline int64_t low_water(const Store *store) noexcept nogil:
    # ... until no more than these are.
    return <int64_t>load_relaxed(<const uint64_t *>&store.slots_limit) // 2

cdef inline int64_t segment_bytes(const Store *store) noexcept nogil:
    return SEGMENT_HEADER + store.segment_clusters * store.cluster_bytes

cdef inline char *slot_data(const Store *store, int64_t slot) noexcept nogil:
    return store.pages + slot * store.cluster_bytes
