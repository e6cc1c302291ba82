# SwitchDevice: a place where one device can be put in another's stead while requests come in. See switch.pyx.
from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.block.filter cimport Filter
from fastcbw.block.sys cimport iovec
from fastcbw.sync cimport pthread_cond_t, pthread_mutex_t

cdef enum:
    SWITCH_LINES = 64

# Of the threads that share it, a cache line by itself. A request that a thread begins and another ends is +1 here and -1 there.
cdef struct SwitchLine:
    uint64_t inflight           # requests begun here less those ended here (atomic, seq_cst)
    uint64_t pad[7]

# Its child changes only while `hold` is set and nothing is in flight.
cdef class SwitchDevice(Filter):
    cdef SwitchLine *lines              # [SWITCH_LINES]
    cdef uint64_t hold_                 # 1: new requests wait (atomic, seq_cst)
    cdef pthread_mutex_t mutex
    cdef pthread_cond_t changed         # hold went; something left while it was set
    cdef bint ready

    cdef void enter(self) noexcept nogil
    cdef bint try_enter(self) noexcept nogil
    cdef void leave(self) noexcept nogil
    cdef bint is_idle(self) noexcept nogil
