"""The copy order: what of a source is copied next.

    policies ─▶ class of each kind of cluster ─▶ walk of class 0, of class 1, … ─▶ what is left ─▶ pieces for the copier

A list of policies comes down to a class for each kind (policies.py). Each class has a walk of its own, ascending, over the clusters that
are of it at that moment; what is handed out is marked as taken, and a last walk takes all that is left, of whatever kind
it has become: every cluster is handed out once. While a later class is being walked, an earlier one may get new members: first
touches are looked for in the geometry's ring (heat.pxd) before every choice, the rest by beginning its walk again after
AGAIN runs. `hot` clusters are found by the heat table, not by a walk.

Runs are as long as a chunk. A short run takes its neighbours along, whatever their class: a target wants large writes, and a disk a few more
bytes rather than one more request. Up to GATHER of a chunk, and more where the pace says so: where a target is worth much in flight (pace.pyx).

What it costs: summary bitmaps and leaves of location maps that exist, so what was preserved; what no store holds is a stretch between leaves;
`taken` marks whole pages by one bit. A walk over a 64 TiB disk of holes touches a few pages. What a snapshot was made without (`copy` from a
bitmap) counts as skipped from the beginning, and no walk comes there: an increment costs what is dirty, not the disk.

One lock over a choice. The source's block status is asked under it, once for each extent.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.bitmaps.mapping cimport map_pages, unmap_pages
from fastcbw.block.device cimport BlockDevice, STATUS_ABSENT, STATUS_ZERO
from fastcbw.cbw.heat cimport Heat, heat_covers, heat_feed, heat_forget, heat_hottest, heat_init
from fastcbw.cbw.kinds cimport Kinds, kinds_of_word, kinds_untouched
from fastcbw.cbw.reader cimport SnapshotDevice
from fastcbw.cbw.state cimport Epoch, Geometry, RECENT, Snap, Ticket, bitmap_bytes, copy_run, enter, leave
from fastcbw.kernels.atomic cimport add_relaxed, load_acquire, load_relaxed
from fastcbw.kernels.bits cimport bits_all, bits_next_one, bits_next_zero, bits_set_atomic
from fastcbw.kernels.sparse cimport PAGE_BITS, sparse_count, sparse_mark, sparse_next_one, sparse_set_atomic, sparse_test, summary_bits
from fastcbw.sync cimport pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock

import numpy as _np

from fastcbw.cbw.policies import ORDERS, classes_of, parse_order

cdef extern from * nogil:
    int ctzll "__builtin_ctzll"(unsigned long long) noexcept

cdef enum:
    PLAIN_BITS = 12         # unit of a source that is no snapshot
    AGAIN = 256             # runs after which the walks of dry classes begin again
    STRETCHES = 4096        # looked at while counted once: a creation waits for that
    GATHER = 8              # a run shorter than this part of a chunk takes its neighbours along
    ROWS = 1024             # of one array of the iterator
    LOOKED_AT = 100000      # extents, for one page

cdef uint64_t ONES = ~(<uint64_t>0)

#: dtype of an array of extents in copy order: bytes, bytes, class (0 first).
ORDER_DTYPE = _np.dtype([("offset", "<i8"), ("length", "<i8"), ("class", "<i4")])


cdef int classes_fill(Classes *classes, str policy) except -1:
    """As policies.classes_of says; raises as it does."""
    table = classes_of(policy)
    classes.count = max(table) + 1
    for i in range(KINDS):
        classes.of_kind[i] = table[i]
    return 0


cdef int64_t bytes_within(const sparse_bits *within, int bits, int64_t length) noexcept nogil:
    """How many of LENGTH bytes are in clusters that WITHIN marks."""
    cdef int64_t last = within.length - 1
    cdef int64_t total = sparse_count(within, 0, within.length) << bits
    if sparse_test(within, last):
        total -= (within.length << bits) - length
    return total


cdef class Order:
    """Hands out all of SOURCE, piece by piece.

    policy: a list of policies with commas; those that ask where old data is need a snapshot, of anything else all is alike.
    chunk: bytes, the longest piece of data; zeroes that are known come in pieces of any length. stored_only: of a snapshot, under a
    policy that tells kinds apart: only what is in a store; more of it comes with every first touch.
    """

    def __cinit__(self, BlockDevice source not None, str policy="sequential", *, int64_t chunk=1 << 18, bint stored_only=False):
        cdef Snap *snap = NULL
        if chunk < 512:
            raise ValueError(f"chunk: {chunk} is less than 512")
        self.source = source
        self.policy = policy
        self.chunk = chunk
        self.bits = PLAIN_BITS
        classes_fill(&self.classes, policy)
        if isinstance(source, SnapshotDevice):
            self.snapshot = source
            snap = self.snapshot.snap
            self.bits = self.snapshot.cluster_bits
            heat_init(&self.heat, self.bits)
            self.arrivals = load_relaxed(&snap.geometry.recent_count)
        else:
            self.classes.count = 1
        self.stored_only = stored_only
        if stored_only and self.classes.count == 1:
            raise ValueError(f"stored_only: {source.name} is no snapshot, or {policy!r} tells nothing apart")
        self.clusters = (source.length + ((<int64_t>1) << self.bits) - 1) >> self.bits
        if self.classes.count > 1:
            self.taken.length = self.clusters
            self.taken.words = <uint64_t *>map_pages(bitmap_bytes(self.clusters))
            self.taken.summary = <uint64_t *>map_pages(bitmap_bytes(summary_bits(self.clusters)))
            self.full = <uint64_t *>map_pages(bitmap_bytes(summary_bits(self.clusters)))
            if self.taken.words == NULL or self.taken.summary == NULL or self.full == NULL:
                raise MemoryError(f"{source.name}: no memory for the bitmap of its copy order")
            if load_acquire(&snap.within_set):
                self.within = &snap.within
                self.skipped = source.length - bytes_within(self.within, self.bits, source.length)
        pthread_mutex_init(&self.lock, NULL)

    def __dealloc__(self):
        if self.taken.words != NULL:
            unmap_pages(self.taken.words, bitmap_bytes(self.clusters))
        if self.taken.summary != NULL:
            unmap_pages(self.taken.summary, bitmap_bytes(summary_bits(self.clusters)))
        if self.full != NULL:
            unmap_pages(self.full, bitmap_bytes(summary_bits(self.clusters)))
        pthread_mutex_destroy(&self.lock)

    # -- pieces

    cdef int next(self, Piece *piece, int64_t gather) noexcept nogil:
        cdef int code
        pthread_mutex_lock(&self.lock)
        code = self.next_locked(piece, gather)
        pthread_mutex_unlock(&self.lock)
        return code

    cdef int next_locked(self, Piece *piece, int64_t gather) noexcept nogil:
        cdef Run run
        cdef int64_t end, at, got, whole, limit
        cdef int64_t size = (<int64_t>1) << self.bits
        cdef bint absent
        if self.rest_begin < self.rest_end:
            piece.offset = self.rest_begin
            piece.length = self.rest_end - self.rest_begin
            piece.zero = piece.in_ram = False
            if piece.length > self.chunk:
                piece.length = self.chunk
            self.rest_begin += piece.length
            return 1
        limit = (self.chunk + size - 1) >> self.bits
        while self.choose(&run, limit, min(max(gather, self.chunk // GATHER), self.chunk) >> self.bits):
            piece.offset = run.first << self.bits
            piece.zero = False
            piece.in_ram = run.in_ram
            absent = False
            end = (run.first + run.count) << self.bits
            if end > self.source.length:
                end = self.source.length
            # Zeroes may be known, and go in one piece whatever their length; data goes up to where they begin.
            at = piece.offset
            while at < end and at < piece.offset + self.chunk:
                if not self.extent_begin <= at < self.extent_end:
                    got = self.source.block_status(at, end - at, &self.extent_flags)
                    if got < 0:
                        piece.offset = at
                        return <int>got
                    self.extent_begin = at
                    self.extent_end = at + got
                whole = self.extent_end if self.extent_end < end else end
                if self.extent_flags & (STATUS_ZERO | STATUS_ABSENT):
                    if whole < self.source.length:
                        whole = whole >> self.bits << self.bits
                    if whole > at:      # at least one cluster of it
                        if at > piece.offset:
                            end = ((at + size - 1) >> self.bits) << self.bits
                        else:
                            end = whole
                            absent = self.extent_flags & STATUS_ABSENT
                            piece.zero = not absent
                        break
                at = self.extent_end
            if not piece.zero and not absent and end - piece.offset > self.chunk:
                # Data goes in chunks at multiples of the chunk, so that a target gets aligned writes.
                end = piece.offset + self.chunk - piece.offset % self.chunk
                end = (end + size - 1) >> self.bits << self.bits
            if end > self.source.length:
                end = self.source.length
            self.take(run.first, ((end + size - 1) >> self.bits) - run.first)
            piece.length = end - piece.offset
            if absent:
                add_relaxed(&self.skipped, <uint64_t>piece.length)      # not in the snapshot: nothing to do
                continue
            if not piece.zero and piece.length > self.chunk:
                self.rest_begin = piece.offset + self.chunk
                self.rest_end = end
                piece.length = self.chunk
            return 1
        return 0

    # -- choosing a run

    cdef bint choose(self, Run *run, int64_t limit, int64_t part) noexcept nogil:
        """The next run, which is not taken yet; False: everything is. LIMIT: clusters after which it need not go on. PART: see gather."""
        cdef int c, kind, kinds
        if self.classes.count == 1:
            run.first = self.at[0]
            run.count = self.clusters - run.first
            run.of_class = 0
            run.in_ram = False
            return run.count > 0
        if self.stored_only:
            return self.choose_stored(run, limit)
        self.handed_out += 1
        if self.handed_out > AGAIN:
            self.handed_out = 0
            for c in range(self.classes.count - 1):
                if self.classes.of_kind[COLD] != c:     # nothing new gets into that one
                    self.at[c] = 0
                    self.dry[c] = False
        for c in range(self.classes.count):
            if self.classes.of_kind[RAM] == c and self.classes.of_kind[COLD] != c and self.choose_arrival(run, limit, part):
                return True
            if self.classes.of_kind[HOT] == c and self.classes.of_kind[COLD] != c:
                if self.choose_hot(run, limit, part):
                    return True
            kinds = 0
            for kind in range(KINDS):
                if kind != HOT and self.classes.of_kind[kind] == c:
                    kinds |= 1 << kind
            if kinds and not self.dry[c]:
                if self.walk(kinds, self.at[c], self.clusters, limit, run):
                    self.at[c] = run.first
                    run.of_class = c
                    self.gather(run, part)
                    return True
                self.dry[c] = True
        # Whatever changed its class after the walk of the new one: it is taken along here.
        if self.walk(SET_ANY, self.at[KINDS], self.clusters, limit, run):
            self.at[KINDS] = run.first
            run.of_class = self.classes.count - 1
            return True
        return False

    cdef bint choose_stored(self, Run *run, int64_t limit) noexcept nogil:
        """The next run that is in a store; none is left until again()."""
        if self.walk((1 << RAM) | (1 << DISK) | (1 << ZERO), self.at[0], self.clusters, limit, run):
            self.at[0] = run.first
            run.of_class = 0
            return True
        self.at[0] = self.clusters
        return False

    cdef bint arrived(self) noexcept nogil:
        return load_relaxed(&self.snapshot.snap.geometry.recent_count) != self.arrivals

    cdef void again(self) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        self.arrivals = load_relaxed(&self.snapshot.snap.geometry.recent_count)
        self.at[0] = 0
        pthread_mutex_unlock(&self.lock)

    cdef bint choose_arrival(self, Run *run, int64_t limit, int64_t part) noexcept nogil:
        """A run that a first touch has put into RAM since the last look."""
        cdef Geometry *geometry = self.snapshot.snap.geometry
        cdef int c = self.classes.of_kind[RAM]
        cdef uint64_t now = load_relaxed(&geometry.recent_count)
        cdef uint64_t entry
        cdef int64_t first, end
        if now - self.arrivals > RECENT:
            self.arrivals = now         # too many to be told apart: walk
            self.at[c] = 0
            self.dry[c] = False
        while self.arrivals != now:
            entry = load_relaxed(geometry.recent + (self.arrivals & (RECENT - 1)))
            first = <int64_t>(entry >> 16)
            end = first + <int64_t>(entry & 0xFFFF)
            if end <= self.clusters and self.walk(1 << RAM, first, end, limit, run):
                run.of_class = c
                self.gather(run, part)
                return True
            self.arrivals += 1
        return False

    cdef bint choose_hot(self, Run *run, int64_t limit, int64_t part) noexcept nogil:
        """A run of the hottest region that has one which is in no store."""
        cdef int64_t first, end
        cdef int hottest
        heat_feed(&self.heat, self.snapshot.snap.geometry)
        while True:
            hottest = heat_hottest(&self.heat)
            if hottest < 0:
                return False
            first = self.heat.region[hottest] << self.heat.region_bits
            end = first + ((<int64_t>1) << self.heat.region_bits)
            if self.walk(SET_NOWHERE, first, end if end < self.clusters else self.clusters, limit, run):
                run.of_class = self.classes.of_kind[HOT]
                if part > limit // GATHER:
                    self.gather(run, part)
                return True
            heat_forget(&self.heat, hottest)        # all of it is copied or preserved; a new touch brings it back

    cdef void gather(self, Run *run, int64_t part) noexcept nogil:
        """Widen a run shorter than PART, within its aligned part of that many clusters, over neighbours that are not taken."""
        cdef int64_t begin, end
        if run.count >= part:
            return
        begin = run.first // part * part
        end = begin + part if begin + part < self.clusters else self.clusters
        while run.first > begin and not self.is_taken(run.first - 1):
            run.first -= 1
            run.count += 1
            run.in_ram = False
        while run.first + run.count < end and not self.is_taken(run.first + run.count):
            run.count += 1
            run.in_ram = False

    cdef bint walk(self, int kinds, int64_t first, int64_t end, int64_t limit, Run *run) noexcept nogil:
        """The first run in first..end that is in KINDS and not taken. It may be longer than LIMIT, where that costs nothing."""
        cdef uint64_t mask = 0, ram = 0, low
        cdef int64_t stop, leaf = -1
        cdef int left = STRETCHES
        cdef Ticket ticket = enter(self.snapshot.state)
        run.count = 0
        run.in_ram = kinds & (1 << RAM) != 0
        while first < end and (run.count == 0 or run.count < limit):
            if left == 0:
                leave(ticket)
                ticket = enter(self.snapshot.state)
                left = STRETCHES
                leaf = -1
            left -= 1
            self.stretches += 1
            stop = self.stretch(ticket.epoch, kinds, first, end, &leaf, &mask, &ram)
            if mask == ONES:
                if run.count == 0:
                    run.first = first
                run.count += stop - first
                run.in_ram = run.in_ram and ram == ONES
                first = stop
                continue
            if mask == 0:
                if run.count:
                    break
                first = stop
                continue
            # Bits of one word, the first of them being FIRST.
            mask >>= first & 63
            ram >>= first & 63
            if run.count == 0:
                if mask == 0:
                    first = stop
                    continue
                first += ctzll(mask)
                ram >>= ctzll(mask)
                mask >>= ctzll(mask)
                if first >= stop:
                    first = stop
                    continue
                run.first = first
            low = stop - first if mask == ONES else ctzll(~mask)
            if <int64_t>low > stop - first:
                low = stop - first
            run.count += <int64_t>low
            run.in_ram = run.in_ram and (low == 0 or ram | ~(ONES >> (64 - low)) == ONES)
            first += <int64_t>low
            if first < stop:
                break
        leave(ticket)
        return run.count > 0

    cdef int64_t stretch(self, const Epoch *epoch, int kinds, int64_t first, int64_t end, int64_t *leaf, uint64_t *mask, uint64_t *ram) noexcept nogil:
        """Where the stretch at FIRST ends. *mask, the clusters of it that are in KINDS and free: all ones, none, or the bits of its word.

        leaf: kept by the caller between calls: the first cluster from FIRST on that may have a location word, or -1.
        """
        cdef Kinds of
        cdef int64_t page = first // PAGE_BITS
        cdef int64_t stop
        cdef int64_t word = first >> 6
        mask[0] = ram[0] = 0
        if bits_next_one(self.full, page, page + 1) == page:
            stop = bits_next_zero(self.full, page, summary_bits(self.clusters)) * PAGE_BITS
            return stop if stop < end else end
        if self.within != NULL:         # what is not in the snapshot is nobody's
            stop = sparse_next_one(self.within, first, end)
            if stop > first:
                return stop
            end = bits_next_zero(self.within.words, first, end)
        if leaf[0] < first:
            leaf[0] = kinds_untouched(epoch, self.snapshot.snap, first, end)
        if leaf[0] > first:
            if not kinds & SET_NOWHERE:
                return leaf[0] if leaf[0] < end else end
            # Nothing but `taken` tells clusters apart: over pages, or within one, without a look at each word.
            end = leaf[0] if leaf[0] < end else end
            if bits_next_one(self.taken.summary, page, page + 1) != page:
                mask[0] = ONES
                stop = bits_next_one(self.taken.summary, page, summary_bits(end)) * PAGE_BITS
                return stop if stop < end else end
            stop = (page + 1) * PAGE_BITS
            stop = stop if stop < end else end
            if bits_all(self.taken.words, first, 1):
                return bits_next_zero(self.taken.words, first, stop)
            mask[0] = ONES
            return bits_next_one(self.taken.words, first, stop)
        kinds_of_word(epoch, self.snapshot.snap, word, &of)
        ram[0] = of.ram
        if kinds & (1 << RAM):
            mask[0] |= of.ram
        if kinds & (1 << DISK):
            mask[0] |= of.disk
        if kinds & (1 << ZERO):
            mask[0] |= of.zero
        if kinds & SET_NOWHERE:
            mask[0] |= ~(of.ram | of.disk | of.zero)
        mask[0] &= ~load_relaxed(self.taken.words + word)
        stop = (word + 1) << 6
        return stop if stop < end else end

    cdef bint is_taken(self, int64_t cluster) noexcept nogil:
        cdef int64_t page = cluster // PAGE_BITS
        if (self.full[page >> 6] >> (page & 63)) & 1 or (self.within != NULL and not sparse_test(self.within, cluster)):
            return True
        return (self.taken.words[cluster >> 6] >> (cluster & 63)) & 1

    cdef void take(self, int64_t first, int64_t count) noexcept nogil:
        """Mark a run as handed out; whole pages of the bitmap by their bit in `full` alone."""
        cdef int64_t end = first + count
        cdef int64_t stop
        if self.classes.count == 1:
            self.at[0] = end
            return
        while first < end:
            stop = (first // PAGE_BITS + 1) * PAGE_BITS
            if first % PAGE_BITS == 0 and (end >= stop or end == self.clusters):
                stop = end // PAGE_BITS * PAGE_BITS if end < self.clusters else (end + PAGE_BITS - 1) // PAGE_BITS * PAGE_BITS
                sparse_mark(&self.taken, first, (stop if stop < self.clusters else self.clusters) - first)
                bits_set_atomic(self.full, first // PAGE_BITS, (stop - first) // PAGE_BITS)
            else:
                if stop > end:
                    stop = end
                sparse_set_atomic(&self.taken, first, stop - first)
            first = stop

    # -- control plane: an iterator for other tools

    def next_piece(self):
        """Return (offset, length) of the next piece as a copier gets it, None when all is handed out; OSError as block status."""
        cdef Piece piece
        cdef int code
        self.source.check_open()
        with nogil:
            code = self.next(&piece, 0)
        if code < 0:
            self.source.fail(code, "block status", piece.offset, self.source.length - piece.offset)
        return (piece.offset, piece.length) if code else None

    def __iter__(self):
        return self

    def __next__(self):
        """The next runs as a structured array of ORDER_DTYPE, about ROWS of them, chosen when asked for; what can't be read is left out."""
        cdef Run run
        cdef int64_t limit = (self.chunk + ((<int64_t>1) << self.bits) - 1) >> self.bits
        cdef int64_t end, until
        cdef bint found, inside = True
        rows = []
        self.source.check_open()
        while len(rows) < ROWS:
            with nogil:
                pthread_mutex_lock(&self.lock)
                found = self.choose(&run, self.clusters, limit // GATHER)
                if found:
                    self.take(run.first, run.count)
                pthread_mutex_unlock(&self.lock)
            if not found:
                break
            while run.count:
                until = run.first + run.count if self.snapshot is None else copy_run(self.snapshot.snap, run.first, run.first + run.count, &inside)
                if inside:
                    end = min(until << self.bits, self.source.length)
                    rows.append((run.first << self.bits, end - (run.first << self.bits), run.of_class))
                run.count -= until - run.first
                run.first = until
        if not rows:
            raise StopIteration
        return _np.array(rows, dtype=ORDER_DTYPE)


cdef int class_extent(SnapshotDevice snapshot, const Classes *classes, const Heat *heat, int64_t first, int64_t end, int64_t *stop) noexcept nogil:
    cdef Kinds of
    cdef Ticket ticket
    cdef int64_t begin = first
    cdef int64_t until, changes
    cdef uint64_t bit
    cdef int kind, here, found = -1
    cdef int left = STRETCHES
    ticket = enter(snapshot.state)
    while first < end and left:
        left -= 1
        until = kinds_untouched(ticket.epoch, snapshot.snap, first, end)
        if until > first:
            here = classes.of_kind[COLD]
            if classes.of_kind[HOT] != here and heat_covers(heat, first, until, &changes):
                here = classes.of_kind[HOT]
            elif classes.of_kind[HOT] == here:
                changes = until
            if found >= 0 and here != found:
                break
            found = here
            first = changes
            continue
        kinds_of_word(ticket.epoch, snapshot.snap, first >> 6, &of)
        until = ((first >> 6) + 1) << 6
        if until > end:
            until = end
        while first < until:
            bit = (<uint64_t>1) << (first & 63)
            if of.ram & bit:
                kind = RAM
            elif of.disk & bit:
                kind = DISK
            elif of.zero & bit:
                kind = ZERO
            elif classes.of_kind[HOT] != classes.of_kind[COLD] and heat_covers(heat, first, end, &changes):
                kind = HOT
            else:
                kind = COLD
            here = classes.of_kind[kind]
            if found >= 0 and here != found:
                left = 0
                break
            found = here
            first += 1
    leave(ticket)
    stop[0] = first if first > begin else begin + 1
    return found if found >= 0 else classes.of_kind[COLD]


def order_page(SnapshotDevice snapshot not None, str policy, start=0, int64_t limit=1000):
    """Return (rows, next): a page of the copy order as a structured array of ORDER_DTYPE, without any state between pages.

    start: 0, or what the last page said is next. next: None after the last. A page holds up to LIMIT rows, and may hold none when much had
    to be passed over. What changes its class between two pages may be in both or in neither.
    """
    cdef Classes classes
    cdef Heat heat
    cdef int bits = snapshot.cluster_bits
    cdef int64_t clusters = (snapshot.length + ((<int64_t>1) << bits) - 1) >> bits
    cdef int64_t first, until, inside_end, at, end
    cdef int here, of_class
    cdef bint inside = False
    cdef int64_t left = LOOKED_AT
    snapshot.check_open()
    classes_fill(&classes, policy)
    if limit < 1:
        raise ValueError(f"limit: {limit} is less than 1")
    if not 0 <= start < classes.count * clusters:
        raise ValueError(f"start: {start} is not within this order (give 0, or what the page before said is next)")
    heat_init(&heat, bits)
    heat_feed(&heat, snapshot.snap.geometry)
    of_class, first = divmod(start, clusters)
    rows = []
    while of_class < classes.count and len(rows) < limit and left:
        with nogil:
            inside_end = copy_run(snapshot.snap, first, clusters, &inside)
            until = inside_end
            here = class_extent(snapshot, &classes, &heat, first, inside_end, &until) if inside else -1
        left -= 1
        if here == of_class:
            at, end = first << bits, min(until << bits, snapshot.length)
            if rows and rows[-1][0] + rows[-1][1] == at and rows[-1][2] == here:
                rows[-1] = (rows[-1][0], end - rows[-1][0], here)
            else:
                rows.append((at, end - at, here))
        first = until
        if first >= clusters:
            first = 0
            of_class += 1
    return _np.array(rows, dtype=ORDER_DTYPE), of_class * clusters + first if of_class < classes.count else None
