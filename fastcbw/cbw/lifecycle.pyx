"""Beginning and end of snapshots: create, group, delete, break (PROTOCOL section 5).

Create. Fill the next epoch: fresh `settled` (untouched zero pages, whatever the size of the disk), fresh `changed`, the
snapshot first in `need` and `chain`. Flip; drain the old epoch's writes, which are in or out of the snapshot; flip to
the same epoch without `draining`; drain again, because a write of the first new epoch may have read old data while an
old write was landing and publish it late. Then the view is constant and is handed out. The guest waited for nothing.
Dirty bitmaps are switched by the same first flip: one that begins here gets every write that is not in the old epoch, one
that `copy` is made of gets no more. What it holds is read after the drains: a write of the old epoch, which the view may
hold, has marked it by then. Until then `copy` is everything.

Group. New guest writes on all the disks are held while all are flipped (a few stores), so that no write that was issued
after one disk's acknowledgement is in a snapshot that lacks it; then each disk drains for itself.

End. `dead` first: readers get errors. Flip to an epoch that does not preserve for it, drain: nobody publishes into it any
more. Then, cluster by cluster under the claim, hand each word to the next older snapshot that needs the cluster and has
nothing for it (destination first, so that a look-up never misses it), or drop it. Only then stop marking its `changed`
(flip, drain), give the marks to the next older one, unlink it from the chain (flip, drain), free it.

What only the last snapshot kept from being discarded is carried out after it by the keeper (lazy.pyx). Until then the epoch keeps
`settled`, with zeroes there, and the geometry, but no snapshot: it lingers. A snapshot taken meanwhile takes the records over.
"""

from libc.stdint cimport int64_t, uint64_t

from fastcbw.bitmaps.dirty cimport dirty_convert
from fastcbw.bitmaps.mapping cimport unmap_pages
from fastcbw.cbw.locmap cimport (LEAF_CLUSTERS, STORES_MAX, WORD_DISK, WORD_NONE, WORD_RAM, map_get, map_next_leaf, map_place, word_store,
                                 word_tag)
from fastcbw.cbw.room cimport room_changed
from fastcbw.cbw.state cimport (ALIVE, EngineState, Epoch, Geometry, Snap, Ticket, WHY_MEMORY, bitmap_bytes, claim_one,
                                claim_release, drain, enter, flip, in_copy, kept_set, leave, next_epoch, snap_break, snap_ref, snap_unref,
                                summary_set, wake_keeper)
from fastcbw.cbw.store cimport Store, slots_set_limit, store_drop, store_free
from fastcbw.kernels.atomic cimport cas_seq, load_relaxed, load_seq, store_relaxed, store_release, store_seq
from fastcbw.kernels.sparse cimport sparse_or_atomic
from fastcbw.sync cimport now_ns, pthread_mutex_lock, pthread_mutex_unlock, sleep_ns

cdef extern from "check.h" nogil:
    void check "fcbw_check"(bint condition, const char *rule) noexcept

cdef int64_t A_MINUTE_NS = 60000000000


cdef void fill(EngineState state, Creation *creation) noexcept nogil:
    cdef Epoch *epoch = next_epoch(state)
    cdef int i
    for i in range(epoch.need_count, 0, -1):
        epoch.need[i] = epoch.need[i - 1]
    for i in range(epoch.chain_count, 0, -1):
        epoch.chain[i] = epoch.chain[i - 1]
    epoch.need[0] = epoch.chain[0] = creation.snap
    epoch.need_count += 1
    epoch.chain_count += 1
    epoch.geometry = creation.snap.geometry
    epoch.settled = creation.settled
    epoch.changed = creation.snap.changed
    epoch.draining = 1
    epoch.dirty_count = creation.dirty_count
    for i in range(creation.dirty_count):
        epoch.dirty[i] = creation.dirty[i]


cdef int64_t pause_ns = 0       # between two flips of a group, for tests


def pause_between_flips(int64_t ns):
    """For tests: let every group from now on take that long between the flips of two disks, while guests are held."""
    global pause_ns
    pause_ns = ns


cdef void creations_flip(Creation *creations, int count) noexcept nogil:
    cdef int i
    for i in range(count):
        fill(<EngineState>creations[i].state, &creations[i])
    if count > 1:
        for i in range(count):
            store_seq(&(<EngineState>creations[i].state).hold, 1)
    for i in range(count):
        if i and pause_ns:
            sleep_ns(pause_ns)
        creations[i].index = flip(<EngineState>creations[i].state)
    if count > 1:
        for i in range(count):
            store_seq(&(<EngineState>creations[i].state).hold, 0)


