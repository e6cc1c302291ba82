# The state of one engine: what PROTOCOL calls engine, epoch and snapshot. Read this first.
#
# How a word is shared stands at each field: (control) changed under the engine's control lock only; (flip) filled before
# the epoch is flipped in, constant while anybody is counted in it; (claim) changed under the claim of its cluster;
# (atomic) by the atomics of kernels/atomic.pxd; (lock) under the mutex named.
from cpython.ref cimport PyObject
from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.bitmaps.dirty cimport dirty_words
from fastcbw.block.device cimport BlockDevice
from fastcbw.cbw.latency cimport LatencyTable
from fastcbw.cbw.locmap cimport STORES_MAX, LocationMap
from fastcbw.cbw.room cimport Room
from fastcbw.cbw.store cimport Store
from fastcbw.kernels.atomic cimport load_acquire, load_relaxed, sub_seq
from fastcbw.kernels.sparse cimport sparse_bits
from fastcbw.sync cimport pthread_cond_t, pthread_mutex_t

cdef enum:
    LINES = 256                 # one for each live thread, see csrc/threads.h
    SNAPSHOTS_MAX = 62          # chain positions
    DIRTY_MAX = 16              # named dirty bitmaps of a disk at once
    STRIPES = 64                # mutexes for those who wait for a claim
    RECENT = 1024               # first touches that the ring of a geometry remembers, a power of two

    # Snapshot.dead
    ALIVE = 0
    DELETED = 1
    BROKEN = 2

    # Snapshot.broken_why
    WHY_NOT = 0
    WHY_FULL = 1                # both tiers at their limits
    WHY_SOURCE = 2              # the old data could not be read
    WHY_STORE = 3               # the disk tier could not be written
    WHY_TIMEOUT = 4             # preserving took longer than cbw-timeout
    WHY_MEMORY = 5              # no memory for the location map
    WHY_COMMAND = 6             # somebody asked for it
    WHY_ROOM_TIMEOUT = 7        # on-full is `wait`, and no room came within cbw-timeout
    WHY_NO_ROOM = 8             # on-full is `wait`, and nothing that runs can free room

    # Snap.on_full, Snap.on_cbw_error: what happens to the snapshot, or to the guest's write
    BREAK_SNAPSHOT = 0
    BREAK_GUEST_WRITE = 1
    WAIT_FOR_ROOM = 2           # on_full only

    # What a guest write waited for
    STALL_CLAIM = 0             # somebody else's copy of the same cluster
    STALL_DEVICE = 1            # its own copy: the old data was not in memory, or went to the disk tier
    STALL_ROOM = 2
    STALLS = 3

# What a claim is taken in: one cluster size, from the first live snapshot until the last has gone. A copy that timed out
# keeps a reference, so that it can give back its claims whenever its device answers.
cdef struct Geometry:
    uint64_t refs               # atomic
    int cluster_bits            # log2 of the cluster size
    int64_t clusters            # of the disk; the last may be partial
    uint64_t *claims            # bit per cluster (atomic); the only right to change a word, `settled`, `copy`, `lazy` of c
    sparse_bits lazy            # recorded guest discards, see lazy.pyx (claim): R6, a recorded cluster is not settled; with summary
    uint64_t lazy_count         # how many are recorded (atomic)
    uint64_t drops              # drops (keep.pyx) under way (atomic, seq_cst): what a guest write that meets a claim has to know
    uint64_t waiters            # threads that wait for a claim (atomic): nobody, nothing to wake
    uint64_t recent_count       # first touches so far (atomic), and the last of them, cluster << 16 | count: hints, see heat.pxd
    uint64_t recent[RECENT]
    pthread_mutex_t mutex[STRIPES]
    pthread_cond_t cond[STRIPES]

