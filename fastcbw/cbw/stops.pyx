"""Stops: for tests, threads held at named places of the protocols.

The gates of block/delay.pyx hold a request at its device; what happens between two loads of memory has no device in it,
and is held here. An engine has none of this until a test gives it some: then a place costs one load.
"""

from libc.errno cimport ETIMEDOUT
from libc.stdint cimport int64_t

from fastcbw.sync cimport (cond_init, cond_wait_until, now_ns, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_wait,
                           pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock)

#: The places by name, in the order of the enum.
POINTS = ("write-entered", "insert-read", "insert-claimed", "insert-checked", "drop-entered", "drop-claimed", "drop-cleared",
          "drop-decided", "reader-found", "reader-copied", "guest-found", "guest-copied", "discard-entered", "carry-claimed")


cdef class Stops:
    """Places of one engine where threads are held while hold() is in force; give it to Engine.set_stops()."""

    def __cinit__(self):
        pthread_mutex_init(&self.mutex, NULL)
        cond_init(&self.changed)

    def __dealloc__(self):
        pthread_cond_destroy(&self.changed)
        pthread_mutex_destroy(&self.mutex)

    def hold(self, name, int count=1 << 30):
        """Hold the next COUNT threads that come to the place NAME, until open() or the end of a `with` block."""
        cdef int point = POINTS.index(name)
        pthread_mutex_lock(&self.mutex)
        self.held[point] = count
        self.opened[point] = 0
        self.arrived[point] = 0
        pthread_mutex_unlock(&self.mutex)
        return Stop(self, point)

    cdef void wait(self, int point) noexcept nogil:
        pthread_mutex_lock(&self.mutex)
        if self.held[point]:
            self.held[point] -= 1
            self.arrived[point] += 1
            self.waiting[point] += 1
            pthread_cond_broadcast(&self.changed)
            while not self.opened[point]:
                pthread_cond_wait(&self.changed, &self.mutex)
            self.waiting[point] -= 1
            pthread_cond_broadcast(&self.changed)
        pthread_mutex_unlock(&self.mutex)

    cdef void open_one(self, int point) noexcept nogil:
        pthread_mutex_lock(&self.mutex)
        self.held[point] = 0
        self.opened[point] = 1
        pthread_cond_broadcast(&self.changed)
        while self.waiting[point]:
            pthread_cond_wait(&self.changed, &self.mutex)
        pthread_mutex_unlock(&self.mutex)

    def wait_arrived(self, int point, int n, double timeout):
        """Return when N threads have come to POINT; TimeoutError after TIMEOUT seconds."""
        cdef int64_t until = now_ns() + <int64_t>(timeout * 1e9)
        cdef int code = 0
        with nogil:
            pthread_mutex_lock(&self.mutex)
            while self.arrived[point] < n and code != ETIMEDOUT:
                code = cond_wait_until(&self.changed, &self.mutex, until)
            n -= self.arrived[point]
            pthread_mutex_unlock(&self.mutex)
        if n > 0:
            raise TimeoutError(f"{POINTS[point]}: {n} more threads should have come within {timeout} s")

    def open(self, int point):
        """Let everybody at POINT go on, and return when they have."""
        with nogil:
            self.open_one(point)


class Stop:
    """One place that is held; made by Stops.hold()."""

    def __init__(self, stops, point):
        self.stops, self.point = stops, point

    def wait_arrived(self, n=1, timeout=10):
        self.stops.wait_arrived(self.point, n, timeout)

    def open(self):
        self.stops.open(self.point)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.open()
