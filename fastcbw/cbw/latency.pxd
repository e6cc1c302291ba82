# How long guest writes take: a histogram for each thread, kept only while somebody asks. See latency.pyx.
from libc.stdint cimport int64_t, uint64_t

from fastcbw.kernels.atomic cimport add_relaxed, load_relaxed
from fastcbw.sync cimport now_ns

cdef enum:
    LATENCY_SETTLED = 0         # the write had nothing to preserve
    LATENCY_PRESERVING = 1      # it had: its wait for claims and copies is in it
    LATENCY_KINDS = 2
    LATENCY_LINEAR = 8          # buckets of 128 ns each, below 1024 ns
    LATENCY_BUCKETS = 216       # then 8 for each power of two, up to 2^36 ns; what is longer is in the last

cdef struct Latency:
    uint64_t counts[432]        # [kind * LATENCY_BUCKETS + bucket] (atomic counters)

cdef struct LatencyTable:
    uint64_t asked              # how many want it measured now (atomic); 0: guest writes read no clock
    Latency *threads            # [LINES], by the number of the line that counted the write; untouched memory until then

cdef extern from * nogil:
    int clzll "__builtin_clzll"(unsigned long long) noexcept

cdef inline int latency_bucket(uint64_t ns) noexcept nogil:
    # Bits of ns from the highest one down: 1xyz... The power of two chooses the eight, xyz one of them.
    cdef int power
    if ns < 1024:
        return <int>(ns >> 7)
    power = 63 - clzll(ns)
    if power > 35:
        return LATENCY_BUCKETS - 1
    return (power - 9) * 8 + <int>((ns >> (power - 3)) & 7)

cdef inline int64_t latency_begin(const LatencyTable *table) noexcept nogil:
    # Before anything else of a guest write. What it returns goes to latency_end, which is called only when it is not 0.
    return now_ns() if load_relaxed(&table.asked) else 0

cdef inline void latency_end(const LatencyTable *table, int64_t line, int kind, int64_t began_ns) noexcept nogil:
    # When the write is done. Any thread: LINE is that of the ticket, so that both ends of a queued write may differ.
    add_relaxed(&table.threads[line].counts[kind * LATENCY_BUCKETS + latency_bucket(<uint64_t>(now_ns() - began_ns))], 1)

cdef int latency_init(LatencyTable *table, int lines) noexcept nogil        # 0 or -ENOMEM
cdef void latency_free(LatencyTable *table, int lines) noexcept nogil

cdef class LatencyMeter:
    cdef LatencyTable *table
    cdef int lines
    cdef object owner           # keeps the table; None once closed
    cdef object last            # counts at the last look

    cdef object read(self)

cdef LatencyMeter latency_meter(LatencyTable *table, int lines, object owner)
