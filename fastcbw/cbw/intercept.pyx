"""The intercept: guest writes, write-zeroes and discards, and the copy-before-write in front of them.

    guest ─▶ FilterDevice ─▶ guest_begin ──all settled──▶ active disk
                                 │
                                 └─▶ preserve: claim ─ check the epoch ─ take room ─ read old data ─ publish ─ settle ─ release

The settled path: be counted, mark `changed`, test `settled`; two loads and one counter over the bare write, no lock and
no allocation. Everything else is preserve(), in rounds of at most 256 clusters and 1 MiB.

A discard goes its own way (lazy.pyx): it preserves nothing.

Invariants: I1, a write reaches a cluster only when it is settled (or no snapshot needs it); I2, settled only after the word
was published; I8, a failed copy gives its claims back. Whoever holds claims waits for device I/O only, and with a
deadline: at the deadline the snapshots that ask for the copy are broken and the guest goes on, or its write fails, as their
policy says (cbw/policy). With on-full=wait a copy preserves what there is room for and leaves the rest, so that it needs
one slot at a time.

Memory ordering. The marks are seq_cst and come before the loads of `settled`, also seq_cst: dropping a cluster clears
`settled`, then loads the marks, so that not both miss. The word is published with release before `settled` is set
with seq_cst. Between that and the write to the disk stands a release fence, since a system call is no fence by
contract; the reader's data comes from the disk before an acquire fence, its look-up after. That is message passing (word,
then data; data, then word), not store-then-load: a release fence and an acquire fence make it right in C11, and so does
what x86-64 does by itself. Who finds new data on the disk, therefore, finds the word; who finds no word has read old data.
"""

from libc.errno cimport EAGAIN, ETIMEDOUT
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport memset, strerror

from fastcbw.block.device cimport FUA, BlockDevice
from fastcbw.block.sys cimport iovec
from fastcbw.cbw.heat cimport heat_note
from fastcbw.cbw.keep cimport keep_ask, keep_has_any, keep_make_room, keep_pread, keep_preadv, keep_preadv_nowait
from fastcbw.cbw.latency cimport LATENCY_PRESERVING, LATENCY_SETTLED, latency_begin, latency_end
from fastcbw.cbw.lazy cimport guest_discard, lazy_cancel, lazy_recorded
from fastcbw.cbw.locmap cimport WORD_NONE, WORD_ZERO, disk_word, map_place, ram_word
from fastcbw.cbw.policy cimport GO_ON, REFUSED, START_OVER, give_up_copy, refusal_errno, wait_for_room, why_text
from fastcbw.cbw.room cimport Waiter, room_changed, room_leave
from fastcbw.cbw.state cimport (EngineState, Epoch, Geometry, Line, STALL_CLAIM, STALL_DEVICE, Snap, Ticket, WAIT_FOR_ROOM,
                                WHY_FULL, WHY_MEMORY, WHY_TIMEOUT, claim_release, claim_wait, cluster_end, count_stall,
                                enter_guest, geometry_ref, geometry_unref, is_current, leave, lookup, newest_needing,
                                overlapped, snap_ref, snap_unref, summary_set)
from fastcbw.cbw.stops cimport STOP_WRITE_ENTERED, pass_stop
from fastcbw.cbw.store cimport Store, slot_data, slot_unref, slots_enlist, slots_take, store_room
from fastcbw.cbw.worker cimport (Copy, CopyItem, ROUND_BYTES, ROUND_CLUSTERS, ROUND_WORDS, copy_give_back, copy_in_pool,
                                 copy_read)
from fastcbw.kernels.atomic cimport add_relaxed, fence_release, load_relaxed, load_seq, or_seq, store_relaxed, store_release
from fastcbw.kernels.bits cimport bits_claim_atomic
from fastcbw.sync cimport now_ns, sleep_ns

cdef extern from "check.h" nogil:
    void check "fcbw_check"(bint condition, const char *rule) noexcept

cdef extern from * nogil:
    int ctzll "__builtin_ctzll"(unsigned long long) noexcept

