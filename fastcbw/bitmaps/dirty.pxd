# Words of a dirty bitmap: which granules of a disk were written. One generation: switched as a whole, never cleared in place.
from libc.stdint cimport int64_t, uint64_t

from fastcbw.kernels.atomic cimport load_seq
from fastcbw.kernels.bits cimport bits_mark_seq
from fastcbw.kernels.sparse cimport sparse_bits, sparse_mark

cdef enum:
    GRANULARITY_BITS_MIN = 9        # 512 bytes
    GRANULARITY_BITS_MAX = 31       # 2 GiB

cdef struct dirty_words:
    sparse_bits bits        # one bit per granule of the disk, the last may be partial; with summary; bits are only ever set (atomic)
    int shift               # log2 of the granularity
    int64_t length          # bytes of the disk
    uint64_t refs           # atomic

cdef dirty_words *dirty_new(int64_t length, int shift) noexcept nogil       # all zero, one reference; NULL without memory
cdef void dirty_ref(dirty_words *dirty) noexcept nogil
cdef void dirty_unref(dirty_words *dirty) noexcept nogil
# target |= source, each bit of either being (1 << shift) bytes: rounded outwards, atomically, in time that follows what is dirty.
cdef void dirty_convert(sparse_bits *target, int target_shift, const sparse_bits *source, int source_shift) noexcept nogil
# The first extent of the range: its length (1..length), and whether it is dirty in one of the two; MORE may be NULL.
cdef int64_t dirty_extent(const dirty_words *dirty, const dirty_words *more, int64_t offset, int64_t length, bint *found) noexcept nogil

cdef inline void dirty_mark(dirty_words *dirty, int64_t offset, int64_t length) noexcept nogil:
    # seq_cst, and nothing but a load where the bits are set already. LENGTH > 0.
    cdef int64_t first = offset >> dirty.shift
    cdef int64_t last = (offset + length - 1) >> dirty.shift
    cdef uint64_t mask
    if first >> 6 == last >> 6:
        mask = (~(<uint64_t>0) >> (63 - (last - first))) << (first & 63)
        if (load_seq(dirty.bits.words + (first >> 6)) & mask) == mask:
            return
    sparse_mark(&dirty.bits, first, last - first + 1)
    bits_mark_seq(dirty.bits.words, first, last - first + 1)

# A reference to words, for Python.
cdef class DirtyWords:
    cdef dirty_words *words

cdef DirtyWords hold_words(dirty_words *words)      # takes a reference of its own
