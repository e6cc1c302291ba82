# QueuedDevice: a device whose every request goes through a queue, one at a time. For tests.
from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.block.device cimport BlockDevice, KernelIo
from fastcbw.block.filter cimport Filter
from fastcbw.block.queue cimport IoQueue
from fastcbw.block.sys cimport iovec
from fastcbw.sync cimport pthread_mutex_t

cdef class QueuedDevice(Filter):
    cdef IoQueue queue
    cdef bint ready
    cdef pthread_mutex_t mutex      # whoever has it owns the queue

    cdef int run(self, int operation, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil

# HungDevice: reads of a queue end when a test feeds them.
cdef class HungDevice(BlockDevice):
    cdef readonly BlockDevice child
    cdef int pipe_out           # what the kernel is asked to read; -1 once closed
    cdef int pipe_in