cdef struct Snap:
    uint64_t id                 # never reused within an engine
    Geometry *geometry          # one reference
    Store *store                # where new old data goes (control)
    LocationMap map             # words (claim), looked up by anybody counted
    # `copy`, what the reader still needs: what `within` marks (everything until within_set), without `not_copy`. It only shrinks.
    sparse_bits not_copy        # given up one by one (claim); with summary
    LocationMap parts           # not locations: a word of granules that were given up, for clusters of which others remain (claim)
    uint64_t parts_used         # atomic: a granule was given up, ever
    uint64_t discarded          # bytes of what was given up (atomic counter)
    sparse_bits within          # from a dirty bitmap; filled before within_set, then constant; words NULL: the whole disk
    uint64_t within_set         # atomic, release
    sparse_bits changed         # written since the snapshot, marked by guest writes while it is the newest (atomic); with summary
    uint64_t *ram               # summaries of the words, for queries and copy order only (atomic)
    uint64_t *disk
    uint64_t *zero
    uint64_t dead               # ALIVE, DELETED, BROKEN (atomic, seq_cst); never goes back
    uint64_t broken_why         # WHY_*, with broken_errno and broken_offset, written by who broke it (atomic)
    uint64_t broken_errno
    uint64_t broken_offset
    uint64_t refs               # its owner, readers during a request, guest writes that wait outside an epoch (atomic)
    int64_t cbw_timeout_ns
    uint64_t on_full            # policies (atomic; change live)
    uint64_t on_cbw_error
    uint64_t consumers          # what discards as it reads, so that room comes: jobs that consume, read-once exports (atomic)
    uint64_t refused            # guest writes that failed by policy (atomic counter), and WHY_* of the last
    uint64_t refused_why
    uint64_t stalls[STALLS]     # guest writes that waited (atomic counters), and how long
    uint64_t stall_ns[STALLS]
    uint64_t preserved          # clusters that were preserved for it, zero ones included (atomic counter)
    uint64_t preserved_zero
    uint64_t preserved_zeroing  # of `preserved`, what a write-zeroes of the guest made necessary
    # copy-on-read, see cbw/keep
    bint copy_on_read           # reads of the snapshot leave what they read in RAM (constant)
    sparse_bits kept            # RAM words that reads left and no guest write was seen to change: what may be dropped (atomic)
    uint64_t kept_count         # ones in it (atomic)
    uint64_t *kept_total        # the engine's sum of them
    uint64_t kept_hand          # cluster: where the search for something to drop goes on (atomic)
    uint64_t read_kept          # counters (atomic): clusters that reads left in RAM,
    uint64_t dropped            # of these, dropped again,
    uint64_t spared             # and first touches that found them there and copied nothing

cdef struct Epoch:
    uint64_t number
    Geometry *geometry          # NULL: no snapshot, nothing to preserve (flip)
    uint64_t *settled           # bit per cluster: a guest write has nothing left to preserve (claim)
    sparse_bits changed         # the newest live snapshot's: the same words and summary (atomic)
    int draining                # between the two flips of a creation (flip)
    int dirty_count             # named dirty bitmaps that record (flip); in the cache line of all that a settled write looks at
    int need_count              # snapshots to preserve for, newest first; no dying ones (flip)
    int chain_count             # snapshots to look in, newest first; dying ones included (flip)
    Snap *need[SNAPSHOTS_MAX]
    Snap *chain[SNAPSHOTS_MAX]
    dirty_words *dirty[DIRTY_MAX]   # their words, marked by every guest write (atomic)

# Two cache lines of a thread: no other thread writes them, except that line 0 is shared by all beyond LINES - 1.
cdef struct Line:
    uint64_t inflight[4]        # operations counted, by epoch number & 3 (atomic, seq_cst)
    uint64_t begin              # bytes: the range of the guest write that is counted; set before it is counted (atomic)
    uint64_t end
    uint64_t queued             # guest writes of a queue that are counted here: while there are any the range is the whole disk (atomic)
    uint64_t pad
    uint64_t writes             # guest writes, zeroes and discards (counters of the thread: relaxed loads and stores)
    uint64_t bytes
    uint64_t touches            # of these, with something to preserve
    uint64_t waits              # waited for a claim or a slow device
    uint64_t wait_ns_max
    uint64_t pad2[3]

cdef struct Ticket:
    Epoch *epoch
    Line *line
    int index                   # the very counter that was incremented

cdef class EngineState:
    cdef BlockDevice child      # the active disk
    cdef PyObject *disk         # the same, for C
    cdef int64_t length         # bytes
    cdef Line *lines            # [LINES]
    cdef LatencyTable latency   # of guest writes, while somebody asks
    cdef Epoch epochs[4]        # fixed: an enter may look at one that is over, never at one that is freed
    cdef uint64_t number        # of the present epoch (atomic, seq_cst)
    cdef uint64_t hold          # 1: new guest writes wait, for the few stores of a group's flips (atomic, seq_cst)
    cdef Store *stores[STORES_MAX]      # by the number in location words (control; read while counted)
    cdef uint64_t kept          # RAM words that reads left, of all snapshots (atomic): 0, guest reads go straight to the disk
    cdef uint64_t word_gone     # epoch in which a word last went without a flip after it; set before its data is freed (atomic)
    cdef uint64_t trim_wanted   # 1: the keeper was asked to drop something (atomic)
    cdef uint64_t ram_reads     # guest reads served from RAM, in whole or in part (atomic counters)
    cdef uint64_t ram_read_bytes
    cdef void *stops            # cbw.stops.Stops of a test, else NULL
    cdef object stops_owner
    cdef Room room              # who waits for room in any of the stores
    cdef int broken_fd          # eventfd, written when the keeper has something to do: a snapshot broke, a guest
                                # write was refused, discards are to be carried out
    cdef Snap *lingering        # no snapshot lives, but recorded discards are not carried out yet: the last one, whose `changed` is marked
                                # until they are (control; one reference)
    cdef uint64_t lazy_recorded # bytes of guest discards recorded, cancelled by a write, carried out, dropped because the disk
    cdef uint64_t lazy_cancelled        # failed them (atomic counters)
    cdef uint64_t lazy_carried_out
    cdef uint64_t lazy_failed
    cdef bint forked            # we are the child of a fork: the threads and the disk are the parent's
    cdef object workers         # cbw.worker.CopyPool, set by the Engine
    cdef object bitmaps         # cbw.dirty.DirtyBitmaps: they own the words that epochs name; set by the Engine
    cdef object logs            # what holds the devices of the stores' logs: a copy that hangs may outlive the Engine
    cdef PyObject *pool         # the same, for C; NULL before the first snapshot

