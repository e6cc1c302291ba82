"""Lazy discard: a guest's discard of clusters that a snapshot still needs copies nothing and touches nothing.

    guest_discard ── settled, or needed by nobody ──▶ the disk, at once
          └───────── needed: recorded in `lazy`, left unsettled ── … ── nobody needs it any more ──▶ lazy_carry_out ──▶ the disk

Until it is carried out the guest reads the old data there (what a discarded range reads as is undefined), block status says
that it is data, and every snapshot finds it on the disk, those taken after the discard included. A guest write there
preserves the old data as any other does, and cancels the record of its clusters.

Rules (PROTOCOL sections 3 and 4). A cluster's record changes under its claim only: recorded without it, it would be carried
out over a later guest write. R6, a recorded cluster is not settled: a write must come by the claim and cancel the record, or
wait for the carry-out that holds it. Such a write goes past without the claim only when nothing is recorded: then every
discard that was answered before the write began is on the disk, since the record goes after the device has discarded.
Carrying out marks the range again: the content changes now, and an increment that was begun in between must see it.

Only whole clusters are recorded: a head or tail that is a part of a cluster is discarded where nobody needs that, else dropped.
A discard is advisory: where a claim is held for longer than the cbw-timeout the cluster is dropped, and a record whose
discard the disk fails goes as well: it is counted, nobody tries again. Records are in memory only; those of an image that
was closed were carried out before, those of a process that was killed are gone.

All by words of bitmaps, 64 clusters at a time: recording half a gigabyte takes microseconds, carrying it out a few large requests.
"""

from libc.stdint cimport int64_t, uint64_t

from fastcbw.block.device cimport BlockDevice
from fastcbw.cbw.state cimport (EngineState, Epoch, Geometry, Ticket, claim_release, claim_wait, cluster_end, enter, enter_guest,
                                geometry_ref, geometry_unref, is_current, leave, mark_range, needed_word, wanted_word)
from fastcbw.cbw.stops cimport STOP_CARRY_CLAIMED, STOP_DISCARD_ENTERED, pass_stop
from fastcbw.kernels.atomic cimport add_relaxed, add_seq, and_seq, load_seq, or_acquire, or_seq, sub_seq
from fastcbw.kernels.sparse cimport sparse_mark, sparse_next_one
from fastcbw.sync cimport now_ns

cdef extern from "check.h" nogil:
    void check "fcbw_check"(bint condition, const char *rule) noexcept

cdef extern from * nogil:
    int ctzll "__builtin_ctzll"(unsigned long long) noexcept
    int popcountll "__builtin_popcountll"(unsigned long long) noexcept

cdef enum:
    CARRY_BYTES = 64 << 20                  # of one discard at most: as long may a guest write to it wait, and a snapshot begin
    CARRY_WORDS = CARRY_BYTES // 4096 // 64

cdef int64_t CLAIM_WAIT_NS = 5000000000     # without a snapshot that says how long


cdef inline uint64_t low_bits(int64_t count) noexcept nogil:
    return ~(<uint64_t>0) if count >= 64 else ((<uint64_t>1) << count) - 1


cdef inline uint64_t word_range(int64_t w, int64_t first, int64_t end) noexcept nogil:
    """The bits of word W that are clusters of first..end."""
    cdef int64_t begin = first - w * 64 if first > w * 64 else 0
    cdef int64_t stop = end - w * 64 if end < w * 64 + 64 else 64
    return low_bits(stop) & ~low_bits(begin) if begin < stop else 0


cdef void lazy_forget(Geometry *geometry, int64_t w, uint64_t bits) noexcept nogil:
    bits &= load_seq(geometry.lazy.words + w)
    if bits:
        and_seq(geometry.lazy.words + w, ~bits)
        sub_seq(&geometry.lazy_count, <uint64_t>popcountll(bits))


cdef void lazy_cancel(EngineState state, Geometry *geometry, int64_t w, uint64_t bits) noexcept nogil:
    if load_seq(&geometry.lazy_count) == 0:
        return
    bits &= load_seq(geometry.lazy.words + w)
    if bits:
        add_relaxed(&state.lazy_cancelled, <uint64_t>popcountll(bits) << geometry.cluster_bits)
        lazy_forget(geometry, w, bits)


# -- the guest's discard

# Neighbouring bytes to be discarded at once, collected into one request.
cdef struct Run:
    int64_t begin
    int64_t end
    int code            # the first error


cdef void run_flush(EngineState state, Run *run) noexcept nogil:
    cdef int code
    if run.begin < run.end:
        code = state.child.discard_at(run.begin, run.end - run.begin, 0)
        if run.code == 0:
            run.code = code
    run.begin = run.end


cdef void run_add(EngineState state, Run *run, int64_t begin, int64_t end) noexcept nogil:
    if begin != run.end:
        run_flush(state, run)
        run.begin = begin
    run.end = end


