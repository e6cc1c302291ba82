# Guest discards of what a snapshot still needs: recorded, and carried out when nobody needs it any more.
from libc.stdint cimport int64_t, uint64_t

from fastcbw.cbw.state cimport EngineState, Geometry, Ticket
from fastcbw.kernels.atomic cimport load_seq

cdef inline bint lazy_recorded(const Geometry *geometry, int64_t cluster) noexcept nogil:
    return load_seq(&geometry.lazy_count) != 0 and (load_seq(geometry.lazy.words + cluster // 64) >> (cluster % 64)) & 1

# A guest write is about to settle clusters BITS of bitmap word W, whose claims are held: it cancels what is recorded there.
cdef void lazy_cancel(EngineState state, Geometry *geometry, int64_t w, uint64_t bits) noexcept nogil
# Discards the range for the guest: at once what nobody needs, what is needed is recorded. TICKET, of enter_guest for the
# range, has been left on return. 0 or the device's -errno.
cdef int guest_discard(EngineState state, int64_t offset, int64_t length, Ticket *ticket) noexcept nogil
# Carries out what is recorded and needed by no snapshot. Returns how many such clusters were claimed by others just now.
# Counted in an epoch while the device discards; called with no claim held and not counted, by any thread.
cdef int64_t lazy_carry_out(EngineState state) noexcept nogil
# Drops what is recorded, needed or not. Returns how many such clusters were claimed by others just now, to be carried out perhaps.
cdef int64_t lazy_drop(EngineState state) noexcept nogil
