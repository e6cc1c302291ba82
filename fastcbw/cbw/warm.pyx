"""A few MiB of populated slots, kept ahead of the guest while first touches come in.

Memory that is touched for the first time costs about as much as the copy into it: 20 to 27 us for each 64 KiB. A thread of
the store takes slots that were never used, populates them and frees them: from then on they are free slots like any other, in the
order of their addresses, so that neighbours are taken together and copied at once. Where a processor is free, a guest's first touch does
without that time; when the thread is late, guests populate what they need themselves.

Small pages. Huge ones cost a third where the machine has them at hand, and ten times as much where a virtual machine gets their memory
from its host at that moment, which free blocks of 2 MiB as a rule are waiting for; so they are used nowhere (docs/benchmarking.md).

It begins with the store's second MiB, keeps as much ahead as is used, at most 8 MiB, and nothing near the limit: all of it is
below the limit of the RAM tier. When nothing is touched it sleeps. It takes no claim and waits for nobody.
"""

from libc.stdint cimport int64_t, uint32_t

from fastcbw.bitmaps.mapping cimport populate_pages
from fastcbw.cbw.store cimport Store, pthread_t
from fastcbw.sync cimport pthread_cond_broadcast, pthread_cond_signal, pthread_cond_wait, pthread_mutex_lock, pthread_mutex_unlock

cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    int sigfillset(sigset_t *set) noexcept
    int pthread_sigmask(int how, const sigset_t *set, sigset_t *old) noexcept
    int SIG_SETMASK

cdef extern from "<pthread.h>" nogil:
    int pthread_create(pthread_t *thread, const void *attributes, void *(*start)(void *) noexcept nogil, void *argument) noexcept
    int pthread_join(pthread_t thread, void **result) noexcept

cdef extern from "forks.h" nogil:
    uint32_t forks "fcbw_forks"() noexcept

cdef int64_t BLOCK_BYTES = 1 << 20          # a cluster at least
cdef int64_t BEGIN_BYTES = 1 << 20
cdef int64_t AHEAD_BYTES = 8 << 20
cdef int64_t PIECE_BYTES = 256 << 10


cdef inline bint short_of(const Store *store) noexcept nogil:
    """Whether less is ahead than should be, and there is room for a block, with as much left for guests meanwhile."""
    cdef int64_t used = store.slots_used * store.cluster_bytes
    cdef int64_t ahead = (store.slots_fresh - store.slots_used) * store.cluster_bytes
    return (used >= BEGIN_BYTES and ahead < (used if used < AHEAD_BYTES else AHEAD_BYTES)
            and store.slots_fresh * store.cluster_bytes + 2 * BLOCK_BYTES <= store.slots_limit * store.cluster_bytes)


cdef bint warm_wanted(Store *store) noexcept nogil:
    return not store.warm_asked and short_of(store)


cdef void warm_ask(Store *store) noexcept nogil:
    cdef sigset_t every, before
    pthread_mutex_lock(&store.lock)
    store.warm_asked = True
    if not store.warm_started:
        store.warm_forks = forks()
        sigfillset(&every)
        pthread_sigmask(SIG_SETMASK, &every, &before)       # signals are for the interpreter's threads
        # Without a thread warm_asked stays set: guests go on as if there were none.
        store.warm_started = pthread_create(&store.warm_thread, NULL, warm_main, <void *>store) == 0
        pthread_sigmask(SIG_SETMASK, &before, NULL)
    pthread_cond_signal(&store.warm_wanted)
    pthread_mutex_unlock(&store.lock)


cdef void warm_stop(Store *store) noexcept nogil:
    if not store.warm_started or store.warm_forks != forks():      # a child has its parent's memory, not its threads
        return
    pthread_mutex_lock(&store.lock)
    store.warm_stopping = True
    pthread_cond_signal(&store.warm_wanted)
    pthread_mutex_unlock(&store.lock)
    pthread_join(store.warm_thread, NULL)


cdef void *warm_main(void *argument) noexcept nogil:
    cdef Store *store = <Store *>argument
    cdef int64_t first, end, at, i
    pthread_mutex_lock(&store.lock)
    while not store.warm_stopping:
        if not short_of(store):
            store.warm_asked = False
            pthread_cond_wait(&store.warm_wanted, &store.lock)
            continue
        first = store.slots_fresh
        end = first + BLOCK_BYTES // store.cluster_bytes
        at = first * store.cluster_bytes if store.populated < first * store.cluster_bytes else store.populated
        store.slots_fresh = end
        store.warming = end - first
        if store.populated < end * store.cluster_bytes:
            store.populated = end * store.cluster_bytes
        pthread_mutex_unlock(&store.lock)
        while at < end * store.cluster_bytes:
            populate_pages(store.pages + at, min(PIECE_BYTES, end * store.cluster_bytes - at))
            at += PIECE_BYTES
        pthread_mutex_lock(&store.lock)
        i = end
        while i > first:                # the lowest on top
            i -= 1
            store.slots[i].next = store.free_head
            store.free_head = <uint32_t>i
        store.warming = 0
        pthread_cond_broadcast(&store.warmed)
    pthread_mutex_unlock(&store.lock)
    return NULL
