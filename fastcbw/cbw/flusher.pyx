"""The flusher: above the high-water mark it moves the oldest clusters of a RAM tier to the disk tier.

    list by age ─▶ pin each under its claim ─▶ one write of the log ─▶ switch each word under its claim ─▶ unpin

One thread per engine, from the first snapshot with a disk tier on. It waits until what was published passes the
high-water mark (three quarters of the tier) of a store, and works until the low one (half) is reached or the log has no room. It gives way to
the guest, in the processor and at the disk, and no claim is held over I/O: after a new snapshot a guest write would wait for it.

Steps of a batch (PROTOCOL section 6), per cluster: claim, enter; w = T.map[c], for a T of the chain, is the RAM word of the slot:
pin the slot; leave, release. Write all of them to the log in one run of a segment. Then claim, enter; T.map[c] is still w:
T.map[c] = the log position, with release, after the data; unref the slot for the map. It is not: the cluster was dropped,
discarded or handed over, and the record is given back. Leave, release, unpin. A claim that is busy is not waited
for: its holder may be a guest's copy whose device hangs; the cluster stays in RAM and its turn comes again.

The epoch is entered before the claim, since nothing is waited for, and not checked again after it (R3): a word moves only by a
hand-over, to an older snapshot, under the claim, and none begins or leaves the chain before we have left. A snapshot that is
flipped in meanwhile has no word that is older than its own.

A reader that copies from the slot meanwhile looks the word up again and finds it changed; the slot's generation tells
whatever comes into the slot from what it copied. I3, I6: until the word is switched the slot is what it names.

What copy-on-read left and nobody has changed is dropped first, and never moved.

A write that fails leaves everything in RAM. The store is tried again after a pause that doubles, a cluster at a time, and
says so in its report. A record that is given back while later ones stay is a dead place in its segment.
"""

from libc.errno cimport ETIMEDOUT
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset

from fastcbw.cbw.keep cimport keep_is_clean, keep_make_room
from fastcbw.cbw.locmap cimport STORE_WORDS, disk_word, map_get, map_place, ram_word
from fastcbw.cbw.room cimport Room, room_changed
from fastcbw.cbw.state cimport EngineState, Epoch, Geometry, Snap, Ticket, claim_release, enter, leave, summary_set
from fastcbw.cbw.store cimport (Store, log_place, log_take, log_untake, log_write_slots, low_water, slot_unref, slots_now,
                                slots_oldest)
from fastcbw.kernels.atomic cimport add32_seq, add_relaxed, add_seq, load_seq, or_acquire, store_relaxed, store_release, store_seq, sub_seq
from fastcbw.sync cimport (cond_wait_until, give_way, now_ns, pthread_cond_signal, pthread_cond_wait, pthread_mutex_lock,
                           pthread_mutex_unlock, sleep_ns)

cdef int64_t FAILED_PAUSE_NS_MIN = 50000000         # after a write that failed: 50 ms, doubling ...
cdef int64_t FAILED_PAUSE_NS_MAX = 5000000000       # ... to 5 s
cdef int64_t BUSY_PAUSE_NS = 5000000                # when nothing could be pinned, 5 ms
cdef int64_t BATCH_BYTES = 1 << 20
cdef int64_t POLL_NS = 100000


