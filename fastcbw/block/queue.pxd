# IoQueue: many requests of one thread under way at once. What is guaranteed:
#
#   - One thread at a time uses a queue, for everything: submit, poll and close take no lock. (It may change hands
#     when it is idle or under a lock of the users.) Each NBD connection, each worker of a copier has its own.
#   - submit_* never waits for a device and takes a request or refuses it. 0: it is under way and its cookie will be returned
#     by poll() exactly once, also when it fails. -EAGAIN: the queue has `depth` requests in it (poll, and submit again).
#     -ENOMEM, -EOWNERDEAD (the child of a fork), -EBADF (closed). A refused request was not begun and will not be returned.
#     The exception to "never waits": a device that is not queueable (memory, Python, filters) and the engine "sync" are done
#     at once, within submit; poll returns them next.
#   - What was submitted reaches the kernel at the latest with the next poll(), also poll(..., 0, 0).
#   - The vector is copied: it may be reused when submit returns. The memory that it points to is the queue's until poll has
#     returned the cookie: a read fills it at any time, a write reads it at any time. The device must live, and stay open, as long.
#   - The rules of BlockDevice hold for the request: range checked by the caller, 0 or -errno as the method of that name gives
#     it, whatever the engine. No order among requests under way; sync covers what poll had returned before it was submitted.
#   - Who has writes under way must not call a synchronous method of the same device for the same blocks: with direct I/O
#     a write of a part of a block waits for the others there to end, and they end in poll(). Submit it to the queue instead.
#   - fd() can be waited for (poll, epoll: readable) beside sockets. It wakes for what ends later, not for what has ended:
#     call poll(..., 0, 0) until it returns 0, then sleep. A wake-up may be for nothing.
#   - A request may be several things to the kernel, one after the other (device.pxd, KernelIo); a stage that has a deadline and misses
#     it is left to the kernel, and the method does the request in a thread.
#   - close() waits for all that is under way and forgets the results. Bounded: `depth` requests, at most
#     THREADS_MAX threads, made when first needed.
from cpython.ref cimport PyObject
from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.block.sys cimport iovec
from fastcbw.block.threads cimport IoSlot, IoThreads

cdef enum:
    DEPTH_MAX = 4096

cdef struct IoDone:
    uint64_t cookie
    int code                        # 0 or -errno, for device.explain()

cdef extern from "uring.h" nogil:
    cdef struct fcbw_uring:
        int fd

cdef class IoQueue:
    cdef readonly int depth         # requests at most
    cdef int engine                 # ENGINE_*
    cdef readonly int in_flight     # submitted and not yet returned by poll
    cdef bint closed
    cdef uint32_t forks             # of the process that made it
    cdef IoSlot *slots              # twice the depth: one for each request, and for what is late
    cdef IoSlot *unused
    cdef IoSlot *ended              # in the order of ending, not yet returned
    cdef IoSlot *ended_last
    cdef int ended_count
    cdef fcbw_uring ring
    cdef int kernel_count           # slots in the ring, submitted or waiting to be
    cdef int late_count             # of these, late ones: their request goes on elsewhere
    cdef int64_t deadline_ns        # before it nothing in the ring is late; 0: nothing ever is
    cdef bint watching              # a POLL on the threads' event is in the ring
    cdef bint ring_lost             # the kernel refused for good: everything goes to the threads
    cdef IoThreads threads          # None: engine sync
    cdef dict held                  # of the Python door: cookie -> device and buffer

    cdef int submit_read(self, PyObject *device, const iovec *vector, int count, int64_t offset, int64_t length,
                         uint64_t cookie) noexcept nogil
    cdef int submit_write(self, PyObject *device, const iovec *vector, int count, int64_t offset, int64_t length,
                          uint32_t flags, uint64_t cookie) noexcept nogil
    cdef int submit_zero(self, PyObject *device, int64_t offset, int64_t length, uint32_t flags, uint64_t cookie) noexcept nogil
    cdef int submit_discard(self, PyObject *device, int64_t offset, int64_t length, uint32_t flags,
                            uint64_t cookie) noexcept nogil
    cdef int submit_sync(self, PyObject *device, uint64_t cookie) noexcept nogil
    # Writes up to ROOM results to DONE and returns their number. Waits until MIN_COMPLETE are there (no more than are under way, or
    # than ROOM), at most TIMEOUT_NS; negative: for ever. -EOWNERDEAD in the child of a fork.
    cdef int poll(self, IoDone *done, int room, int min_complete, int64_t timeout_ns) noexcept nogil
    cdef int fd(self) noexcept nogil        # -1 with the engine "sync": nothing ends later
    # When poll() must be called again at the latest, though fd() says nothing (monotonic); 0: never.
    cdef int64_t next_deadline(self) noexcept nogil
    # Whether poll() has nothing more to do: nothing is under way, nor late and to be cleaned up.
    cdef bint is_idle(self) noexcept nogil
    cdef void drain(self) noexcept nogil

    cdef bint is_forked(self) noexcept nogil
    cdef bint untold(self) noexcept nogil
    cdef int submit(self, int operation, PyObject *device, const iovec *vector, int count, int64_t offset, int64_t length,
                    uint32_t flags, uint64_t cookie) noexcept nogil
    cdef bint to_kernel(self, IoSlot *slot) noexcept nogil
    cdef void to_threads(self, IoSlot *slot) noexcept nogil
    cdef void end(self, IoSlot *slot) noexcept nogil
    cdef void add_entry(self, IoSlot *slot) noexcept nogil
    cdef void leave_kernel(self, IoSlot *slot, int code) noexcept nogil
    cdef void expire(self) noexcept nogil
    cdef void replace(self, IoSlot *late) noexcept nogil
    cdef void kernel_answered(self, IoSlot *slot, int result) noexcept nogil
    cdef void reap(self) noexcept nogil
    cdef bint enter(self, int want, int64_t timeout_ns) noexcept nogil
