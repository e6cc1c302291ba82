"""IoQueue: many requests of one thread under way at once, in the kernel's io_uring or in threads; beside the synchronous
methods of BlockDevice, with the same results.

        submit ─┬─ device not queueable, or engine sync ──▶ done at once ───────────┐
                ├─ engine uring, and device.queue_begin() says yes ──▶ the ring ────┤
                │                                failed there: once more by ──┐     ├──▶ ended ──▶ poll
                └─ the rest: engine threads; unaligned, FUA, zeroes, discards ┴─▶ threads

The same results by construction: what the kernel fails, or ends early without an explanation, is done once more by the
device's own method, whose answer counts; only short transfers go on in the ring. A device may ask for several stages of one
request (device.queue_end says so), and give it to the threads between any two of them.

Invariants: a slot is unused, or in the ring, or with the threads, or ended; in_flight counts requests: slots that are neither
unused nor late. A slot is late when the kernel has not done its stage in time and another slot has the request; of these there are
at most `depth` beside `depth` requests, and slots for both. The ring holds at most one entry for each slot and one for the
threads' event; what is late was submitted long ago, and its completion ring has twice the places, so neither side can be full.
"""

cimport cython
from cpython.ref cimport PyObject
from libc.errno cimport EAGAIN, EBADF, EINTR, EIO, ENOMEM
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc

import os as _os

from fastcbw.block.device import engine_number as _engine_number
from fastcbw.block.device cimport (BlockDevice, ENGINE_SYNC, ENGINE_THREADS, ENGINE_URING, IO_DISCARD, IO_READ, IO_SYNC,
                                   IO_WRITE, IO_ZERO, QUEUE_ENDED, QUEUE_METHOD, QUEUE_NEXT)
from fastcbw.block.threads cimport IO_CACHE, SLOT_PIECES, THREADS_MAX, perform
from fastcbw.kernels.lent cimport Lent, lend
from fastcbw.sync cimport now_ns, sleep_ns

cdef extern from "<errno.h>" nogil:
    enum:
        ECANCELED
        EOWNERDEAD
        ETIME

cdef extern from "forks.h" nogil:
    uint32_t fcbw_forks() noexcept

cdef extern from "uring.h" nogil:
    enum:
        FCBW_URING_READ
        FCBW_URING_WRITE
        FCBW_URING_SYNC
        FCBW_URING_POLL
    int fcbw_uring_open(fcbw_uring *ring, uint32_t entries) noexcept
    void fcbw_uring_close(fcbw_uring *ring) noexcept
    void fcbw_uring_close_forked(fcbw_uring *ring) noexcept
    uint32_t fcbw_uring_waiting(fcbw_uring *ring) noexcept
    void fcbw_uring_add(fcbw_uring *ring, int kind, int fd, const iovec *vector, int count, int64_t offset, uint64_t data) noexcept
    bint fcbw_uring_take_back(fcbw_uring *ring, uint64_t *data) noexcept
    int fcbw_uring_enter(fcbw_uring *ring, uint32_t want, int64_t timeout_ns) noexcept
    bint fcbw_uring_reap(fcbw_uring *ring, uint64_t *data, int *result) noexcept
    bint fcbw_uring_owes(fcbw_uring *ring) noexcept


cdef inline int moved_on(iovec *vector, int64_t done, int *count) noexcept nogil:
    """Take DONE bytes off the front of VECTOR, which has more; return how many entries are used up, also taken off *COUNT."""
    cdef int first = 0
    while done > 0 or vector[first].iov_len == 0:
        if done < <int64_t>vector[first].iov_len:
            vector[first].iov_base = <char *>vector[first].iov_base + done
            vector[first].iov_len -= <size_t>done
            break
        done -= <int64_t>vector[first].iov_len
        first += 1
    if count != NULL:
        count[0] -= first
    return first


cdef enum:
    HELPERS_MAX = 16    # threads beside a ring
    TRIES_MAX = 8       # of a request that the kernel says to try again
    DRAINED = 64