cdef class Flusher:
    """Call run() in a thread of its own; stop() ends it, after its present write."""

    def __cinit__(self, EngineState state not None):
        self.state = state

    def run(self):
        """Flush until stop(). Never holds the interpreter lock."""
        cdef Room *room = &self.state.room
        with nogil:
            give_way()
            pthread_mutex_lock(&room.lock)
            while not room.stopping:
                if not room.flush_wanted:
                    store_seq(&self.busy, 0)
                    if self.retry_ns == 0:
                        pthread_cond_wait(&room.flush, &room.lock)
                        continue
                    if cond_wait_until(&room.flush, &room.lock, self.retry_ns) != ETIMEDOUT:
                        continue
                room.flush_wanted = False
                store_seq(&self.busy, 1)
                pthread_mutex_unlock(&room.lock)
                self.retry_ns = 0
                store_seq(&self.soon, 0)
                while self.pass_over():
                    pass
                pthread_mutex_lock(&room.lock)
            store_seq(&self.busy, 0)
            pthread_mutex_unlock(&room.lock)

    def stop(self):
        """Let run() return. Returns at once."""
        with nogil:
            pthread_mutex_lock(&self.state.room.lock)
            self.state.room.stopping = True
            pthread_cond_signal(&self.state.room.flush)
            pthread_mutex_unlock(&self.state.room.lock)

    @property
    def is_idle(self):
        """Whether it waits, with nothing to do or for a disk tier that fails. For tests."""
        cdef bint idle
        pthread_mutex_lock(&self.state.room.lock)
        idle = not self.state.room.flush_wanted and load_seq(&self.busy) == 0 and load_seq(&self.soon) == 0
        pthread_mutex_unlock(&self.state.room.lock)
        return idle

    cdef void await_unpinned(self, const Store *store, int64_t deadline_ns) noexcept nogil:
        while load_seq(&self.at) == <uint64_t>store and now_ns() < deadline_ns:
            sleep_ns(POLL_NS)

    cdef bint pass_over(self) noexcept nogil:
        """One batch of each store that wants it. False: there is none, or nothing could be moved."""
        cdef Store *store
        cdef int64_t moved = 0
        cdef int64_t now = now_ns()
        cdef uint64_t seen[STORE_WORDS]        # a bit per store
        memset(seen, 0, sizeof(seen))
        while not self.state.room.stopping:
            store = self.pin_next(now, seen)
            if store == NULL:
                break
            seen[store.index // 64] |= (<uint64_t>1) << (store.index % 64)
            moved += self.flush(store)
            sub_seq(&store.pins, 1)         # from here on it may be freed
            store_seq(&self.at, 0)
        return moved > 0

    cdef Store *pin_next(self, int64_t now, const uint64_t *seen) noexcept nogil:
        """A store above its water mark that is not in SEEN, pinned so that it outlives its snapshot; NULL: none.

        Found through a snapshot that is needed in the epoch that we are counted in: its store can't have been retired.
        """
        cdef Ticket ticket = enter(self.state)
        cdef Store *store
        cdef Store *found = NULL
        cdef int64_t above
        cdef int i
        for i in range(ticket.epoch.need_count):
            store = (<Snap *>ticket.epoch.need[i]).store
            above = slots_now(store) - low_water(store)
            if store.flush_asked and store.log != NULL and above > 0:
                keep_make_room(self.state, ticket.epoch, ticket.epoch.need[i], above)       # what the disk has as well goes first
            if (seen[store.index // 64] >> (store.index % 64)) & 1 or store.log == NULL or not is_wanting(store):
                continue
            if store.retry_ns > now:
                self.look_again(store.retry_ns)
                continue
            add_seq(&store.pins, 1)
            store_seq(&self.at, <uint64_t>store)
            found = store
            break
        leave(ticket)
        return found

    cdef void look_again(self, int64_t at_ns) noexcept nogil:
        if self.retry_ns == 0 or at_ns < self.retry_ns:
            self.retry_ns = at_ns

    cdef void look_again_soon(self) noexcept nogil:
        store_seq(&self.soon, 1)
        self.look_again(now_ns() + BUSY_PAUSE_NS)

    cdef int64_t flush(self, Store *store) noexcept nogil:
        """One batch. How many clusters were moved; 0: the log has no room, its write failed, or all were busy."""
        cdef Batch *batch = &self.batch
        cdef int64_t want = BATCH_BYTES // store.cluster_bytes
        cdef int64_t moved = 0
        cdef int64_t got
        cdef int code
        want = 1 if want < 1 else BATCH_CLUSTERS if want > BATCH_CLUSTERS else want
        if load_seq(&store.log_error):
            want = 1                # a probe
        if want > slots_now(store) - low_water(store):
            want = slots_now(store) - low_water(store)
        batch.store = store
        batch.count = slots_oldest(store, batch.slots, batch.clusters, batch.generations, want)
        self.take_pins()
        if batch.count == 0:
            self.look_again_soon()
            return 0
        add_seq(&store.transits, 1)         # before: who finds no room from here on waits for the end of the batch
        got = log_take(store, batch.count, &batch.position)
        self.drop_pins(got)
        if got:
            code = log_write_slots(store, batch.position, batch.slots, batch.clusters, batch.snapshots, got)
            moved = self.switch_words(code)
            note_outcome(store, code)
            if code:
                self.look_again(store.retry_ns)
            elif moved == 0:
                self.look_again_soon()
        add_seq(&store.transits, 1)
        room_changed(store.room)
        return moved

    cdef void take_pins(self) noexcept nogil:
        """Keep of the batch what is in RAM and free to claim, each slot with a reference."""
        cdef Batch *batch = &self.batch
        cdef Store *store = batch.store
        cdef Geometry *geometry
        cdef Ticket ticket
        cdef Snap *snap
        cdef int64_t i, kept = 0, cluster
        cdef uint64_t bit
        for i in range(batch.count):
            cluster = batch.clusters[i]
            bit = (<uint64_t>1) << (cluster % 64)
            ticket = enter(self.state)
            geometry = ticket.epoch.geometry
            # A batch's store has clusters of one geometry, which lives as long as any snapshot that is counted here.
            if geometry != NULL and not or_acquire(geometry.claims + cluster // 64, bit) & bit:
                snap = holder(ticket.epoch, cluster, ram_word(store.index, batch.slots[i], batch.generations[i]))
                if snap != NULL and not keep_is_clean(ticket.epoch, snap, cluster):
                    add32_seq(&store.slots[batch.slots[i]].refs, 1)
                    batch.slots[kept] = batch.slots[i]
                    batch.clusters[kept] = cluster
                    batch.generations[kept] = batch.generations[i]
                    batch.snapshots[kept] = snap.id
                    kept += 1
                claim_release(geometry, &bit, cluster, 1)
            leave(ticket)
        batch.count = kept

    cdef void drop_pins(self, int64_t first) noexcept nogil:
        """Leave the batch with its first FIRST clusters."""
        cdef int64_t i
        for i in range(first, self.batch.count):
            slot_unref(self.batch.store, self.batch.slots[i])
        self.batch.count = first

    cdef int64_t switch_words(self, int code) noexcept nogil:
        """Make the words of the batch name the log, unless CODE says that the write failed; give back what can't be. How many were."""
        cdef Batch *batch = &self.batch
        cdef Store *store = batch.store
        cdef Geometry *geometry
        cdef Ticket ticket
        cdef Snap *snap
        cdef int64_t i, cluster
        cdef int64_t moved = 0
        cdef int64_t position
        cdef uint64_t bit, word
        cdef bint switched
        for i in range(batch.count - 1, -1, -1):        # from the last on, so that places given back can be taken again
            cluster = batch.clusters[i]
            bit = (<uint64_t>1) << (cluster % 64)
            position = log_place(store, batch.position + i, cluster)
            switched = False
            if code == 0:
                ticket = enter(self.state)
                geometry = ticket.epoch.geometry
                if geometry != NULL and not or_acquire(geometry.claims + cluster // 64, bit) & bit:
                    snap = holder(ticket.epoch, cluster, ram_word(store.index, batch.slots[i], batch.generations[i]))
                    if snap != NULL and snap.id == batch.snapshots[i]:                  # still == w [M]
                        word = disk_word(store.index, position)
                        store_release(map_place(&snap.map, cluster), word)
                        summary_set(snap, cluster, word)
                        store_relaxed(&self.state.word_gone, ticket.epoch.number)
                        switched = True
                    claim_release(geometry, &bit, cluster, 1)
                leave(ticket)
            if switched:
                slot_unref(store, batch.slots[i])       # the map's
                moved += 1
            else:
                log_untake(store, position)
            slot_unref(store, batch.slots[i])           # ours
        add_relaxed(&store.flushed, <uint64_t>moved)
        return moved


cdef Snap *holder(const Epoch *epoch, int64_t cluster, uint64_t word) noexcept nogil:
    """The snapshot of the chain whose map has WORD for CLUSTER, or NULL. Under the claim, so that it stays there."""
    cdef int i
    for i in range(epoch.chain_count):
        if map_get(&(<Snap *>epoch.chain[i]).map, cluster) == word:
            return <Snap *>epoch.chain[i]
    return NULL


cdef bint is_wanting(Store *store) noexcept nogil:
    """Whether the store was above its high-water mark and is still above the low one; else it is asked anew."""
    cdef bint wanting
    pthread_mutex_lock(&store.lock)
    if store.slots_used <= low_water(store):
        store.flush_asked = False
    wanting = store.flush_asked
    pthread_mutex_unlock(&store.lock)
    return wanting


cdef void note_outcome(Store *store, int code) noexcept nogil:
    if code == 0:
        store_seq(&store.log_error, 0)
        store.backoff_ns = 0
        return
    store_seq(&store.log_error, <uint64_t>(-code))
    store.backoff_ns = FAILED_PAUSE_NS_MIN if store.backoff_ns == 0 else store.backoff_ns * 2
    if store.backoff_ns > FAILED_PAUSE_NS_MAX:
        store.backoff_ns = FAILED_PAUSE_NS_MAX
    store.retry_ns = now_ns() + store.backoff_ns
