# ThrottleDevice: a filter that lets no more through than its limits, as QEMU's throttle groups count.
from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.block.filter cimport Filter
from fastcbw.block.sys cimport iovec
from fastcbw.sync cimport pthread_cond_t, pthread_mutex_t

cdef enum:
    LIMITS = 6                  # bps-total, bps-read, bps-write, iops-total, iops-read, iops-write: the order of LIMIT_NAMES

# A leaky bucket as a due time: what was let through empties at `rate`, and is all gone at due_ns. Under the mutex.
cdef struct Bucket:
    double rate                 # units (bytes or requests) a second; 0: no limit
    int64_t burst_ns            # how far due_ns may lie ahead when a request begins: what may come at once, in time
    int64_t due_ns

cdef class ThrottleDevice(Filter):
    cdef Bucket average[LIMITS]
    cdef Bucket burst[LIMITS]           # the rate within a burst that may last longer than a second; rate 0: none
    cdef int64_t iops_size              # bytes that count as one request; 0: each counts as one
    cdef dict given                     # the limits as they were given
    cdef uint64_t read_limited          # atomic, relaxed: 0 is the path without the mutex
    cdef uint64_t write_limited
    cdef uint64_t generation            # of the limits: +1 by each change (mutex)
    cdef uint64_t delayed               # requests that waited, and how long, all together (atomic counters)
    cdef uint64_t delayed_ns
    cdef pthread_mutex_t mutex
    cdef pthread_cond_t changed         # the limits are others
    cdef bint ready

    cdef void wait_turn(self, bint writing, int64_t length) noexcept nogil
    cdef int64_t reserve(self, bint writing, int64_t length, int64_t now) noexcept nogil
