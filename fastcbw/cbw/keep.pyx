"""Copy-on-read: clusters that reads leave in RAM although no guest write has asked for it.

    snapshot read, CACHE, read-ahead ─▶ keep_fetch: free slot ─ read the disk ─ claim ─ look up again ─ publish ─ settle
    guest read, while anything is kept ─▶ unchanged and in RAM? from there. Else the disk
    no slot for a first touch, or little left ─▶ drop: claim ─ clear `settled` ─ look at `changed` ─ remove the word

A kept cluster is preserved like any other, but nothing has changed it: a later guest write finds it settled, marks it
`changed` and copies nothing. Until then the disk holds the same data, so that it can be served to the guest, and dropped.

Insert (keep_fetch). The data is read into a slot of our own, without a claim, uncounted. Then, counted: a claim if it is
to be had, never waited for; the epoch is still the same (R3); under the claim the look-up still finds nothing, which
says that no guest write can have begun before the read had ended, so that what was read is the snapshot's. The word goes
to the newest snapshot that needs the cluster, and the bit that is set is that of the epoch in which we are counted, not
of the present one: a snapshot taken meanwhile has a bitmap of its own, where the cluster is not settled.

Drop. Whoever is counted in the epoch before may still go by its own `settled` while a creation drains: nothing is dropped
then. Else `settled` is cleared, then `changed` is looked at, of the snapshot and all newer ones; a guest write marks
`changed`, then looks at `settled`; all seq_cst, so that not both miss the other. Marked: the bit goes back, the word stays.

Not marked: the word goes, under the claim. A guest write that finds the cluster claimed and not settled must not take a
word that is there for good, as it may when others hold claims: it may be the one that is going. It looks at `drops`.

Guest reads. Counted: the word, then `changed`, all after the request has come; then the copy, an acquire fence, and the word
again, generation and all (the slot may have been dropped and filled with other data). At the look at `changed` no guest
write had begun: that is the instant of the read.

`kept` is a note at the word, for the search and the reports; it decides nothing. The guest's settled write does not touch it: what was
changed is taken out by the search, each once, so that finding something to drop costs what was kept since the last time, and by a sweep
of the keeper, which guest reads ask for when they look for kept clusters in vain: with nothing left they look no more.
"""

from libc.errno cimport EAGAIN
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from fastcbw.block.device cimport BlockDevice
from fastcbw.block.sys cimport iovec
from fastcbw.cbw.lazy cimport lazy_recorded
from fastcbw.cbw.locmap cimport (LEAF_CLUSTERS, WORD_NONE, WORD_RAM, WORD_ZERO, map_get, map_next_leaf, map_place, ram_word,
                                 word_slot, word_store, word_tag)
from fastcbw.cbw.state cimport (EngineState, Epoch, Geometry, Snap, Ticket, claim_release, cluster_end, enter, in_copy,
                                is_current, kept_clear, kept_set, leave, lookup, newest_needing, snap_ref, snap_unref, summary_set,
                                wake_keeper)
from fastcbw.cbw.stops cimport (STOP_DROP_CLAIMED, STOP_DROP_CLEARED, STOP_DROP_DECIDED, STOP_DROP_ENTERED, STOP_GUEST_COPIED,
                                STOP_GUEST_FOUND, STOP_INSERT_CHECKED, STOP_INSERT_CLAIMED, STOP_INSERT_READ, pass_stop)
from fastcbw.cbw.store cimport Store, slot_data, slot_unref, slots_enlist, slots_free, slots_reserve, slots_take_spare
from fastcbw.cbw.worker cimport Copy, ROUND_BYTES, ROUND_CLUSTERS, copy_read
from fastcbw.kernels.atomic cimport (add_relaxed, add_seq, and_seq, cas_seq, fence_acquire, fence_seq, load_relaxed, load_seq,
                                     or_acquire, or_seq, store_relaxed, store_release, store_seq, sub_seq)
