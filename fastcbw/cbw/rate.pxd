# How fast something fills: the net of what came and went in each of the last seconds. A few words, no thread that samples.
from libc.stdint cimport int64_t

from fastcbw.sync cimport now_ns

cdef enum:
    RATE_SECONDS = 10           # what a rate is taken over
    RATE_BUCKETS = 16           # more than that, and a power of two

cdef struct Rate:
    int64_t began               # second of the first note, 0: none yet
    int64_t second[RATE_BUCKETS]
    int64_t net[RATE_BUCKETS]

cdef inline void rate_note(Rate *rate, int64_t count) noexcept nogil:
    # COUNT more, or fewer. Under a lock of the caller's.
    cdef int64_t second = now_ns() // 1000000000
    cdef int at = <int>(second & (RATE_BUCKETS - 1))
    if rate.began == 0:
        rate.began = second
    if rate.second[at] != second:
        rate.second[at] = second
        rate.net[at] = 0
    rate.net[at] += count

cdef inline double rate_now(const Rate *rate) noexcept nogil:
    # Per second, over the last RATE_SECONDS or since the first note. Under the same lock.
    cdef double now = now_ns() / 1e9
    cdef int64_t second = <int64_t>now
    cdef double seconds = now - rate.began
    cdef int64_t net = 0
    cdef int i
    if rate.began == 0:
        return 0
    for i in range(RATE_BUCKETS):
        if second - rate.second[i] < RATE_SECONDS:
            net += rate.net[i]
    if seconds > RATE_SECONDS:
        seconds = RATE_SECONDS - 1 + (now - second)
    return net / (seconds if seconds > 1 else 1)
