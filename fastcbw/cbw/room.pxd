# Room in the stores of one engine: who waits for it, in order of arrival, and who is to be told when some is freed.
#
# Lock order: room.lock, then a store's lock. Whoever frees room holds the store's lock while it looks at `waiting`, and a
# waiter counts itself there before it looks at the store under that lock: one of the two sees the other.
from libc.stdint cimport int64_t, uint64_t

from fastcbw.kernels.atomic cimport load_seq
from fastcbw.sync cimport pthread_cond_t, pthread_mutex_t

cdef enum:
    WAITERS_MAX = 1024          # guest writes that wait for room at once; beyond, a store counts as full

# One guest write that has waited. It lies on the stack of its thread and stays in the queue until the write has all that
# it needs, so that it does not lose its turn while it tries.
cdef struct Waiter:
    bint queued
    bint zeroing            # its guest request is a write-zeroes: for the counters
    const void *snap            # for room in whose store
    Waiter *next

cdef struct Room:
    pthread_mutex_t lock
    pthread_cond_t changed      # something that a waiter looks at is different now
    uint64_t waiting            # length of the queue (atomic; changed under `lock`)
    Waiter *head
    Waiter *tail
    pthread_cond_t flush        # the flusher waits here, under `lock`
    bint flush_wanted
    bint stopping               # the flusher is to end

cdef int room_init(Room *room) noexcept nogil               # 0 or an errno
cdef void room_destroy(Room *room) noexcept nogil
# Of the caller's own lock:
cdef bint room_queue(Room *room, Waiter *waiter, const void *snap) noexcept nogil   # False: too many wait. Locked
cdef bint room_is_first(const Room *room, const Waiter *waiter) noexcept nogil      # of those for its snapshot. Locked
cdef void room_leave(Room *room, Waiter *waiter) noexcept nogil         # out of the queue, if it is in it; wakes who is next
cdef void room_wake(Room *room) noexcept nogil              # every waiter looks again
cdef void room_want_flush(Room *room) noexcept nogil        # wake the flusher

cdef inline void room_changed(Room *room) noexcept nogil:
    # Something changed that waiters look at, by a seq_cst operation or under a lock that they take.
    if load_seq(&room.waiting) != 0:
        room_wake(room)
