"""ThrottleDevice: a filter that lets no more through than its limits: bytes and requests a second, reads, writes or both, with bursts.

Each limit is a leaky bucket, as in QEMU's throttle groups, in the form of a due time: what was let through empties at the limit's
rate and is gone at `due`; a request may begin when no more than the burst is left in the bucket, and then adds itself. A
request takes its turn under the mutex, the turn being a time, and sleeps until then without it: turns are in the order of arrival, and
a request larger than the burst passes and makes those after it wait. New limits take turns anew. Zeroes and discards count as
writes; flushes are never held. Whoever waits does so in the thread of its request; queues have that done by threads.
"""

from libc.errno cimport EAGAIN
from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.block.device cimport BlockDevice, IO_READ, IO_SYNC, KernelIo
from fastcbw.block.filter cimport Filter
from fastcbw.block.sys cimport iovec
from fastcbw.kernels.atomic cimport add_relaxed, load_relaxed, store_relaxed
from fastcbw.sync cimport (
    cond_init, cond_wait_until, now_ns, pthread_cond_broadcast, pthread_cond_destroy, pthread_mutex_destroy, pthread_mutex_init,
    pthread_mutex_lock, pthread_mutex_unlock, waits,
)

LIMIT_NAMES = ("bps_total", "bps_read", "bps_write", "iops_total", "iops_read", "iops_write")
LIMIT_MAX = 10**15              # QEMU's, too
LENGTH_MAX = 3600               # seconds of a burst: due times stay far from their range

cdef enum:
    FIRST_IOPS = 3


