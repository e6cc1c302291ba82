"""BufferPool: the request buffers of all connections of a server, with one limit.

A request that does not fit the fixed buffers of its connection takes its buffer here. When the pool is empty the
connection waits, and while it waits its socket is not read: the limit reaches the client as back-pressure.

Two classes share the pool. Guests (exports of live disks) may use all of it; background exports (snapshots) only what
lies above `guest_reserve`, so whatever snapshot readers do, stalled ones included, the reserve is there for guests.
Each class is served first come first served, and nothing is given to background while a guest waits.
"""

from libc.errno cimport EAGAIN, ENOMEM
from libc.stdint cimport int64_t, uint32_t

from fastcbw.bitmaps.mapping cimport map_pages, unmap_pages
from fastcbw.export.nbd.pthread cimport (
    pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init, pthread_cond_wait,
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock)
from fastcbw.kernels.atomic cimport load32_acquire
from fastcbw.units import parse_size

cdef extern from "<errno.h>" nogil:
    int ECANCELED


cdef class BufferPool:
    """A bounded pool of buffers.

    limit_bytes: what may be handed out at one time; int or a size like "64M". At least one piece (256K) above the reserve.
    guest_reserve_bytes: the part of it that background exports never get.
    Raises ValueError when the two don't fit together. Safe from any thread. Memory: at most limit_bytes, plus 2 MiB of
    free buffers kept for reuse.
    """

    def __cinit__(self, limit_bytes="64M", guest_reserve_bytes="32M"):
        self.limit = parse_size(limit_bytes, "limit_bytes")
        self.guest_reserve = parse_size(guest_reserve_bytes, "guest_reserve_bytes")
        if self.limit - self.guest_reserve < PIECE_LENGTH:
            raise ValueError(
                f"limit_bytes {self.limit}: must be at least {PIECE_LENGTH} above guest_reserve_bytes {self.guest_reserve}")
        pthread_mutex_init(&self.lock, NULL)
        pthread_cond_init(&self.freed, NULL)
        self.ready = True

    def __dealloc__(self):
        cdef int i
        if self.ready:
            for i in range(self.spares_count):
                unmap_pages(self.spares[i], PIECE_LENGTH)
            pthread_cond_destroy(&self.freed)
            pthread_mutex_destroy(&self.lock)

    cdef bint fits(self, int64_t length, bint background) noexcept nogil:
        """Whether a buffer of LENGTH may be handed out now, queues aside. Under the lock."""
        if length > self.limit - self.used:
            return False
        if not background:
            return True
        return length <= self.limit - self.guest_reserve - self.used_background and self.waiters[0].count == 0

    cdef int take(self, int64_t length, bint background, bint wait, const uint32_t *cancelled, void **buffer) noexcept nogil:
        cdef WaiterList *queue = &self.waiters[1 if background else 0]
        cdef Waiter me
        cdef Waiter *before
        cdef int code = 0
        buffer[0] = NULL
        if length > self.limit - (self.guest_reserve if background else 0):
            return -ENOMEM
        pthread_mutex_lock(&self.lock)
        if queue.first != NULL or not self.fits(length, background):
            if not wait:
                pthread_mutex_unlock(&self.lock)
                return -EAGAIN
            me.length = length
            me.next = NULL
            if queue.last != NULL:
                queue.last.next = &me
            else:
                queue.first = &me
            queue.last = &me
            queue.count += 1
            while code == 0 and not (queue.first == &me and self.fits(length, background)):
                if load32_acquire(cancelled):
                    code = -ECANCELED
                else:
                    pthread_cond_wait(&self.freed, &self.lock)
            if queue.first == &me:
                queue.first = me.next
                if queue.last == &me:
                    queue.last = NULL
            else:
                before = queue.first
                while before.next != &me:
                    before = before.next
                before.next = me.next
                if queue.last == &me:
                    queue.last = before
            queue.count -= 1
            # The next in line may fit too, and background may go on when the last guest has stopped waiting.
            pthread_cond_broadcast(&self.freed)
        if code == 0:
            self.used += length
            if background:
                self.used_background += length
            if self.used > self.used_most:
                self.used_most = self.used
            if length == PIECE_LENGTH and self.spares_count > 0:
                self.spares_count -= 1
                buffer[0] = self.spares[self.spares_count]
        pthread_mutex_unlock(&self.lock)
        if code == 0 and buffer[0] == NULL:
            buffer[0] = map_pages(length)
            if buffer[0] == NULL:
                self.give(NULL, length, background)
                return -ENOMEM
        return code

    cdef void give(self, void *buffer, int64_t length, bint background) noexcept nogil:
        cdef bint keep
        pthread_mutex_lock(&self.lock)
        keep = buffer != NULL and length == PIECE_LENGTH and self.spares_count < SPARES_MAX
        if keep:
            self.spares[self.spares_count] = buffer
            self.spares_count += 1
        pthread_mutex_unlock(&self.lock)
        if buffer != NULL and not keep:
            unmap_pages(buffer, length)     # before it counts as free: the limit is on memory, not on bookkeeping
        pthread_mutex_lock(&self.lock)
        self.used -= length
        if background:
            self.used_background -= length
        if self.waiters[0].first != NULL or self.waiters[1].first != NULL:
            pthread_cond_broadcast(&self.freed)
        pthread_mutex_unlock(&self.lock)

    cdef void wake(self) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        pthread_cond_broadcast(&self.freed)
        pthread_mutex_unlock(&self.lock)

    @property
    def limit_bytes(self):
        return self.limit

    @property
    def guest_reserve_bytes(self):
        return self.guest_reserve

    def status(self):
        """Return the figures of this moment: bytes handed out, and how many connections wait."""
        cdef int64_t used, background, most, guests, others
        with nogil:
            pthread_mutex_lock(&self.lock)
            used = self.used
            background = self.used_background
            most = self.used_most
            guests = self.waiters[0].count
            others = self.waiters[1].count
            pthread_mutex_unlock(&self.lock)
        return {
            "limit_bytes": self.limit,
            "guest_reserve_bytes": self.guest_reserve,
            "used_bytes": used,
            "used_background_bytes": background,
            "used_bytes_max": most,
            "waiting_guests": guests,
            "waiting_background": others,
        }

    def hold(self, int64_t length, *, bint background=False):
        """Take LENGTH bytes without waiting and keep them until the returned Hold is released. For tests and tools.

        Raises BlockingIOError when they are not there now, MemoryError when they can never be.
        """
        return Hold(self, length, background)


cdef class Hold:
    """A buffer of the pool held by Python code; release() gives it back, once."""

    cdef BufferPool pool
    cdef void *buffer
    cdef int64_t length
    cdef bint background

    def __cinit__(self, BufferPool pool not None, int64_t length, bint background):
        cdef uint32_t never = 0
        cdef int code
        if length <= 0:
            raise ValueError(f"length: {length} is not positive")
        with nogil:
            code = pool.take(length, background, False, &never, &self.buffer)
        if code == -EAGAIN:
            raise BlockingIOError(f"the pool has no {length} bytes free now")
        if code:
            raise MemoryError(f"{length} bytes are more than the pool may hand out")
        self.pool = pool
        self.length = length
        self.background = background

    def release(self):
        """Give the buffer back; again is no error."""
        cdef void *buffer = self.buffer
        self.buffer = NULL
        if buffer != NULL:
            with nogil:
                self.pool.give(buffer, self.length, self.background)

    def __dealloc__(self):
        if self.buffer != NULL:
            self.pool.give(self.buffer, self.length, self.background)
