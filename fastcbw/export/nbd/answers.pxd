# Answers: what the handlers of one connection's requests share: the device, the replies, counters, error texts.
from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.block.device cimport BlockDevice
from fastcbw.export.nbd.flights cimport Flights
from fastcbw.export.nbd.pool cimport BufferPool
from fastcbw.export.nbd.replies cimport Replies
from fastcbw.export.nbd.request cimport Request
from fastcbw.kernels.atomic cimport load_relaxed, store_relaxed
from fastcbw.wire.constants cimport CONTEXTS_MAX

cdef enum:
    EXTENTS_MAX = 4096              # extents of one context in a reply to BLOCK_STATUS

cdef enum:                # order of COUNTERS in answers.pyx
    REQUESTS = 0
    READS
    WRITES
    ZEROES
    TRIMS
    FLUSHES
    CACHES
    STATUSES
    BYTES_READ
    BYTES_WRITTEN
    BYTES_ZEROED
    BYTES_TRIMMED
    ERRORS
    RECEIVES                        # calls to recv that brought something: requests / receives is the batching
    COUNTERS_COUNT

cdef inline void count(uint64_t *counter, int64_t more) noexcept nogil:
    # One writer, so no atomic addition; readers see a whole word.
    store_relaxed(counter, load_relaxed(counter) + <uint64_t>more)

cdef class Answers:
    cdef int fd                     # borrowed from the Python socket, which outlives run()
    cdef BlockDevice device
    cdef BufferPool pool
    cdef Replies replies
    cdef Flights flights            # None: every request is done at once, in the thread of run()
    cdef bint read_only
    cdef bint trims_only            # of a device that nobody writes: TRIM says what the client has done with
    cdef bint read_once             # and so does a read, when its reply has gone out
    cdef bint background            # class in the pool
    cdef bytes export_name          # kept for `name`
    cdef const char *name           # of the export, for messages
    cdef tuple contexts             # keeps the MetaContexts alive
    cdef void *context[CONTEXTS_MAX]
    cdef uint32_t context_id[CONTEXTS_MAX]
    cdef int contexts_count
    # shared with the control plane (atomic)
    cdef uint32_t stopping          # receive no more; what was received is served and answered
    cdef uint32_t killing           # give up waiting for a pool buffer as well
    cdef uint64_t counters[COUNTERS_COUNT]      # written by the thread of run() only

    cdef int check(self, const Request *request, const char **why) noexcept nogil
    cdef void block_status(self, const Request *request) noexcept nogil
    cdef void put_status(self, const Request *request, int context, const char *chunk, int64_t extents, int64_t length) noexcept nogil
    cdef void answer(self, const Request *request, int code, const char *why) noexcept nogil
    cdef void refuse(self, const Request *request, int code, const char *why, int64_t offset) noexcept nogil
