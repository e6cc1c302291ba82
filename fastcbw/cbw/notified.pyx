"""NotifiedView: the disk at the begin() of a WriteNotifier that no job empties: the old scheme's image fleecing, a backup with sync none and a reader.

    read ─▶ the disk ─ looked up ─ done? ──yes──▶ that cluster again, from the notifier's target
                                     └─no─▶ what was read

A cluster is done before a guest write to it begins, so what was read and is not done afterwards was not written meanwhile. Reading never makes the
guest wait. When the notifier has ended, by itself or by a failure, what the guest overwrites is kept no more, and every read is an error.
"""

from libc.errno cimport EIO
from libc.stdint cimport int64_t, uint32_t

from fastcbw.block.device cimport BlockDevice, read_each
from fastcbw.block.sys cimport iovec
from fastcbw.cbw.notifier cimport COPYING, WriteNotifier
from fastcbw.kernels.atomic cimport fence_acquire, load_seq
from fastcbw.kernels.bits cimport bits_next_run


cdef class NotifiedView(BlockDevice):
    """What was below NOTIFIER at its begin(), read-only. NOTIFIER: has begun, and outlives this; its target holds nothing but what it puts there.

    Raises ValueError when it has not begun.
    """

    def __cinit__(self, WriteNotifier notifier not None, str name=None):
        if not notifier.has_begun:
            raise ValueError(f"{notifier.name}: has not begun: there is no point in time to read (call begin())")
        self.notifier = notifier
        self.length = notifier.length
        self.name = f"{notifier.name}@begin" if name is None else name
        self.read_only = True

    cdef int pread(self, void *buffer, int64_t offset, int64_t length) noexcept nogil:
        cdef int bits = self.notifier.cluster_bits
        cdef int64_t at = offset >> bits
        cdef int64_t stop = ((offset + length - 1) >> bits) + 1
        cdef int64_t begin, end, first, run
        cdef int code = self.notifier.child.pread(buffer, offset, length)
        fence_acquire()             # the bitmap is looked at after the read
        while code == 0:
            run = bits_next_run(self.notifier.done, at, stop, &first)
            if run == 0:
                break
            at = first + run
            begin = max(offset, first << bits)
            end = min(offset + length, at << bits)
            code = self.notifier.target.pread(<char *>buffer + (begin - offset), begin, end - begin)
        if load_seq(&self.notifier.state) != COPYING:
            return -EIO
        return code

    cdef int preadv(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        return read_each(self, vector, count, offset)

    cdef int64_t block_status(self, int64_t offset, int64_t length, uint32_t *flags) noexcept nogil:
        flags[0] = 0                # nothing is known of what the guest may be writing
        return length
