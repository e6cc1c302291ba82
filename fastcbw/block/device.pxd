# BlockDevice: the one data-plane interface. Everything that holds bytes, and every filter above it, is one of these.
#
# Rules that every cdef method obeys
#   - nogil and noexcept: 0 on success, -errno on failure; all or nothing is reported, a failed write leaves any mixture
#     of old and new bytes in its range and nothing changed outside it;
#   - any thread, any number at once; no ordering between requests that overlap in time;
#   - 0 <= offset, 0 < length, offset + length <= self.length: the caller (a door) has checked it;
#   - the buffer belongs to the caller and is not kept after the return.
from libc.stdint cimport int64_t, uint32_t

from fastcbw.block.sys cimport iovec

cdef enum:
    # flags of the write-like requests
    FUA = 1             # on stable storage before the return
    MAY_UNMAP = 2       # write_zeroes may leave a hole
    FAST_ONLY = 4       # write_zeroes: -EOPNOTSUPP at once when it would be no faster than writing zeroes
    # flags of block_status: the bits of NBD base:allocation
    STATUS_HOLE = 1     # not allocated
    STATUS_ZERO = 2     # reads as zeroes
    # and one that NBD has not
    STATUS_ABSENT = 4   # outside what the snapshot keeps: a read is an error

    # operations, of what is under way in a queue
    IO_READ = 0
    IO_WRITE = 1
    IO_ZERO = 2
    IO_DISCARD = 3
    IO_SYNC = 4
    # engines: who does the requests of a queue
    ENGINE_SYNC = 0     # the thread that submits, at once
    ENGINE_THREADS = 1
    ENGINE_URING = 2    # the kernel; threads do what it can't

    # what queue_end says
    QUEUE_ENDED = 0     # that was all: the request has ended, if the kernel did what it was asked for
    QUEUE_NEXT = 1      # *io says what the kernel is to be asked for next
    QUEUE_METHOD = 2    # nothing is under way any more: the method does the request, in a thread that may wait

# What the kernel is to be asked for in place of a method; lies in the slot of a queue from queue_begin to queue_end. A request may
# take several such stages, one after the other.
cdef struct KernelIo:
    int fd
    int operation       # IO_*; the queue sets the request's own before queue_begin
    # What to read or write: NULL, the request's own vector; else these, which are the device's and must stay until queue_end (the
    # queue moves them on when the kernel does a part). The queue sets NULL before queue_begin.
    iovec *vector
    int count
    int64_t offset
    int64_t length
    int64_t deadline_ns # 0: none. Else, when the kernel has not answered by then, queue_late() is called (monotonic)
    int64_t own[6]      # the leaf's
    int64_t above[6]    # of the one filter above it that has stages of its own

cdef class BlockDevice:
    cdef readonly int64_t length        # bytes, fixed for the life of the device
    cdef readonly str name              # for messages: a node name or a file name
    cdef readonly bint read_only
    cdef readonly bint queueable        # a queue may have requests done by other threads or the kernel; else it does them at once
    cdef readonly bint can_cache        # cache_at does something
    cdef int io_engine                  # ENGINE_*: what a queue for this device is to be made with; `io` in Python
    cdef bint always_waits              # asking it not to wait is of no use: every read and write waits for a device
    cdef bint closed                    # set by close(): the Python doors refuse, cdef methods are no longer called

    cdef int pread(self, void *buffer, int64_t offset, int64_t length) noexcept nogil
    cdef int preadv(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil
    # As preadv, but -EAGAIN at once instead of waiting for a device (data not in memory). Never waits, may read nothing.
    cdef int preadv_nowait(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil
    cdef int pwrite(self, const void *buffer, int64_t offset, int64_t length, uint32_t flags) noexcept nogil
    # As pwritev, but -EAGAIN, with nothing done, where it would wait for a device or another request. The page cache counts as memory.
    cdef int pwritev_nowait(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil
    # Whether the method of OPERATION (IO_*) may wait for a device. A hint: it decides which thread is asked to wait.
    cdef bint may_wait(self, int operation) noexcept nogil
    cdef int pwritev(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil
    cdef int write_zeroes_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil
    cdef int discard_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil     # advisory: content undefined after
    # Reading once, of devices that drop what was handed over. Before the read: whether the range can be dropped, 0 or a code. After
    # all of it was handed over: it goes.
    cdef int check_once(self, int64_t offset, int64_t length) noexcept nogil
    cdef int delivered(self, int64_t offset, int64_t length) noexcept nogil
    cdef int sync(self) noexcept nogil                  # all that was acknowledged before is on stable storage
    # The first extent of the range: its length (1..length) with *flags, or -errno. Holes are the truth at some moment of the call.
    cdef int64_t block_status(self, int64_t offset, int64_t length, uint32_t *flags) noexcept nogil
    # Advisory: the range will be read, bring it nearer. May read nothing, changes nothing.
    cdef int cache_at(self, int64_t offset, int64_t length) noexcept nogil
    # Whether a read, write or sync may be asked of the kernel in place of preadv, pwritev, sync: True with *io, then queue_end must
    # follow when the kernel has ended it. Never waits. False: call the method (in a thread that may wait).
    cdef bint queue_begin(self, int operation, const iovec *vector, int count, int64_t offset, int64_t length,
                          uint32_t flags, KernelIo *io) noexcept nogil
    # What was asked for has ended. OPERATION and what follows is the request, as in queue_begin; of a write or read that the kernel did
    # in parts, what is left. CODE: 0, all was done; else -errno (-ECANCELED: the kernel did not take it). Never waits. QUEUE_*; of
    # a read or write that failed, QUEUE_ENDED has the method do it again. A sync always ends here.
    cdef int queue_end(self, int operation, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags,
                       KernelIo *io, int code) noexcept nogil
    # The deadline of a stage has passed. From here on the method does the request; queue_end is called once more, when the kernel
    # has answered after all, and may only clean up. Its buffers stay until then.
    cdef void queue_late(self, int operation, KernelIo *io) noexcept nogil
    # What a code that a method returned means: the words go to TEXT (SIZE bytes, ended by 0); returns the errno to show outside.
    # A device with verdicts of its own, codes below -999, overrides it.
    cdef int explain(self, int code, char *text, size_t size) noexcept nogil
    cdef int check_open(self) except -1
    cdef int check_range(self, int64_t offset, int64_t length) except -1
    cdef int check_writable(self) except -1
    cdef int fail(self, int code, str operation, int64_t offset, int64_t length) except -1

# preadv of a device that knows pread alone: the buffers one after the other, until one fails.
cdef int read_each(BlockDevice device, const iovec *vector, int count, int64_t offset) noexcept nogil
