"""Engine state: epochs, who is counted in them, claims, snapshots, and the look-up along the chain.

The order of steps and the memory ordering follow PROTOCOL sections 2, 3 and 8; the names are the same. In short:

    enter / flip    An operation adds one to its own counter of the epoch, then loads the epoch number; a flip stores the
                    number, then the drain loads the counters. All four are sequentially consistent, so that never both miss:
                    either the operation sees the new number and starts over, or the drain sees the operation and waits.
    claims          fetch_or with acquire, release with seq_cst (the waiters' count is loaded after it, see claim_release).
    publish         the data, then its location word with release; a look-up loads the word with acquire, then the data.
    end of data     `dead` or `copy` first, then the word is removed; readers check in the opposite order.

The epochs are a ring of four: a flip fills the next one, and goes on only after the one before the last is drained, so
that an operation that is counted never sees its epoch refilled.
"""

from cpython.ref cimport PyObject
from libc.errno cimport ETIMEDOUT
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from fastcbw.bitmaps.dirty cimport dirty_mark
from fastcbw.bitmaps.mapping cimport map_pages, unmap_pages
from fastcbw.block.device cimport BlockDevice
from fastcbw.cbw.latency cimport latency_free, latency_init
from fastcbw.cbw.locmap cimport (LEAF_CLUSTERS, STORES_MAX, WORD_DISK, WORD_NONE, WORD_RAM, WORD_ZERO, map_free, map_get, map_init, map_leaf,
                                 word_tag)
from fastcbw.cbw.room cimport room_changed, room_destroy, room_init
from fastcbw.cbw.store cimport Store, store_droppable, store_free
from fastcbw.kernels.atomic cimport (add_relaxed, add_seq, and_release, and_seq, cas_seq, load_acquire, load_relaxed,
                                     load_seq, or_acquire, or_release, or_seq, store_relaxed, store_seq, sub_seq)
from fastcbw.kernels.bits cimport bits_all_seq, bits_mark_seq, bits_next_zero
from fastcbw.kernels.sparse cimport sparse_bits, sparse_mark, sparse_next_one, sparse_test, summary_bits
from fastcbw.sync cimport (cond_init, cond_wait_until, pthread_cond_broadcast, pthread_cond_destroy,
                           pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, now_ns, sleep_ns,
                           waits)

cdef extern from "threads.h" nogil:
    int thread_slot "fcbw_thread_slot"() noexcept

cdef extern from "check.h" nogil:
    void check "fcbw_check"(bint condition, const char *rule) noexcept

cdef extern from * nogil:
    int popcount "__builtin_popcountll"(unsigned long long) noexcept

cdef extern from "<unistd.h>" nogil:
    ssize_t write(int fd, const void *buffer, size_t length) noexcept

cdef uint64_t ONE = 1           # what an eventfd is told
cdef int64_t POLL_NS_MIN = 5000
cdef int64_t POLL_NS_MAX = 500000


cdef class EngineState:
    """What one engine shares between its threads. Only cbw modules touch it; Python sees the Engine."""

    def __cinit__(self, BlockDevice child not None):
        self.child = child
        self.disk = <PyObject *>child
        self.length = child.length
        self.lines = <Line *>map_pages(LINES * sizeof(Line))
        if self.lines == NULL or latency_init(&self.latency, LINES) != 0:
            raise MemoryError("engine: no memory for the threads' counters")
        if room_init(&self.room) != 0:
            raise MemoryError("engine: no memory for its locks")
        self.broken_fd = -1
        self.number = 1
        self.epochs[1].number = 1

    def __dealloc__(self):
        cdef int i
        if self.lines != NULL:
            unmap_pages(self.lines, LINES * sizeof(Line))
        latency_free(&self.latency, LINES)
        if self.lingering != NULL:
            snap_unref(self.lingering)
        for i in range(STORES_MAX):
            if self.stores[i] != NULL:
                store_free(self.stores[i])
        room_destroy(&self.room)


# -- epochs