cdef void creation_finish(Creation *creation) noexcept nogil:
    finish(<EngineState>creation.state, creation)


cdef void finish(EngineState state, Creation *creation) noexcept nogil:
    # The epoch before lives in the ring until two flips from now; its bitmap goes when its writes have ended.
    cdef uint64_t *old_settled = state.epochs[creation.index].settled
    drain(state, creation.index)
    next_epoch(state)               # a copy with `draining` off
    drain(state, flip(state))
    if creation.frozen != NULL:
        dirty_convert(&creation.snap.within, creation.snap.geometry.cluster_bits, &creation.frozen.bits, creation.frozen.shift)
        store_release(&creation.snap.within_set, 1)
        if load_seq(&creation.snap.geometry.lazy_count):
            wake_keeper(state)          # discards were recorded for it, and it does not need all of them any more
    room_changed(&state.room)       # who waits for room for an older snapshot may find some in the new one
    if old_settled != NULL:
        unmap_pages(old_settled, bitmap_bytes(creation.snap.geometry.clusters))
    if state.lingering != NULL:
        snap_unref(state.lingering)         # nobody marks its `changed` any more
        state.lingering = NULL


cdef int position_of(Snap **list, int count, Snap *snap) noexcept nogil:
    cdef int i
    for i in range(count):
        if list[i] == snap:
            return i
    return -1


cdef int without(Snap **list, int count, Snap *snap) noexcept nogil:
    """Take SNAP out of the list; return the new count."""
    cdef int i, at = position_of(list, count, snap)
    if at < 0:
        return count
    for i in range(at, count - 1):
        list[i] = list[i + 1]
    return count - 1


cdef void retire(EngineState state, Snap *snap, uint64_t why) noexcept nogil:
    cdef Epoch *epoch
    cdef uint64_t *settled = NULL
    cdef Snap *older = NULL
    cdef int at
    cas_seq(&snap.dead, ALIVE, why)
    room_changed(&state.room)

    epoch = next_epoch(state)
    epoch.need_count = without(epoch.need, epoch.need_count, snap)
    drain(state, flip(state))
    hand_over(state, snap)

    epoch = next_epoch(state)
    at = position_of(epoch.chain, epoch.chain_count, snap)
    check(at >= 0, "a snapshot is retired once")
    if at + 1 < epoch.chain_count:
        older = epoch.chain[at + 1]
    if at == 0 and older != NULL:
        epoch.changed = older.changed
    drain(state, flip(state))
    if older != NULL:
        sparse_or_atomic(&older.changed, &snap.changed)         # others set bits in it meanwhile

    epoch = next_epoch(state)
    epoch.chain_count = without(epoch.chain, epoch.chain_count, snap)
    if epoch.chain_count == 0 and load_seq(&epoch.geometry.lazy_count) != 0:
        snap_ref(snap)          # nobody records any more, but until all is carried out writes must come by (lazy.pyx)
        state.lingering = snap
    elif epoch.chain_count == 0:
        settled = epoch_empty(epoch)
    drain(state, flip(state))
    if settled != NULL:
        unmap_pages(settled, bitmap_bytes(snap.geometry.clusters))
    snap.store.retired = True
    if snap.store.slots_used != 0:
        slots_set_limit(snap.store, 0)      # it stays for what others read in it: the memory of every other slot goes back


cdef uint64_t *epoch_empty(Epoch *epoch) noexcept nogil:
    """Make it an epoch of a disk without snapshots; return its `settled`, to be unmapped when the epoch before is drained."""
    cdef uint64_t *settled = epoch.settled
    epoch.geometry = NULL
    epoch.settled = NULL
    epoch.changed.words = NULL
    epoch.changed.summary = NULL
    return settled


cdef bint end_lingering(EngineState state) noexcept nogil:
    cdef Epoch *epoch
    cdef uint64_t *settled
    cdef Snap *snap = state.lingering
    if snap == NULL:
        return True
    if load_seq(&snap.geometry.lazy_count) != 0:
        return False
    epoch = next_epoch(state)
    settled = epoch_empty(epoch)
    drain(state, flip(state))
    unmap_pages(settled, bitmap_bytes(snap.geometry.clusters))
    state.lingering = NULL
    snap_unref(snap)
    return True


