"""Filter: the base of devices that stand on another one. What nobody overrides is the child's: the words of an error, flushes, block status,
and the end of a request that the kernel was asked for, since a filter that lets the child ask has to let it hear of the end as well.

Reads and writes are not here: to change these is what a filter is for. Nor are CACHE and hints about waiting, which are false
where a filter does not think of them, and then only cost time.
"""

from libc.stdint cimport int64_t, uint32_t

from fastcbw.block.device cimport BlockDevice, ENGINE_SYNC, ENGINE_THREADS, KernelIo
from fastcbw.block.sys cimport iovec


cdef class Filter(BlockDevice):
    """CHILD, in some other way. Closing it closes the child."""

    cdef int stand_on(self, BlockDevice child, name) except -1:
        """Be as long as CHILD, and read-only where it is. name: None for the child's."""
        self.child = child
        self.length = child.length
        self.name = child.name if name is None else name
        self.read_only = child.read_only
        return 0

    cdef void may_wait_in_threads(self) noexcept:
        """Requests may wait here, whatever the child is: queues have them done by threads, or as the child has them done."""
        self.queueable = True
        self.io_engine = self.child.io_engine if self.child.queueable and self.child.io_engine != ENGINE_SYNC else ENGINE_THREADS

    def close(self):
        """Close the child."""
        self.closed = True
        self.child.close()

    cdef int fail(self, int code, str operation, int64_t offset, int64_t length) except -1:
        return self.child.fail(code, operation, offset, length)     # it may know more than the errno

    cdef int explain(self, int code, char *text, size_t size) noexcept nogil:
        return self.child.explain(code, text, size)

    cdef int sync(self) noexcept nogil:
        return self.child.sync()

    cdef int queue_end(self, int operation, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags,
                       KernelIo *io, int code) noexcept nogil:
        return self.child.queue_end(operation, vector, count, offset, length, flags, io, code)

    cdef void queue_late(self, int operation, KernelIo *io) noexcept nogil:
        self.child.queue_late(operation, io)

    cdef int64_t block_status(self, int64_t offset, int64_t length, uint32_t *flags) noexcept nogil:
        return self.child.block_status(offset, length, flags)
