"""For tests and benchmarks: QueuedDevice, a filter that sends every request through an IoQueue, so that what tests a
device tests the queue; HungDevice, a filter that answers the kernel's reads when it is told to; and a load that keeps a queue full.

QueuedDevice: any thread may call; they take turns. A request is submitted, then waited for, so there is never more than one under way.
"""

from cpython.ref cimport PyObject
from libc.errno cimport EIO
from libc.stdint cimport int64_t, uint64_t

import os as _os

from fastcbw.block.device cimport (BlockDevice, ENGINE_URING, IO_DISCARD, IO_READ, IO_SYNC, IO_WRITE, IO_ZERO, KernelIo, QUEUE_ENDED)
from fastcbw.block.filter cimport Filter
from fastcbw.block.queue cimport IoDone, IoQueue
from fastcbw.block.sys cimport iovec
from fastcbw.kernels.lent cimport Lent, lend
from fastcbw.sync cimport now_ns, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock


cdef class QueuedDevice(Filter):
    """CHILD, by way of a queue of ENGINE. Closing it closes the queue and the child."""

    def __cinit__(self, BlockDevice child not None, str engine):
        self.queue = IoQueue(engine, 4)
        pthread_mutex_init(&self.mutex, NULL)
        self.ready = True
        self.stand_on(child, None)

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


cdef class HungDevice(BlockDevice):
    """CHILD, but what a queue asks the kernel to read comes out of a pipe: it hangs until feed(). Closing it closes the child."""

    def __cinit__(self, BlockDevice child not None):
        self.pipe_out, self.pipe_in = _os.pipe2(_os.O_CLOEXEC)
        self.child = child
        self.length = child.length
        self.name = child.name
        self.queueable = self.always_waits = True
        self.io_engine = ENGINE_URING

    def feed(self, data):
        """Give the reads that hang DATA, in their order."""
        _os.write(self.pipe_in, data)

    def close(self):
        """Close the pipe and the child."""
        if self.pipe_out >= 0:
            _os.close(self.pipe_out)
            _os.close(self.pipe_in)
            self.pipe_out = self.pipe_in = -1
        self.closed = True
        self.child.close()

    cdef bint queue_begin(self, int operation, const iovec *vector, int count, int64_t offset, int64_t length,
                          uint32_t flags, KernelIo *io) noexcept nogil:
        io.fd = self.pipe_out
        return operation == IO_READ

    cdef int preadv(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        return self.child.preadv(vector, count, offset, length)

    cdef int pwritev(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        return self.child.pwritev(vector, count, offset, length, flags)

    cdef int sync(self) noexcept nogil:
        return self.child.sync()


def drive(IoQueue queue not None, BlockDevice device not None, offsets, memory, int64_t block, *, bint write=False):
    """Read (or write) BLOCK bytes at each of OFFSETS (int64), as many under way as the queue is deep; return the seconds it took.

    memory: queue.depth * block bytes, one place for each request under way. Raises OSError for the first that fails.
    """
    cdef IoDone done[64]
    cdef iovec vector
    cdef Lent places = lend(offsets, "offsets", "int64", False), lent = lend(memory, "memory", "uint8", True)
    cdef const int64_t *at = <const int64_t *>places.start
    cdef unsigned char *room = <unsigned char *>lent.start
    cdef int64_t i, count = places.count, first_ns, length = block
    cdef int code = 0, got, n
    cdef uint64_t place = 0
    if lent.count < queue.depth * block or queue.in_flight:
        raise ValueError(f"memory: {lent.count} bytes for {queue.depth} requests of {block}, {queue.in_flight} under way")
    for i in range(count):
        device.check_range(at[i], block)
    i = 0
    vector.iov_len = <size_t>block
    if count == 0:
        return 0.0
    with nogil:
        first_ns = now_ns()
        while (i < count and code == 0) or queue.in_flight > 0:
            got = queue.poll(done, 64, 1 if queue.in_flight == queue.depth or i == count or code else 0, -1)
            n = 0
            while n < got:
                if done[n].code:
                    code = done[n].code
                n += 1
            # Each that ended makes room for one, in its place; in the beginning all places are free.
            n = 0
            while i < count and code == 0 and queue.in_flight < queue.depth:
                if n < got:
                    place = done[n].cookie
                    n += 1
                else:
                    place = <uint64_t>queue.in_flight
                vector.iov_base = room + <int64_t>place * block
                if write:
                    code = queue.submit_write(<PyObject *>device, &vector, 1, at[i], length, 0, place)
                else:
                    code = queue.submit_read(<PyObject *>device, &vector, 1, at[i], length, place)
                i += 1
        first_ns = now_ns() - first_ns
    if code:
        raise OSError(-code, _os.strerror(-code))
    return first_ns / 1e9