def check_engine(name):
    """Return the number of the engine NAME ("sync", "threads", "uring").

    Raises ValueError for a name that does not exist, OSError where the kernel does not have the engine or does not let us.
    """
    cdef fcbw_uring ring
    cdef int code
    number = _engine_number(name)
    if number == ENGINE_URING:
        code = fcbw_uring_open(&ring, 4)
        if code:
            _refuse(code)
        fcbw_uring_close(&ring)
    return number


def _refuse(int code):
    raise OSError(-code, f"io: 'uring': the kernel gives no io_uring: {_os.strerror(-code)} (take io='threads')")


@cython.no_gc_clear     # __dealloc__ waits for requests whose buffers are held
cdef class IoQueue:
    """Requests of one thread, at most DEPTH under way.

    engine: "sync", "threads" or "uring"; raises as check_engine() does, ValueError for a depth that is not 1 to 4096.
    The def methods are for tests and for the control plane. See queue.pxd for what is guaranteed.
    """

    def __cinit__(self, str engine, int depth=64):
        cdef int i, code
        self.ring.fd = -1
        self.closed = True
        self.engine = _engine_number(engine)
        if not 1 <= depth <= DEPTH_MAX:
            raise ValueError(f"depth: {depth} is not 1 to {DEPTH_MAX}")
        self.depth = depth
        self.held = {}
        self.forks = fcbw_forks()
        self.slots = <IoSlot *>calloc(2 * depth, sizeof(IoSlot))
        if self.slots == NULL:
            raise MemoryError
        for i in range(2 * depth):
            self.slots[i].next = self.unused
            self.unused = &self.slots[i]
        if self.engine != ENGINE_SYNC:
            self.threads = IoThreads(min(depth, THREADS_MAX if self.engine == ENGINE_THREADS else HELPERS_MAX))
        if self.engine == ENGINE_URING:
            code = fcbw_uring_open(&self.ring, depth + 1)
            if code:
                _refuse(code)
        self.closed = False

    def __dealloc__(self):
        if self.slots != NULL:
            self._end()
            free(self.slots)

    cdef bint is_forked(self) noexcept nogil:
        return fcbw_forks() != self.forks

    # -- submission

    cdef int submit_read(self, PyObject *device, const iovec *vector, int count, int64_t offset, int64_t length,
                         uint64_t cookie) noexcept nogil:
        return self.submit(IO_READ, device, vector, count, offset, length, 0, cookie)

    cdef int submit_write(self, PyObject *device, const iovec *vector, int count, int64_t offset, int64_t length,
                          uint32_t flags, uint64_t cookie) noexcept nogil:
        return self.submit(IO_WRITE, device, vector, count, offset, length, flags, cookie)

    cdef int submit_zero(self, PyObject *device, int64_t offset, int64_t length, uint32_t flags, uint64_t cookie) noexcept nogil:
        return self.submit(IO_ZERO, device, NULL, 0, offset, length, flags, cookie)

    cdef int submit_discard(self, PyObject *device, int64_t offset, int64_t length, uint32_t flags,
                            uint64_t cookie) noexcept nogil:
        return self.submit(IO_DISCARD, device, NULL, 0, offset, length, flags, cookie)

    cdef int submit_sync(self, PyObject *device, uint64_t cookie) noexcept nogil:
        return self.submit(IO_SYNC, device, NULL, 0, 0, 0, 0, cookie)

    cdef int submit(self, int operation, PyObject *device, const iovec *vector, int count, int64_t offset, int64_t length,
                    uint32_t flags, uint64_t cookie) noexcept nogil:
        cdef IoSlot *slot = self.unused
        cdef int i
        if self.closed:
            return -EBADF
        if self.is_forked():
            return -EOWNERDEAD
        if self.in_flight >= self.depth:
            return -EAGAIN
        slot.vector = slot.own_vector
        if count > SLOT_PIECES:
            slot.vector = <iovec *>malloc(sizeof(iovec) * <size_t>count)
            if slot.vector == NULL:
                return -ENOMEM
        self.unused = slot.next
        for i in range(count):
            slot.vector[i] = vector[i]
        slot.device = device
        slot.cookie = cookie
        slot.operation = operation
        slot.flags = flags
        slot.offset = offset
        slot.length = length
        slot.first = 0
        slot.count = count
        slot.tries = 0
        self.in_flight += 1
        if self.engine == ENGINE_SYNC or not (<BlockDevice>device).queueable:
            slot.code = perform(slot)
            self.end(slot)
        elif self.engine != ENGINE_URING or not self.to_kernel(slot):
            self.to_threads(slot)
        return 0

    cdef bint to_kernel(self, IoSlot *slot) noexcept nogil:
        """Put the request into the ring, if the device lets the kernel do it."""
        if self.ring_lost or slot.operation == IO_CACHE:        # which is nothing of the kernel's
            return False
        slot.io.operation = slot.operation
        slot.io.vector = NULL
        slot.io.deadline_ns = 0
        slot.late = False
        if not (<BlockDevice>slot.device).queue_begin(
                slot.operation, slot.vector, slot.count, slot.offset, slot.length, slot.flags, &slot.io):
            return False
        self.kernel_count += 1
        slot.in_kernel = True
        self.add_entry(slot)
        return True

    cdef void add_entry(self, IoSlot *slot) noexcept nogil:
        cdef int kind = FCBW_URING_SYNC
        if slot.io.operation == IO_READ:
            kind = FCBW_URING_READ
        elif slot.io.operation == IO_WRITE:
            kind = FCBW_URING_WRITE
        if slot.io.deadline_ns and (self.deadline_ns == 0 or slot.io.deadline_ns < self.deadline_ns):
            self.deadline_ns = slot.io.deadline_ns
        if slot.io.vector != NULL:
            fcbw_uring_add(&self.ring, kind, slot.io.fd, slot.io.vector, slot.io.count, slot.io.offset, <uint64_t>slot)
        else:
            fcbw_uring_add(&self.ring, kind, slot.io.fd, slot.vector + slot.first, slot.count - slot.first, slot.offset,
                           <uint64_t>slot)

    cdef void to_threads(self, IoSlot *slot) noexcept nogil:
        # What is in memory needs no thread.
        if slot.operation == IO_READ and self.engine == ENGINE_THREADS:
            slot.code = (<BlockDevice>slot.device).preadv_nowait(slot.vector, slot.count, slot.offset, slot.length)
            if slot.code != -EAGAIN:
                self.end(slot)
                return
        if not self.threads.push(slot):
            slot.code = perform(slot)
            self.end(slot)

    cdef void end(self, IoSlot *slot) noexcept nogil:
        if slot.vector != slot.own_vector:
            free(slot.vector)
            slot.vector = slot.own_vector
        slot.next = NULL
        if self.ended == NULL:
            self.ended = slot
        else:
            self.ended_last.next = slot
        self.ended_last = slot
        self.ended_count += 1

    # -- completion

    cdef void kernel_answered(self, IoSlot *slot, int result) noexcept nogil:
        cdef bint staged = slot.io.vector != NULL
        cdef int64_t length = slot.io.length if staged else slot.length
        if (result == -EAGAIN or result == -EINTR) and slot.tries < TRIES_MAX and not self.ring_lost and not slot.late:
            slot.tries += 1
            self.add_entry(slot)
            return
        if 0 < result < length and not self.ring_lost and not slot.late:
            if staged:
                slot.io.offset += result
                slot.io.length -= result
                slot.io.vector += moved_on(slot.io.vector, result, &slot.io.count)
            else:
                slot.offset += result
                slot.length -= result
                slot.first += moved_on(slot.vector + slot.first, result, NULL)
            self.add_entry(slot)
            return
        if slot.io.operation != IO_SYNC and result >= 0:
            result = 0 if result == length else -EIO        # the end of a file that somebody shrank
        self.leave_kernel(slot, result)

    cdef void leave_kernel(self, IoSlot *slot, int code) noexcept nogil:
        """What was asked of the kernel has ended with CODE: go on as the device says."""
        cdef int what
        if slot.operation == IO_SYNC and code == -ECANCELED:
            code = 0        # not asked at all: the device must not take it for a failure
            what = QUEUE_METHOD
            (<BlockDevice>slot.device).queue_end(slot.operation, NULL, 0, 0, 0, slot.flags, &slot.io, 0)
        else:
            what = (<BlockDevice>slot.device).queue_end(slot.operation, slot.vector + slot.first, slot.count - slot.first, slot.offset,
                                                        slot.length, slot.flags, &slot.io, code)
        if slot.late:
            self.kernel_count -= 1
            self.late_count -= 1
            slot.in_kernel = slot.late = False
            slot.next = self.unused
            self.unused = slot
            return
        while what == QUEUE_NEXT and self.ring_lost:
            what = (<BlockDevice>slot.device).queue_end(slot.operation, slot.vector + slot.first, slot.count - slot.first, slot.offset,
                                                        slot.length, slot.flags, &slot.io, -ECANCELED)
            code = -ECANCELED
        if what == QUEUE_NEXT:
            slot.tries = 0
            self.add_entry(slot)
            return
        self.kernel_count -= 1
        slot.in_kernel = False
        # A sync never twice: the kernel tells a lost write-back once.
        if what == QUEUE_ENDED and (code == 0 or slot.operation == IO_SYNC):
            slot.code = code
            self.end(slot)
        else:
            self.to_threads(slot)

    cdef void expire(self) noexcept nogil:
        """Give the requests whose stage is late to the threads. Few and rare: all slots are looked at."""
        cdef int64_t now
        cdef int64_t next_ns = 0
        cdef IoSlot *slot
        cdef int i
        if self.deadline_ns == 0:
            return
        now = now_ns()
        if now < self.deadline_ns:
            return
        for i in range(2 * self.depth):
            slot = &self.slots[i]
            if not slot.in_kernel or slot.late or slot.io.deadline_ns == 0:
                continue
            if now >= slot.io.deadline_ns and self.late_count < self.depth:
                self.replace(slot)
            elif next_ns == 0 or slot.io.deadline_ns < next_ns:
                next_ns = slot.io.deadline_ns
        self.deadline_ns = next_ns

    cdef void replace(self, IoSlot *late) noexcept nogil:
        """Have the threads do the request of LATE, which keeps what it needs to clean up."""
        cdef IoSlot *slot = self.unused
        cdef int i
        self.unused = slot.next
        slot.device = late.device
        slot.cookie = late.cookie
        slot.operation = late.operation
        slot.flags = late.flags
        slot.offset = late.offset
        slot.length = late.length
        slot.first = late.first
        slot.count = late.count
        slot.tries = 0
        slot.in_kernel = slot.late = False
        slot.vector = slot.own_vector
        if late.vector != late.own_vector:
            slot.vector = late.vector
            late.vector = late.own_vector
        else:
            for i in range(late.count):
                slot.vector[i] = late.vector[i]
        late.count = late.first = 0
        late.late = True
        self.late_count += 1
        (<BlockDevice>late.device).queue_late(late.operation, &late.io)
        self.to_threads(slot)

    cdef int64_t next_deadline(self) noexcept nogil:
        return self.deadline_ns

    cdef bint is_idle(self) noexcept nogil:
        return self.in_flight == 0 and self.late_count == 0

    cdef void reap(self) noexcept nogil:
        """Move what has ended in the ring and with the threads to the ended."""
        cdef IoSlot *slot
        cdef IoSlot *after
        cdef uint64_t data = 0
        cdef int result = 0
        if self.engine == ENGINE_SYNC:
            return
        if self.engine == ENGINE_URING:
            while fcbw_uring_reap(&self.ring, &data, &result):
                if data == 0:
                    self.watching = False
                else:
                    self.kernel_answered(<IoSlot *>data, result)
        slot = self.threads.take_ended()
        while slot != NULL:
            after = slot.next
            self.end(slot)
            slot = after

    cdef bint enter(self, int want, int64_t timeout_ns) noexcept nogil:
        """Give the ring's entries to the kernel and wait for WANT completions; False: timed out.

        What the kernel does not take the threads do.
        """
        cdef uint64_t data = 0
        cdef int code
        if self.threads.outstanding and not self.watching:
            self.watching = True
            fcbw_uring_add(&self.ring, FCBW_URING_POLL, self.threads.event_fd, NULL, 0, 0, 0)
        code = fcbw_uring_enter(&self.ring, <uint32_t>want, timeout_ns)
        if code == 0 or code == -EINTR:
            return True
        if code == -ETIME:
            return False
        if code != -EAGAIN and code != -ENOMEM:
            self.ring_lost = True
        while fcbw_uring_take_back(&self.ring, &data):
            if data == 0:
                self.watching = False
            else:
                self.leave_kernel(<IoSlot *>data, -ECANCELED)
        if want:
            sleep_ns(100000)    # what is in the kernel ends without us; the caller looks again
        return True

    cdef int poll(self, IoDone *done, int room, int min_complete, int64_t timeout_ns) noexcept nogil:
        cdef int64_t deadline = now_ns() + timeout_ns if timeout_ns > 0 else 0, left = timeout_ns
        cdef int64_t until
        cdef IoSlot *slot
        cdef bint in_time = True, soon
        cdef int count = 0
        if self.is_forked():
            return -EOWNERDEAD
        if self.closed and self.in_flight == 0:
            return 0
        if min_complete > self.in_flight:
            min_complete = self.in_flight
        if min_complete > room:
            min_complete = room
        self.reap()
        self.expire()
        if self.engine == ENGINE_URING and self.ended_count >= min_complete \
                and (self.untold() or self.kernel_count and self.ended == NULL and fcbw_uring_owes(&self.ring)):
            self.enter(0, 0)
            self.reap()
        while self.ended_count < min_complete and in_time:
            self.expire()
            if timeout_ns > 0:
                left = deadline - now_ns()
                if left < 0:
                    left = 0
            soon = False
            if self.deadline_ns:
                until = self.deadline_ns - now_ns()
                if until < 0:
                    until = 1000000     # as many late ones as there may be: look again in a while
                if timeout_ns < 0 or until < left:
                    left = until
                    soon = True
            if self.engine == ENGINE_THREADS:
                in_time = self.threads.wait(left)
            elif self.threads.outstanding or self.kernel_count == 0:
                in_time = self.enter(1, left)       # one wake-up may stand for several
            else:
                in_time = self.enter(min_complete - self.ended_count, left)
            in_time = in_time or soon
            left = timeout_ns
            self.reap()
        while count < room and self.ended != NULL:
            slot = self.ended
            self.ended = slot.next
            self.ended_count -= 1
            self.in_flight -= 1
            done[count].cookie = slot.cookie
            done[count].code = slot.code
            count += 1
            slot.next = self.unused
            self.unused = slot
        if self.engine == ENGINE_URING and self.untold():
            self.enter(0, 0)        # what came of the last look: whoever sleeps on fd() now must be woken for it
        return count

    cdef bint untold(self) noexcept nogil:
        """Whether there is something that the kernel has to be told: entries, or to watch the threads."""
        return fcbw_uring_waiting(&self.ring) > 0 or self.threads.outstanding > 0 and not self.watching

    cdef int fd(self) noexcept nogil:
        if self.engine == ENGINE_URING:
            return self.ring.fd
        return self.threads.event_fd if self.engine == ENGINE_THREADS else -1

    cdef void drain(self) noexcept nogil:
        """Wait for all that is under way and forget it."""
        cdef IoDone done[DRAINED]
        while self.in_flight > 0 and self.poll(done, DRAINED, 1, -1) >= 0:
            pass
        while self.late_count > 0:
            self.enter(1, -1)
            self.reap()

    # -- the door

    def _end(self):
        """Wait for what is under way, unless it is the parent's; release everything. May be called twice."""
        self.closed = True
        if self.is_forked():
            self.threads = None
            fcbw_uring_close_forked(&self.ring)
            return
        with nogil:
            self.drain()
            if self.threads is not None:
                self.threads.stop()
            if self.ring.fd >= 0:
                fcbw_uring_close(&self.ring)
        self.threads = None
        self.held = {}

    def _submit(self, int operation, BlockDevice device not None, int64_t offset, int64_t length, buffer, uint32_t flags, cookie):
        cdef Lent lent
        cdef iovec vector
        cdef uint64_t number = cookie
        cdef int code, count = 0
        device.check_range(offset, length)
        if length == 0 and operation != IO_SYNC:
            raise ValueError("length: a request of no bytes")
        if number in self.held:
            raise ValueError(f"cookie: {number} is under way already")
        if buffer is not None:
            lent = lend(buffer, "buffer", "uint8", False)
            vector.iov_base = lent.start
            vector.iov_len = <size_t>length
            count = 1
        with nogil:
            code = self.submit(operation, <PyObject *>device, &vector, count, offset, length, flags, number)
        if code == -EAGAIN:
            raise BlockingIOError(EAGAIN, f"the queue is full, {self.depth} requests (poll first)")
        if code == -EBADF:
            raise ValueError("the queue is closed")
        if code == -EOWNERDEAD:
            raise RuntimeError("a fork does not take queues along (make a new one)")
        if code:
            raise OSError(-code, _os.strerror(-code))
        self.held[number] = (device, buffer)

    def submit_read_into(self, device, offset, buffer, cookie):
        """Begin to fill BUFFER (contiguous bytes, writable). BlockingIOError when the queue is full."""
        view = memoryview(buffer)
        if view.readonly:
            raise TypeError("buffer: it is read-only")
        self._submit(IO_READ, device, offset, view.nbytes, view.cast("B"), 0, cookie)

    def submit_write_from(self, device, offset, data, cookie, *, uint32_t flags=0):
        """Begin to write DATA (contiguous bytes), which must not change until poll() has returned the cookie."""
        view = memoryview(data)
        self._submit(IO_WRITE, device, offset, view.nbytes, view.cast("B"), flags, cookie)

    def submit_zeroes(self, device, offset, length, cookie, *, uint32_t flags=0):
        """Begin to zero a range."""
        self._submit(IO_ZERO, device, offset, length, None, flags, cookie)

    def submit_discards(self, device, offset, length, cookie, *, uint32_t flags=0):
        """Begin to discard a range."""
        self._submit(IO_DISCARD, device, offset, length, None, flags, cookie)

    def submit_flush(self, device, cookie):
        """Begin to flush what poll() has returned."""
        self._submit(IO_SYNC, device, 0, 0, None, 0, cookie)

    def wait(self, int min_complete=0, timeout=None):
        """Return what has ended as a list of (cookie, 0 or -errno); see poll() in queue.pxd. timeout: seconds, None: for ever."""
        cdef IoDone done[DRAINED]
        cdef int64_t timeout_ns = -1 if timeout is None else <int64_t>(timeout * 1e9)
        cdef int got, i
        ended = []
        if self.closed:
            raise ValueError("the queue is closed")
        while True:
            with nogil:
                got = self.poll(done, DRAINED, min_complete, timeout_ns)
            if got < 0:
                raise RuntimeError("a fork does not take queues along (make a new one)")
            for i in range(got):
                self.held.pop(done[i].cookie, None)
                ended.append((done[i].cookie, done[i].code))
            min_complete -= got
            if got < DRAINED:
                return ended

    def fileno(self):
        """Return what can be waited for; ValueError when closed, or with the engine "sync"."""
        if self.closed or self.fd() < 0:
            raise ValueError("there is nothing to wait for (closed, or engine 'sync')")
        return self.fd()

    def close(self):
        """Wait for all that is under way, forget the results, end the threads. Closing twice is no error."""
        if not self.closed:
            self._end()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()
