"""WriteNotifier: the filter of the old backup scheme, before copy-before-write nodes: no store, the target is where old data goes.

    guest write ─▶ enter ─ done? ──yes──────────────────────────────▶ child
                            └─no─▶ claim ─ read old data ─ write it to the TARGET ─ done ─▶ child
    job         ─▶ claim the next cluster that nobody has ─ read ─ write ─ done

The guest pays for the target's latency with every first write to a cluster: that is the scheme, kept to be compared with the
engine, and for who wants no store. There is one point in time, that of begin(), and it is the target that holds it, when the job has ended.

A bit of `claims` is the right to copy a cluster, taken once: it stays when the cluster is done, so that a claim finds at once what is
left to copy, and neither job nor guest copies a cluster twice. Who finds the claim taken and the cluster not done waits, and holds
no claim meanwhile. Who holds claims waits for the two devices only. A copy that fails gives its claim back and wakes who waits.

Order. `done` is set after the target's write has returned, and the guest's write is handed to the child after all of its clusters
are done: the child's old data can no longer be wanted. begin() holds new guest writes and waits for those under way, so that none of
these, which look at no bitmap, can land while a cluster is read: enter counts, then looks at `hold`; begin sets it, then looks at
the count; all seq_cst, not both may miss.

What fails. Old data that can't be read or can't be written to the target ends the backup and lets the guest go on (break-snapshot),
or lets the guest's write fail, and the job try that cluster again, once it gets there (break-guest-write, what QEMU's old job did). The
job's own failure ends the backup in either case.
"""

from libc.errno cimport EAGAIN, ENOMEM
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free

from fastcbw.bitmaps.mapping cimport map_pages, unmap_pages
from fastcbw.block.device cimport (BlockDevice, IO_DISCARD, IO_READ, IO_SYNC, IO_WRITE, IO_ZERO, KernelIo,
                                   MAY_UNMAP)
from fastcbw.block.filter cimport Filter
from fastcbw.block.sys cimport iovec
from fastcbw.cbw.pace cimport Pace
from fastcbw.kernels.atomic cimport add_relaxed, add_seq, fence_acquire, fence_seq, load_relaxed, load_seq, store_relaxed, store_seq, sub_seq
from fastcbw.kernels.bits cimport (bits_all_seq, bits_claim_atomic, bits_clear_atomic, bits_count, bits_next_run, bits_next_zero,
                                  bits_set_atomic)
from fastcbw.kernels.bytes cimport is_zero
from fastcbw.sync cimport (
    cond_init, cond_wait_until, now_ns, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_wait, pthread_mutex_destroy,
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, run_in_background, waits,
)
from fastcbw.units import parse_size

cdef extern from "stdlib.h" nogil:
    int posix_memalign(void **pointer, size_t alignment, size_t size) noexcept

POLICIES = ("break-snapshot", "break-guest-write")

cdef int64_t PIECE_BYTES = 1 << 20      # of a copy at once
CLUSTER_MIN, CLUSTER_MAX = 4096, 1 << 20