cdef inline Ticket count_in(EngineState state, Line *line, bint guest) noexcept nogil:
    cdef Ticket ticket
    cdef uint64_t number
    ticket.line = line
    while True:
        number = load_seq(&state.number)
        ticket.index = <int>(number & 3)
        add_seq(&line.inflight[ticket.index], 1)
        if load_seq(&state.number) == number and not (guest and load_seq(&state.hold)):
            ticket.epoch = &state.epochs[ticket.index]
            check(ticket.epoch.number == number, "a counted operation sees its own epoch")
            return ticket
        sub_seq(&line.inflight[ticket.index], 1)
        while guest and load_seq(&state.hold):
            sleep_ns(POLL_NS_MIN)


cdef Ticket enter(EngineState state) noexcept nogil:
    """Be counted in the present epoch. For everybody but guest writes."""
    return count_in(state, &state.lines[thread_slot()], False)


cdef bint enter_guest(EngineState state, int64_t offset, int64_t length, Ticket *ticket) noexcept nogil:
    """As enter, for a guest write to that range of bytes; waits while a group of disks is being flipped.

    Then marks the dirty bitmaps and `changed`, and tests `settled`, marks first, all seq_cst (section 8, write and drop). This is the whole of the
    settled path but for leave(): one counter, a few loads. No lock, no allocation, no call for a write within one bitmap word.
    """
    cdef int slot = thread_slot()
    cdef Line *line = &state.lines[slot]
    cdef Epoch *epoch
    cdef int64_t first, count, w
    cdef uint64_t mask
    # Line 0 is shared by many, and a queue has many writes under way: one range says nothing then, so it is the whole disk. It is
    # only ever widened while a write of the line is counted.
    if slot == 0 or load_relaxed(&line.queued):
        store_relaxed(&line.begin, 0)
        store_relaxed(&line.end, <uint64_t>-1)
    else:
        store_relaxed(&line.begin, <uint64_t>offset)
        store_relaxed(&line.end, <uint64_t>(offset + length))
    ticket[0] = count_in(state, line, True)
    epoch = ticket.epoch
    if epoch.dirty_count:
        mark_dirty(epoch, offset, length)
    if epoch.geometry == NULL:
        return True
    first = offset >> epoch.geometry.cluster_bits
    count = cluster_end(epoch.geometry, offset, length) - first
    if (first & 63) + count > 64:
        sparse_mark(&epoch.changed, first, count)
        bits_mark_seq(epoch.changed.words, first, count)
        return bits_all_seq(epoch.settled, first, count)
    w = first >> 6
    mask = (~(<uint64_t>0) >> (64 - count)) << (first & 63)
    if (load_seq(epoch.changed.words + w) & mask) != mask:
        sparse_mark(&epoch.changed, first, count)
        or_seq(epoch.changed.words + w, mask)
    return (load_seq(epoch.settled + w) & mask) == mask


cdef void mark_dirty(Epoch *epoch, int64_t offset, int64_t length) noexcept nogil:
    cdef int i
    for i in range(epoch.dirty_count):
        dirty_mark(epoch.dirty[i], offset, length)


cdef void mark_range(Epoch *epoch, int64_t offset, int64_t length) noexcept nogil:
    cdef int64_t first, count
    mark_dirty(epoch, offset, length)
    if epoch.geometry != NULL:
        first = offset >> epoch.geometry.cluster_bits
        count = cluster_end(epoch.geometry, offset, length) - first
        sparse_mark(&epoch.changed, first, count)
        bits_mark_seq(epoch.changed.words, first, count)


cdef bint is_current(EngineState state, const Epoch *epoch) noexcept nogil:
    return load_seq(&state.number) == epoch.number


cdef Epoch *next_epoch(EngineState state) noexcept nogil:
    """The next epoch of the ring as a copy of the present one. Control lock held, everything before drained."""
    cdef uint64_t number = load_seq(&state.number)
    cdef Epoch *fresh = &state.epochs[(number + 1) & 3]
    memcpy(fresh, &state.epochs[number & 3], sizeof(Epoch))
    fresh.number = number + 1
    fresh.draining = 0
    return fresh