cdef int guest_discard(EngineState state, int64_t offset, int64_t length, Ticket *ticket) noexcept nogil:
    cdef Run run
    cdef Geometry *geometry
    cdef int64_t end = offset + length
    cdef int64_t at = offset            # everything before it is dealt with, or in the run
    cdef int64_t busy, wait_ns
    cdef int64_t deadline_ns = 0
    run.begin = run.end = offset
    run.code = 0
    while at < end:
        busy = discard_words(state, ticket.epoch, &at, end, &run)
        run_flush(state, &run)          # before the epoch is left
        if at == end:
            break
        geometry = ticket.epoch.geometry
        geometry_ref(geometry)
        wait_ns = ticket.epoch.need[0].cbw_timeout_ns if ticket.epoch.need_count else CLAIM_WAIT_NS
        leave(ticket[0])
        if busy >= 0:                   # else the epoch is over: nothing to wait for
            if deadline_ns == 0:
                deadline_ns = now_ns() + wait_ns
            if claim_wait(geometry, busy, 1, deadline_ns) != 0:
                at = (busy + 1) << geometry.cluster_bits        # advisory: dropped there
        geometry_unref(geometry)
        if at >= end:
            return run.code
        if enter_guest(state, at, end - at, ticket):
            run_add(state, &run, at, end)
            run_flush(state, &run)
            break
    leave(ticket[0])
    return run.code


