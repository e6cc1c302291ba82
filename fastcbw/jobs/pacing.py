"""How a job is paced: its options checked, the levels of bytes in flight it may choose among, and the guest's share."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable

from fastcbw.block.device import BlockDevice
from fastcbw.block.file import FileDevice
from fastcbw.cbw.latency import count_above, percentile_us
from fastcbw.cbw.pace import Pace
from fastcbw.cbw.reader import SnapshotDevice
from fastcbw.units import parse_size

WORKERS_MAX = 64
WORKERS_REMOTE = 16         # to an NBD target or another device: round trips overlap, as many as are worth it
WORKERS_LOCAL_MAX = 4       # to a file or block device: half the processors, so that the guest has the others
CHUNK_MIN = 4096
CHUNK_DEFAULT = 256 << 10   # as fast as larger ones on tmpfs, and a guest waits for less of it
CHUNK_MAX = 1 << 20
IN_FLIGHT_DEFAULT = 16 << 20
MEMORY_PAIR = (2, 1 << 20)  # to a file in memory, whose lock lets one write at a time: the other worker reads meanwhile

TICK_S = 0.1                # how often the guest is looked at
WINDOW_TICKS = 10           # what the p99 that is shown is taken over
SAMPLES = 100               # writes that are enough to judge a p99 by ...
JUDGE_TICKS = 5             # ... or this long, where the guest writes less
RATE_FLOOR = 1 << 20        # bytes a second that the job always gets: it must come to an end
RATE_FIRST = 32 << 20       # what it begins with, before it is known what the guest feels
GUEST_WRITES_ACTIVE = 10    # a tick: then no more than READERS read from its disk at once
READERS = 2


def make_pace(target: BlockDevice, workers: int | None, in_flight: int | None) -> Pace:
    """Return the pace for a copy to TARGET. workers: that many, no adapting. in_flight: never more bytes than that.

    Without workers the job adapts, between one and as many as the target may be worth. Raises ValueError for an in_flight that
    gives no worker a block.
    """
    if workers is not None:
        if in_flight is None:
            return Pace([(workers, CHUNK_DEFAULT)])
        return Pace([(workers, _chunk_for(in_flight, workers))])
    limit = IN_FLIGHT_DEFAULT if in_flight is None else in_flight
    if isinstance(target, FileDevice) and target.in_memory and len(os.sched_getaffinity(0)) > 1 and limit >= math.prod(MEMORY_PAIR):
        return Pace([MEMORY_PAIR])
    piece = min(CHUNK_DEFAULT, _chunk_for(limit, 1))
    levels = [(1, small) for small in (64 << 10, 128 << 10) if small < piece]
    first = len(levels)
    levels += [(count, piece) for count in (1, 2, 3, 4, 6, 8, 12, 16) if count <= _workers_for(target) and count * piece <= limit]
    most = levels[-1][0]
    levels += [(most, large) for large in (512 << 10, CHUNK_MAX) if large > piece and most * large <= limit and most > 1]
    return Pace(levels, first)


def check_workers(workers: int) -> int:
    """Return WORKERS; TypeError, ValueError when it is no number of workers."""
    if isinstance(workers, bool) or not isinstance(workers, int):
        raise TypeError(f"workers: expected an int, got {type(workers).__name__}")
    if not 1 <= workers <= WORKERS_MAX:
        raise ValueError(f"workers: {workers} is not within 1 to {WORKERS_MAX}")
    return workers


def check_in_flight(in_flight: int | str | None, workers: int | None) -> int | None:
    """Return IN_FLIGHT in bytes, at least a block for each of WORKERS."""
    if in_flight is None:
        return None
    limit = parse_size(in_flight, "in_flight")
    _chunk_for(limit, workers or 1)
    return limit


def check_rate(rate: int | str | None) -> int:
    """Return RATE in bytes a second, 0 for None: no limit."""
    if rate is None:
        return 0
    limit = parse_size(rate, "rate")
    if limit == 0:
        raise ValueError("rate: 0 bytes a second would never end (leave it out for no limit)")
    return limit


def check_guest_p99(guest_p99: float | None, source: BlockDevice) -> float | None:
    """Return GUEST_P99, milliseconds; ValueError where it is not above 0, or SOURCE has no guest that writes."""
    if guest_p99 is None:
        return None
    if isinstance(guest_p99, bool) or not isinstance(guest_p99, (int, float)):
        raise TypeError(f"guest_p99: expected milliseconds, got {type(guest_p99).__name__}")
    if not 0 < guest_p99 < math.inf:
        raise ValueError(f"guest_p99: {guest_p99} ms is not above 0")
    if not isinstance(source, SnapshotDevice) or source.engine is None or source.engine.device.read_only:
        raise ValueError(f"guest_p99: {source.name}: no guest writes through this process (it is for a disk that is written meanwhile)")
    return guest_p99


def _workers_for(target: BlockDevice) -> int:
    if isinstance(target, FileDevice):
        return max(1, min(WORKERS_LOCAL_MAX, (os.cpu_count() or 1) // 2))
    return WORKERS_REMOTE


def _chunk_for(in_flight: int, workers: int) -> int:
    """The largest chunk with which WORKERS keep at most IN_FLIGHT bytes in flight."""
    chunk = in_flight // workers // CHUNK_MIN * CHUNK_MIN
    if chunk < CHUNK_MIN:
        raise ValueError(f"in_flight: {in_flight} bytes are less than {CHUNK_MIN} for each of {workers} workers")
    return min(chunk, CHUNK_MAX)


class Governor:
    """Sees to it that the guest of a disk comes first while a job reads its snapshot.

    Every TICK_S: while the guest writes, few workers read from its disk at once. With a target for its p99 write latency, the job's rate
    goes up while the target is met, and is halved as soon as more than one write in a hundred takes longer (additive
    increase, multiplicative decrease); it never goes below RATE_FLOOR, so that the job ends even where the guest's latency has other causes.

    meter: look() and close() as of a LatencyMeter. done: bytes the job has moved so far. target_ms: or None.
    """

    def __init__(self, pace: Pace, meter, done: Callable[[], int], target_ms: float | None):
        self.target_ms = target_ms
        self._pace = pace
        self._meter = meter
        self._done = done
        self._window: deque = deque(maxlen=WINDOW_TICKS)
        self._writes = self._above = self._ticks = 0
        self._rate = RATE_FIRST
        self._climbing = True       # no write was too late yet: the rate doubles
        self._moved: tuple[float, int] | None = None
        self._active = False
        if target_ms is not None:
            pace.set_guest_rate(self._rate)

    @property
    def p99_ms(self) -> float | None:
        """The guest's p99 write latency of the last second, None when it wrote nothing."""
        window = list(self._window)
        found = percentile_us(sum(window[1:], window[0]), 0.99) if window else None
        return None if found is None else round(found / 1000, 4)

    def tick(self, now_s: float) -> None:
        """Look at the guest, and set the pace. NOW_S: any clock."""
        counts = self._meter.look()
        self._window.append(counts)
        writes = int(counts.sum())
        active = writes >= GUEST_WRITES_ACTIVE
        if active != self._active:
            self._active = active
            self._pace.set_readers(READERS if active else 0)
        done = self._done()
        speed = None if self._moved is None else (done - self._moved[1]) / max(now_s - self._moved[0], 1e-3)
        self._moved = (now_s, done)
        if self.target_ms is None:
            return
        self._writes += writes
        self._above += count_above(counts, self.target_ms * 1000)
        self._ticks += 1
        late = self._above > 0.01 * self._writes and (self._above > 1 or self._writes < SAMPLES)
        if late and (self._writes >= SAMPLES or self._above > 1 or self._ticks >= JUDGE_TICKS):
            slower = self._rate / 2 if speed is None else min(self._rate, max(speed, RATE_FLOOR)) / 2
            self._set(slower)
            self._climbing = False
        elif self._writes >= SAMPLES or self._ticks >= JUDGE_TICKS or not self._writes:
            if speed is not None and speed > self._rate / 4:        # else it is not the rate that limits the job
                self._set(self._rate * 2 if self._climbing else self._rate * 1.1 + RATE_FLOOR)
        else:
            return          # too few writes to say anything
        self._writes = self._above = self._ticks = 0

    def _set(self, rate: float) -> None:
        self._rate = max(RATE_FLOOR, int(rate))
        self._pace.set_guest_rate(self._rate)

    def close(self) -> None:
        """Measure no more, limit nothing more."""
        self._meter.close()
        self._pace.set_readers(0)
        self._pace.set_guest_rate(0)