cdef int flip(EngineState state) noexcept nogil:
    cdef uint64_t number = load_seq(&state.number)
    store_seq(&state.number, number + 1)
    return <int>(number & 3)


cdef void drain(EngineState state, int index) noexcept nogil:
    """Wait until nobody is counted at INDEX. Operations there wait for device I/O only, so this ends when they do."""
    cdef int i
    cdef int64_t pause = POLL_NS_MIN
    waits()
    for i in range(LINES):
        while load_seq(&state.lines[i].inflight[index]) != 0:
            sleep_ns(pause)
            if pause < POLL_NS_MAX:
                pause *= 2


cdef bint overlapped(EngineState state, int index, int64_t begin, int64_t end) noexcept nogil:
    """Whether a write counted at INDEX may overlap the bytes begin..end.

    A look-up counted there shows the range of its thread's last write: a wait for nothing, and a short one.
    """
    cdef int i
    for i in range(LINES):
        if load_seq(&state.lines[i].inflight[index]) != 0:
            if load_relaxed(&state.lines[i].begin) < <uint64_t>end and load_relaxed(&state.lines[i].end) > <uint64_t>begin:
                return True
    return False


# -- geometry and claims

cdef Geometry *geometry_new(int64_t length, int cluster_bits) noexcept nogil:
    cdef Geometry *geometry = <Geometry *>calloc(1, sizeof(Geometry))
    cdef int i
    if geometry == NULL:
        return NULL
    geometry.refs = 1
    geometry.cluster_bits = cluster_bits
    geometry.clusters = (length + ((<int64_t>1) << cluster_bits) - 1) >> cluster_bits
    geometry.claims = <uint64_t *>map_pages(bitmap_bytes(geometry.clusters))
    geometry.lazy.length = geometry.clusters
    geometry.lazy.words = <uint64_t *>map_pages(bitmap_bytes(geometry.clusters))
    geometry.lazy.summary = <uint64_t *>map_pages(bitmap_bytes(summary_bits(geometry.clusters)))
    if geometry.claims == NULL or geometry.lazy.words == NULL or geometry.lazy.summary == NULL:
        geometry_unmap(geometry)
        return NULL
    for i in range(STRIPES):
        pthread_mutex_init(&geometry.mutex[i], NULL)
        cond_init(&geometry.cond[i])
    return geometry


cdef void geometry_unmap(Geometry *geometry) noexcept nogil:
    unmap_bitmap(geometry.claims, bitmap_bytes(geometry.clusters))
    unmap_bitmap(geometry.lazy.words, bitmap_bytes(geometry.clusters))
    unmap_bitmap(geometry.lazy.summary, bitmap_bytes(summary_bits(geometry.clusters)))
    free(geometry)


cdef void geometry_ref(Geometry *geometry) noexcept nogil:
    add_seq(&geometry.refs, 1)


cdef void geometry_unref(Geometry *geometry) noexcept nogil:
    cdef int i
    if sub_seq(&geometry.refs, 1) != 1:
        return
    for i in range(STRIPES):
        pthread_mutex_destroy(&geometry.mutex[i])
        pthread_cond_destroy(&geometry.cond[i])
    geometry_unmap(geometry)