cdef class ThrottleDevice(Filter):
    """CHILD, no faster than its limits.

    bps_total, bps_read, bps_write: bytes a second; iops_total, iops_read, iops_write: requests a second; 0 or left out: no limit.
    NAME_max: what may come at once after a pause, default a tenth of a second's; NAME_max_length: seconds for which NAME_max a second may
    come, default 1. iops_size: bytes from which on a request counts as several.
    All of it can be changed live by set(). Raises ValueError, TypeError as QEMU refuses them: a total and one of its parts, a maximum
    without its limit or below it. Closing it lets everybody through and closes the child.
    """

    def __cinit__(self, BlockDevice child not None, *, name=None, **limits):
        self.stand_on(child, name)
        self.can_cache = child.can_cache
        self.may_wait_in_threads()
        self.always_waits = child.always_waits
        pthread_mutex_init(&self.mutex, NULL)
        cond_init(&self.changed)
        self.ready = True
        self.set(**limits)

    def __dealloc__(self):
        if self.ready:
            pthread_cond_destroy(&self.changed)
            pthread_mutex_destroy(&self.mutex)

    # -- control plane

    def set(self, **limits):
        """Replace all limits by LIMITS, for those who wait too; errors as of the constructor, and then nothing has changed."""
        cdef Bucket average[LIMITS]
        cdef Bucket burst[LIMITS]
        cdef int64_t size
        cdef int i
        cdef bint reading = False, writing = False
        limits = check_limits(limits)
        for i, limit in enumerate(LIMIT_NAMES):
            rate = limits.get(limit, 0)
            most, seconds = limits.get(f"{limit}_max", 0), limits.get(f"{limit}_max_length", 1)
            average[i].rate = rate
            average[i].due_ns = burst[i].due_ns = 0
            average[i].burst_ns = int((most * seconds if most else rate / 10) / rate * 1e9) if rate else 0
            burst[i].rate = most if seconds > 1 else 0
            burst[i].burst_ns = 100_000_000
            reading |= rate and not limit.endswith("write")
            writing |= rate and not limit.endswith("read")
        size = limits.get("iops_size", 0)
        self.given = limits
        with nogil:
            pthread_mutex_lock(&self.mutex)
            self.average, self.burst, self.iops_size = average, burst, size
            store_relaxed(&self.read_limited, reading)
            store_relaxed(&self.write_limited, writing)
            self.generation += 1
            pthread_cond_broadcast(&self.changed)
            pthread_mutex_unlock(&self.mutex)

    @property
    def limits(self):
        """The limits as they were given, without those of 0."""
        return dict(self.given)

    def counters(self):
        """Return how many requests had to wait, and how long, together, in nanoseconds: delayed, delayed_ns."""
        return {"delayed": load_relaxed(&self.delayed), "delayed_ns": load_relaxed(&self.delayed_ns)}

    def close(self):
        """Let everybody through and close the child."""
        self.closed = True
        self.set()
        self.child.close()

    # -- data plane

    cdef int64_t reserve(self, bint writing, int64_t length, int64_t now) noexcept nogil:
        """Take a turn, under the mutex: when the request may begin."""
        cdef Bucket *bucket
        cdef int64_t begin = now
        cdef double units
        cdef int i, pass_
        for pass_ in range(2):
            for i in range(LIMITS):
                if i % 3 == (1 if writing else 2):
                    continue                    # of the other kind
                units = <double>length
                if i >= FIRST_IOPS:
                    units = max(1.0, units / <double>self.iops_size) if self.iops_size else 1.0
                bucket = &self.average[i]
                while True:
                    if bucket.rate > 0 and pass_ == 0:
                        begin = max(begin, bucket.due_ns - bucket.burst_ns)
                    elif bucket.rate > 0:
                        bucket.due_ns = max(bucket.due_ns, begin) + <int64_t>(units / bucket.rate * 1e9)
                    if bucket == &self.burst[i]:
                        break
                    bucket = &self.burst[i]
        return begin

    cdef void wait_turn(self, bint writing, int64_t length) noexcept nogil:
        cdef int64_t begin, now, arrived
        cdef uint64_t generation
        if not load_relaxed(&self.write_limited if writing else &self.read_limited):
            return
        arrived = now = now_ns()
        pthread_mutex_lock(&self.mutex)
        generation = self.generation
        begin = self.reserve(writing, length, now)
        if begin > now:
            waits()
        while begin > now:
            cond_wait_until(&self.changed, &self.mutex, begin)
            now = now_ns()
            if self.generation != generation:
                generation = self.generation
                begin = self.reserve(writing, length, now)
        pthread_mutex_unlock(&self.mutex)
        if now != arrived:
            add_relaxed(&self.delayed, 1)
            add_relaxed(&self.delayed_ns, <uint64_t>(now - arrived))

    cdef int preadv(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        self.wait_turn(False, length)
        return self.child.preadv(vector, count, offset, length)

    cdef int preadv_nowait(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        """With a limit, the caller is sent to preadv, so that a request takes one turn."""
        if load_relaxed(&self.read_limited):
            return -EAGAIN
        return self.child.preadv_nowait(vector, count, offset, length)

    cdef int pwritev(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        self.wait_turn(True, length)
        return self.child.pwritev(vector, count, offset, length, flags)

    cdef int pwritev_nowait(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        if load_relaxed(&self.write_limited):
            return -EAGAIN
        return self.child.pwritev_nowait(vector, count, offset, length, flags)

    cdef int write_zeroes_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        self.wait_turn(True, length)
        return self.child.write_zeroes_at(offset, length, flags)

    cdef int discard_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        self.wait_turn(True, length)
        return self.child.discard_at(offset, length, flags)

    cdef bint may_wait(self, int operation) noexcept nogil:
        if operation != IO_SYNC and load_relaxed(&self.read_limited if operation == IO_READ else &self.write_limited):
            return True
        return self.child.may_wait(operation)

    cdef bint queue_begin(self, int operation, const iovec *vector, int count, int64_t offset, int64_t length,
                          uint32_t flags, KernelIo *io) noexcept nogil:
        if operation != IO_SYNC and load_relaxed(&self.read_limited if operation == IO_READ else &self.write_limited):
            return False
        return self.child.queue_begin(operation, vector, count, offset, length, flags, io)

    cdef int cache_at(self, int64_t offset, int64_t length) noexcept nogil:
        return self.child.cache_at(offset, length)


def check_limits(limits):
    """Return the dict LIMITS without what is 0; ValueError, TypeError for what makes no sense."""
    known = [f"{name}{suffix}" for name in LIMIT_NAMES for suffix in ("", "_max", "_max_length")] + ["iops_size"]
    for name, value in limits.items():
        if name not in known:
            raise TypeError(f"{name}: there is no such limit (there are {', '.join(LIMIT_NAMES)}, each with _max and _max_length, and iops_size)")
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        most = LENGTH_MAX if name.endswith("_length") else LIMIT_MAX
        if not 0 <= value <= most:
            raise ValueError(f"{name}: {value} is not within 0 to {most}")
    limits = {name: value for name, value in limits.items() if value}
    for kind in ("bps", "iops"):
        for part in ("read", "write"):
            if f"{kind}_total" in limits and f"{kind}_{part}" in limits:
                raise ValueError(f"{kind}_total, {kind}_{part}: a total and one of its parts cannot both be limited")
    for name in LIMIT_NAMES:
        most = limits.get(f"{name}_max")
        if most is not None and name not in limits:
            raise ValueError(f"{name}_max: needs {name} beside it")
        if most is not None and most < limits[name]:
            raise ValueError(f"{name}_max: {most} is below {name}, {limits[name]}")
        if f"{name}_max_length" in limits and most is None:
            raise ValueError(f"{name}_max_length: needs {name}_max beside it")
        if most is not None and limits.get(f"{name}_max_length", 1) > 1 and most * limits[f"{name}_max_length"] > LIMIT_MAX:
            raise ValueError(f"{name}_max_length: a burst of {most} for {limits[name + '_max_length']} s is more than {LIMIT_MAX}")
    if "iops_size" in limits and not any(name.startswith("iops_") and name != "iops_size" for name in limits):
        raise ValueError("iops_size: needs a limit of requests a second beside it")
    return limits
