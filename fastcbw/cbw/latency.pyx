"""Latency of guest writes, from their arrival at the filter until they are done, as histograms.

Measured only while somebody asks (`asked`): two readings of the clock and one addition a write, some 50 ns. Otherwise the settled
path pays one load of a word that nobody writes. Each thread adds to its own histogram, so no cache line is shared; what reads
them sums all threads and subtracts what it saw before. The counts are for people and for control loops: a write that
ends during a look is in this one or in the next.

Buckets are an eighth of a power of two wide, so a percentile is exact to 12.5 %, rounded up.
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memset

import numpy as np

from fastcbw.bitmaps.mapping cimport map_pages, unmap_pages
from fastcbw.kernels.atomic cimport add_seq, load_relaxed, sub_seq

KINDS = ("settled", "preserving")

#: Longest latency of each bucket, in nanoseconds, exclusive; the last has no end.
LIMITS_NS = np.concatenate((np.arange(1, 9) * 128, *((np.arange(9, 17) << power - 3) for power in range(10, 36)))).astype(np.int64)


cdef int latency_init(LatencyTable *table, int lines) noexcept nogil:
    table.asked = 0
    table.threads = <Latency *>map_pages(lines * <int64_t>sizeof(Latency))
    return 0 if table.threads != NULL else -ENOMEM


cdef void latency_free(LatencyTable *table, int lines) noexcept nogil:
    if table.threads != NULL:
        unmap_pages(table.threads, lines * <int64_t>sizeof(Latency))
        table.threads = NULL


cdef class LatencyMeter:
    """Guest latency while this lives; made by Engine.latency_meter(). Several at once do not disturb each other.

    close() it: as long as one is open, guest writes are measured.
    """

    def __init__(self):
        raise TypeError("a LatencyMeter is made by Engine.latency_meter()")

    cdef object read(self):
        cdef uint64_t sums[LATENCY_KINDS * LATENCY_BUCKETS]
        cdef int line, i
        memset(sums, 0, sizeof(sums))
        for line in range(self.lines):
            for i in range(LATENCY_KINDS * LATENCY_BUCKETS):
                sums[i] += load_relaxed(&self.table.threads[line].counts[i])
        return np.frombuffer((<char *>sums)[:sizeof(sums)], np.uint64).reshape(LATENCY_KINDS, LATENCY_BUCKETS)

    def look(self):
        """Return the writes that ended since the last look (or the beginning), uint64 of shape (len(KINDS), len(LIMITS_NS))."""
        if self.owner is None:
            raise ValueError("the meter is closed")
        now = self.read()
        counts, self.last = now - self.last, now
        return counts

    def close(self):
        """Measure no more on its account. Closing twice is no error."""
        if self.owner is not None:
            sub_seq(&self.table.asked, 1)
            self.owner = None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def __dealloc__(self):
        if self.owner is not None:
            sub_seq(&self.table.asked, 1)


cdef LatencyMeter latency_meter(LatencyTable *table, int lines, object owner):
    cdef LatencyMeter meter = LatencyMeter.__new__(LatencyMeter)
    meter.table = table
    meter.lines = lines
    meter.owner = owner
    add_seq(&table.asked, 1)
    meter.last = meter.read()
    return meter


def percentile_us(counts, double fraction):
    """Return the latency in microseconds that FRACTION of the writes in COUNTS stayed below, None when there are none.

    counts: what look() returned, one row of it, or a sum of such; all kinds of write together.
    """
    counts = np.asarray(counts).reshape(-1, LATENCY_BUCKETS).sum(axis=0)
    total = int(counts.sum())
    if total == 0:
        return None
    at = int(np.searchsorted(np.cumsum(counts), fraction * total, side="left"))
    return float(LIMITS_NS[min(at, LATENCY_BUCKETS - 1)]) / 1000


def count_above(counts, double limit_us):
    """Return how many writes in COUNTS may have taken longer than LIMIT_US microseconds."""
    counts = np.asarray(counts).reshape(-1, LATENCY_BUCKETS).sum(axis=0)
    return int(counts[LIMITS_NS > limit_us * 1000].sum())


def bucket_of(uint64_t ns):
    """Return the bucket of a latency; for tests."""
    return latency_bucket(ns)
