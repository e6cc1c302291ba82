# The pace of a job: how many of its workers are at work, on how large pieces, how many bytes a second. See pace.pyx.
from libc.stdint cimport int64_t, uint64_t

from fastcbw.sync cimport pthread_cond_t, pthread_mutex_t

cdef enum:
    LEVELS_MAX = 32

# One amount of bytes in flight.
cdef struct Level:
    int workers                 # at work at once
    int64_t piece               # bytes of one read and write

cdef class Pace:
    cdef Level levels[LEVELS_MAX]       # ascending in bytes in flight (constant)
    cdef int levels_count
    cdef readonly int workers_max       # of any level
    cdef readonly int64_t piece_max
    # everything below: under the mutex
    cdef pthread_mutex_t mutex
    cdef pthread_cond_t changed
    cdef pthread_cond_t free    # for who waits in take()
    cdef int level
    cdef int busy               # workers with a piece
    cdef int reading            # of these, reading from the source
    cdef bint stopped           # everything was handed out
    cdef bint cancelled
    cdef bint paused
    cdef int readers_limit      # at once; 0: no limit
    cdef uint64_t rate          # bytes a second that the user allows; 0: no limit
    cdef uint64_t guest_rate    # that the guest's latency allows; 0: no limit
    cdef int64_t due_ns         # when the next piece may begin, by the rate
    cdef int first              # level to begin with (constant)
    # the shortest time that a piece took: in this window, which began then, and in the one before
    cdef int64_t window_ns
    cdef int64_t shortest_ns
    cdef int64_t shortest_before_ns
    cdef double needed          # bytes in flight that the last rounds made use of: pieces a second x shortest time, of full pieces
    cdef bint excess_tried      # less under way was tried for this level
    # the climb to the level from which on more in flight gains nothing
    cdef int phase
    cdef int best_level
    cdef double best_rate       # bytes a second
    cdef int rounds             # since the last probe
    cdef bint probe_up          # the next probe is one level up, else down
    cdef int to_skip            # pieces that were under way when the level changed
    cdef int64_t round_ns       # when the round began; 0: with the next piece
    cdef int64_t round_bytes
    cdef int round_pieces
    cdef bint round_void        # it was slowed down by a rate, a pause or the guest: it says nothing about the target

    cdef bint take(self) noexcept nogil                 # waits until one more may be at work; False: no more
    cdef bint again(self) noexcept nogil                # it has done what it took, and takes more; False: no more
    cdef void give(self) noexcept nogil                 # it has done what it took, or can't
    cdef int64_t step(self, int64_t left) noexcept nogil        # waits for the rate; bytes to move now, of LEFT; 0: cancelled
    cdef void moved(self, int64_t length, int64_t took_ns) noexcept nogil       # they have been moved, since step() that long
    cdef void read_begin(self) noexcept nogil           # waits while as many as may are reading
    cdef void read_end(self) noexcept nogil
    cdef void stop(self, bint at_once) noexcept nogil   # take() gives nothing any more, and at_once: nor does step()
    cdef int64_t gather(self) noexcept nogil            # bytes that a short piece may be widened to; 0: as usual
    cdef uint64_t rate_now(self) noexcept nogil
    cdef bint round_is_over(self, int64_t now) noexcept nogil
    cdef void judge(self, int64_t now) noexcept nogil
    cdef void climb(self, int level, double rate) noexcept nogil
    cdef void begin_round(self, int64_t now) noexcept nogil
    cdef void hold(self, int level) noexcept nogil
    cdef void probe(self) noexcept nogil
    cdef int64_t flight(self, int level) noexcept nogil
    cdef int enough(self) noexcept nogil
    cdef void change(self, uint64_t rate, uint64_t guest_rate) noexcept
    cdef void go_to(self, int level) noexcept nogil
