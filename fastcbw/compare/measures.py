"""From single requests to figures: percentiles, rates, stalls, latency over time.

A request is when it began (monotonic ns), what it took, whether it was a write, and its length. Nothing is averaged before
it gets here.
"""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray

REQUESTS = numpy.dtype([("begun_ns", "<i8"), ("took_ns", "<i8"), ("write", "?"), ("length", "<u4")])
#: The shares of a percentile curve.
SHARES = (0, 10, 25, 50, 75, 90, 95, 98, 99, 99.5, 99.8, 99.9, 99.95, 99.99, 100)
#: A request that took this long is a stall.
STALL_NS = 100_000_000
#: A request that was under way in a pause and ends this long after it was waited for.
WAITED_NS = 5_000_000
POINTS_MAX = 240


def no_requests() -> NDArray[numpy.void]:
    return numpy.empty(0, REQUESTS)


def between(requests: NDArray[numpy.void], begin_ns: int, end_ns: int) -> NDArray[numpy.void]:
    """Return the requests that began from BEGIN_NS to END_NS."""
    return requests[(requests["begun_ns"] >= begin_ns) & (requests["begun_ns"] < end_ns)]


def across_pause(requests: NDArray[numpy.void], begin_ns: int, end_ns: int) -> NDArray[numpy.void]:
    """Return REQUESTS of a guest that was stopped from BEGIN_NS to END_NS, without what is the pause's.

    What was under way then and ended in the pause or at its end is left out. What is waited for longer counts from the pause's end on:
    the server had it, or got the rest of it, after the instant.
    """
    ends = requests["begun_ns"] + requests["took_ns"]
    under_way = (requests["begun_ns"] < end_ns) & (ends >= begin_ns)
    kept = requests[~under_way | (ends >= end_ns + WAITED_NS)].copy()
    late = (kept["begun_ns"] < end_ns) & (kept["begun_ns"] + kept["took_ns"] >= begin_ns)
    kept["took_ns"][late] -= end_ns - kept["begun_ns"][late]
    kept["begun_ns"][late] = end_ns
    return kept


def as_paced(took_ns: NDArray[numpy.int64], interval_ns: int) -> NDArray[numpy.int64]:
    """Return TOOK_NS and, for each request that took longer than INTERVAL_NS, those that were due while it was under way.

    A guest that asks one after the other asks nothing while it waits, so that a stall of a second counts as one request among thousands.
    These are the requests that it would have made, each with what it would have waited.
    """
    long = took_ns[took_ns > interval_ns]
    counts = numpy.minimum((long - 1) // interval_ns, 1_000_000)
    steps = numpy.arange(counts.sum(), dtype=numpy.int64) - numpy.repeat(numpy.cumsum(counts) - counts, counts) + 1
    return numpy.concatenate([took_ns, numpy.repeat(long, counts) - steps * interval_ns])


def summary(requests: NDArray[numpy.void], seconds: float, rate: int | None = None) -> dict[str, Any]:
    """Return what REQUESTS of SECONDS amount to: latencies in microseconds, None where there was no request.

    rate: requests a second that the load asks for, one after the other; p99_paced_us is then the p99 of as_paced, else None.
    """
    if not len(requests):
        return {"requests": 0, "seconds": round(seconds, 3), "iops": 0.0, "p50_us": None, "p99_us": None, "p999_us": None, "max_us": None,
                "p99_paced_us": None,
                "stalls": 0, "stalled_s": 0.0, "written_bytes": 0, "read_bytes": 0}
    took = requests["took_ns"]
    p50, p99, p999 = (round(float(value) / 1000, 1) for value in numpy.percentile(took, (50, 99, 99.9)))
    stalls = took[took >= STALL_NS]
    paced = round(float(numpy.percentile(as_paced(took, 1_000_000_000 // rate), 99)) / 1000, 1) if rate else None
    return {"requests": len(requests), "seconds": round(seconds, 3), "iops": round(len(requests) / seconds, 1) if seconds > 0 else 0.0,
            "p50_us": p50, "p99_us": p99, "p999_us": p999, "max_us": round(float(took.max()) / 1000, 1), "p99_paced_us": paced,
            "stalls": len(stalls), "stalled_s": round(float(stalls.sum()) / 1e9, 3),
            "written_bytes": int(requests["length"][requests["write"]].sum(dtype=numpy.int64)),
            "read_bytes": int(requests["length"][~requests["write"]].sum(dtype=numpy.int64))}


def curve(requests: NDArray[numpy.void]) -> list[list[float]]:
    """Return the percentile curve: pairs of share and microseconds."""
    if not len(requests):
        return []
    return [[share, round(float(value) / 1000, 1)] for share, value in zip(SHARES, numpy.percentile(requests["took_ns"], SHARES))]


def over_time(requests: NDArray[numpy.void], zero_ns: int, begin_ns: int, end_ns: int) -> dict[str, list]:
    """Return latencies in windows from BEGIN_NS to END_NS, at most POINTS_MAX: t_s from ZERO_NS, p50, p99, max and requests a second.

    A request belongs to the window in which it began. A window in which none began has the longest that was under way there; None if none was.
    """
    window = max(50_000_000, -(-(end_ns - begin_ns) // POINTS_MAX))
    series: dict[str, list] = {"t_s": [], "p50_us": [], "p99_us": [], "max_us": [], "iops": []}
    begun = requests[numpy.argsort(requests["begun_ns"], kind="stable")]
    edges = numpy.arange(begin_ns, end_ns, window)
    cuts = numpy.searchsorted(begun["begun_ns"], numpy.append(edges, edges[-1] + window) if len(edges) else edges)
    for i, edge in enumerate(edges):
        took = begun["took_ns"][cuts[i]:cuts[i + 1]] / 1000
        if not len(took):
            before = begun[:cuts[i]]
            took_there = before["took_ns"][before["begun_ns"] + before["took_ns"] >= edge]
            values = (took_there.max() / 1000,) * 3 if len(took_there) else (None,) * 3
        else:
            values = numpy.percentile(took, (50, 99, 100))
        series["t_s"].append(round((int(edge) + window / 2 - zero_ns) / 1e9, 3))
        for name, value in zip(("p50_us", "p99_us", "max_us"), values):
            series[name].append(None if value is None else round(float(value), 1))
        series["iops"].append(round(len(took) / window * 1e9, 1))
    return series