cdef Ticket enter(EngineState state) noexcept nogil
# Counts a guest write in, marks it, tests whether all of it is settled: then, or without a snapshot, True: it may go to the disk.
cdef bint enter_guest(EngineState state, int64_t offset, int64_t length, Ticket *ticket) noexcept nogil

cdef inline void leave(Ticket ticket) noexcept nogil:
    sub_seq(&ticket.line.inflight[ticket.index], 1)

# Marks `changed` and every dirty bitmap over a range of bytes, as a guest write does: for whoever changes content while counted in EPOCH.
cdef void mark_range(Epoch *epoch, int64_t offset, int64_t length) noexcept nogil
cdef bint is_current(EngineState state, const Epoch *epoch) noexcept nogil      # R3
cdef Epoch *next_epoch(EngineState state) noexcept nogil            # a copy of the present one, to be changed and flipped in
cdef int flip(EngineState state) noexcept nogil                     # the index to drain
cdef void drain(EngineState state, int index) noexcept nogil        # returns when nobody is counted there
cdef bint overlapped(EngineState state, int index, int64_t begin, int64_t end) noexcept nogil

cdef Geometry *geometry_new(int64_t length, int cluster_bits) noexcept nogil
cdef void geometry_ref(Geometry *geometry) noexcept nogil
cdef void geometry_unref(Geometry *geometry) noexcept nogil
cdef void claim_release(Geometry *geometry, const uint64_t *got, int64_t first, int64_t count) noexcept nogil
# Waits until nobody claims any cluster of the range, or the deadline; takes nothing. 0 or -ETIMEDOUT.
cdef int claim_wait(Geometry *geometry, int64_t first, int64_t count, int64_t deadline_ns) noexcept nogil
cdef int claim_one(Geometry *geometry, int64_t cluster, int64_t deadline_ns) noexcept nogil     # waits; -ETIMEDOUT

cdef bint map_bits(sparse_bits *bits, int64_t length) noexcept nogil        # zeroes; False without memory, to be unmapped all the same
cdef Snap *snap_new(EngineState state, Geometry *geometry, Store *store, uint64_t id) noexcept nogil
cdef void snap_ref(Snap *snap) noexcept nogil
cdef void snap_unref(Snap *snap) noexcept nogil
cdef Snap *newest_needing(const Epoch *epoch, int64_t cluster) noexcept nogil
cdef uint64_t lookup(const Epoch *epoch, Snap *snap, int64_t cluster) noexcept nogil
cdef void count_stall(Snap *snap, int kind, int64_t since_ns) noexcept nogil
cdef void snap_break(EngineState state, Snap *snap, uint64_t why, int code, int64_t offset) noexcept nogil
cdef void summary_set(Snap *snap, int64_t cluster, uint64_t word) noexcept nogil
cdef void kept_set(Snap *snap, int64_t cluster) noexcept nogil              # under the claim, with a RAM word
cdef uint64_t kept_clear(Snap *snap, int64_t w, uint64_t bits) noexcept nogil      # which of the bits of word W had been set

cdef inline int64_t cluster_end(const Geometry *geometry, int64_t offset, int64_t length) noexcept nogil:
    # One past the last cluster that the range touches.
    return (offset + length + ((<int64_t>1) << geometry.cluster_bits) - 1) >> geometry.cluster_bits

cdef inline int64_t bitmap_bytes(int64_t bits) noexcept nogil:
    return (bits + 63) // 64 * 8

cdef bint in_copy(const Snap *snap, int64_t cluster) noexcept nogil         # acquire
# How far first..end is alike, all inside `copy` (*inside) or all outside, at least one cluster; in time that follows what is marked.
# Neighbours outside may come as several runs.
cdef int64_t copy_run(const Snap *snap, int64_t first, int64_t end, bint *inside) noexcept nogil

# By bitmap word: of the clusters AMONG of word W ...
cdef inline uint64_t copy_word(const Snap *snap, int64_t w) noexcept nogil:          # those in `copy`: acquire
    cdef uint64_t given_up = load_acquire(snap.not_copy.words + w)
    return ~given_up & load_relaxed(snap.within.words + w) if load_acquire(&snap.within_set) else ~given_up

cdef uint64_t wanted_word(const Epoch *epoch, int64_t w, uint64_t among) noexcept nogil     # those that a live snapshot has in `copy`
cdef uint64_t needed_word(const Epoch *epoch, int64_t w, uint64_t among) noexcept nogil     # of them, those that no store holds yet
cdef void wake_keeper(EngineState state) noexcept nogil
