# What a guest write does when its old data can't be preserved now: wait for room, give the snapshot up, or fail.
from libc.stdint cimport int64_t, uint64_t

from fastcbw.cbw.room cimport Waiter
from fastcbw.cbw.state cimport EngineState, Snap, Ticket

cdef enum:
    # what a step of a guest write returns, beside a refusal
    GO_ON = 0           # still counted in the epoch
    START_OVER = 1      # the epoch was left
    # codes of refused writes, beside -errno: REFUSED - WHY_*
    REFUSED = -1100

cdef const char *why_text(uint64_t why) noexcept nogil
cdef int refusal_errno(int code) noexcept nogil         # what is shown outside for REFUSED - why; 0: CODE is no refusal
# Does what on-full (WHY_FULL), else on-cbw-error says: breaks SNAP, START_OVER; or counts a refusal and returns its code.
# The caller is counted, or holds a reference to SNAP.
cdef int give_up_copy(EngineState state, Snap *snap, uint64_t why, int code, int64_t offset) noexcept nogil
# Leaves the epoch, waits until there may be room for NEED clusters or nothing to do for CLUSTER; where neither can come, does
# what the policies say. START_OVER, or a refusal.
cdef int wait_for_room(EngineState state, Ticket *ticket, Snap *snap, int64_t cluster, int64_t need, int64_t started_ns,
                       Waiter *waiter) noexcept nogil
