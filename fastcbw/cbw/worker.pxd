# Copies of old data: what a guest write asks for, done in place when it can't wait, else by a pool of threads.
from cpython.ref cimport PyObject
from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.cbw.state cimport Geometry, Snap
from fastcbw.sync cimport pthread_cond_t, pthread_mutex_t

cdef enum:
    ROUND_CLUSTERS = 256            # clusters of one copy at most
    ROUND_BYTES = 1 << 20           # bytes of one copy at most, but at least one cluster
    ROUND_WORDS = ROUND_CLUSTERS // 64 + 1

cdef struct CopyItem:
    int64_t cluster
    int64_t slot                    # RAM slot, or -1
    int64_t position                # log position, or -1
    char *data                      # the slot's memory, or a piece of `bounce`
    bint zero                       # found to be all zeroes

# One copy: old data of some claimed clusters, from the active disk into slots and the log. It lives on the stack of the
# guest's thread; handed to the pool, it is copied to the heap, and belongs to the pool's thread once it is abandoned.
cdef struct Copy:
    PyObject *disk                  # BlockDevice that is read
    int64_t disk_length
    Snap *snap                      # data goes into its store
    Geometry *geometry
    int64_t first                   # the range whose claims `got` holds
    int64_t count
    uint64_t got[ROUND_WORDS]
    int items_count
    CopyItem items[ROUND_CLUSTERS]
    char *bounce                    # memory of the items without a slot
    bint zeroing                    # a write-zeroes of the guest needs it, for the counters
    bint partial                    # on-full is `wait`: what finds no room is left, the others are done
    int left                        # items that found none
    int code                        # 0 or -errno
    uint64_t why                    # WHY_SOURCE, WHY_STORE or WHY_FULL, with `code`
    int64_t error_offset
    # of a copy in the pool, under the pool's lock
    bint done
    bint abandoned                  # its guest write went on without it
    bint wanted                     # not abandoned when a thread took it
    pthread_cond_t finished
    Copy *next

cdef class CopyPool:
    cdef pthread_mutex_t lock
    cdef pthread_cond_t wanted
    cdef Copy *head
    cdef Copy *tail
    cdef bint stopping
    cdef int left_behind            # copies whose guest write went on without them, not yet ended
    cdef object owner               # what must live as long as a thread runs (the engine state)

    cdef void submit(self, Copy *task) noexcept nogil
    cdef int await_done(self, Copy *task, int64_t deadline_ns) noexcept nogil
    cdef Copy *take(self) noexcept nogil
    cdef void finish(self, Copy *task) noexcept nogil

cdef int copy_read(Copy *copy, bint nowait) noexcept nogil      # reads all items and tests them for zeroes; -EAGAIN
cdef void find_zeroes(Copy *copy) noexcept nogil                # tests the data of all items
# A copy that outlives the guest's request, its epoch and its snapshot holds its own references.
cdef void keep_references(Copy *copy) noexcept nogil
cdef void drop_references(Copy *copy) noexcept nogil
cdef void copy_give_back(Copy *copy) noexcept nogil             # what room the items have; of a copy that failed, slots only
# Runs the copy in the pool and waits for it. -ETIMEDOUT: it was abandoned, and keeps its claims and its room until it ends.
cdef int copy_in_pool(PyObject *pool, Copy *copy, int64_t deadline_ns) noexcept nogil
