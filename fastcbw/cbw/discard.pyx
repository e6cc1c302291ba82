"""Discarding of a snapshot: what its reader has done with goes, and the guest's later writes there cost nothing.

    snapshot_discard ── whole clusters ──▶ claim ─ clear `copy` ─ hand over or free the word ─ settle, or leave to the keeper ─ release
          └──────────── a part of one ───▶ claim ─ note its granules ─ release; all of them noted: as a whole one

The order is R5's: `copy` is cleared first, then the word goes, then `settled` is set, and only then may a guest's write change
the disk; readers look in the opposite order, so that none returns data of what has gone. An older snapshot that reads the
word inherits it before it leaves here (R4). What nobody needs now is settled; what an older snapshot still has to get from the
disk is left as it is; and a cluster with a recorded guest discard stays unsettled: the keeper carries it out (lazy.pyx).

Parts. A cluster is 64 granules, or granules of 512 bytes where that is less: a word of bits for each cluster of which a part
has gone, in a two-level table that is allocated on touch. Parts add up: with all granules noted the cluster goes. Reading a noted
granule is an error like reading a cluster that has gone. What is finer than a granule is refused (is_granular), never ignored.
"""

from libc.errno cimport ENOMEM, ESTALE
from libc.stdint cimport int64_t, uint64_t

from fastcbw.cbw.lifecycle cimport drop_word, hand_over_claimed
from fastcbw.cbw.locmap cimport WORD_NONE, map_get, map_leaf, map_next_leaf, map_place
from fastcbw.cbw.state cimport (ALIVE, EngineState, Geometry, Snap, Ticket, claim_release, claim_wait, cluster_end, copy_word, enter,
                                in_copy, leave, needed_word, wake_keeper, wanted_word)
from fastcbw.kernels.atomic cimport add_relaxed, load_acquire, load_seq, or_acquire, or_release, or_seq, store_relaxed, store_release
from fastcbw.kernels.sparse cimport sparse_mark
from fastcbw.sync cimport now_ns

cdef extern from * nogil:
    int ctzll "__builtin_ctzll"(unsigned long long) noexcept
    int popcountll "__builtin_popcountll"(unsigned long long) noexcept

cdef int64_t CLAIM_LOOK_NS = 500000000      # as often it is looked whether the snapshot still lives


cdef inline uint64_t bit_range(int64_t first, int64_t end) noexcept nogil:
    """Bits first..end of a word, 0 <= first <= end <= 64."""
    return ((~(<uint64_t>0) >> (64 - end + first)) << first) if end > first else 0


cdef bint is_granular(EngineState state, int cluster_bits, int64_t offset, int64_t length) noexcept nogil:
    cdef int64_t granule = granule_bytes(cluster_bits)
    return offset % granule == 0 and ((offset + length) % granule == 0 or offset + length == state.length)


