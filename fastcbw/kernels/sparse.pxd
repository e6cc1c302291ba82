# A bitmap with a summary: bit p of the summary says that page p of the words (512 words, 4 KiB, 32768 bits) may hold
# ones. A search then costs what is dirty: 64 KiB of summary stand for 16 Gi bits, and pages never touched stay untouched.
#
# Whoever sets bits marks first (sparse_mark, or sparse_set_atomic which does both); clearing leaves the summary alone. A
# thread that knows that a bit was set (by any synchronisation) therefore finds its page marked.
from libc.stdint cimport int64_t, uint64_t

from fastcbw.kernels.atomic cimport load_acquire
from fastcbw.kernels.bits cimport bit_run

cdef enum:
    PAGE_BITS = 32768
    PAGE_WORDS = 512

cdef struct sparse_bits:
    uint64_t *words         # ceil(length / 64) words; atomic bit-wise
    uint64_t *summary       # one bit per PAGE_BITS bits; atomic, only ever set; NULL: no summary, every page may hold ones
    int64_t length          # bits; those past it in the last word are zero

cdef int64_t summary_bits(int64_t length) noexcept nogil        # how many bits the summary of a bitmap of `length` bits has
cdef void sparse_mark(sparse_bits *bitmap, int64_t first, int64_t count) noexcept nogil         # before bits are set there
cdef void sparse_set_atomic(sparse_bits *bitmap, int64_t first, int64_t count) noexcept nogil   # release
# The first stretch of first..end that may hold ones: where it begins (end when there is none) and *stop, where it ends.
cdef int64_t sparse_stretch(const sparse_bits *bitmap, int64_t first, int64_t end, int64_t *stop) noexcept nogil
cdef inline bint sparse_test(const sparse_bits *bitmap, int64_t index) noexcept nogil:
    # One bit, acquire; a page that holds no ones is not touched.
    if bitmap.summary != NULL and not (load_acquire(bitmap.summary + (index >> 21)) >> ((index >> 15) & 63)) & 1:
        return False
    return (load_acquire(bitmap.words + (index >> 6)) >> (index & 63)) & 1

cdef int64_t sparse_next_one(const sparse_bits *bitmap, int64_t first, int64_t end) noexcept nogil      # index, or end
# As bits_next_run and bits_runs.
cdef int64_t sparse_next_run(const sparse_bits *bitmap, int64_t first, int64_t end, int64_t *run_first) noexcept nogil
cdef int64_t sparse_runs(const sparse_bits *bitmap, int64_t first, int64_t end,
                         bit_run *runs, int64_t room, int64_t *resume) noexcept nogil
cdef int64_t sparse_count(const sparse_bits *bitmap, int64_t first, int64_t end) noexcept nogil
# Whole bitmaps of equal length. Not atomic: nobody else changes the target, which may be one of the sources.
cdef void sparse_and_not(sparse_bits *target, const sparse_bits *left, const sparse_bits *right) noexcept nogil
cdef void sparse_copy(sparse_bits *target, const sparse_bits *source) noexcept nogil
# target |= source, atomically for each word: others may change bits of the target meanwhile.
cdef void sparse_or_atomic(sparse_bits *target, const sparse_bits *source) noexcept nogil
cdef bint sparse_equal(const sparse_bits *left, const sparse_bits *right) noexcept nogil
cdef void sparse_tidy(sparse_bits *bitmap) noexcept nogil       # unmarks pages without ones; nobody may set bits meanwhile
