# The one bounded pool of request buffers of a server.
from libc.stdint cimport int64_t, uint32_t

from fastcbw.export.nbd.pthread cimport pthread_cond_t, pthread_mutex_t

cdef enum:
    PIECE_LENGTH = 262144           # bytes: a large read is served in buffers of this length; the only length kept for reuse
    SPARES_MAX = 8                  # free buffers of PIECE_LENGTH kept mapped

cdef struct Waiter:                 # on the stack of the waiting thread, in a list under the lock
    int64_t length
    Waiter *next

cdef struct WaiterList:
    Waiter *first
    Waiter *last
    int64_t count

cdef class BufferPool:
    cdef pthread_mutex_t lock       # owns everything below
    cdef pthread_cond_t freed       # broadcast when a buffer came back or a waiter was cancelled
    cdef int64_t limit              # bytes handed out at most
    cdef int64_t guest_reserve      # bytes of it that background exports never get
    cdef int64_t used               # bytes handed out
    cdef int64_t used_background    # bytes of it that background exports hold
    cdef int64_t used_most          # the highest `used` ever was
    cdef WaiterList waiters[2]      # first come first served; [0] guests, [1] background
    cdef void *spares[SPARES_MAX]   # free, mapped, of PIECE_LENGTH bytes: last in, first out
    cdef int spares_count
    cdef bint ready

    # 0 with *buffer; -ENOMEM: larger than this class of export may ever have, or the system has no memory;
    # -ECANCELED: *cancelled became non-zero. Waits while the pool is empty when WAIT, else -EAGAIN.
    cdef int take(self, int64_t length, bint background, bint wait, const uint32_t *cancelled, void **buffer) noexcept nogil
    cdef void give(self, void *buffer, int64_t length, bint background) noexcept nogil
    cdef void wake(self) noexcept nogil         # waiters look at their `cancelled` again
    cdef bint fits(self, int64_t length, bint background) noexcept nogil
