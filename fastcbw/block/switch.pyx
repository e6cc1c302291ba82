"""SwitchDevice: a place where one device can be put in another's stead while requests come in.

    request ─▶ counted? held: wait ─▶ child ─▶ counted out
    control ─▶ hold() ─ new requests wait, those under way end ─▶ put(other) ─▶ release()

The drained section between hold() and release() is of this place only: what goes on beside it goes on. It is bounded in time; at the
bound requests go on to the child that was there, and nothing has changed. Several places are changed as one by holding all of them first.

A request is counted, then looks at `hold`; hold() sets it, then looks at the counts; all seq_cst, so that not both miss. The counts of all
lines are added up while no new request can be counted for good: each only goes down, and a request that ends on another line than
it began on is seen as under way or not at all, so that a sum of nothing means that nothing is.
"""

from libc.errno cimport EAGAIN, ETIMEDOUT
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from fastcbw.block.device cimport BlockDevice, KernelIo, QUEUE_NEXT
from fastcbw.block.filter cimport Filter
from fastcbw.block.sys cimport iovec
from fastcbw.kernels.atomic cimport add_seq, load_seq, store_seq, sub_seq
from fastcbw.sync cimport (
    cond_init, cond_wait_until, now_ns, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_wait, pthread_mutex_destroy,
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, waits,
)

cdef extern from "threads.h" nogil:
    int thread_slot "fcbw_thread_slot"() noexcept