cdef void hand_over(EngineState state, Snap *snap) noexcept nogil:
    """Give each word of SNAP to the snapshot that still needs it, or drop it. Nobody publishes into SNAP any more."""
    cdef int64_t leaf = map_next_leaf(&snap.map, 0)
    cdef int64_t cluster
    while leaf < snap.map.clusters:
        for cluster in range(leaf, min(leaf + LEAF_CLUSTERS, snap.map.clusters)):
            if map_get(&snap.map, cluster) != WORD_NONE:
                hand_over_one(state, snap, cluster)
        leaf = map_next_leaf(&snap.map, leaf + LEAF_CLUSTERS)


cdef void hand_over_one(EngineState state, Snap *snap, int64_t cluster) noexcept nogil:
    cdef uint64_t got = (<uint64_t>1) << (cluster % 64)
    cdef uint64_t dropped
    cdef Ticket ticket
    while claim_one(snap.geometry, cluster, now_ns() + A_MINUTE_NS) != 0:
        pass                # held over a copy whose device does not answer: there is nothing better than to wait
    ticket = enter(state)
    dropped = hand_over_claimed(state, ticket.epoch, snap, cluster)
    claim_release(snap.geometry, &got, cluster, 1)
    leave(ticket)
    drop_word(state, dropped)


cdef uint64_t hand_over_claimed(EngineState state, Epoch *epoch, Snap *snap, int64_t cluster) noexcept nogil:
    cdef uint64_t word = map_get(&snap.map, cluster)
    cdef uint64_t *place
    cdef Snap *heir
    while word != WORD_NONE:
        heir = find_heir(epoch, snap, cluster)
        if heir != NULL:
            place = map_place(&heir.map, cluster)
            if place == NULL:
                snap_break(state, heir, WHY_MEMORY, 0, cluster << snap.geometry.cluster_bits)
                continue        # it needs nothing any more; the one before it may
            store_release(place, word)                                          # R4: destination first
            summary_set(heir, cluster, word)
            if (load_relaxed(snap.kept.words + cluster // 64) >> (cluster % 64)) & 1:
                kept_set(heir, cluster)
                store_relaxed(&state.stores[word_store(word)].inherited, 1)
        store_release(map_place(&snap.map, cluster), WORD_NONE)
        if heir != NULL:
            word = WORD_NONE    # the heir's now: nothing to drop
        break
    summary_set(snap, cluster, WORD_NONE)
    return word


cdef void drop_word(EngineState state, uint64_t word) noexcept nogil:
    if word_tag(word) == WORD_RAM or word_tag(word) == WORD_DISK:
        store_drop(state.stores[word_store(word)], word)


cdef Snap *find_heir(const Epoch *epoch, Snap *snap, int64_t cluster) noexcept nogil:
    """The newest snapshot older than SNAP that needs its word of CLUSTER, or NULL. Under the claim.

    A snapshot in between that has a word of its own, dying ones included, has older data: that is what all before it
    read and inherit, and the newer data of SNAP must not come in front of it.
    """
    cdef int i, j
    cdef int at = position_of(<Snap **>epoch.chain, epoch.chain_count, snap)
    for i in range(at + 1, epoch.chain_count):
        if map_get(&(<Snap *>epoch.chain[i]).map, cluster) != WORD_NONE:
            return NULL
        for j in range(epoch.need_count):
            if epoch.need[j] == epoch.chain[i] and load_seq(&(<Snap *>epoch.need[j]).dead) == ALIVE \
                    and in_copy(epoch.need[j], cluster):
                return <Snap *>epoch.need[j]
    return NULL


cdef int find_store_index(EngineState state) noexcept nogil:
    cdef int i
    for i in range(STORES_MAX):
        if state.stores[i] == NULL:
            return i
    return -1


cdef void sweep_stores(EngineState state) noexcept nogil:
    """Free the retired stores that nothing names.

    Nothing comes into a retired store, so that an empty one stays empty. But its last word may have gone just now (a drop
    takes no flip), while a look-up that is counted holds it: then those have to leave first. One of them may have pinned the store.
    """
    cdef Store *empty[STORES_MAX]
    cdef int count = 0
    cdef Store *store
    cdef int i
    for i in range(STORES_MAX):
        store = state.stores[i]
        if store != NULL and store.retired:
            pthread_mutex_lock(&store.lock)         # after it: what was done before the last word was freed
            if store.slots_used == 0 and store.log_used == 0:
                empty[count] = store
                count += 1
            pthread_mutex_unlock(&store.lock)
    if count and load_relaxed(&state.word_gone) == load_seq(&state.number):
        next_epoch(state)
        drain(state, flip(state))
    for i in range(count):
        if load_seq(&empty[i].pins) == 0:
            state.stores[empty[i].index] = NULL
            store_free(empty[i])
