# The slots of a queue, and the threads that do what the kernel cannot be asked for.
from cpython.ref cimport PyObject
from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.block.device cimport KernelIo
from fastcbw.block.sys cimport iovec
from fastcbw.sync cimport pthread_cond_t, pthread_mutex_t

cdef enum:
    THREADS_MAX = 32
    SLOT_PIECES = 16            # a longer vector is copied to the heap
    IO_CACHE = 5                # cache_at, beside IO_* of device.pxd: only a queue knows it, no device is asked about it

cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned long pthread_t

# One request. Belongs to the thread of the queue, except from push() until take_ended() returns it: to the worker.
cdef struct IoSlot:
    PyObject *device            # a BlockDevice, borrowed
    uint64_t cookie
    int operation               # IO_*
    uint32_t flags
    int64_t offset              # of what is left to do
    int64_t length
    iovec *vector               # ours: own_vector or from the heap; of what is left to do, from FIRST on
    int first
    int count
    int tries                   # times that the kernel told to try again
    bint in_kernel              # in the ring
    bint late                   # in the ring, and another slot has the request meanwhile
    int code                    # result
    KernelIo io
    IoSlot *next
    iovec own_vector[SLOT_PIECES]

# Do the request by the device's method, here and now.
cdef int perform(IoSlot *slot) noexcept nogil

cdef class IoThreads:
    cdef int limit              # threads at most
    cdef int event_fd           # readable when something has ended
    cdef int outstanding        # pushed and not taken; the queue's thread only
    cdef bint ready
    cdef pthread_mutex_t mutex
    cdef pthread_cond_t work
    # under mutex
    cdef int count              # threads begun
    cdef int idle
    cdef int pending
    cdef bint stopping
    cdef IoSlot *first
    cdef IoSlot *last
    cdef IoSlot *ended
    cdef IoSlot *ended_last
    cdef pthread_t ids[THREADS_MAX]

    # Hand over a request. False: there is no thread, and none can be made.
    cdef bint push(self, IoSlot *slot) noexcept nogil
    # What has ended, in that order, linked by next; NULL: nothing. Clears the event.
    cdef IoSlot *take_ended(self) noexcept nogil
    cdef bint wait(self, int64_t timeout_ns) noexcept nogil     # for the event; False: timed out. Negative: for ever
    cdef void stop(self) noexcept nogil                         # nothing is outstanding; joins the threads
    cdef void work_off(self) noexcept nogil                     # what a thread does
