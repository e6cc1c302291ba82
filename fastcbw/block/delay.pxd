# DelayDevice: a filter that makes requests late, or holds them at a gate. For tests and for the comparison of schemes.
from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.block.filter cimport Filter
from fastcbw.block.sys cimport iovec
from fastcbw.sync cimport pthread_cond_t, pthread_mutex_t

cdef enum:
    GATES_MAX = 16
    OPERATIONS = 5          # read, write, zero, discard, flush: the order of OPERATION_NAMES

cdef struct GateState:      # all of it under DelayDevice.mutex
    bint used               # a Gate owns it, or requests still leave it
    bint held               # closed: requests that match wait
    bint after              # they wait after the child has done the request, not before
    int operation
    int64_t offset          # bytes; requests that touch offset..end match
    int64_t end
    int64_t arrived         # requests that came to it while it was held, ever
    int64_t waiting         # requests inside now

cdef class DelayDevice(Filter):
    cdef uint64_t delay_ns[OPERATIONS]      # atomic, relaxed: set live
    cdef uint64_t bytes_per_s               # atomic, relaxed: 0 = no limit
    cdef uint64_t first_byte                # atomic, relaxed: delays apply to requests that touch first_byte..end_byte
    cdef uint64_t end_byte
    cdef uint64_t gates_held                # atomic: how many gates are held; 0 is the path without the mutex
    cdef GateState gates[GATES_MAX]
    cdef int64_t free_ns                    # under mutex: when the limited bandwidth is free again (CLOCK_MONOTONIC)
    cdef pthread_mutex_t mutex
    cdef pthread_cond_t changed             # a request arrived or left, a gate was opened
    cdef bint ready                         # mutex and condition are initialised

    cdef void before(self, int operation, int64_t offset, int64_t length) noexcept nogil
    cdef void after(self, int operation, int64_t offset, int64_t length) noexcept nogil
    cdef void pass_gates(self, int operation, int64_t offset, int64_t length, bint after) noexcept nogil
    cdef bint would_wait(self, int operation, int64_t offset, int64_t length) noexcept nogil

cdef class Gate:
    cdef DelayDevice device
    cdef int index              # in device.gates; -1 once opened
    cdef int64_t arrived_last   # what was counted when it was opened

    cdef void let_go(self) noexcept nogil