cdef class WriteNotifier(Filter):
    """CHILD, whose content at begin() ends up in TARGET: the guest writes through this device, WriteNotifierJob copies the rest.

    target: a device at least as long as CHILD; it is the caller's, as is CHILD, until close(), which closes CHILD only.
    cluster_size: bytes, a power of two from 4 KiB to 1 MiB. on_cbw_error: who suffers when old data can't be copied, "break-snapshot" (the
    backup fails, the guest goes on) or "break-guest-write" (the guest's write fails with the error, as in QEMU's old job).
    Raises ValueError, TypeError for arguments; MemoryError.
    """

    def __cinit__(self, BlockDevice child not None, BlockDevice target not None, *, cluster_size=65536,
                  str on_cbw_error="break-snapshot", name=None):
        cdef int64_t size = parse_size(cluster_size, "cluster_size")
        if not CLUSTER_MIN <= size <= CLUSTER_MAX or size & (size - 1):
            raise ValueError(f"cluster_size: {size} is no power of two from {CLUSTER_MIN} to {CLUSTER_MAX}")
        if on_cbw_error not in POLICIES:
            raise ValueError(f"on_cbw_error: {on_cbw_error!r} does not exist (there are {', '.join(POLICIES)})")
        if target is child:
            raise ValueError(f"target {target.name}: is the disk itself (name another device)")
        if target.length < child.length:
            raise ValueError(f"target {target.name}: its {target.length} bytes are less than the disk's {child.length}")
        if target.read_only:
            raise ValueError(f"target {target.name}: is read-only")
        self.stand_on(child, name)
        self.target = target
        self.cluster_size = size
        self.cluster_bits = size.bit_length() - 1
        self.clusters = (child.length + size - 1) // size
        self.guest_first = on_cbw_error == "break-snapshot"
        self.can_cache = child.can_cache
        self.always_waits = child.always_waits
        # A write may wait for the target: a queue has it done by a thread, whatever the child is.
        self.may_wait_in_threads()
        pthread_mutex_init(&self.mutex, NULL)
        cond_init(&self.changed)
        self.ready = True

    def __dealloc__(self):
        self.forget()
        if self.ready:
            pthread_cond_destroy(&self.changed)
            pthread_mutex_destroy(&self.mutex)

    cdef forget(self):
        if self.claims != NULL:
            unmap_pages(self.claims, self.bitmap_bytes())
        if self.done != NULL:
            unmap_pages(self.done, self.bitmap_bytes())
        self.claims = self.done = NULL

    cdef int64_t bitmap_bytes(self) noexcept nogil:
        return (self.clusters + 63) // 64 * 8

    # -- control plane

    def begin(self, *, timeout=None):
        """Make now the point in time: from here on what the guest overwrites goes to the target first. Once for each device.

        New guest writes wait while those under way end. timeout: seconds to wait for these; TimeoutError then, and nothing has changed.
        Raises ValueError when it has begun already.
        """
        cdef int64_t until = 0
        cdef bint in_time
        self.check_open()
        if load_seq(&self.state) != DORMANT:
            raise ValueError(f"{self.name}: the backup has {'ended' if self.is_ended else 'begun'} already")
        if timeout is not None:
            until = now_ns() + <int64_t>(timeout * 1e9)
        if self.claims == NULL:
            self.claims = <uint64_t *>map_pages(self.bitmap_bytes())
            self.done = <uint64_t *>map_pages(self.bitmap_bytes())
            if self.claims == NULL or self.done == NULL:
                self.forget()
                raise MemoryError(f"{self.name}: no memory for the bitmaps of {self.clusters} clusters")
        with nogil:
            store_seq(&self.hold, 1)
            add_seq(&self.waiting, 1)
            pthread_mutex_lock(&self.mutex)
            waits()
            while load_seq(&self.inflight) and not (until and now_ns() >= until):
                if until:
                    cond_wait_until(&self.changed, &self.mutex, until)
                else:
                    pthread_cond_wait(&self.changed, &self.mutex)
            in_time = load_seq(&self.inflight) == 0
            if in_time:
                store_seq(&self.state, COPYING)
            store_seq(&self.hold, 0)
            sub_seq(&self.waiting, 1)
            pthread_cond_broadcast(&self.changed)
            pthread_mutex_unlock(&self.mutex)
        if not in_time:
            raise TimeoutError(f"{self.name}: guest writes did not end within {timeout} s (nothing has begun)")

    def end(self):
        """Intercept nothing any more: for a job that has ended, or is not wanted. Ending twice is no error."""
        with nogil:
            store_seq(&self.state, ENDED)
            pthread_mutex_lock(&self.mutex)
            pthread_cond_broadcast(&self.changed)
            pthread_mutex_unlock(&self.mutex)
            self.stop_job()

    def run(self, Pace pace not None, int64_t chunk, bint in_background=False):
        """Copy until all is done, a failure, or the pace was cancelled. For threads of a job; holds no interpreter lock."""
        pthread_mutex_lock(&self.mutex)
        if self.pace is not pace:       # all threads of a job have the same
            self.pace = pace
        pthread_mutex_unlock(&self.mutex)
        with nogil:
            if in_background:
                run_in_background()
            self.work(pace, max(1, chunk >> self.cluster_bits))

    @property
    def has_begun(self):
        """Whether begin() was called, or end(), without which there is nothing to begin any more."""
        return load_seq(&self.state) != DORMANT

    @property
    def is_ended(self):
        """Whether guest writes are left alone again, for good: the job or end() has ended the backup, or a failure."""
        return load_seq(&self.state) == ENDED

    @property
    def error(self):
        """None, or what ended the backup: text with device, operation, offset, length and reason."""
        cdef BlockDevice device
        cdef char text[256]
        if not load_seq(&self.failed):
            return None
        device = self.child if self.failed_reading else self.target
        device.explain(self.failed_code, text, sizeof(text))
        doing = "read" if self.failed_reading else "write"
        return f"{device.name}: {doing} at offset {self.failed_offset}, length {self.failed_length}: {text.decode(errors='replace')}"

    @property
    def is_done(self):
        """Whether every cluster is in the target."""
        return self.done != NULL and bits_count(self.done, 0, self.clusters) == self.clusters

    def counters(self):
        """Return, in bytes: done (in the target), zero (of these, zeroes), guest (of these, copied by guest writes); guest_refused: writes."""
        return {"done": load_seq(&self.done_bytes), "zero": load_seq(&self.zero_bytes), "guest": load_seq(&self.guest_bytes),
                "guest_refused": load_seq(&self.guest_refused)}

    def close(self):
        """End the backup and close the child."""
        self.end()
        self.closed = True
        self.child.close()

    # -- guest writes

    cdef bint enter(self, bint wait) noexcept nogil:
        """Count a guest write. False: it would have to wait for begin(), and may not."""
        while True:
            add_seq(&self.inflight, 1)
            if load_seq(&self.hold) == 0:
                return True
            self.leave()
            if not wait:
                return False
            add_seq(&self.waiting, 1)
            pthread_mutex_lock(&self.mutex)
            waits()
            while load_seq(&self.hold):
                pthread_cond_wait(&self.changed, &self.mutex)
            pthread_mutex_unlock(&self.mutex)
            sub_seq(&self.waiting, 1)

    cdef void leave(self) noexcept nogil:
        sub_seq(&self.inflight, 1)
        if load_seq(&self.hold):
            self.wake()

    cdef void wake(self) noexcept nogil:
        fence_seq()
        if load_seq(&self.waiting):
            pthread_mutex_lock(&self.mutex)
            pthread_cond_broadcast(&self.changed)
            pthread_mutex_unlock(&self.mutex)

    cdef bint settled(self, int64_t offset, int64_t length) noexcept nogil:
        """Whether a write of the range has nothing left to preserve."""
        cdef int64_t first = offset >> self.cluster_bits
        return load_seq(&self.state) != COPYING or bits_all_seq(
            self.done, first, ((offset + length - 1) >> self.cluster_bits) + 1 - first)

    cdef int before_write(self, int64_t offset, int64_t length) noexcept nogil:
        """0: all of the range is in the target, or nobody wants it any more, and the write is counted. Else it fails with the code."""
        cdef int code
        self.enter(True)
        if self.settled(offset, length):
            return 0
        code = self.preserve(offset >> self.cluster_bits, ((offset + length - 1) >> self.cluster_bits) + 1)
        if code and self.guest_first:
            code = 0            # the failure is noted: the backup has ended
        if code:
            add_relaxed(&self.guest_refused, 1)
            self.leave()
        return code

    cdef int preserve(self, int64_t first, int64_t end) noexcept nogil:
        """Have the clusters first..end copied, by us or by who has claimed them."""
        cdef uint64_t got[CLAIM_WORDS + 1]
        cdef int64_t stop
        cdef int code
        while first < end and load_seq(&self.state) == COPYING:
            stop = min(end, first + CLAIM_WORDS * 64)
            if bits_claim_atomic(self.claims, got, first, stop - first):
                code = self.copy_claimed(got, first, stop - first, True)
                if code:
                    return code
            if self.wait_for_others(first, stop):
                first = stop
        return 0

    cdef bint wait_for_others(self, int64_t first, int64_t end) noexcept nogil:
        """Wait until the clusters are done, or one that is not can be claimed: False. True also when nothing is wanted any more."""
        cdef int64_t at
        cdef bint done = True
        if bits_all_seq(self.done, first, end - first):
            return True
        add_seq(&self.waiting, 1)
        fence_seq()             # then the bitmaps; wake(): the bitmaps, then `waiting`
        pthread_mutex_lock(&self.mutex)
        waits()
        while load_seq(&self.state) == COPYING:
            at = bits_next_zero(self.done, first, end)
            if at == end:
                break
            if not (load_seq(self.claims + at // 64) >> (at % 64)) & 1:
                done = False
                break
            pthread_cond_wait(&self.changed, &self.mutex)
        pthread_mutex_unlock(&self.mutex)
        sub_seq(&self.waiting, 1)
        fence_acquire()
        return done

    # -- copies

    cdef int copy_claimed(self, const uint64_t *got, int64_t first, int64_t count, bint for_guest) noexcept nogil:
        """Copy the claimed clusters of first..first+count; GOT: their bits. At an error the claims of all that is not done go back."""
        cdef int64_t base = first // 64 * 64
        cdef int64_t at = first - base
        cdef int64_t end = at + count
        cdef int64_t begin, length, piece, offset, run
        cdef void *buffer = NULL
        cdef int code = 0
        piece = min(count << self.cluster_bits, max(PIECE_BYTES, self.cluster_size))
        if posix_memalign(&buffer, 4096, <size_t>piece):
            code = -ENOMEM
            self.note_copy_failure(code, False, first << self.cluster_bits, piece, for_guest)
        piece >>= self.cluster_bits
        while True:
            run = bits_next_run(got, at, end, &begin)
            if run == 0:
                break
            at = begin + run
            while run and code == 0:
                length = min(run, piece)
                offset = (base + begin) << self.cluster_bits
                code = self.copy_run(<char *>buffer, offset, min(length << self.cluster_bits, self.length - offset), for_guest)
                if code == 0:
                    self.note_done(base + begin, length, for_guest)
                    begin += length
                    run -= length
            if run:
                bits_clear_atomic(self.claims, base + begin, run)
                self.wake()
        free(buffer)
        return code

    cdef int copy_run(self, char *buffer, int64_t offset, int64_t length, bint for_guest) noexcept nogil:
        """Copy a run of clusters; those that are all zeroes are written as zeroes."""
        cdef int64_t at = 0, begin
        cdef bint zero
        cdef int code = self.child.pread(buffer, offset, length)
        if code:
            self.note_copy_failure(code, True, offset, length, for_guest)
            return code
        while at < length:
            begin = at
            zero = is_zero(buffer + at, min(self.cluster_size, length - at))
            while at < length and is_zero(buffer + at, min(self.cluster_size, length - at)) == zero:
                at = min(length, at + self.cluster_size)
            if zero:
                add_seq(&self.zero_bytes, <uint64_t>(at - begin))
                code = self.target.write_zeroes_at(offset + begin, at - begin, MAY_UNMAP)
            else:
                code = self.target.pwrite(buffer + begin, offset + begin, at - begin, 0)
            if code:
                self.note_copy_failure(code, False, offset + begin, at - begin, for_guest)
                return code
        return 0

    cdef void note_done(self, int64_t first, int64_t count, bint for_guest) noexcept nogil:
        cdef int64_t length = min((first + count) << self.cluster_bits, self.length) - (first << self.cluster_bits)
        bits_set_atomic(self.done, first, count)
        self.wake()
        if for_guest:
            add_seq(&self.guest_bytes, <uint64_t>length)
        if add_seq(&self.done_bytes, <uint64_t>length) + <uint64_t>length == <uint64_t>self.length:
            self.stop_job()         # it may sleep for its rate, and there is nothing left to copy

    cdef void stop_job(self) noexcept nogil:
        pthread_mutex_lock(&self.mutex)
        if self.pace is not None:       # else it begins later, and finds nothing to do
            self.pace.stop(True)
        pthread_mutex_unlock(&self.mutex)

    cdef void note_copy_failure(self, int code, bint reading, int64_t offset, int64_t length, bint for_guest) noexcept nogil:
        """Of a guest's copy the policy says whether it is the backup's end; of the job's it is."""
        if for_guest and not self.guest_first:
            return
        pthread_mutex_lock(&self.mutex)
        if not load_relaxed(&self.failed):
            self.failed_code = code
            self.failed_reading = reading
            self.failed_offset = offset
            self.failed_length = length
            store_seq(&self.failed, 1)
        store_seq(&self.state, ENDED)
        pthread_cond_broadcast(&self.changed)
        pthread_mutex_unlock(&self.mutex)
        self.stop_job()

    # -- the job

    cdef int64_t next_claim(self, uint64_t *got, int64_t most, int64_t *first) noexcept nogil:
        """Claim of the next clusters that nobody has, among MOST that lie from *FIRST on; of how many. 0: none is free."""
        cdef int64_t at, count
        most = min(most, CLAIM_WORDS * 64)
        at = load_relaxed(&self.cursor)
        while True:
            at = bits_next_zero(self.claims, at, self.clusters)
            count = min(most, self.clusters - at)
            if count == 0 or bits_claim_atomic(self.claims, got, at, count):
                break
        store_relaxed(&self.cursor, at + count)     # a hint: another worker may set it back, or forth
        first[0] = at
        return count

    cdef bint pay(self, Pace pace, int64_t length) noexcept nogil:
        """Wait for LENGTH bytes by the rate. False: cancelled, or nobody wants the copy any more."""
        cdef int64_t step
        while length > 0:
            step = pace.step(length)
            if step == 0 or load_seq(&self.state) != COPYING:
                return False
            length -= step
        return True

    cdef void work(self, Pace pace, int64_t most) noexcept nogil:
        cdef uint64_t got[CLAIM_WORDS + 1]
        cdef int64_t first, count, begun
        cdef bint more = True
        while more and pace.take():
            more = False
            if bits_next_zero(self.claims, load_relaxed(&self.cursor), self.clusters) == self.clusters:
                more = not self.rest_is_done()
            # The rate is paid for before anything is claimed: a guest write never waits for a claim that sleeps.
            elif self.pay(pace, most << self.cluster_bits):
                begun = now_ns()
                count = self.next_claim(got, most, &first)
                more = count == 0 or self.copy_claimed(got, first, count, False) == 0
                pace.moved(count << self.cluster_bits, now_ns() - begun)
            pace.give()
        pace.stop(True)         # who sleeps is not needed any more: all is done, or nobody wants it

    cdef bint rest_is_done(self) noexcept nogil:
        """Nothing is free to claim: wait for who copies the rest. False: a copy failed, and there is something to claim again."""
        if self.wait_for_others(0, self.clusters):
            return True
        store_relaxed(&self.cursor, 0)
        return False

    # -- data plane

    cdef int preadv(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        return self.child.preadv(vector, count, offset, length)

    cdef int preadv_nowait(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        return self.child.preadv_nowait(vector, count, offset, length)

    cdef int pwritev(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef int code = self.before_write(offset, length)
        if code == 0:
            code = self.child.pwritev(vector, count, offset, length, flags)
            self.leave()
        return code

    cdef int pwritev_nowait(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        """A write that has nothing to preserve goes to the child in this thread; another by a thread that may wait."""
        cdef int code = -EAGAIN
        if not self.enter(False):
            return -EAGAIN
        if self.settled(offset, length):
            code = self.child.pwritev_nowait(vector, count, offset, length, flags)
        self.leave()
        return code

    cdef int write_zeroes_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef int code = self.before_write(offset, length)
        if code == 0:
            code = self.child.write_zeroes_at(offset, length, flags)
            self.leave()
        return code

    cdef int discard_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef int code = self.before_write(offset, length)
        if code == 0:
            code = self.child.discard_at(offset, length, flags)
            self.leave()
        return code

    cdef bint may_wait(self, int operation) noexcept nogil:
        if operation in (IO_WRITE, IO_ZERO, IO_DISCARD) and load_seq(&self.state) == COPYING:
            return True
        return self.child.may_wait(operation)

    cdef bint queue_begin(self, int operation, const iovec *vector, int count, int64_t offset, int64_t length,
                          uint32_t flags, KernelIo *io) noexcept nogil:
        """Reads and flushes are the child's; what writes has to be counted from its first look at the bitmap to its end: the method."""
        if operation != IO_READ and operation != IO_SYNC:
            return False
        return self.child.queue_begin(operation, vector, count, offset, length, flags, io)

    cdef int cache_at(self, int64_t offset, int64_t length) noexcept nogil:
        return self.child.cache_at(offset, length)
