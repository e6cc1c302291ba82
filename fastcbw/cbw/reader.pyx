"""The snapshot reader: the disk as it was, while the guest goes on writing. It never makes the guest wait.

A cluster that no store in the chain holds is read from the active disk, optimistically, and looked up again afterwards:
still held by none means that no guest write can have begun before the read ended (old data is published before the write
starts, and a fence stands on both sides), so what was read is the point in time. Held means that it is in the store now.
A RAM slot is copied, then its word looked up again, generation and all; the log is read with the store pinned, then the
same. Last, after the look-ups, `dead` and `copy`: an end clears those first (R5).

Counted in an epoch: look-ups and copies out of RAM. Not counted: I/O.
"""

from libc.errno cimport EAGAIN, EINVAL, EIO, EPERM, ESTALE
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset, strerror

from fastcbw.block.device cimport BlockDevice, STATUS_ABSENT, STATUS_HOLE, STATUS_ZERO, read_each
from fastcbw.block.sys cimport iovec
from fastcbw.cbw.discard cimport granule_bytes, has_parts, is_granular, parts_run, snapshot_discard
from fastcbw.cbw.keep cimport NO_ROOM, keep_fetch, keep_step
from fastcbw.cbw.locmap cimport (LEAF_CLUSTERS, WORD_DISK, WORD_NONE, WORD_RAM, WORD_ZERO, map_leaf, map_next_leaf_before, word_position,
                                 word_slot, word_store, word_tag)
from fastcbw.cbw.policy cimport why_text
from fastcbw.cbw.state cimport (ALIVE, Epoch, Snap, Ticket, WHY_NOT, WHY_TIMEOUT, copy_run, enter, leave, lookup, snap_unref)
from fastcbw.cbw.stops cimport STOP_READER_COPIED, STOP_READER_FOUND, pass_stop
from fastcbw.cbw.store cimport Store, log_read, slot_data
from fastcbw.kernels.atomic cimport add_seq, fence_acquire, fence_seq, load_acquire, load_relaxed, load_seq, sub_seq

from fastcbw.errors import NotInSnapshot, SnapshotBroken

cdef enum:
    BATCH_CLUSTERS = 256        # looked up while counted once
    STATUS_CLUSTERS_MAX = 1 << 18       # looked at for one extent of block status

# What a cluster still needs, beside its word: no word looks like these (tag DISK, a position beyond any log).
cdef uint64_t DONE = ~(<uint64_t>0)
cdef uint64_t RETRY = ~(<uint64_t>0) - 256

cdef int64_t BATCH_BYTES = 1 << 20