from fastcbw.kernels.bits cimport bits_claim_atomic
from fastcbw.kernels.sparse cimport sparse_next_one

cdef extern from "check.h" nogil:
    void check "fcbw_check"(bint condition, const char *rule) noexcept

cdef extern from * nogil:
    int ctzll "__builtin_ctzll"(unsigned long long) noexcept
    int popcount "__builtin_popcountll"(unsigned long long) noexcept

cdef enum:
    SERVE_CLUSTERS = 256        # of a guest read, looked at while counted once
    SERVE_WORDS = 4             # of a bit for each
    DROP_TRIES = 4096           # clusters that one search for room looks at, at most
    SWEEP_MISSES = 1024         # guest reads that found nothing kept, for one sweep
    TRIM_STEP = 64              # slots that the keeper frees while counted once

    # what became of one cluster that was to be dropped
    DROPPED = 0
    CHANGED = 1                 # a guest write has changed it: it is the snapshot's only copy
    BUSY = 2                    # claimed by somebody
    NOT_NOW = 3                 # another epoch has begun, or a creation is draining


cdef inline bint may_settle(const Epoch *epoch, int64_t cluster) noexcept nogil:
    """R6: whether a cluster that is preserved now may be settled in EPOCH. Under the claim."""
    return not lazy_recorded(epoch.geometry, cluster)


cdef inline bint in_need(const Epoch *epoch, const Snap *snap) noexcept nogil:
    cdef int i
    for i in range(epoch.need_count):
        if epoch.need[i] == snap:
            return True
    return False


cdef inline uint64_t changed_since(const Epoch *epoch, const Snap *snap, int64_t w) noexcept nogil:
    """Word W of what has changed since SNAP: its own marks and those of all newer ones (seq_cst loads)."""
    cdef uint64_t bits = 0
    cdef int i
    for i in range(epoch.chain_count):
        bits |= load_seq(epoch.chain[i].changed.words + w)
        if epoch.chain[i] == snap:
            return bits
    return ~(<uint64_t>0)       # it is not there any more


