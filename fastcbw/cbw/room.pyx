"""The queue of guest writes that wait for room, and the flusher's bell.

First in, first out among those that wait for the same snapshot's store: only the first may take what comes free, the
others wait on. What a waiter looks at (room, the cluster, the snapshot, the policy, who consumes) is cbw/policy's.
"""

from fastcbw.kernels.atomic cimport add_seq, sub_seq
from fastcbw.sync cimport (cond_init, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_signal, pthread_mutex_destroy,
                           pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock)


cdef int room_init(Room *room) noexcept nogil:
    cdef int code = pthread_mutex_init(&room.lock, NULL)
    if code == 0:
        code = cond_init(&room.changed)
    if code == 0:
        code = cond_init(&room.flush)
    return code


cdef void room_destroy(Room *room) noexcept nogil:
    pthread_cond_destroy(&room.changed)
    pthread_cond_destroy(&room.flush)
    pthread_mutex_destroy(&room.lock)


cdef bint room_queue(Room *room, Waiter *waiter, const void *snap) noexcept nogil:
    if waiter.queued:
        if waiter.snap == snap:
            return True
        unlink(room, waiter)        # it has to wait for another snapshot now: at the end of that queue
    if room.waiting >= WAITERS_MAX:
        return False
    waiter.snap = snap
    waiter.next = NULL
    waiter.queued = True
    if room.tail == NULL:
        room.head = waiter
    else:
        room.tail.next = waiter
    room.tail = waiter
    add_seq(&room.waiting, 1)
    return True


cdef bint room_is_first(const Room *room, const Waiter *waiter) noexcept nogil:
    cdef const Waiter *other = room.head
    while other != NULL and other.snap != waiter.snap:
        other = other.next
    return other == waiter


cdef void unlink(Room *room, Waiter *waiter) noexcept nogil:
    cdef Waiter *before = NULL
    cdef Waiter *at = room.head
    while at != waiter:
        before = at
        at = at.next
    if before == NULL:
        room.head = waiter.next
    else:
        before.next = waiter.next
    if room.tail == waiter:
        room.tail = before
    waiter.queued = False
    sub_seq(&room.waiting, 1)


cdef void room_leave(Room *room, Waiter *waiter) noexcept nogil:
    if not waiter.queued:
        return
    pthread_mutex_lock(&room.lock)
    unlink(room, waiter)
    pthread_cond_broadcast(&room.changed)
    pthread_mutex_unlock(&room.lock)


cdef void room_wake(Room *room) noexcept nogil:
    pthread_mutex_lock(&room.lock)
    pthread_cond_broadcast(&room.changed)
    pthread_mutex_unlock(&room.lock)


cdef void room_want_flush(Room *room) noexcept nogil:
    pthread_mutex_lock(&room.lock)
    room.flush_wanted = True
    pthread_cond_signal(&room.flush)
    pthread_mutex_unlock(&room.lock)
