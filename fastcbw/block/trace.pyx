"""TraceDevice: a filter that writes down each request that passes, as text; all else is the child's.

    # fastcbw-trace-1
    MICROSECONDS OP OFFSET LENGTH

MICROSECONDS from the first request on; OP: read, write, zero, discard, flush. A request is recorded when it comes; one that is tried
without waiting, when that did it. Lines are collected and written in the thread of the request that fills the buffer, a write to a file each
2000 requests or so. When writing fails, recording ends, the guest goes on, and `error` tells.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint32_t
from libc.stdio cimport snprintf

import os

from fastcbw.block.device cimport BlockDevice
from fastcbw.block.filter cimport Filter
from fastcbw.block.sys cimport iovec
from fastcbw.sync cimport now_ns, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock

cdef extern from "unistd.h" nogil:
    ssize_t write(int fd, const void *buffer, size_t length)

cdef enum:
    READ = 0
    WRITE = 1
    ZERO = 2
    DISCARD = 3
    FLUSH = 4

#: The first line of a trace.
HEAD = "# fastcbw-trace-1"
REQUESTS_LIMIT = 100_000_000


cdef const char *word_of(int operation) noexcept nogil:
    if operation == READ:
        return "read"
    if operation == WRITE:
        return "write"
    if operation == ZERO:
        return "zero"
    return "discard" if operation == DISCARD else "flush"


cdef class TraceDevice(Filter):
    """CHILD, and a new file PATH of what is asked of it, until stop() or REQUESTS of them. Closing it ends the trace and closes the child.

    Raises OSError when PATH cannot be made; FileExistsError when there is one.
    """

    def __cinit__(self, BlockDevice child not None, path, *, int64_t requests=REQUESTS_LIMIT, name=None):
        self.fd = -1
        if not 0 < requests <= REQUESTS_LIMIT:
            raise ValueError(f"requests: {requests} is not within 1 to {REQUESTS_LIMIT}")
        self.stand_on(child, name)
        self.queueable, self.io_engine, self.always_waits = child.queueable, child.io_engine, child.always_waits
        self.limit = requests
        self.path = os.fspath(path)
        pthread_mutex_init(&self.mutex, NULL)
        self.ready = True
        self.fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        head = HEAD.encode()
        self.used = snprintf(self.buffer, TRACE_LINE_MAX, "%s\n", <const char *>head)

    def __dealloc__(self):
        if self.ready:
            self.write_out()
            if self.fd >= 0:
                os.close(self.fd)
            pthread_mutex_destroy(&self.mutex)

    # -- control plane

    @property
    def requests(self):
        """Requests recorded."""
        cdef int64_t recorded
        with nogil:
            pthread_mutex_lock(&self.mutex)
            recorded = self.recorded
            pthread_mutex_unlock(&self.mutex)
        return recorded

    @property
    def error(self):
        """None, or why nothing more is written."""
        return os.strerror(self.failed) if self.failed else None

    def stop(self):
        """End the trace: what was recorded is in the file. Stopping twice is no error."""
        cdef int fd
        with nogil:
            pthread_mutex_lock(&self.mutex)
            self.write_out()
            fd, self.fd = self.fd, -1
            pthread_mutex_unlock(&self.mutex)
        if fd >= 0:
            os.close(fd)

    def close(self):
        """End the trace and close the child."""
        self.closed = True
        self.stop()
        self.child.close()

    # -- data plane

    cdef void write_out(self) noexcept nogil:
        """Write what is in the buffer. Caller holds mutex, or is the last."""
        cdef int done = 0
        cdef ssize_t took
        while self.fd >= 0 and not self.failed and done < self.used:
            took = write(self.fd, self.buffer + done, self.used - done)
            if took > 0:
                done += <int>took
            elif took == 0 or errno != EINTR:
                self.failed = errno if took else 5
        self.used = 0

    cdef void record(self, int operation, int64_t offset, int64_t length) noexcept nogil:
        cdef int64_t now
        pthread_mutex_lock(&self.mutex)
        if self.fd >= 0 and not self.failed and self.recorded < self.limit:
            now = now_ns()          # under the mutex: lines never go back in time
            if self.begun_ns == 0:
                self.begun_ns = now
            if self.used > TRACE_BUFFER - TRACE_LINE_MAX:
                self.write_out()
            self.used += snprintf(self.buffer + self.used, TRACE_LINE_MAX, "%lld %s %lld %lld\n", <long long>((now - self.begun_ns) // 1000),
                                  word_of(operation), <long long>offset, <long long>length)
            self.recorded += 1
        pthread_mutex_unlock(&self.mutex)

    cdef int preadv(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        self.record(READ, offset, length)
        return self.child.preadv(vector, count, offset, length)

    cdef int preadv_nowait(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        cdef int code = self.child.preadv_nowait(vector, count, offset, length)
        if code != -EAGAIN:
            self.record(READ, offset, length)
        return code

    cdef int pwritev(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        self.record(WRITE, offset, length)
        return self.child.pwritev(vector, count, offset, length, flags)

    cdef int pwritev_nowait(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef int code = self.child.pwritev_nowait(vector, count, offset, length, flags)
        if code != -EAGAIN:
            self.record(WRITE, offset, length)
        return code

    cdef bint may_wait(self, int operation) noexcept nogil:
        return self.child.may_wait(operation)

    cdef int write_zeroes_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        self.record(ZERO, offset, length)
        return self.child.write_zeroes_at(offset, length, flags)

    cdef int discard_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        self.record(DISCARD, offset, length)
        return self.child.discard_at(offset, length, flags)

    cdef int sync(self) noexcept nogil:
        self.record(FLUSH, 0, 0)
        return self.child.sync()