cdef class SnapshotDevice(BlockDevice):
    """One snapshot as a device that nobody writes. Reads are the point in time, or an error; what was read can be dropped."""

    def __cinit__(self, *args, **keywords):
        self.read_only = True

    def __dealloc__(self):
        if self.snap != NULL:
            snap_unref(self.snap)

    cdef int pread(self, void *buffer, int64_t offset, int64_t length) noexcept nogil:
        return self.read_pieces(<char *>buffer, offset, length, False)

    cdef int read_pieces(self, char *out, int64_t offset, int64_t length, bint nowait) noexcept nogil:
        cdef int64_t piece
        cdef int code
        while length:
            piece = length if length < BATCH_BYTES else BATCH_BYTES
            code = self.read_range(out, offset, piece, nowait)
            if code:
                return code
            out += piece
            offset += piece
            length -= piece
        return 0

    cdef int preadv_nowait(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        """What is in RAM, here or in the page cache of the active disk; the log is a device."""
        cdef int i, code
        for i in range(count):
            code = self.read_pieces(<char *>vector[i].iov_base, offset, <int64_t>vector[i].iov_len, True)
            if code:
                return code
            offset += <int64_t>vector[i].iov_len
        return 0

    cdef int preadv(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        return read_each(self, vector, count, offset)

    cdef int read_range(self, char *buffer, int64_t offset, int64_t length, bint nowait) noexcept nogil:
        """At most BATCH_BYTES. Batches of clusters; see read_batch."""
        cdef int64_t end = offset + length
        cdef int64_t batch_end
        cdef int code
        while offset < end:
            batch_end = ((offset >> self.cluster_bits) + BATCH_CLUSTERS) << self.cluster_bits
            if batch_end > end:
                batch_end = end
            code = self.read_batch(buffer, offset, batch_end, nowait)
            if code:
                return code
            buffer += batch_end - offset
            offset = batch_end
        return self.verdict(end - length, length)

    cdef int read_batch(self, char *buffer, int64_t offset, int64_t end, bint nowait) noexcept nogil:
        """Fill BUFFER with offset..end, at most BATCH_CLUSTERS clusters.

        words[] says what each cluster still needs: 0, read the disk; a word, read the store; RETRY, look again; DONE. A pass that finds a
        cluster's word changed leaves it for the next pass; each change is progress of somebody else, and words of a
        cluster change a handful of times in the life of a snapshot, so this ends.
        """
        cdef uint64_t words[BATCH_CLUSTERS]
        cdef uint64_t now[BATCH_CLUSTERS]
        cdef Ticket ticket
        cdef int64_t first = offset >> self.cluster_bits
        cdef int count = <int>(((end - 1) >> self.cluster_bits) - first + 1)
        cdef int i, run, left, code
        cdef int64_t begin, stop
        cdef iovec vector
        code = self.verdict(offset, end - offset)
        if code:
            return code
        if self.snap.copy_on_read:
            self.read_through(offset, end, nowait)
        # First look: everything in one go; what is in RAM or zero is done at once.
        ticket = enter(self.state)
        look_up_run(ticket.epoch, self.snap, first, count, words)
        left = self.take_counted(ticket.epoch, buffer, offset, end, count, words)
        leave(ticket)
        while left:
            # Runs that no store holds: read the disk, then look again.
            i = 0
            while i < count:
                run = i
                while i < count and words[i] == WORD_NONE:
                    i += 1
                if i > run:
                    begin = (first + run) << self.cluster_bits
                    stop = (first + i) << self.cluster_bits
                    begin = begin if begin > offset else offset
                    stop = stop if stop < end else end
                    if nowait:
                        vector.iov_base = buffer + (begin - offset)
                        vector.iov_len = <size_t>(stop - begin)
                        code = self.state.child.preadv_nowait(&vector, 1, begin, stop - begin)
                    else:
                        code = self.state.child.pread(buffer + (begin - offset), begin, stop - begin)
                    if code:
                        return code
                while i < count and words[i] != WORD_NONE:
                    i += 1
            fence_seq()
            for i in range(count):
                if word_tag(words[i]) == WORD_DISK and words[i] != DONE:
                    if nowait:
                        return -EAGAIN
                    code = self.take_from_log(buffer, offset, end, first + i, words + i)
                    if code:
                        return code
            ticket = enter(self.state)
            look_up_run(ticket.epoch, self.snap, first, count, now)
            for i in range(count):
                if words[i] == WORD_NONE and now[i] == WORD_NONE:
                    words[i] = DONE
                elif words[i] != DONE:
                    words[i] = now[i]
            left = self.take_counted(ticket.epoch, buffer, offset, end, count, words)
            leave(ticket)
        return 0

    cdef void read_through(self, int64_t offset, int64_t end, bint nowait) noexcept nogil:
        """Copy-on-read: take what no store holds into RAM first, while there is room; errors are met again by who reads."""
        cdef int64_t cluster = offset >> self.cluster_bits
        cdef int64_t stop = ((end - 1) >> self.cluster_bits) + 1
        cdef int64_t step = keep_step(self.snap)
        while cluster < stop and keep_fetch(self.state, self.snap, cluster, min(step, stop - cluster), nowait) == 0:
            cluster += step

    cdef int cache_at(self, int64_t offset, int64_t length) noexcept nogil:
        cdef int64_t cluster = offset >> self.cluster_bits
        cdef int64_t stop = ((offset + length - 1) >> self.cluster_bits) + 1
        cdef int64_t step = keep_step(self.snap)
        cdef int code = self.verdict(offset, length)
        while code == 0 and cluster < stop:
            code = keep_fetch(self.state, self.snap, cluster, min(step, stop - cluster), False)
            cluster += step
        return 0 if code == NO_ROOM else code

    cdef int take_counted(self, const Epoch *epoch, char *buffer, int64_t offset, int64_t end, int count, uint64_t *words) noexcept nogil:
        """Take what is in RAM or zero of the COUNT clusters of a batch, while counted; their words are DONE then.

        How many are not: on disk, nowhere, or moved away while they were copied. Everything is copied, slots that are
        neighbours at once, then everything is looked up again: one walk along the chain for all.
        """
        cdef uint64_t now[BATCH_CLUSTERS]
        cdef int64_t first = offset >> self.cluster_bits
        cdef int64_t begin, stop, skip
        cdef Store *store
        cdef int i = 0, run, copied = 0, left = 0
        while i < count:
            run = 1
            if words[i] == WORD_ZERO or word_tag(words[i]) == WORD_RAM:
                while i + run < count and follows(words[i], words[i + run], run):
                    run += 1
                begin = (first + i) << self.cluster_bits
                stop = begin + (<int64_t>run << self.cluster_bits)
                skip = offset - begin if begin < offset else 0
                begin += skip
                stop = stop if stop < end else end
                if words[i] == WORD_ZERO:
                    memset(buffer + (begin - offset), 0, <size_t>(stop - begin))
                else:
                    pass_stop(self.state.stops, STOP_READER_FOUND)
                    store = self.state.stores[word_store(words[i])]
                    memcpy(buffer + (begin - offset), slot_data(store, word_slot(words[i])) + skip, <size_t>(stop - begin))
                    copied += run
            i += run
        pass_stop(self.state.stops, STOP_READER_COPIED)
        fence_acquire()
        if copied:
            look_up_run(epoch, self.snap, first, count, now)
        for i in range(count):
            if words[i] == WORD_ZERO:
                words[i] = DONE
            elif word_tag(words[i]) == WORD_RAM:
                words[i] = DONE if now[i] == words[i] else now[i]
            if words[i] != DONE:
                left += 1
        return left

    cdef int take_from_log(self, char *buffer, int64_t offset, int64_t end, int64_t cluster, uint64_t *word) noexcept nogil:
        """Take one cluster from the log; *word is DONE then, or RETRY. The store is pinned for the I/O."""
        cdef int64_t cluster_bytes = (<int64_t>1) << self.cluster_bits
        cdef int64_t begin = cluster << self.cluster_bits
        cdef int64_t stop = begin + cluster_bytes
        cdef int64_t skip = 0
        cdef uint64_t now
        cdef char *bounce
        cdef Store *store
        cdef Ticket ticket
        cdef int code
        if begin < offset:
            skip = offset - begin
        if stop > end:
            stop = end
        ticket = enter(self.state)
        now = lookup(ticket.epoch, self.snap, cluster)
        if now != word[0]:
            word[0] = RETRY
            leave(ticket)
            return 0
        store = self.state.stores[word_store(now)]
        add_seq(&store.pins, 1)
        leave(ticket)
        bounce = <char *>malloc(<size_t>cluster_bytes)
        if bounce == NULL:
            code = -12          # ENOMEM
        else:
            code = log_read(store, word_position(now), bounce)
            memcpy(buffer + (begin + skip - offset), bounce + skip, <size_t>(stop - begin - skip))
            free(bounce)
        sub_seq(&store.pins, 1)
        fence_acquire()
        ticket = enter(self.state)
        now = lookup(ticket.epoch, self.snap, cluster)
        leave(ticket)
        if now != word[0]:
            word[0] = RETRY     # dropped or moved meanwhile: what was read, or its error, says nothing
            return 0
        word[0] = DONE
        return code

    cdef int verdict(self, int64_t offset, int64_t length) noexcept nogil:
        """0, or why the snapshot may not be read there. I5: one cluster outside `copy` makes the request an error."""
        cdef int64_t first = offset >> self.cluster_bits
        cdef int64_t count = ((offset + length - 1) >> self.cluster_bits) + 1 - first
        cdef bint inside
        fence_acquire()         # after the look-ups that came before (R5)
        if load_seq(&self.snap.dead) != ALIVE:
            return ERROR_BROKEN
        if copy_run(self.snap, first, first + count, &inside) < first + count or not inside:
            return ERROR_NOT_IN_SNAPSHOT
        if has_parts(self.snap) and (parts_run(self.snap, offset, offset + length, &inside) < offset + length or inside):
            return ERROR_NOT_IN_SNAPSHOT
        return 0

    # -- what the reader has done with

    cdef int drop(self, int64_t offset, int64_t length) noexcept nogil:
        cdef int code
        if not is_granular(self.state, self.cluster_bits, offset, length):
            return ERROR_TOO_FINE
        if load_seq(&self.snap.dead) != ALIVE:
            return ERROR_BROKEN
        code = snapshot_discard(self.state, self.snap, offset, length)
        return ERROR_BROKEN if code == -ESTALE else code

    cdef int discard_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        return self.drop(offset, length)

    cdef int check_once(self, int64_t offset, int64_t length) noexcept nogil:
        return 0 if is_granular(self.state, self.cluster_bits, offset, length) else ERROR_TOO_FINE

    cdef int delivered(self, int64_t offset, int64_t length) noexcept nogil:
        return self.drop(offset, length)

    cdef int pwritev(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        return -EPERM           # for clients of an export that may discard

    cdef int write_zeroes_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        return -EPERM

    @property
    def granule(self):
        """Bytes that a discard must be cut in; the end of the disk is always a cut."""
        return granule_bytes(self.cluster_bits)

    @property
    def discarded(self):
        """Bytes that were discarded of the snapshot, roughly: 0 as long as it is whole."""
        return load_relaxed(&self.snap.discarded)

    def discard(self, int64_t offset, int64_t length):
        """Drop LENGTH bytes at OFFSET, multiples of `granule`: reading them is an error from then on, and guest writes there cost nothing.

        What has gone already stays so. Raises ValueError, SnapshotBroken, MemoryError.
        """
        cdef int code = 0
        self.check_range(offset, length)
        if length:
            with nogil:
                code = self.drop(offset, length)
        if code:
            self.fail(code, "discard", offset, length)

    def take(self, int64_t offset, int64_t length):
        """Return LENGTH bytes at OFFSET and drop them, see discard; on an error nothing was dropped.

        Of two calls at once for the same bytes both may return them; a call that begins after one has ended gets NotInSnapshot.
        """
        self.check_range(offset, length)
        if length and not is_granular(self.state, self.cluster_bits, offset, length):
            self.fail(ERROR_TOO_FINE, "take", offset, length)
        data = self.read(offset, length)
        self.discard(offset, length)
        return data

    # -- block status

    cdef int64_t block_status(self, int64_t offset, int64_t length, uint32_t *flags) noexcept nogil:
        """Zero clusters are holes; what is in a store is data; what is nowhere is what the active disk says, if it still is so.

        What is outside `copy` is STATUS_ABSENT: status tells of it what a read would, and goes on behind it.
        """
        cdef uint64_t words[BATCH_CLUSTERS]
        cdef uint64_t kind
        cdef Ticket ticket
        cdef int64_t first = offset >> self.cluster_bits
        cdef int64_t cluster = first
        cdef int64_t end_cluster
        cdef int64_t got, limit
        cdef int i, count
        cdef bint inside
        while True:
            if load_seq(&self.snap.dead) != ALIVE:
                return ERROR_BROKEN
            end_cluster = copy_run(self.snap, first, ((offset + length - 1) >> self.cluster_bits) + 1, &inside)
            if not inside:
                flags[0] = STATUS_ABSENT
                limit = (end_cluster << self.cluster_bits) - offset
                return limit if limit < length else length
            if has_parts(self.snap):
                limit = min(end_cluster << self.cluster_bits, offset + length)
                length = parts_run(self.snap, offset, limit, &inside) - offset
                if inside:
                    flags[0] = STATUS_ABSENT
                    return length
                end_cluster = ((offset + length - 1) >> self.cluster_bits) + 1
            # How far does the kind of the first cluster go?
            ticket = enter(self.state)
            cluster = next_held(ticket.epoch, self.snap, first, end_cluster)
            kind = WORD_NONE
            if cluster == first:
                kind = kind_of(lookup(ticket.epoch, self.snap, first))
            leave(ticket)
            while kind != WORD_NONE and cluster < end_cluster and cluster - first < STATUS_CLUSTERS_MAX:
                count = BATCH_CLUSTERS if end_cluster - cluster > BATCH_CLUSTERS else <int>(end_cluster - cluster)
                ticket = enter(self.state)
                look_up_run(ticket.epoch, self.snap, cluster, count, words)
                leave(ticket)
                i = 0
                while i < count and kind_of(words[i]) == kind:
                    i += 1
                cluster += i
                if i < count:
                    break
            limit = (cluster << self.cluster_bits) - offset
            if limit > length:
                limit = length
            if kind == WORD_ZERO:
                flags[0] = STATUS_HOLE | STATUS_ZERO
                return limit
            if kind != WORD_NONE:
                flags[0] = 0
                return limit
            got = self.state.child.block_status(offset, limit, flags)
            if got < 0:
                return got
            fence_seq()
            got = self.nowhere(offset, got)
            if got > 0 and self.verdict(offset, 1) == 0:
                return got
            # Its first cluster was preserved meanwhile, or left the snapshot: each happens once.

    cdef int64_t nowhere(self, int64_t offset, int64_t length) noexcept nogil:
        """How many bytes of the range, from its start, still no store holds."""
        cdef int64_t end = ((offset + length - 1) >> self.cluster_bits) + 1
        cdef Ticket ticket = enter(self.state)
        cdef int64_t held = next_held(ticket.epoch, self.snap, offset >> self.cluster_bits, end)
        leave(ticket)
        held = (held << self.cluster_bits) - offset
        return 0 if held < 0 else held if held < length else length

    cdef int explain(self, int code, char *text, size_t size) noexcept nogil:
        cdef uint64_t why = load_seq(&self.snap.broken_why)
        cdef uint64_t error = load_relaxed(&self.snap.broken_errno)
        cdef unsigned long long offset = load_relaxed(&self.snap.broken_offset)
        if code == ERROR_NOT_IN_SNAPSHOT:
            snprintf(text, size, "the range, or a part of it, is not in the snapshot")
            return EINVAL
        if code == ERROR_TOO_FINE:
            snprintf(text, size, "parts of a cluster are discarded in multiples of %lld bytes", <long long>granule_bytes(self.cluster_bits))
            return EINVAL
        if code != ERROR_BROKEN:
            return self.state.child.explain(code, text, size)
        if why == WHY_NOT:
            snprintf(text, size, "the snapshot was deleted")
        elif error and why != WHY_TIMEOUT:
            snprintf(text, size, "snapshot broken: %s: %s, at offset %llu", why_text(why), strerror(<int>error), offset)
        else:
            snprintf(text, size, "snapshot broken: %s, at offset %llu", why_text(why), offset)
        return EIO

    cdef str broken_reason(self):
        """Why the snapshot can't be read any more, for messages; None while it can."""
        cdef char text[256]
        if load_seq(&self.snap.dead) == ALIVE:
            return None
        self.explain(ERROR_BROKEN, text, sizeof(text))
        return text.decode(errors="replace")

    cdef int mark_closed(self) except -1:
        self.closed = True
        return 0

    cdef int check_open(self) except -1:
        if self.state.forked:
            raise RuntimeError(f"{self.name}: a fork does not take disks along (open it anew)")
        return BlockDevice.check_open(self)

    @property
    def broken(self):
        """None while the snapshot can be read, else why not."""
        self.check_open()
        return self.broken_reason()

    cdef int fail(self, int code, str operation, int64_t offset, int64_t length) except -1:
        cdef char text[256]
        if code == ERROR_BROKEN or code == ERROR_NOT_IN_SNAPSHOT or code == ERROR_TOO_FINE:
            self.explain(code, text, sizeof(text))
            raise (SnapshotBroken if code == ERROR_BROKEN else NotInSnapshot if code == ERROR_NOT_IN_SNAPSHOT else ValueError)(
                f"{self.name}: {operation} {offset}+{length}: {text.decode(errors='replace')}")
        return BlockDevice.fail(self, code, operation, offset, length)




cdef inline uint64_t kind_of(uint64_t word) noexcept nogil:
    """What block status tells apart: nowhere, zero, in a store."""
    return word if word == WORD_NONE or word == WORD_ZERO else WORD_RAM


cdef inline bint follows(uint64_t word, uint64_t later, int distance) noexcept nogil:
    """Whether LATER is zero like WORD, or in the slot that is DISTANCE after WORD's."""
    if word == WORD_ZERO:
        return later == WORD_ZERO
    return (word_tag(later) == WORD_RAM and word_store(later) == word_store(word)
            and word_slot(later) == word_slot(word) + distance)


cdef void look_up_run(const Epoch *epoch, Snap *snap, int64_t first, int64_t count, uint64_t *words) noexcept nogil:
    """lookup() for COUNT neighbours: a leaf that is not there answers for its 64 clusters at once."""
    cdef int64_t i = 0, stop, j
    cdef int k
    cdef const uint64_t *leaf
    cdef uint64_t word
    memset(words, 0, <size_t>count * 8)
    if epoch.geometry != snap.geometry:
        return                  # as in lookup()
    while i < count:
        stop = LEAF_CLUSTERS - (first + i) % LEAF_CLUSTERS + i
        if stop > count:
            stop = count
        for k in range(epoch.chain_count):
            leaf = map_leaf(&(<Snap *>epoch.chain[k]).map, first + i)
            if leaf != NULL:
                for j in range(i, stop):
                    word = load_acquire(leaf + (first + j) % LEAF_CLUSTERS)
                    if word:
                        words[j] = word
            if epoch.chain[k] == snap:
                break
        i = stop


cdef int64_t next_held(const Epoch *epoch, Snap *snap, int64_t cluster, int64_t end) noexcept nogil:
    """The first cluster of cluster..end whose data for SNAP is in a store, or END. Costs what is preserved, not what is asked.

    A hand-over puts the word into the older map before it leaves the newer, and the maps are walked from the newest, so a
    word that moves is not missed.
    """
    cdef int64_t leaf, at
    cdef const uint64_t *words
    cdef int k
    if epoch.geometry != snap.geometry:
        return end                  # as in lookup()
    for k in range(epoch.chain_count):
        leaf = map_next_leaf_before(&(<Snap *>epoch.chain[k]).map, cluster, end)
        while leaf < end:
            words = map_leaf(&(<Snap *>epoch.chain[k]).map, leaf)
            for at in range(leaf if leaf > cluster else cluster, leaf + LEAF_CLUSTERS if leaf + LEAF_CLUSTERS < end else end):
                if load_acquire(words + at % LEAF_CLUSTERS) != WORD_NONE:
                    end = at        # nothing beyond it matters any more, in this map and in the older ones
                    break
            leaf = map_next_leaf_before(&(<Snap *>epoch.chain[k]).map, leaf + LEAF_CLUSTERS, end)
        if epoch.chain[k] == snap:
            break
    return end
