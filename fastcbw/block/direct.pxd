# DirectDevice: a raw image opened O_DIRECT, past the page cache.
from libc.stdint cimport int64_t, uint32_t

from fastcbw.block.file cimport FileDevice
from fastcbw.block.sys cimport iovec
from fastcbw.sync cimport pthread_cond_t, pthread_mutex_t

cdef enum:
    BOUNCE_BUFFERS = 8          # at most; made when first needed, kept until the device goes
    BOUNCE_BYTES = 262144       # of each

# A write under way, or waiting for its turn, in the list of its device; lies on the stack of the writer, or in the slot of
# a queue. All fields under the device's mutex.
cdef struct WriteRange:
    int64_t first               # bytes, multiples of the block
    int64_t end
    bint exclusive              # reads the block, changes a part of it, writes it
    WriteRange *earlier
    WriteRange *later

cdef class DirectDevice(FileDevice):
    cdef readonly int64_t memory_alignment  # bytes, power of two: of addresses
    cdef readonly int64_t alignment         # bytes, power of two: of offsets and lengths; "block" in the code
    cdef int64_t grain              # bytes: what the kernel zeroes or drops without its page cache; a multiple of the block
    # From here on, up to the device's length, lies what direct I/O cannot reach without growing the file: the bytes after the
    # last grain, when the length is no multiple of the block. They go through the page cache, by edge_fd, and by nothing
    # else. Equal to the length when there are none.
    cdef int64_t direct_end
    cdef int edge_fd                # -1 when there are none
    cdef bint ready                 # mutex and conditions exist
    cdef pthread_mutex_t mutex
    cdef pthread_cond_t ended       # a write has left the list
    cdef pthread_cond_t returned    # a bounce buffer is free
    cdef WriteRange *oldest         # under mutex
    cdef WriteRange *newest         # under mutex
    cdef char *bounces[BOUNCE_BUFFERS]      # under mutex; NULL: not made yet
    cdef uint32_t bounces_taken             # under mutex; bit n: somebody has buffers[n]

    cdef bint straight(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil
    # Enter the list: an exclusive range waits for those that overlap it and came earlier, every range for earlier exclusive ones.
    cdef void begin_write(self, WriteRange *mine, int64_t offset, int64_t length, bint exclusive) noexcept nogil
    # As begin_write of a range that is not exclusive, but False instead of waiting.
    cdef bint try_begin_write(self, WriteRange *mine, int64_t offset, int64_t length) noexcept nogil
    cdef void end_write(self, WriteRange *mine) noexcept nogil
    cdef char *take_bounce(self) noexcept nogil
    cdef void return_bounce(self, char *buffer) noexcept nogil
    cdef int read_failed(self, int code, int64_t offset, int64_t length) noexcept nogil
    cdef int preadv_cut(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil
    cdef int pwritev_cut(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil
    cdef int write_part(self, const iovec *vector, int count, int64_t skip, int64_t offset, int64_t length) noexcept nogil
    cdef int write_body(self, const iovec *vector, int count, int64_t skip, int64_t offset, int64_t length) noexcept nogil
    cdef int write_edge(self, const iovec *vector, int count, int64_t skip, int64_t offset, int64_t length) noexcept nogil