cdef int64_t OLD_WRITES_POLL_NS = 20000
cdef int64_t DROPS_POLL_NS = 1000       # a drop takes a fraction of it
cdef int64_t CARRY_OUT_WAIT_NS = 1000000000      # then it looks again
cdef int64_t ROUND_WITHOUT_ROOM = 8     # clusters read in a round beyond what there is room for: they may be zeroes


cdef class FilterDevice(BlockDevice):
    """The disk the guest sees: reads pass through (or come from RAM, see cbw/keep), what changes data goes through the intercept first."""

    def __cinit__(self, EngineState state not None):
        self.state = state
        self.child = state.child
        self.length = state.length
        self.name = state.child.name
        self.read_only = state.child.read_only
        self.can_cache = state.child.can_cache

    cdef int pread(self, void *buffer, int64_t offset, int64_t length) noexcept nogil:
        if load_relaxed(&self.state.kept):
            return keep_pread(self.state, <char *>buffer, offset, length)
        return self.child.pread(buffer, offset, length)

    cdef int preadv(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        if load_relaxed(&self.state.kept):
            return keep_preadv(self.state, vector, count, offset, length)
        return self.child.preadv(vector, count, offset, length)

    cdef int preadv_nowait(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        if load_relaxed(&self.state.kept) and keep_preadv_nowait(self.state, vector, count, offset, length) == 0:
            return 0
        return self.child.preadv_nowait(vector, count, offset, length)

    cdef int pwrite(self, const void *buffer, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef Ticket ticket
        cdef int64_t began_ns = latency_begin(&self.state.latency)
        cdef int touched = guest_begin(self.state, offset, length, False, &ticket)
        cdef int code
        if touched < 0:
            return touched
        code = self.child.pwrite(buffer, offset, length, flags)
        guest_end(self.state, ticket, touched, began_ns)
        return code

    cdef int pwritev(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef Ticket ticket
        cdef int64_t began_ns = latency_begin(&self.state.latency)
        cdef int touched = guest_begin(self.state, offset, length, False, &ticket)
        cdef int code
        if touched < 0:
            return touched
        code = self.child.pwritev(vector, count, offset, length, flags)
        guest_end(self.state, ticket, touched, began_ns)
        return code

    cdef int write_zeroes_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef Ticket ticket
        cdef int64_t began_ns = latency_begin(&self.state.latency)
        cdef int touched = guest_begin(self.state, offset, length, True, &ticket)
        cdef int code
        if touched < 0:
            return touched
        code = self.child.write_zeroes_at(offset, length, flags)
        guest_end(self.state, ticket, touched, began_ns)
        return code

    cdef int discard_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef Ticket ticket
        cdef int64_t began_ns = latency_begin(&self.state.latency)
        cdef bint settled = enter_guest(self.state, offset, length, &ticket)
        cdef int code
        count_write(ticket.line, length)
        if settled:
            code = self.child.discard_at(offset, length, flags)
            guest_end(self.state, ticket, False, began_ns)
            return code
        add_relaxed(&ticket.line.touches, 1)
        code = guest_discard(self.state, offset, length, &ticket)       # leaves
        if code == 0 and flags & FUA:
            code = self.child.sync()
        if began_ns:
            latency_end(&self.state.latency, ticket.line - self.state.lines, LATENCY_PRESERVING, began_ns)
        return code

    cdef int sync(self) noexcept nogil:
        return self.child.sync()

    cdef int cache_at(self, int64_t offset, int64_t length) noexcept nogil:
        return self.child.cache_at(offset, length)

    cdef int explain(self, int code, char *text, size_t size) noexcept nogil:
        cdef int shown = refusal_errno(code)
        if shown == 0:
            return self.child.explain(code, text, size)
        snprintf(text, size, "%s; a snapshot's policy lets the write fail: %s", strerror(shown), why_text(<uint64_t>(REFUSED - code)))
        return shown

    cdef int fail(self, int code, str operation, int64_t offset, int64_t length) except -1:
        cdef char text[256]
        cdef int shown
        if refusal_errno(code) == 0:
            return BlockDevice.fail(self, code, operation, offset, length)
        shown = self.explain(code, text, sizeof(text))
        raise OSError(shown, f"{self.name}: {operation} {offset}+{length}: {text.decode(errors='replace')}")

    cdef int64_t block_status(self, int64_t offset, int64_t length, uint32_t *flags) noexcept nogil:
        return self.child.block_status(offset, length, flags)

    cdef int mark_closed(self) except -1:
        self.closed = True
        return 0

    cdef int check_open(self) except -1:
        if self.state.forked:
            raise RuntimeError(f"{self.name}: a fork does not take disks along (open it anew)")
        return BlockDevice.check_open(self)


cdef inline void guest_end(EngineState state, Ticket ticket, bint touched, int64_t began_ns) noexcept nogil:
    """The write is done: no longer counted. began_ns: what latency_begin returned; touched: what guest_begin said."""
    leave(ticket)
    if began_ns:
        latency_end(&state.latency, ticket.line - state.lines, LATENCY_PRESERVING if touched else LATENCY_SETTLED, began_ns)


cdef int guest_begin(EngineState state, int64_t offset, int64_t length, bint zeroing, Ticket *ticket) noexcept nogil:
    """Return when the write may go to the disk: counted in *TICKET, all of it settled. 1: there was something to preserve.

    Negative: refused by a policy, and not counted.
    """
    cdef Geometry *geometry
    cdef Waiter waiter
    cdef int64_t started_ns = 0         # of the first wait or copy; each limit counts from here
    cdef int code
    while not enter_guest(state, offset, length, ticket):
        if started_ns == 0:
            started_ns = now_ns()
            waiter.queued = False
            waiter.zeroing = zeroing
        geometry = ticket.epoch.geometry
        code = preserve(state, ticket, offset >> geometry.cluster_bits, cluster_end(geometry, offset, length), started_ns, &waiter)
        if code == GO_ON:
            break
        if code < 0:
            room_leave(&state.room, &waiter)
            return code
    if started_ns:
        room_leave(&state.room, &waiter)
        count_touch(ticket.line, started_ns)
    count_write(ticket.line, length)
    fence_release()
    return started_ns != 0


cdef void count_write(Line *line, int64_t length) noexcept nogil:
    # The thread's own counters: a load and a store, no locked instruction. Line 0, which is shared, may lose some.
    store_relaxed(&line.writes, load_relaxed(&line.writes) + 1)
    store_relaxed(&line.bytes, load_relaxed(&line.bytes) + <uint64_t>length)


cdef void count_touch(Line *line, int64_t started_ns) noexcept nogil:
    cdef uint64_t took = <uint64_t>(now_ns() - started_ns)
    add_relaxed(&line.touches, 1)
    if took > load_relaxed(&line.wait_ns_max):
        store_relaxed(&line.wait_ns_max, took)


cdef inline int64_t next_unsettled(const uint64_t *settled, int64_t first, int64_t end) noexcept nogil:
    """As bits_next_zero, with seq_cst loads (see the module's text)."""
    cdef uint64_t bits
    while first < end:
        bits = ~load_seq(settled + first // 64) >> (first % 64)
        if bits:
            first += ctzll(bits)
            return first if first < end else end
        first = (first // 64 + 1) * 64
    return end


cdef inline bint is_claimed(const Geometry *geometry, int64_t cluster) noexcept nogil:
    return (load_seq(geometry.claims + cluster // 64) >> (cluster % 64)) & 1


cdef uint64_t lookup_for_good(const Epoch *epoch, Snap *snap, int64_t cluster) noexcept nogil:
    """lookup() of a cluster that somebody else claims: never a word that a drop (keep.pyx) is about to take away.

    A drop that began before our marks has not seen them; one that begins after this load of `drops` sees them, and leaves
    the word. We are counted meanwhile, but a drop waits for nothing and nobody, so that this is no wait for anything else.
    """
    while load_seq(&epoch.geometry.drops):
        sleep_ns(DROPS_POLL_NS)
    return lookup(epoch, snap, cluster)


cdef int64_t next_to_preserve(const Epoch *epoch, int64_t first, int64_t end, int64_t *round_end) noexcept nogil:
    """The first cluster of first..end that a copy may have to be made of, with the end of the round for it; END: none."""
    cdef int64_t limit = ROUND_BYTES >> epoch.geometry.cluster_bits
    cdef Snap *needing
    cdef int code
    if limit > ROUND_CLUSTERS:
        limit = ROUND_CLUSTERS
    if limit == 0:
        limit = 1
    while True:
        first = next_unsettled(epoch.settled, first, end)
        if first == end:
            return end
        needing = newest_needing(epoch, first)
        if is_claimed(epoch.geometry, first) and not lazy_recorded(epoch.geometry, first) and (
                needing == NULL or lookup_for_good(epoch, needing, first) != WORD_NONE):
            # Outside every `copy`, or all broken, and neither ever goes back; or in a store already. When the claim is to be
            # had, it is settled, so that the next write there costs nothing; when not, nothing is worth waiting for.
            # Except where a discard is recorded: it may be being carried out just now, and the write must come after it (lazy.pyx).
            first += 1
            continue
        round_end[0] = end if end - first < limit else first + limit
        return first


cdef int preserve(EngineState state, Ticket *ticket, int64_t first, int64_t end, int64_t started_ns, Waiter *waiter) noexcept nogil:
    """Settle first..end in the ticket's epoch, or find that nobody needs it. Negative: refused, and the epoch was left."""
    cdef int64_t round_end = end
    cdef int64_t room
    cdef Snap *needing
    cdef int code
    while True:
        first = next_to_preserve(ticket.epoch, first, end, &round_end)
        if first == end:
            return GO_ON
        needing = newest_needing(ticket.epoch, first)
        if needing != NULL and load_relaxed(&needing.on_full) == WAIT_FOR_ROOM:
            if not waiter.queued and load_seq(&state.room.waiting) != 0:
                return wait_for_room(state, ticket, needing, first, 1, started_ns, waiter)      # those before it come first
            # Not much more than what there is room for is read, since what finds none is read again.
            room = store_room(needing.store, True)
            if round_end - first > room + ROUND_WITHOUT_ROOM:
                round_end = first + room + ROUND_WITHOUT_ROOM
        code = preserve_round(state, ticket, first, round_end, started_ns, waiter)
        if code != GO_ON:
            return code


cdef int preserve_round(EngineState state, Ticket *ticket, int64_t first, int64_t end, int64_t started_ns, Waiter *waiter) noexcept nogil:
    """Preserve what is free to claim in first..end, a range with an unsettled cluster at its head."""
    cdef Epoch *epoch = ticket.epoch
    cdef Geometry *geometry = epoch.geometry
    cdef Copy copy
    cdef int64_t without_room
    cdef Snap *snap
    cdef int code, what = prepare(state, epoch, &copy, first, end)
    if what == COPY_BUSY:
        return wait_for_claim(state, ticket, first, started_ns)
    if what == COPY_STALE:
        leave(ticket[0])
        return START_OVER
    if what == COPY_NOTHING:
        return GO_ON
    snap = copy.snap
    if epoch.draining and not old_writes_ended(state, epoch, first, end, snap, started_ns):
        return give_up(state, snap, &copy, ticket, WHY_TIMEOUT, ETIMEDOUT, first << geometry.cluster_bits)
    if not make_leaves(&copy):
        return give_up(state, snap, &copy, ticket, WHY_MEMORY, 0, copy.items[0].cluster << geometry.cluster_bits)
    copy.zeroing = waiter.zeroing
    copy.partial = load_relaxed(&snap.on_full) == WAIT_FOR_ROOM
    take_slots(state, epoch, &copy)
    code = copy_old(state, &copy, started_ns, ticket.line)
    if code == -ETIMEDOUT:
        # The pool has the claims and the room now, and gives them back when the device answers.
        memset(copy.got, 0, sizeof(copy.got))
        return give_up(state, snap, &copy, ticket, WHY_TIMEOUT, ETIMEDOUT, copy.items[0].cluster << geometry.cluster_bits)
    if code:
        copy_give_back(&copy)
        if copy.why == WHY_FULL:        # full at that moment: perhaps something is on its way to the disk tier
            claim_release(geometry, copy.got, copy.first, copy.count)
            return wait_for_room(state, ticket, snap, copy.error_offset >> geometry.cluster_bits, data_count(&copy),
                                 started_ns, waiter)
        return give_up(state, snap, &copy, ticket, copy.why, -code, copy.error_offset)
    publish(&copy)
    without_room = settle_and_release(state, epoch, &copy)
    if copy.left:
        return wait_for_room(state, ticket, snap, without_room, 1, started_ns, waiter)
    return GO_ON


cdef int prepare(EngineState state, Epoch *epoch, Copy *copy, int64_t first, int64_t end) noexcept nogil:
    """Claim what is free of first..end, and find out what of it is to be copied. Never waits."""
    cdef uint64_t settle[ROUND_WORDS]
    pass_stop(state.stops, STOP_WRITE_ENTERED)
    if bits_claim_atomic(epoch.geometry.claims, copy.got, first, end - first) == 0:
        return COPY_BUSY
    copy.disk = state.disk
    copy.disk_length = state.length
    copy.geometry = epoch.geometry
    copy.first = first
    copy.count = end - first
    copy.bounce = NULL
    copy.zeroing = False
    copy.partial = False
    copy.left = 0
    if not is_current(state, epoch):                                    # R3
        claim_release(epoch.geometry, copy.got, first, end - first)
        return COPY_STALE
    select(epoch, copy, settle)
    release_others(state, epoch, copy, settle)
    if copy.items_count:
        return COPY_READY
    # Were only neighbours free that need nothing? Trying again at once would spin, without any limit.
    return COPY_BUSY if next_unsettled(epoch.settled, first, first + 1) == first else COPY_NOTHING


cdef int give_up(EngineState state, Snap *snap, Copy *copy, Ticket *ticket, uint64_t why, int code, int64_t offset) noexcept nogil:
    """The copy failed: I8, its claims go back, and who waits for them wakes; then the policy decides."""
    cdef int verdict = give_up_copy(state, snap, why, code, offset)
    claim_release(copy.geometry, copy.got, copy.first, copy.count)
    leave(ticket[0])
    return verdict


cdef int wait_for_claim(EngineState state, Ticket *ticket, int64_t first, int64_t started_ns) noexcept nogil:
    """Somebody else holds the claims: leave the epoch, wait, start over. Nothing is held or counted during the wait."""
    cdef Geometry *geometry = ticket.epoch.geometry
    cdef Snap *snap = newest_needing(ticket.epoch, first)
    cdef int64_t began_ns = now_ns()
    cdef int code = START_OVER
    if snap == NULL and not lazy_recorded(geometry, first):
        return GO_ON            # it broke just now: the caller looks again
    geometry_ref(geometry)
    add_relaxed(&ticket.line.waits, 1)
    if snap == NULL:
        # A discard is being carried out: the guest's own request, and its write must come after it.
        leave(ticket[0])
        claim_wait(geometry, first, 1, now_ns() + CARRY_OUT_WAIT_NS)
    else:
        snap_ref(snap)
        leave(ticket[0])
        if claim_wait(geometry, first, 1, started_ns + snap.cbw_timeout_ns) == -ETIMEDOUT:
            code = give_up_copy(state, snap, WHY_TIMEOUT, ETIMEDOUT, first << geometry.cluster_bits)
        count_stall(snap, STALL_CLAIM, began_ns)
        snap_unref(snap)
    geometry_unref(geometry)
    return code


cdef Snap *select(Epoch *epoch, Copy *copy, uint64_t *settle) noexcept nogil:
    """Make the items of COPY: claimed clusters that one snapshot needs and none has. SETTLE gets those that need nothing.

    Clusters that another snapshot needs are in neither: they are left for the next round.
    """
    cdef Snap *snap = NULL
    cdef Snap *needing
    cdef int64_t base = copy.first // 64
    cdef int64_t w, cluster
    cdef uint64_t bits, bit
    copy.items_count = 0
    for w in range((copy.first + copy.count + 63) // 64 - base):
        bits = copy.got[w]
        settle[w] = 0
        while bits:
            cluster = (base + w) * 64 + ctzll(bits)
            bit = bits & (~bits + 1)
            bits ^= bit
            needing = newest_needing(epoch, cluster)
            if needing != NULL and not (load_seq(epoch.settled + base + w) & bit) \
                    and lookup(epoch, needing, cluster) == WORD_NONE:
                if snap == NULL:
                    snap = needing
                if needing != snap:
                    continue
                copy.items[copy.items_count].cluster = cluster
                copy.items[copy.items_count].slot = -1
                copy.items[copy.items_count].position = -1
                copy.items_count += 1
            else:
                settle[w] |= bit
    copy.snap = snap
    return snap


cdef void release_others(EngineState state, Epoch *epoch, Copy *copy, const uint64_t *settle) noexcept nogil:
    """Keep the claims of the items only, so that what is held over I/O is what is copied; settle what needs nothing."""
    cdef uint64_t others[ROUND_WORDS]
    cdef int64_t base = copy.first // 64
    cdef int64_t w, cluster
    cdef uint64_t any_other = 0
    cdef int i
    for w in range((copy.first + copy.count + 63) // 64 - base):
        others[w] = copy.got[w]
        copy.got[w] = 0
    for i in range(copy.items_count):
        cluster = copy.items[i].cluster
        copy.got[cluster // 64 - base] |= (<uint64_t>1) << (cluster % 64)
    for w in range((copy.first + copy.count + 63) // 64 - base):
        others[w] &= ~copy.got[w]
        any_other |= others[w]
        if settle[w]:
            lazy_cancel(state, copy.geometry, base + w, settle[w])
            or_seq(epoch.settled + base + w, settle[w])
    if any_other:
        claim_release(copy.geometry, others, copy.first, copy.count)


cdef bint old_writes_ended(EngineState state, Epoch *epoch, int64_t first, int64_t end, Snap *snap, int64_t started_ns) noexcept nogil:
    """While a creation drains, writes of the epoch before may still be landing here: preserving now could save a torn sector.

    They wait for nothing but their device, so this ends; the claims are held meanwhile. False: the deadline passed.
    """
    cdef int bits = epoch.geometry.cluster_bits
    while overlapped(state, <int>((epoch.number - 1) & 3), first << bits, end << bits):
        if now_ns() > started_ns + snap.cbw_timeout_ns:
            return False
        sleep_ns(OLD_WRITES_POLL_NS)
    return True


cdef bint make_leaves(Copy *copy) noexcept nogil:
    """Make the leaves of the location map beforehand, so that publishing can't fail. False: no memory."""
    cdef int i
    for i in range(copy.items_count):
        if map_place(&copy.snap.map, copy.items[i].cluster) == NULL:
            return False
    return True


cdef void take_slots(EngineState state, Epoch *epoch, Copy *copy) noexcept nogil:
    """Give the first items the slots that there are, or that unchanged clusters can be dropped from. Whether the others need room is known when they have been read."""
    cdef uint32_t slots[ROUND_CLUSTERS]
    cdef Store *store = copy.snap.store
    cdef int i, taken = <int>slots_take(store, slots, copy.items_count)
    if keep_has_any(copy.snap):
        if taken < copy.items_count and keep_make_room(state, epoch, copy.snap, copy.items_count - taken):
            taken += <int>slots_take(store, slots + taken, copy.items_count - taken)
        keep_ask(state, copy.snap)
    for i in range(taken):
        copy.items[i].slot = slots[i]
        copy.items[i].data = slot_data(store, slots[i])


cdef int copy_old(EngineState state, Copy *copy, int64_t started_ns, Line *line) noexcept nogil:
    """Read the old data where that can't wait, else have the pool do it, with the deadline."""
    cdef int64_t began_ns
    cdef int code = -EAGAIN
    if copy.items[copy.items_count - 1].slot >= 0:          # slots come first: every item has one
        code = copy_read(copy, True)
    if code == -EAGAIN:
        add_relaxed(&line.waits, 1)
        began_ns = now_ns()
        code = copy_in_pool(state.pool, copy, started_ns + copy.snap.cbw_timeout_ns)
        count_stall(copy.snap, STALL_DEVICE, began_ns)
    return code


cdef int64_t data_count(const Copy *copy) noexcept nogil:
    """Clusters of a copy that was read which take room."""
    cdef int64_t count = 0
    cdef int i
    for i in range(copy.items_count):
        count += not copy.items[i].zero
    return count


cdef inline bint is_done(const CopyItem *item) noexcept nogil:
    return item.zero or item.slot >= 0 or item.position >= 0


cdef void publish(Copy *copy) noexcept nogil:
    """Name the data in the location map (release, after the data); I3: from here on it is immutable."""
    cdef int64_t slots[ROUND_CLUSTERS]
    cdef int64_t clusters[ROUND_CLUSTERS]
    cdef Snap *snap = copy.snap
    cdef Store *store = snap.store
    cdef CopyItem *item
    cdef uint64_t *place
    cdef uint64_t word
    cdef uint64_t zeroes = 0
    cdef int64_t in_ram = 0
    cdef int i
    for i in range(copy.items_count):
        item = &copy.items[i]
        check(is_done(item) or copy.left, "I4: a word names data")
        if not is_done(item):
            continue
        if item.zero:
            word = WORD_ZERO
            zeroes += 1
        elif item.slot >= 0:
            word = ram_word(store.index, item.slot, store.slots[item.slot].generation)
            slots[in_ram] = item.slot
            clusters[in_ram] = item.cluster
            in_ram += 1
        else:
            word = disk_word(store.index, item.position)
        place = map_place(&snap.map, item.cluster)
        check(load_relaxed(place) == WORD_NONE, "I3: published old data is immutable")
        store_release(place, word)
        summary_set(snap, item.cluster, word)
        if item.zero and item.slot >= 0:
            slot_unref(store, item.slot)
    if in_ram and store.log != NULL:
        slots_enlist(store, slots, clusters, in_ram, True)
    add_relaxed(&snap.preserved, <uint64_t>(copy.items_count - copy.left))
    add_relaxed(&snap.preserved_zero, zeroes)
    if copy.zeroing:
        add_relaxed(&snap.preserved_zeroing, <uint64_t>(copy.items_count - copy.left))
    item = &copy.items[copy.items_count - 1]
    heat_note(copy.geometry, copy.items[0].cluster, item.cluster + 1 - copy.items[0].cluster)


cdef int64_t settle_and_release(EngineState state, Epoch *epoch, Copy *copy) noexcept nogil:
    """Settle what was published; return the first cluster that found no room, when there is one."""
    cdef uint64_t left[ROUND_WORDS]
    cdef int64_t base = copy.first // 64
    cdef int64_t words = (copy.first + copy.count + 63) // 64 - base
    cdef int64_t w, without_room = -1
    cdef int i
    for w in range(words):
        left[w] = 0
    if copy.left:
        for i in range(copy.items_count - 1, -1, -1):
            if not is_done(&copy.items[i]):
                without_room = copy.items[i].cluster
                left[without_room // 64 - base] |= (<uint64_t>1) << (without_room % 64)
    for w in range(words):
        if copy.got[w] & ~left[w]:
            lazy_cancel(state, copy.geometry, base + w, copy.got[w] & ~left[w])      # then `settled` (R6)
            or_seq(epoch.settled + base + w, copy.got[w] & ~left[w])
    claim_release(copy.geometry, copy.got, copy.first, copy.count)
    room_changed(&state.room)
    return without_room