cdef int64_t discard_words(EngineState state, Epoch *epoch, int64_t *at, int64_t end, Run *run) noexcept nogil:
    """Go on from *at until the end, a claimed cluster (returned) or the end of the epoch (-1)."""
    cdef Geometry *geometry = epoch.geometry
    cdef int bits = geometry.cluster_bits
    cdef int64_t whole_end = geometry.clusters if end == state.length else end >> bits
    cdef int64_t whole_first = cluster_end(geometry, at[0], 0)
    cdef int64_t last = cluster_end(geometry, at[0], end - at[0])
    cdef int64_t w, i, count, begin, stop, busy = -1
    cdef uint64_t now, rest, got
    for w in range((at[0] >> bits) // 64, (last + 63) // 64):
        now = load_seq(epoch.settled + w) & word_range(w, at[0] >> bits, last)
        rest = word_range(w, at[0] >> bits, last) & ~now
        if rest:
            pass_stop(state.stops, STOP_DISCARD_ENTERED)
            got = rest & ~or_acquire(geometry.claims + w, rest)
            if got:
                if not is_current(state, epoch):                                    # R3
                    claim_release(geometry, &got, w * 64, 64)
                    return -1
                now |= record(state, epoch, w, got, word_range(w, whole_first, whole_end))
                claim_release(geometry, &got, w * 64, 64)
            if got != rest:
                # What comes after it waits for the next turn, so that everything before *at is done.
                busy = w * 64 + ctzll(rest & ~got)
                now &= low_bits(busy - w * 64)
        while now:
            i = ctzll(now)
            count = ctzll(~(now >> i)) if ~(now >> i) else 64
            now &= ~(low_bits(count) << i)
            begin = (w * 64 + i) << bits
            stop = begin + (count << bits)
            run_add(state, run, begin if begin > at[0] else at[0], stop if stop < end else end)
        if busy >= 0:
            at[0] = busy << bits if busy << bits > at[0] else at[0]
            return busy
        stop = (w + 1) * 64 << bits
        at[0] = stop if stop < end else end
    return -1


cdef uint64_t record(EngineState state, Epoch *epoch, int64_t w, uint64_t got, uint64_t whole) noexcept nogil:
    """Of the claimed clusters GOT settle what nobody needs and return it: it can be discarded at once. Record the others, if WHOLE."""
    cdef Geometry *geometry = epoch.geometry
    cdef uint64_t needed = needed_word(epoch, w, got)
    cdef uint64_t free = got & ~needed
    cdef uint64_t fresh
    check((load_seq(epoch.settled + w) & needed) == 0, "I2: what is settled is not needed")
    needed &= whole
    if needed:
        sparse_mark(&geometry.lazy, w * 64 + ctzll(needed), 1)
        fresh = needed & ~or_seq(geometry.lazy.words + w, needed)
        add_seq(&geometry.lazy_count, <uint64_t>popcountll(fresh))
        add_relaxed(&state.lazy_recorded, <uint64_t>popcountll(fresh) << geometry.cluster_bits)
    free &= whole | ~load_seq(geometry.lazy.words + w)      # the record of a whole cluster says more than a part of it
    if free:
        lazy_forget(geometry, w, free)
        or_seq(epoch.settled + w, free)
    return free


# -- dropping

cdef int64_t lazy_drop(EngineState state) noexcept nogil:
    cdef Ticket ticket = enter(state)
    cdef Geometry *geometry = ticket.epoch.geometry
    cdef int64_t cluster, w, busy = 0
    cdef uint64_t bits, got
    if geometry != NULL and load_seq(&geometry.lazy_count) != 0:
        cluster = sparse_next_one(&geometry.lazy, 0, geometry.clusters)
        while cluster < geometry.clusters:
            w = cluster // 64
            bits = load_seq(geometry.lazy.words + w)
            got = bits & ~or_acquire(geometry.claims + w, bits)
            if got:
                # What is not recorded any more is as before the discard: whichever epoch it is, `settled` need not change (no R3).
                lazy_cancel(state, geometry, w, got)
                claim_release(geometry, &got, w * 64, 64)
            busy += popcountll(bits & ~got)
            cluster = sparse_next_one(&geometry.lazy, (w + 1) * 64, geometry.clusters)
    leave(ticket)
    return busy


# -- carrying out

cdef int64_t lazy_carry_out(EngineState state) noexcept nogil:
    cdef Ticket ticket
    cdef Geometry *geometry
    cdef int64_t cursor = 0, busy = 0
    cdef bint found
    while True:
        ticket = enter(state)
        geometry = ticket.epoch.geometry
        found = geometry != NULL and load_seq(&geometry.lazy_count) != 0 and carry_run(state, ticket.epoch, &cursor, &busy)
        leave(ticket)
        if not found:
            return busy


cdef int64_t next_unwanted(const Epoch *epoch, int64_t cluster) noexcept nogil:
    """The first recorded cluster at or after CLUSTER that no snapshot has in `copy`, or the number of clusters."""
    cdef Geometry *geometry = epoch.geometry
    cdef int64_t w
    cdef uint64_t bits
    cluster = sparse_next_one(&geometry.lazy, cluster, geometry.clusters)
    while cluster < geometry.clusters:
        w = cluster // 64
        bits = load_seq(geometry.lazy.words + w) & ~low_bits(cluster % 64)
        bits &= ~wanted_word(epoch, w, bits)
        if bits:
            return w * 64 + ctzll(bits)
        cluster = sparse_next_one(&geometry.lazy, (w + 1) * 64, geometry.clusters)
    return geometry.clusters


cdef int claim_prefix(const Epoch *epoch, int64_t w, int i, int64_t most) noexcept nogil:
    """Claim neighbours from bit I of word W on that are recorded and unwanted, at most MOST. Returns how many."""
    cdef Geometry *geometry = epoch.geometry
    cdef uint64_t bits = ~(load_seq(geometry.lazy.words + w) >> i)
    cdef int count = ctzll(bits) if bits else 64
    if count > 64 - i:
        count = 64 - i
    if count > most:
        count = <int>most
    bits = low_bits(count) << i
    cdef uint64_t got = bits & ~or_acquire(geometry.claims + w, bits)
    bits = got & load_seq(geometry.lazy.words + w)          # now that they are claimed: it stands
    bits = ~((bits & ~wanted_word(epoch, w, bits)) >> i)
    if bits and ctzll(bits) < count:
        count = ctzll(bits)
    got &= ~(low_bits(count) << i)
    if got:
        claim_release(geometry, &got, w * 64, 64)
    return count


cdef bint carry_run(EngineState state, Epoch *epoch, int64_t *cursor, int64_t *busy) noexcept nogil:
    """Carry out the next run at or after *cursor. False: there is none."""
    cdef Geometry *geometry = epoch.geometry
    cdef uint64_t got[CARRY_WORDS + 1]
    cdef int64_t first = next_unwanted(epoch, cursor[0])
    cdef int64_t base = first // 64
    cdef int64_t limit = CARRY_BYTES >> geometry.cluster_bits
    cdef int64_t at = first
    cdef int64_t words = 0
    cdef int64_t i, run, length
    cdef int code
    if first == geometry.clusters:
        return False
    while at - first < limit and at < geometry.clusters:
        run = claim_prefix(epoch, base + words, at % 64, limit - (at - first))
        if run == 0:
            break
        got[words] = low_bits(run) << (at % 64)
        words += 1
        at += run
        if at % 64:
            break
    cursor[0] = at
    if at == first:
        busy[0] += lazy_recorded(geometry, first)       # somebody has the claim
        cursor[0] += 1
        return True
    pass_stop(state.stops, STOP_CARRY_CLAIMED)
    if not is_current(state, epoch):                                                # R3
        claim_release(geometry, got, base * 64, words * 64)
        cursor[0] = first
        return True
    length = (at - first) << geometry.cluster_bits
    if length > state.length - (first << geometry.cluster_bits):
        length = state.length - (first << geometry.cluster_bits)
    mark_range(epoch, first << geometry.cluster_bits, length)
    code = state.child.discard_at(first << geometry.cluster_bits, length, 0)
    add_relaxed(&state.lazy_failed if code else &state.lazy_carried_out, <uint64_t>length)
    for i in range(words):
        lazy_forget(geometry, base + i, got[i])         # before `settled`, after the disk
        or_seq(epoch.settled + base + i, got[i])
    claim_release(geometry, got, base * 64, words * 64)
    return True