cdef class SwitchDevice(Filter):
    """CHILD, for now. Closing it closes nothing but itself: whose the children are is for who puts them there to know."""

    def __cinit__(self, BlockDevice child not None, *, name=None):
        self.stand_on(child, name)
        self.can_cache = child.can_cache
        # Another child may wait where this one does not: a queue has threads for that.
        self.may_wait_in_threads()
        self.always_waits = child.always_waits
        self.lines = <SwitchLine *>calloc(SWITCH_LINES, sizeof(SwitchLine))
        if self.lines == NULL:
            raise MemoryError
        pthread_mutex_init(&self.mutex, NULL)
        cond_init(&self.changed)
        self.ready = True

    def __dealloc__(self):
        free(self.lines)
        if self.ready:
            pthread_cond_destroy(&self.changed)
            pthread_mutex_destroy(&self.mutex)

    # -- control plane; one thread at a time

    def hold(self, double timeout):
        """Have new requests wait and return when those under way have ended: until release() the child is idle.

        timeout: seconds. TimeoutError: they did not end within it, requests go on, and nothing has changed.
        """
        cdef int64_t until = now_ns() + <int64_t>(timeout * 1e9)
        cdef bint idle
        with nogil:
            pthread_mutex_lock(&self.mutex)
            store_seq(&self.hold_, 1)
            while True:
                idle = self.is_idle()
                if idle or cond_wait_until(&self.changed, &self.mutex, until) == ETIMEDOUT:
                    break
            idle = idle or self.is_idle()
            if not idle:
                store_seq(&self.hold_, 0)
                pthread_cond_broadcast(&self.changed)
            pthread_mutex_unlock(&self.mutex)
        if not idle:
            raise TimeoutError(f"{self.name}: requests under way did not end within {timeout:g} s (nothing was changed)")

    def check(self, BlockDevice other not None):
        """Raise ValueError when OTHER can't be put here: it has another length, or can't be written where this one can."""
        if other.length != self.length:
            raise ValueError(f"{other.name}: its {other.length} bytes are not the {self.length} of {self.name}")
        if other.read_only and not self.read_only:
            raise ValueError(f"{other.name}: is read-only")
        if other is self:
            raise ValueError(f"{other.name}: would be behind itself")

    def put(self, BlockDevice other not None):
        """Have requests go to OTHER from here on; only between hold() and release(). Return the device that was there."""
        if not load_seq(&self.hold_):
            raise RuntimeError(f"{self.name}: put without hold")
        self.check(other)
        before, self.child = self.child, other
        return before

    def release(self):
        """Let requests go on."""
        with nogil:
            pthread_mutex_lock(&self.mutex)
            store_seq(&self.hold_, 0)
            pthread_cond_broadcast(&self.changed)
            pthread_mutex_unlock(&self.mutex)

    def close(self):
        """Take no more requests."""
        self.closed = True

    cdef int explain(self, int code, char *text, size_t size) noexcept nogil:
        """Counted, too, so that the child stays; after a change another one says what the code means, which is of no other kind.

        It never waits: callers hold the interpreter, or are who holds the place. Meanwhile the code's own words have to do.
        """
        cdef int shown
        if not self.try_enter():
            return BlockDevice.explain(self, code, text, size)
        shown = self.child.explain(code, text, size)
        self.leave()
        return shown

    # -- counting

    cdef bint is_idle(self) noexcept nogil:
        cdef uint64_t sum = 0
        cdef int i
        for i in range(SWITCH_LINES):
            sum += load_seq(&self.lines[i].inflight)
        return sum == 0

    cdef bint try_enter(self) noexcept nogil:
        add_seq(&self.lines[thread_slot() & (SWITCH_LINES - 1)].inflight, 1)
        if load_seq(&self.hold_) == 0:
            return True
        self.leave()
        return False

    cdef void enter(self) noexcept nogil:
        while not self.try_enter():
            pthread_mutex_lock(&self.mutex)
            waits()
            while load_seq(&self.hold_):
                pthread_cond_wait(&self.changed, &self.mutex)
            pthread_mutex_unlock(&self.mutex)

    cdef void leave(self) noexcept nogil:
        sub_seq(&self.lines[thread_slot() & (SWITCH_LINES - 1)].inflight, 1)
        if load_seq(&self.hold_):
            pthread_mutex_lock(&self.mutex)
            pthread_cond_broadcast(&self.changed)
            pthread_mutex_unlock(&self.mutex)

    # -- data plane

    cdef int preadv(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        cdef int code
        self.enter()
        code = self.child.preadv(vector, count, offset, length)
        self.leave()
        return code

    cdef int preadv_nowait(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        cdef int code
        if not self.try_enter():
            return -EAGAIN
        code = self.child.preadv_nowait(vector, count, offset, length)
        self.leave()
        return code

    cdef int pwritev(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef int code
        self.enter()
        code = self.child.pwritev(vector, count, offset, length, flags)
        self.leave()
        return code

    cdef int pwritev_nowait(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef int code
        if not self.try_enter():
            return -EAGAIN
        code = self.child.pwritev_nowait(vector, count, offset, length, flags)
        self.leave()
        return code

    cdef int write_zeroes_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef int code
        self.enter()
        code = self.child.write_zeroes_at(offset, length, flags)
        self.leave()
        return code

    cdef int discard_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef int code
        self.enter()
        code = self.child.discard_at(offset, length, flags)
        self.leave()
        return code

    cdef int sync(self) noexcept nogil:
        cdef int code
        self.enter()
        code = self.child.sync()
        self.leave()
        return code

    cdef bint may_wait(self, int operation) noexcept nogil:
        cdef bint may
        if not self.try_enter():
            return True
        may = self.child.may_wait(operation)
        self.leave()
        return may

    cdef bint queue_begin(self, int operation, const iovec *vector, int count, int64_t offset, int64_t length,
                          uint32_t flags, KernelIo *io) noexcept nogil:
        """Counted until queue_end, which always comes."""
        if not self.try_enter():
            return False
        if self.child.queue_begin(operation, vector, count, offset, length, flags, io):
            return True
        self.leave()
        return False

    cdef int queue_end(self, int operation, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags,
                       KernelIo *io, int code) noexcept nogil:
        cdef int what = self.child.queue_end(operation, vector, count, offset, length, flags, io, code)
        if what != QUEUE_NEXT:
            self.leave()
        return what

    cdef int64_t block_status(self, int64_t offset, int64_t length, uint32_t *flags) noexcept nogil:
        cdef int64_t got
        self.enter()
        got = self.child.block_status(offset, length, flags)
        self.leave()
        return got

    cdef int cache_at(self, int64_t offset, int64_t length) noexcept nogil:
        cdef int code
        self.enter()
        code = self.child.cache_at(offset, length)
        self.leave()
        return code