cdef int snapshot_discard(EngineState state, Snap *snap, int64_t offset, int64_t length) noexcept nogil:
    cdef Geometry *geometry = snap.geometry
    cdef int bits = geometry.cluster_bits
    cdef int64_t end = offset + length
    cdef int64_t first = cluster_end(geometry, offset, 0)                           # of the whole clusters
    cdef int64_t last = geometry.clusters if end == state.length else end >> bits
    cdef int64_t w, begin, stop
    cdef int code = 0
    if first > last:        # within one cluster
        return discard_part(state, snap, offset, end)
    if first << bits > offset:
        code = discard_part(state, snap, offset, min(first << bits, end))
    for w in range(first // 64, (last + 63) // 64):
        if code:
            return code
        begin = first - w * 64 if first > w * 64 else 0
        stop = last - w * 64 if last < (w + 1) * 64 else 64
        code = discard_word(state, snap, w, bit_range(begin, stop))
    if code == 0 and last << bits < end:
        code = discard_part(state, snap, last << bits, end)
    return code


cdef int claim_some(Snap *snap, int64_t w, uint64_t wanted, uint64_t *got) noexcept nogil:
    """Claim what can be had of the clusters WANTED of word W, at least one; waits for that, as long as the snapshot lives."""
    cdef Geometry *geometry = snap.geometry
    while load_seq(&snap.dead) == ALIVE:
        got[0] = wanted & ~or_acquire(geometry.claims + w, wanted)
        if got[0]:
            return 0
        claim_wait(geometry, w * 64 + ctzll(wanted), 1, now_ns() + CLAIM_LOOK_NS)
    return -ESTALE


cdef int discard_word(EngineState state, Snap *snap, int64_t w, uint64_t clusters) noexcept nogil:
    cdef uint64_t got = 0
    cdef int code
    clusters &= copy_word(snap, w)
    while clusters:
        code = claim_some(snap, w, clusters, &got)
        if code:
            return code
        drop_claimed(state, snap, w, got)
        clusters &= ~got
    return 0


cdef int discard_part(EngineState state, Snap *snap, int64_t begin, int64_t end) noexcept nogil:
    """Note the granules of begin..end, which lie in one cluster."""
    cdef int bits = snap.geometry.cluster_bits
    cdef int64_t granule = granule_bytes(bits)
    cdef int64_t cluster = begin >> bits
    cdef int64_t base = cluster << bits
    cdef int64_t stop = base + ((<int64_t>1) << bits) if base + ((<int64_t>1) << bits) < state.length else state.length
    cdef uint64_t all_of_it = bit_range(0, (stop - base + granule - 1) // granule)
    cdef uint64_t got = 0, parts
    cdef uint64_t *place
    cdef int code
    if not in_copy(snap, cluster):
        return 0
    place = map_place(&snap.parts, cluster)
    if place == NULL:
        return -ENOMEM
    store_release(&snap.parts_used, 1)
    code = claim_some(snap, cluster // 64, (<uint64_t>1) << (cluster % 64), &got)
    if code:
        return code
    parts = place[0] | bit_range((begin - base) // granule, (end - base + granule - 1) // granule)
    add_relaxed(&snap.discarded, <uint64_t>(popcountll(parts & ~place[0]) * granule))
    store_release(place, parts)
    if parts == all_of_it:
        drop_claimed(state, snap, cluster // 64, got)
    else:
        claim_release(snap.geometry, &got, cluster // 64 * 64, 64)
    return 0


cdef int64_t parts_bytes(Snap *snap, int64_t w, uint64_t clusters) noexcept nogil:
    """What of the clusters of word W has gone by parts."""
    cdef int64_t total = 0
    if not has_parts(snap) or map_leaf(&snap.parts, w * 64) == NULL:
        return 0
    while clusters:
        total += popcountll(map_get(&snap.parts, w * 64 + ctzll(clusters)))
        clusters &= clusters - 1
    return total * granule_bytes(snap.geometry.cluster_bits)


cdef void drop_claimed(EngineState state, Snap *snap, int64_t w, uint64_t got) noexcept nogil:
    """The clusters GOT of word W, whose claims are held, leave the snapshot. Releases the claims."""
    cdef Geometry *geometry = snap.geometry
    cdef const uint64_t *leaf
    cdef uint64_t dropped[64]
    cdef uint64_t bits, lazy, settle
    cdef Ticket ticket
    cdef int count = 0, i
    ticket = enter(state)
    if ticket.epoch.geometry != geometry:       # it has ended meanwhile, and so has everything that is said here
        claim_release(geometry, &got, w * 64, 64)
        leave(ticket)
        return
    add_relaxed(&snap.discarded, <uint64_t>((<int64_t>popcountll(got) << geometry.cluster_bits) - parts_bytes(snap, w, got)))
    sparse_mark(&snap.not_copy, w * 64, 1)
    or_release(snap.not_copy.words + w, got)                                        # R5: first
    leaf = map_leaf(&snap.map, w * 64)
    bits = got if leaf != NULL else 0
    while bits:
        i = ctzll(bits)
        bits &= bits - 1
        if load_acquire(leaf + i) != WORD_NONE:
            dropped[count] = hand_over_claimed(state, ticket.epoch, snap, w * 64 + i)
            count += 1
    lazy = load_seq(geometry.lazy.words + w) & got
    settle = got & ~lazy & ~needed_word(ticket.epoch, w, got)
    if settle:
        or_seq(ticket.epoch.settled + w, settle)
    if lazy & ~wanted_word(ticket.epoch, w, lazy):
        wake_keeper(state)
    claim_release(geometry, &got, w * 64, 64)
    if count:       # a look-up that is counted may still hold it: its store must outlive that (sweep_stores)
        store_relaxed(&state.word_gone, ticket.epoch.number)
    leave(ticket)
    for i in range(count):      # not under the claim
        drop_word(state, dropped[i])


cdef int64_t parts_run(const Snap *snap, int64_t offset, int64_t end, bint *absent) noexcept nogil:
    cdef int bits = snap.geometry.cluster_bits
    cdef int64_t granule = granule_bytes(bits)
    cdef int64_t cluster, base, at = offset
    cdef uint64_t parts
    cdef int i, run
    absent[0] = False
    while at < end:
        cluster = at >> bits
        base = cluster << bits
        if map_leaf(&(<Snap *>snap).parts, cluster) == NULL:
            if absent[0]:
                return at
            at = map_next_leaf(&(<Snap *>snap).parts, cluster) << bits
            continue
        parts = map_get(&(<Snap *>snap).parts, cluster)
        i = <int>((at - base) // granule)
        if at == offset:
            absent[0] = (parts >> i) & 1
        parts = (~parts if absent[0] else parts) >> i          # ones: where it is different
        run = ctzll(parts) if parts else 64
        if i + run >= 64 or base + (i + run) * granule >= base + ((<int64_t>1) << bits):
            at = (cluster + 1) << bits
            continue
        at = base + (i + run) * granule
        return at if at < end else end
    return end
