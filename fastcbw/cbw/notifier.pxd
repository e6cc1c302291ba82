# WriteNotifier: the filter of the old backup scheme. What the guest is about to overwrite goes to the backup's target first.
from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.block.device cimport BlockDevice
from fastcbw.block.filter cimport Filter
from fastcbw.block.sys cimport iovec
from fastcbw.cbw.pace cimport Pace
from fastcbw.sync cimport pthread_cond_t, pthread_mutex_t

cdef enum:
    CLAIM_WORDS = 16            # clusters of one round, in words: 1024

    # WriteNotifier.state
    DORMANT = 0                 # nothing is intercepted
    COPYING = 1
    ENDED = 2                   # everything is in the target, or it failed: nothing is intercepted any more

cdef class WriteNotifier(Filter):
    cdef readonly BlockDevice target
    cdef readonly int64_t cluster_size      # bytes
    cdef int cluster_bits
    cdef int64_t clusters                   # the last may be partial
    cdef bint guest_first                   # what can't be preserved fails the backup, not the guest's write
    # A bit per cluster each. `claims` (atomic, acquire and release): somebody copies it, or it is done; who sets it may copy. `done`
    # (atomic, release): it is in the target; never taken back before the next begin().
    cdef uint64_t *claims
    cdef uint64_t *done
    cdef uint64_t state                     # atomic, seq_cst
    cdef uint64_t inflight                  # guest writes between enter and leave (atomic, seq_cst)
    cdef uint64_t hold                      # 1: new ones wait, while begin() waits for those under way (atomic, seq_cst)
    cdef uint64_t waiting                   # threads that wait for a claim or for begin() (atomic, seq_cst): 0, nobody to wake
    cdef uint64_t done_bytes                # in the target (atomic counters), ...
    cdef uint64_t zero_bytes                # of these, zeroes
    cdef uint64_t guest_bytes               # of these, copied by guest writes, before they went on
    cdef uint64_t guest_refused             # guest writes that failed because the copy did
    # the first failure, under the mutex; then `failed` (atomic)
    cdef uint64_t failed
    cdef int failed_code                    # negative errno
    cdef bint failed_reading
    cdef int64_t failed_offset
    cdef int64_t failed_length
    cdef uint64_t cursor                    # cluster: where the job looks next (atomic; a hint)
    cdef pthread_mutex_t mutex
    cdef pthread_cond_t changed             # a claim was given up or has become done; hold or state changed; a write left while held
    cdef bint ready
    cdef Pace pace                          # of the job; None before it (mutex)

    cdef forget(self)
    cdef int64_t bitmap_bytes(self) noexcept nogil
    cdef bint enter(self, bint wait) noexcept nogil
    cdef bint settled(self, int64_t offset, int64_t length) noexcept nogil
    cdef void leave(self) noexcept nogil
    cdef void wake(self) noexcept nogil
    cdef int before_write(self, int64_t offset, int64_t length) noexcept nogil
    cdef int preserve(self, int64_t first, int64_t end) noexcept nogil
    cdef int copy_claimed(self, const uint64_t *got, int64_t first, int64_t count, bint for_guest) noexcept nogil
    cdef int copy_run(self, char *buffer, int64_t offset, int64_t length, bint for_guest) noexcept nogil
    cdef void note_done(self, int64_t first, int64_t count, bint for_guest) noexcept nogil
    cdef void stop_job(self) noexcept nogil
    cdef bint wait_for_others(self, int64_t first, int64_t end) noexcept nogil
    cdef void note_copy_failure(self, int code, bint reading, int64_t offset, int64_t length, bint for_guest) noexcept nogil
    cdef int64_t next_claim(self, uint64_t *got, int64_t most, int64_t *first) noexcept nogil
    cdef bint rest_is_done(self) noexcept nogil
    cdef bint pay(self, Pace pace, int64_t length) noexcept nogil
    cdef void work(self, Pace pace, int64_t most) noexcept nogil
