"""QueuedDevice: a filter that sends every request through an IoQueue, so that what tests a device tests the queue.

Any thread may call; they take turns. A request is submitted, then waited for, so there is never more than one under way.
"""

from cpython.ref cimport PyObject
from libc.errno cimport EIO

from fastcbw.block.device cimport BlockDevice, IO_DISCARD, IO_READ, IO_SYNC, IO_WRITE, IO_ZERO
from fastcbw.block.queue cimport IoDone, IoQueue
from fastcbw.sync cimport pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock


cdef class QueuedDevice(BlockDevice):
    """CHILD, by way of a queue of ENGINE. Closing it closes the queue and the child."""

    def __cinit__(self, BlockDevice child not None, str engine):
        self.queue = IoQueue(engine, 4)
        pthread_mutex_init(&self.mutex, NULL)
        self.ready = True
        self.child = child
        self.length = child.length
        self.name = child.name
        self.read_only = child.read_only

    def __dealloc__(self):
        if self.ready:
            pthread_mutex_destroy(&self.mutex)

    def close(self):
        """Close the queue and the child."""
        self.closed = True
        self.queue.close()
        self.child.close()

    cdef int run(self, int operation, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef IoDone done
        cdef uint64_t cookie = <uint64_t>offset ^ 0x5a5a
        cdef int code
        pthread_mutex_lock(&self.mutex)
        code = self.queue.submit(operation, <PyObject *>self.child, vector, count, offset, length, flags, cookie)
        if code == 0:
            code = self.queue.poll(&done, 1, 1, -1)
            code = done.code if code == 1 and done.cookie == cookie and self.queue.in_flight == 0 else -EIO
        pthread_mutex_unlock(&self.mutex)
        return code

    cdef int fail(self, int code, str operation, int64_t offset, int64_t length) except -1:
        return self.child.fail(code, operation, offset, length)

    cdef int explain(self, int code, char *text, size_t size) noexcept nogil:
        return self.child.explain(code, text, size)

    cdef int preadv(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        return self.run(IO_READ, vector, count, offset, length, 0)

    cdef int pwritev(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        return self.run(IO_WRITE, vector, count, offset, length, flags)

    cdef int write_zeroes_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        return self.run(IO_ZERO, NULL, 0, offset, length, flags)

    cdef int discard_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        return self.run(IO_DISCARD, NULL, 0, offset, length, flags)

    cdef int sync(self) noexcept nogil:
        return self.run(IO_SYNC, NULL, 0, 0, 0, 0)

    cdef int64_t block_status(self, int64_t offset, int64_t length, uint32_t *flags) noexcept nogil:
        return self.child.block_status(offset, length, flags)
