"""IoThreads: a few threads that call the synchronous methods of devices for a queue.

Below block/queue, which owns one. Requests come in a list and leave in another, in any order; an eventfd says that the
second is not empty. Threads begin when a request finds none idle, up to a limit, and end with the queue.
Invariant: a slot is in one list, or with one worker, or with the queue's thread; who has it is the only one to touch it.
"""

from cpython.ref cimport PyObject
from libc.errno cimport EINTR
from libc.stdint cimport int64_t, uint64_t

import os as _os

from fastcbw.block.device cimport BlockDevice, IO_DISCARD, IO_READ, IO_SYNC, IO_WRITE
from fastcbw.sync cimport (cond_init, now_ns, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_signal,
                           pthread_cond_wait, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
                           pthread_mutex_unlock)

cdef extern from "<errno.h>" nogil:
    int errno

cdef extern from "<poll.h>" nogil:
    cdef struct pollfd:
        int fd
        short events
        short revents
    enum:
        POLLIN
    int c_poll "poll"(pollfd *fds, unsigned long count, int timeout_ms) noexcept

cdef extern from "<unistd.h>" nogil:
    ssize_t c_read "read"(int fd, void *buffer, size_t size) noexcept
    ssize_t c_write "write"(int fd, const void *buffer, size_t size) noexcept

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_attr_t:
        pass
    int pthread_attr_init(pthread_attr_t *attributes) noexcept
    int pthread_attr_setstacksize(pthread_attr_t *attributes, size_t size) noexcept
    int pthread_attr_destroy(pthread_attr_t *attributes) noexcept
    int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *) noexcept nogil, void *argument) noexcept
    int pthread_join(pthread_t thread, void **result) noexcept

cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    enum:
        SIG_SETMASK
    int sigfillset(sigset_t *signals) noexcept
    int pthread_sigmask(int how, const sigset_t *signals, sigset_t *before) noexcept

cdef enum:
    STACK_BYTES = 262144


cdef int perform(IoSlot *slot) noexcept nogil:
    cdef const iovec *vector = slot.vector + slot.first
    if slot.operation == IO_READ:
        return (<BlockDevice>slot.device).preadv(vector, slot.count - slot.first, slot.offset, slot.length)
    if slot.operation == IO_WRITE:
        return (<BlockDevice>slot.device).pwritev(vector, slot.count - slot.first, slot.offset, slot.length, slot.flags)
    if slot.operation == IO_SYNC:
        return (<BlockDevice>slot.device).sync()
    if slot.operation == IO_CACHE:
        return (<BlockDevice>slot.device).cache_at(slot.offset, slot.length)
    if slot.operation == IO_DISCARD:
        return (<BlockDevice>slot.device).discard_at(slot.offset, slot.length, slot.flags)
    return (<BlockDevice>slot.device).write_zeroes_at(slot.offset, slot.length, slot.flags)


cdef void *thread_main(void *threads) noexcept nogil:
    (<IoThreads>(<PyObject *>threads)).work_off()
    return NULL


cdef class IoThreads:
    """At most LIMIT threads. Made and used by one IoQueue; OSError when there is no descriptor left."""

    def __cinit__(self, int limit):
        self.event_fd = -1
        self.limit = limit
        pthread_mutex_init(&self.mutex, NULL)
        cond_init(&self.work)
        self.ready = True
        self.event_fd = _os.eventfd(0, _os.EFD_NONBLOCK | _os.EFD_CLOEXEC)

    def __dealloc__(self):
        # The threads are gone: the queue has called stop(). In the child of a fork they never were there.
        if self.event_fd >= 0:
            try:
                _os.close(self.event_fd)
            except (OSError, AttributeError, TypeError):    # the interpreter is going down
                pass

    cdef bint push(self, IoSlot *slot) noexcept nogil:
        cdef pthread_attr_t attributes
        cdef sigset_t every, before
        cdef bint taken
        slot.next = NULL
        pthread_mutex_lock(&self.mutex)
        if self.idle <= self.pending and self.count < self.limit:
            pthread_attr_init(&attributes)
            pthread_attr_setstacksize(&attributes, STACK_BYTES)
            sigfillset(&every)
            pthread_sigmask(SIG_SETMASK, &every, &before)       # signals are for the interpreter's threads
            if pthread_create(&self.ids[self.count], &attributes, thread_main, <void *><PyObject *>self) == 0:
                self.count += 1
            pthread_sigmask(SIG_SETMASK, &before, NULL)
            pthread_attr_destroy(&attributes)
        taken = self.count > 0
        if taken:
            if self.first == NULL:
                self.first = slot
            else:
                self.last.next = slot
            self.last = slot
            self.pending += 1
            self.outstanding += 1
            pthread_cond_signal(&self.work)
        pthread_mutex_unlock(&self.mutex)
        return taken

    cdef void work_off(self) noexcept nogil:
        cdef IoSlot *slot
        cdef uint64_t one = 1
        cdef bint wake
        pthread_mutex_lock(&self.mutex)
        while True:
            while self.first == NULL and not self.stopping:
                self.idle += 1
                pthread_cond_wait(&self.work, &self.mutex)
                self.idle -= 1
            if self.first == NULL:
                break
            slot = self.first
            self.first = slot.next
            self.pending -= 1
            pthread_mutex_unlock(&self.mutex)
            slot.code = perform(slot)
            slot.next = NULL
            pthread_mutex_lock(&self.mutex)
            wake = self.ended == NULL       # else whoever made it so has said it, and the queue has not looked since
            if wake:
                self.ended = slot
            else:
                self.ended_last.next = slot
            self.ended_last = slot
            if wake:
                c_write(self.event_fd, &one, sizeof(one))   # fails only when the counter is full: then it is readable
        pthread_mutex_unlock(&self.mutex)

    cdef IoSlot *take_ended(self) noexcept nogil:
        cdef IoSlot *taken
        cdef IoSlot *slot
        cdef uint64_t counter
        if self.outstanding == 0:
            return NULL
        # Within the mutex, as the write is: readable if and only if the list is not empty.
        pthread_mutex_lock(&self.mutex)
        taken = self.ended
        self.ended = NULL
        if taken != NULL:
            c_read(self.event_fd, &counter, sizeof(counter))
        pthread_mutex_unlock(&self.mutex)
        slot = taken
        while slot != NULL:
            self.outstanding -= 1
            slot = slot.next
        return taken

    cdef bint wait(self, int64_t timeout_ns) noexcept nogil:
        cdef pollfd waited
        cdef int64_t deadline = now_ns() + timeout_ns, left
        cdef int timeout_ms = -1
        waited.fd = self.event_fd
        waited.events = POLLIN
        while True:
            if timeout_ns >= 0:
                left = deadline - now_ns()
                if left < 0:
                    left = 0
                if left > 1000000000:
                    left = 1000000000
                timeout_ms = <int>((left + 999999) // 1000000)
            got = c_poll(&waited, 1, timeout_ms)
            if got > 0:
                return True
            if timeout_ns >= 0 and now_ns() >= deadline:
                return False
            if got < 0 and errno != EINTR:
                return True     # the caller looks for itself

    cdef void stop(self) noexcept nogil:
        cdef int i
        pthread_mutex_lock(&self.mutex)
        self.stopping = True
        pthread_cond_broadcast(&self.work)
        pthread_mutex_unlock(&self.mutex)
        for i in range(self.count):
            pthread_join(self.ids[i], NULL)
        self.count = 0
        if self.ready:
            self.ready = False
            pthread_cond_destroy(&self.work)
            pthread_mutex_destroy(&self.mutex)