cdef inline int stripe_of(int64_t cluster) noexcept nogil:
    return <int>((cluster // 64) % STRIPES)


cdef void claim_release(Geometry *geometry, const uint64_t *got, int64_t first, int64_t count) noexcept nogil:
    """Give back the claims in GOT (as bits_claim_atomic filled it for that range), and wake who waits.

    A waiter counts itself, then tests the bit; here the bit is cleared, then the count is loaded, all seq_cst: one of the
    two sees the other. The stripe's lock makes the wake-up wait for a waiter that has tested and not yet gone to sleep.
    """
    cdef int64_t base = first // 64
    cdef int64_t w
    cdef int stripe
    for w in range(base, (first + count + 63) // 64):
        if got[w - base] == 0:
            continue
        and_seq(geometry.claims + w, ~got[w - base])
        if load_seq(&geometry.waiters) != 0:
            stripe = stripe_of(w * 64)
            pthread_mutex_lock(&geometry.mutex[stripe])
            pthread_cond_broadcast(&geometry.cond[stripe])
            pthread_mutex_unlock(&geometry.mutex[stripe])


cdef int claim_wait(Geometry *geometry, int64_t first, int64_t count, int64_t deadline_ns) noexcept nogil:
    cdef int64_t w
    cdef int64_t begin, end
    cdef int stripe, code = 0
    add_seq(&geometry.waiters, 1)
    for w in range(first // 64, (first + count + 63) // 64):
        begin = first if first > w * 64 else w * 64
        end = first + count if first + count < (w + 1) * 64 else (w + 1) * 64
        stripe = stripe_of(begin)
        pthread_mutex_lock(&geometry.mutex[stripe])
        while code == 0 and claimed_seq(geometry, begin, end):
            if cond_wait_until(&geometry.cond[stripe], &geometry.mutex[stripe], deadline_ns) == ETIMEDOUT:
                code = -ETIMEDOUT
        pthread_mutex_unlock(&geometry.mutex[stripe])
        if code:
            break
    sub_seq(&geometry.waiters, 1)
    return code


cdef inline bint claimed_seq(Geometry *geometry, int64_t begin, int64_t end) noexcept nogil:
    """Whether any cluster of begin..end, which lies in one word, is claimed."""
    cdef uint64_t mask = ~(<uint64_t>0) << (begin % 64)
    if end % 64:
        mask &= ((<uint64_t>1) << (end % 64)) - 1
    return (load_seq(geometry.claims + begin // 64) & mask) != 0


cdef int claim_one(Geometry *geometry, int64_t cluster, int64_t deadline_ns) noexcept nogil:
    cdef uint64_t bit = (<uint64_t>1) << (cluster % 64)
    cdef int code = 0
    while or_acquire(geometry.claims + cluster // 64, bit) & bit:
        code = claim_wait(geometry, cluster, 1, deadline_ns)
        if code:
            return code
    return 0


# -- snapshots

cdef Snap *snap_new(EngineState state, Geometry *geometry, Store *store, uint64_t id) noexcept nogil:
    """All that a snapshot needs, untouched mappings; takes a reference to GEOMETRY. NULL without memory."""
    cdef Snap *snap = <Snap *>calloc(1, sizeof(Snap))
    cdef int64_t size = bitmap_bytes(geometry.clusters)
    if snap == NULL:
        return NULL
    if map_init(&snap.map, geometry.clusters) != 0:
        free(snap)
        return NULL
    if map_init(&snap.parts, geometry.clusters) != 0:
        map_free(&snap.map)
        free(snap)
        return NULL
    snap.id = id
    snap.refs = 1
    snap.store = store
    snap.geometry = geometry
    geometry_ref(geometry)
    snap.kept_total = &state.kept
    snap.ram = <uint64_t *>map_pages(size)
    snap.disk = <uint64_t *>map_pages(size)
    snap.zero = <uint64_t *>map_pages(size)
    if not (map_bits(&snap.not_copy, geometry.clusters) and map_bits(&snap.changed, geometry.clusters)
            and map_bits(&snap.kept, geometry.clusters)) \
            or snap.ram == NULL or snap.disk == NULL or snap.zero == NULL:
        snap_free(snap)
        return NULL
    return snap


cdef inline void unmap_bitmap(uint64_t *words, int64_t size) noexcept nogil:
    if words != NULL:
        unmap_pages(words, size)


cdef bint map_bits(sparse_bits *bits, int64_t length) noexcept nogil:
    bits.length = length
    bits.words = <uint64_t *>map_pages(bitmap_bytes(length))
    bits.summary = <uint64_t *>map_pages(bitmap_bytes(summary_bits(length)))
    return bits.words != NULL and bits.summary != NULL


cdef void unmap_bits(sparse_bits *bits) noexcept nogil:
    unmap_bitmap(bits.words, bitmap_bytes(bits.length))
    unmap_bitmap(bits.summary, bitmap_bytes(summary_bits(bits.length)))


cdef void snap_ref(Snap *snap) noexcept nogil:
    add_seq(&snap.refs, 1)


cdef void snap_unref(Snap *snap) noexcept nogil:
    """The last reference frees it: then no epoch names it. The store stays: words elsewhere may name it."""
    if sub_seq(&snap.refs, 1) == 1:
        snap_free(snap)


cdef void snap_free(Snap *snap) noexcept nogil:
    cdef int64_t size = bitmap_bytes(snap.geometry.clusters)
    map_free(&snap.map)
    map_free(&snap.parts)
    unmap_bits(&snap.not_copy)
    unmap_bits(&snap.within)
    unmap_bits(&snap.changed)
    unmap_bits(&snap.kept)
    unmap_bitmap(snap.ram, size)
    unmap_bitmap(snap.disk, size)
    unmap_bitmap(snap.zero, size)
    geometry_unref(snap.geometry)
    free(snap)


cdef bint in_copy(const Snap *snap, int64_t cluster) noexcept nogil:
    if sparse_test(&snap.not_copy, cluster):
        return False
    return not load_acquire(&snap.within_set) or (load_relaxed(snap.within.words + cluster // 64) >> (cluster % 64)) & 1


cdef int64_t copy_run(const Snap *snap, int64_t first, int64_t end, bint *inside) noexcept nogil:
    cdef bint limited = load_acquire(&snap.within_set) != 0
    inside[0] = in_copy(snap, first)
    if inside[0]:
        if limited:
            end = bits_next_zero(snap.within.words, first, end)
        return sparse_next_one(&snap.not_copy, first, end)
    if limited and not (load_relaxed(snap.within.words + first // 64) >> (first % 64)) & 1:
        return sparse_next_one(&snap.within, first, end)
    return bits_next_zero(snap.not_copy.words, first, end)


cdef Snap *newest_needing(const Epoch *epoch, int64_t cluster) noexcept nogil:
    """The newest snapshot that CLUSTER must be preserved for, or NULL. A broken one needs nothing any more."""
    cdef int i
    for i in range(epoch.need_count):
        if load_seq(&(<Snap *>epoch.need[i]).dead) == ALIVE and in_copy(epoch.need[i], cluster):
            return <Snap *>epoch.need[i]
    return NULL


cdef uint64_t wanted_word(const Epoch *epoch, int64_t w, uint64_t among) noexcept nogil:
    cdef uint64_t wanted = 0
    cdef int i
    for i in range(epoch.need_count):
        if load_seq(&(<Snap *>epoch.need[i]).dead) == ALIVE:
            wanted |= copy_word(epoch.need[i], w)
    return wanted & among


cdef uint64_t held_word(const Epoch *epoch, Snap *snap, int64_t w) noexcept nogil:
    """Those of bitmap word W whose data for SNAP is in a store: lookup() for 64 neighbours, in the same order."""
    cdef const uint64_t *leaf
    cdef uint64_t held = 0
    cdef int i, j
    for i in range(epoch.chain_count):
        leaf = map_leaf(&(<Snap *>epoch.chain[i]).map, w * 64)
        if leaf != NULL:
            for j in range(LEAF_CLUSTERS):
                if load_acquire(leaf + j):
                    held |= (<uint64_t>1) << j
        if epoch.chain[i] == snap:
            break
    return held


cdef uint64_t needed_word(const Epoch *epoch, int64_t w, uint64_t among) noexcept nogil:
    """need() of PROTOCOL for 64 neighbours: the newest snapshot that has the cluster in `copy` decides."""
    cdef uint64_t needed = 0, its
    cdef int i
    for i in range(epoch.need_count):
        if among == 0:
            break
        if load_seq(&(<Snap *>epoch.need[i]).dead) != ALIVE:
            continue
        its = among & copy_word(epoch.need[i], w)
        if its:
            needed |= its & ~held_word(epoch, epoch.need[i], w)
            among ^= its
    return needed


cdef uint64_t lookup(const Epoch *epoch, Snap *snap, int64_t cluster) noexcept nogil:
    """Where the data of CLUSTER for SNAP is: in the store of the nearest snapshot at or after it that has it, or nowhere.

    From the newest to the older: a hand-over puts the word into the older snapshot before it leaves the newer one, so a
    look-up in this order can't miss a word that moves. Dying snapshots are looked in as well.
    """
    cdef uint64_t word, found = 0
    cdef int i
    if epoch.geometry != snap.geometry:
        return WORD_NONE        # it ended, and another cluster size began, during a long read: `dead` tells the reader
    for i in range(epoch.chain_count):
        word = map_get(&(<Snap *>epoch.chain[i]).map, cluster)
        if word:
            found = word
        if epoch.chain[i] == snap:
            break
    return found


cdef void snap_break(EngineState state, Snap *snap, uint64_t why, int code, int64_t offset) noexcept nogil:
    """Give the snapshot up, so that the guest can go on: the first reason is kept, and every reader gets it from now on."""
    if cas_seq(&snap.broken_why, WHY_NOT, why):
        store_relaxed(&snap.broken_errno, <uint64_t>code)
        store_relaxed(&snap.broken_offset, <uint64_t>offset)
    cas_seq(&snap.dead, ALIVE, BROKEN)
    room_changed(&state.room)
    wake_keeper(state)


cdef void wake_keeper(EngineState state) noexcept nogil:
    write(state.broken_fd, &ONE, 8)


cdef void count_stall(Snap *snap, int kind, int64_t since_ns) noexcept nogil:
    add_relaxed(&snap.stalls[kind], 1)
    add_relaxed(&snap.stall_ns[kind], <uint64_t>(now_ns() - since_ns))


cdef void summary_set(Snap *snap, int64_t cluster, uint64_t word) noexcept nogil:
    """Make the summaries of one cluster say what WORD says. Under the claim; the bitmaps are for reports and order only."""
    cdef uint64_t bit = (<uint64_t>1) << (cluster % 64)
    cdef int64_t w = cluster // 64
    cdef uint32_t tag = word_tag(word)
    if tag == WORD_RAM:
        or_release(snap.ram + w, bit)
    elif load_relaxed(snap.ram + w) & bit:
        and_release(snap.ram + w, ~bit)
        kept_clear(snap, w, bit)
    if tag == WORD_DISK:
        or_release(snap.disk + w, bit)
    elif load_relaxed(snap.disk + w) & bit:
        and_release(snap.disk + w, ~bit)
    if tag == WORD_ZERO:
        or_release(snap.zero + w, bit)
    elif load_relaxed(snap.zero + w) & bit:
        and_release(snap.zero + w, ~bit)


cdef void kept_set(Snap *snap, int64_t cluster) noexcept nogil:
    """Note that a read left this RAM word; summary_set takes the note back when the word is another or goes."""
    cdef uint64_t bit = (<uint64_t>1) << (cluster % 64)
    sparse_mark(&snap.kept, cluster, 1)
    if not or_seq(snap.kept.words + cluster // 64, bit) & bit:
        add_seq(&snap.kept_count, 1)
        add_seq(snap.kept_total, 1)
        store_droppable(snap.store, 1)


cdef uint64_t kept_clear(Snap *snap, int64_t w, uint64_t bits) noexcept nogil:
    cdef uint64_t had
    if not load_relaxed(snap.kept.words + w) & bits:
        return 0
    had = and_seq(snap.kept.words + w, ~bits) & bits
    if had:         # else somebody else took the note back just now
        sub_seq(&snap.kept_count, <uint64_t>popcount(had))
        sub_seq(snap.kept_total, <uint64_t>popcount(had))
        store_droppable(snap.store, -<int64_t>popcount(had))
    return had