cdef bint keep_is_clean(const Epoch *epoch, const Snap *snap, int64_t cluster) noexcept nogil:
    return (load_relaxed(snap.kept.words + cluster // 64) & ~changed_since(epoch, snap, cluster // 64)) >> (cluster % 64) & 1


# -- insert

cdef int64_t keep_step(const Snap *snap) noexcept nogil:
    cdef int64_t step = ROUND_BYTES >> snap.geometry.cluster_bits
    return 1 if step < 1 else step if step < ROUND_CLUSTERS else ROUND_CLUSTERS


cdef int keep_fetch(EngineState state, Snap *snap, int64_t first, int64_t count, bint nowait) noexcept nogil:
    cdef Copy copy
    cdef Ticket ticket = enter(state)
    cdef Snap *newest = choose(ticket.epoch, snap, &copy, first, count)
    cdef Store *store
    cdef int i, code, wanted
    if newest == NULL:
        leave(ticket)
        return 0
    # A reference and a pin: neither the snapshot nor its store go while we read, uncounted.
    store = newest.store
    wanted = copy.items_count
    take_spare(store, &copy)
    if copy.items_count == 0:
        leave(ticket)
        return NO_ROOM
    snap_ref(newest)
    add_seq(&store.pins, 1)
    leave(ticket)
    copy.disk = state.disk
    copy.disk_length = state.length
    copy.snap = newest
    copy.geometry = newest.geometry
    code = copy_read(&copy, nowait)
    if code == 0:
        fence_seq()
        pass_stop(state.stops, STOP_INSERT_READ)
        ticket = enter(state)
        insert(state, ticket.epoch, snap, &copy)
        leave(ticket)
        code = 0 if copy.items_count == wanted else NO_ROOM
    for i in range(copy.items_count):
        if copy.items[i].slot >= 0:
            slot_unref(store, copy.items[i].slot)
    sub_seq(&store.pins, 1)
    snap_unref(newest)
    return code


cdef Snap *choose(const Epoch *epoch, Snap *snap, Copy *copy, int64_t first, int64_t count) noexcept nogil:
    """Make the items of COPY: what SNAP needs and no store holds for it. Returns whose store it goes to, NULL: nothing.

    Clusters that would go to another snapshot than the first one are left out: a later read brings them.
    """
    cdef Snap *newest = NULL
    cdef Snap *needing
    cdef int64_t cluster
    copy.items_count = 0
    if epoch.geometry != snap.geometry or not in_need(epoch, snap):
        return NULL
    for cluster in range(first, first + count):
        if not in_copy(snap, cluster) or lookup(epoch, snap, cluster) != WORD_NONE:
            continue
        needing = newest_needing(epoch, cluster)
        if needing == NULL or (newest != NULL and needing != newest):
            continue
        newest = needing
        copy.items[copy.items_count].cluster = cluster
        copy.items[copy.items_count].slot = -1
        copy.items[copy.items_count].position = -1
        copy.items[copy.items_count].zero = False
        copy.items_count += 1
    return newest


cdef void take_spare(Store *store, Copy *copy) noexcept nogil:
    """Give the first items the slots that can be spared, and forget the others."""
    cdef uint32_t slots[ROUND_CLUSTERS]
    cdef int i
    copy.items_count = <int>slots_take_spare(store, slots, copy.items_count)
    for i in range(copy.items_count):
        copy.items[i].slot = slots[i]
        copy.items[i].data = slot_data(store, slots[i])


cdef void insert(EngineState state, const Epoch *epoch, Snap *snap, Copy *copy) noexcept nogil:
    """Publish what was read, as far as it is still nowhere. Items whose slot was given to a word have none afterwards."""
    cdef Geometry *geometry = copy.geometry
    cdef int i = 0, begin
    cdef int64_t first, count
    if epoch.geometry != geometry:
        return                  # all that it was for has ended
    while i < copy.items_count:
        begin = i
        first = copy.items[begin].cluster
        while i < copy.items_count and copy.items[i].cluster == first + (i - begin):
            i += 1
        count = i - begin
        if bits_claim_atomic(geometry.claims, copy.got, first, count) == 0:
            continue            # busy: whoever is there preserves them, or drops them
        pass_stop(state.stops, STOP_INSERT_CLAIMED)
        if is_current(state, epoch):                                    # R3; background work gives up
            pass_stop(state.stops, STOP_INSERT_CHECKED)
            publish(epoch, snap, copy, begin, i)
        claim_release(geometry, copy.got, first, count)


cdef void publish(const Epoch *epoch, Snap *snap, Copy *copy, int begin, int end) noexcept nogil:
    """One run of neighbours: those that we claimed."""
    cdef Snap *newest = copy.snap
    cdef Store *store = newest.store
    cdef int64_t base = copy.items[begin].cluster // 64
    cdef int64_t cluster
    cdef uint64_t *place
    cdef uint64_t word
    cdef int i
    for i in range(begin, end):
        cluster = copy.items[i].cluster
        if not (copy.got[cluster // 64 - base] >> (cluster % 64)) & 1:
            continue
        # The look-up under the claim is what says that the data is good (see the module's text).
        if lookup(epoch, snap, cluster) != WORD_NONE or not in_copy(snap, cluster) or not in_need(epoch, snap) \
                or load_seq(&snap.dead) or newest_needing(epoch, cluster) != newest:
            continue
        place = map_place(&newest.map, cluster)
        if place == NULL:
            continue
        check(load_relaxed(place) == WORD_NONE, "I3: published old data is immutable")
        word = WORD_ZERO if copy.items[i].zero else ram_word(store.index, copy.items[i].slot,
                                                             store.slots[copy.items[i].slot].generation)
        store_release(place, word)
        summary_set(newest, cluster, word)
        if not copy.items[i].zero:
            kept_set(newest, cluster)
            if store.log != NULL:       # for the flusher, once it is changed; to drop it is not what this is for
                slots_enlist(store, &copy.items[i].slot, &cluster, 1, False)
            copy.items[i].slot = -1
        add_relaxed(&newest.read_kept, 1)
        if may_settle(epoch, cluster):
            or_seq(epoch.settled + cluster // 64, (<uint64_t>1) << (cluster % 64))


# -- drop

cdef int drop_one(EngineState state, const Epoch *epoch, Snap *snap, int64_t cluster, uint64_t *word) noexcept nogil:
    """Drop a RAM word of SNAP, which is in EPOCH's need; the caller is counted there. *word: what was dropped."""
    cdef Geometry *geometry = snap.geometry
    cdef uint64_t bit = (<uint64_t>1) << (cluster % 64)
    cdef int64_t w = cluster // 64
    cdef uint64_t was
    cdef int outcome = DROPPED
    add_seq(&geometry.drops, 1)
    if or_acquire(geometry.claims + w, bit) & bit:
        sub_seq(&geometry.drops, 1)
        return BUSY
    word[0] = map_get(&snap.map, cluster)
    if not is_current(state, epoch) or epoch.draining:                  # R3
        outcome = NOT_NOW
    elif word_tag(word[0]) != WORD_RAM:
        outcome = CHANGED       # nothing to drop
    else:
        pass_stop(state.stops, STOP_DROP_CLAIMED)
        was = and_seq(epoch.settled + w, ~bit) & bit
        pass_stop(state.stops, STOP_DROP_CLEARED)
        if changed_since(epoch, snap, w) & bit:
            if was:
                or_seq(epoch.settled + w, was)
            outcome = CHANGED
        else:
            pass_stop(state.stops, STOP_DROP_DECIDED)
            store_release(map_place(&snap.map, cluster), WORD_NONE)
            summary_set(snap, cluster, WORD_NONE)
    claim_release(geometry, &bit, cluster, 1)
    sub_seq(&geometry.drops, 1)
    if outcome == DROPPED:
        store_relaxed(&state.word_gone, epoch.number)
        slot_unref(state.stores[word_store(word[0])], word_slot(word[0]))
        add_relaxed(&snap.dropped, 1)
    return outcome


cdef void take_changed(const Epoch *epoch, Snap *snap, int64_t w) noexcept nogil:
    """Take what has changed out of word W of `kept`. The caller is counted in EPOCH."""
    cdef uint64_t gone = kept_clear(snap, w, changed_since(epoch, snap, w))
    if gone:
        add_relaxed(&snap.spared, <uint64_t>popcount(gone & load_seq(snap.changed.words + w)))


cdef void keep_sweep(EngineState state, Snap *snap) noexcept nogil:
    cdef int64_t clusters = snap.geometry.clusters
    cdef int64_t cluster = sparse_next_one(&snap.kept, 0, clusters)
    cdef Ticket ticket
    while cluster < clusters:
        ticket = enter(state)
        if ticket.epoch.geometry != snap.geometry or not in_need(ticket.epoch, snap):
            leave(ticket)
            break
        take_changed(ticket.epoch, snap, cluster // 64)
        leave(ticket)
        cluster = (cluster // 64 + 1) * 64
        if cluster < clusters:
            cluster = sparse_next_one(&snap.kept, cluster, clusters)


cdef bint keep_has_any(const Snap *snap) noexcept nogil:
    return load_relaxed(&snap.kept_count) != 0 or load_relaxed(&snap.store.inherited) != 0


cdef int64_t keep_make_room(EngineState state, const Epoch *epoch, Snap *snap, int64_t want) noexcept nogil:
    cdef Store *store = snap.store
    cdef int64_t freed
    cdef int i
    cdef bint older = False, all_of_it = True
    if not keep_has_any(snap) or epoch.geometry != snap.geometry or not in_need(epoch, snap):
        return 0
    pass_stop(state.stops, STOP_DROP_ENTERED)
    freed = make_room_of(state, epoch, snap, snap, want, &all_of_it)
    if freed < want and load_relaxed(&store.inherited):
        # A reader's discard of SNAP has left some to an older one, which reads them here still. Noted again when some may be left.
        store_seq(&store.inherited, 0)
        all_of_it = True
        for i in range(epoch.need_count):
            if older and freed < want:
                freed += make_room_of(state, epoch, epoch.need[i], snap, want - freed, &all_of_it)
            older |= epoch.need[i] == snap
        if freed >= want or not all_of_it:
            store_seq(&store.inherited, 1)
    return freed


cdef int64_t make_room_of(EngineState state, const Epoch *epoch, Snap *owner, const Snap *snap, int64_t want, bint *all_of_it) noexcept nogil:
    """Drop what OWNER keeps until WANT slots of SNAP's store are free; of another owner only what lies there. Not *all_of_it: some was left out."""
    cdef int64_t freed = 0
    cdef int64_t clusters = owner.geometry.clusters
    cdef int64_t cluster, start, w
    cdef uint64_t bits, bit, word
    cdef int tries = 0, outcome
    cdef bint wrapped = False
    start = cluster = <int64_t>load_relaxed(&owner.kept_hand)
    while freed < want and load_relaxed(&owner.kept_count):
        if tries >= DROP_TRIES:
            all_of_it[0] = False
            break
        cluster = sparse_next_one(&owner.kept, cluster, clusters)
        if wrapped and cluster > start:
            break
        if cluster == clusters:
            if wrapped:
                break
            wrapped = True
            cluster = 0
            continue
        w = cluster // 64
        take_changed(epoch, owner, w)
        bits = load_relaxed(owner.kept.words + w) & (~(<uint64_t>0) << (cluster % 64))
        while bits and freed < want:
            bit = bits & (~bits + 1)
            bits ^= bit
            tries += 1
            if owner != snap:
                word = map_get(&owner.map, w * 64 + ctzll(bit))
                if word_tag(word) != WORD_RAM or state.stores[word_store(word)] != snap.store:
                    continue
            outcome = drop_one(state, epoch, owner, w * 64 + ctzll(bit), &word)
            if outcome == NOT_NOW:
                all_of_it[0] = False
                return freed
            if outcome == BUSY:
                all_of_it[0] = False
            if outcome == DROPPED and state.stores[word_store(word)] == snap.store:
                freed += 1      # what was handed over lies in the store of another snapshot
        if bits == 0:
            cluster = (w + 1) * 64
            if cluster > clusters:
                cluster = clusters
        else:
            cluster = w * 64 + ctzll(bits)
    store_relaxed(&owner.kept_hand, <uint64_t>(cluster if cluster < clusters else 0))
    return freed


cdef void keep_ask(EngineState state, const Snap *snap) noexcept nogil:
    cdef const Store *store = snap.store
    if keep_has_any(snap) and slots_free(store) < slots_reserve(store) // 2 \
            and cas_seq(&state.trim_wanted, 0, 1):
        wake_keeper(state)


cdef void keep_trim(EngineState state, Snap *snap) noexcept nogil:
    """Until the reserve is free again. In steps, so that nobody waits long for us to leave an epoch."""
    cdef Ticket ticket
    cdef int64_t missing, freed = 1
    keep_sweep(state, snap)
    while freed:
        missing = slots_reserve(snap.store) - slots_free(snap.store)
        if missing <= 0:
            return
        ticket = enter(state)
        freed = keep_make_room(state, ticket.epoch, snap, TRIM_STEP if missing > TRIM_STEP else missing)
        leave(ticket)


cdef int64_t keep_drop_range(EngineState state, Snap *snap, int64_t first, int64_t end) noexcept nogil:
    cdef int64_t leaf = map_next_leaf(&snap.map, first)
    cdef int64_t cluster, dropped = 0
    cdef uint64_t bits, word
    cdef Ticket ticket
    while leaf < end:
        ticket = enter(state)
        if ticket.epoch.geometry != snap.geometry or not in_need(ticket.epoch, snap):
            leave(ticket)
            break
        pass_stop(state.stops, STOP_DROP_ENTERED)
        bits = load_relaxed(snap.ram + leaf // 64) & ~changed_since(ticket.epoch, snap, leaf // 64)
        while bits:
            cluster = leaf + ctzll(bits)
            bits &= bits - 1
            if first <= cluster < end and drop_one(state, ticket.epoch, snap, cluster, &word) == DROPPED:
                dropped += 1
        leave(ticket)
        leaf = map_next_leaf(&snap.map, leaf + LEAF_CLUSTERS)
    return dropped


# -- guest reads

cdef uint64_t misses = 0        # guest reads that looked for kept clusters and found none, of all engines: a hint, as all it does is ask


cdef inline void note_miss(EngineState state) noexcept nogil:
    """Every so often have the keeper sweep: when the guest has changed all that was kept, its reads need not look any more."""
    if add_relaxed(&misses, 1) % SWEEP_MISSES == SWEEP_MISSES - 1 and cas_seq(&state.trim_wanted, 0, 1):
        wake_keeper(state)


cdef int64_t serve(EngineState state, char *buffer, int64_t offset, int64_t end, int64_t first, int64_t count,
                   int bits, uint64_t *served) noexcept nogil:
    """Copy what is kept of COUNT clusters, of which offset..end wants bytes, and note them in SERVED; how many bytes."""
    cdef Ticket ticket = enter(state)
    cdef Epoch *epoch = ticket.epoch
    cdef Snap *newest
    cdef int64_t i, begin, stop, got = 0
    cdef uint64_t word
    memset(served, 0, SERVE_WORDS * 8)
    if epoch.geometry == NULL or epoch.geometry.cluster_bits != bits:
        count = 0
    for i in range(count):
        newest = newest_needing(epoch, first + i)
        if newest == NULL:
            continue
        word = map_get(&newest.map, first + i)
        if word_tag(word) != WORD_RAM and word != WORD_ZERO:
            continue
        if (changed_since(epoch, newest, (first + i) // 64) >> ((first + i) % 64)) & 1:
            continue
        begin = (first + i) << bits
        stop = begin + ((<int64_t>1) << bits)
        if stop > end:
            stop = end
        if begin < offset:
            begin = offset
        if word == WORD_ZERO:
            memset(buffer + (begin - offset), 0, <size_t>(stop - begin))
        else:
            pass_stop(state.stops, STOP_GUEST_FOUND)
            memcpy(buffer + (begin - offset), slot_data(state.stores[word_store(word)], word_slot(word))
                   + (begin & (((<int64_t>1) << bits) - 1)), <size_t>(stop - begin))
            pass_stop(state.stops, STOP_GUEST_COPIED)
            fence_acquire()
            if map_get(&newest.map, first + i) != word:
                continue        # dropped, or moved: the slot may hold anything
        served[i // 64] |= (<uint64_t>1) << (i % 64)
        got += stop - begin
    leave(ticket)
    if got == 0:
        note_miss(state)
    return got


cdef int cluster_bits_now(EngineState state) noexcept nogil:
    """Of the live snapshots; -1: there is none."""
    cdef Ticket ticket = enter(state)
    cdef int bits = ticket.epoch.geometry.cluster_bits if ticket.epoch.geometry != NULL else -1
    leave(ticket)
    return bits


cdef int keep_pread(EngineState state, char *buffer, int64_t offset, int64_t length) noexcept nogil:
    cdef uint64_t served[SERVE_WORDS]
    cdef int bits = cluster_bits_now(state)
    cdef int64_t end = offset + length
    cdef int64_t first, count, batch_end, i, run, begin, stop, got
    cdef int64_t moved = 0
    cdef int code
    if bits < 0:
        return state.child.pread(buffer, offset, length)
    while offset < end:
        first = offset >> bits
        batch_end = (first + SERVE_CLUSTERS) << bits
        if batch_end > end:
            batch_end = end
        count = ((batch_end - 1) >> bits) + 1 - first
        got = serve(state, buffer, offset, batch_end, first, count, bits, served)
        moved += got
        i = 0
        while i < count and got < batch_end - offset:
            run = i
            while i < count and not (served[i // 64] >> (i % 64)) & 1:
                i += 1
            if i > run:
                begin = (first + run) << bits
                stop = (first + i) << bits
                begin = begin if begin > offset else offset
                stop = stop if stop < batch_end else batch_end
                code = state.child.pread(buffer + (begin - offset), begin, stop - begin)
                if code:
                    return code
            else:
                i += 1
        buffer += batch_end - offset
        offset = batch_end
    if moved:
        count_served(state, moved)
    return 0


cdef inline void count_served(EngineState state, int64_t length) noexcept nogil:
    add_relaxed(&state.ram_reads, 1)
    add_relaxed(&state.ram_read_bytes, <uint64_t>length)


cdef bint keep_has(EngineState state, int64_t offset, int64_t length) noexcept nogil:
    cdef Ticket ticket = enter(state)
    cdef Epoch *epoch = ticket.epoch
    cdef Snap *newest
    cdef int64_t cluster
    cdef bint found = False
    if epoch.geometry != NULL:
        for cluster in range(offset >> epoch.geometry.cluster_bits, cluster_end(epoch.geometry, offset, length)):
            newest = newest_needing(epoch, cluster)
            if newest != NULL and map_get(&newest.map, cluster) & 3 in (WORD_RAM, WORD_ZERO):
                found = True
                break
    leave(ticket)
    if not found:
        note_miss(state)
    return found


cdef int keep_preadv(EngineState state, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
    cdef int i, code
    if not keep_has(state, offset, length):
        return state.child.preadv(vector, count, offset, length)
    for i in range(count):
        code = keep_pread(state, <char *>vector[i].iov_base, offset, <int64_t>vector[i].iov_len)
        if code:
            return code
        offset += <int64_t>vector[i].iov_len
    return 0


cdef int keep_preadv_nowait(EngineState state, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
    cdef uint64_t served[SERVE_WORDS]
    cdef int bits = cluster_bits_now(state)
    cdef int64_t first, pieces
    cdef int i
    if bits >= 0:
        for i in range(count):
            first = offset >> bits
            pieces = ((offset + <int64_t>vector[i].iov_len - 1) >> bits) + 1 - first
            if pieces > SERVE_CLUSTERS or serve(state, <char *>vector[i].iov_base, offset, offset + <int64_t>vector[i].iov_len,
                                                first, pieces, bits, served) != <int64_t>vector[i].iov_len:
                return -EAGAIN
            offset += <int64_t>vector[i].iov_len
        count_served(state, length)
        return 0
    return -EAGAIN


# -- reports

cdef void keep_counts(EngineState state, Snap *snap, uint64_t *unchanged, uint64_t *spared) noexcept nogil:
    """Kept clusters that nothing has changed, and first touches that found theirs there; costs what is kept."""
    cdef int64_t clusters = snap.geometry.clusters
    cdef int64_t cluster = sparse_next_one(&snap.kept, 0, clusters)
    cdef uint64_t bits
    cdef Ticket ticket
    unchanged[0] = 0
    spared[0] = load_relaxed(&snap.spared)
    while cluster < clusters:
        ticket = enter(state)
        bits = load_relaxed(snap.kept.words + cluster // 64)
        if ticket.epoch.geometry == snap.geometry:
            unchanged[0] += <uint64_t>popcount(bits & ~changed_since(ticket.epoch, snap, cluster // 64))
            spared[0] += <uint64_t>popcount(bits & load_seq(snap.changed.words + cluster // 64))
        leave(ticket)
        cluster = (cluster // 64 + 1) * 64
        if cluster < clusters:
            cluster = sparse_next_one(&snap.kept, cluster, clusters)
