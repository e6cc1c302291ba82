# Kernels over bitmap words: bit i of a bitmap is bit i % 64 of word i / 64, as in NumPy uint64 and a little-endian bitarray.
# `first` and `count` are bits; `end` is one past the last. Atomic where the name says so; the others suppose that
# nobody else writes (they read with relaxed loads, so a concurrent writer gives an old or a new bit, never a torn word).
from libc.stdint cimport int64_t, uint64_t

cdef extern from "bitrun.h" nogil:
    ctypedef struct bit_run "struct fcbw_run":
        int64_t first           # bits; the first of the run
        int64_t count           # bits; how many ones follow each other

cdef bint bits_all(const uint64_t *words, int64_t first, int64_t count) noexcept nogil
cdef bint bits_all_seq(const uint64_t *words, int64_t first, int64_t count) noexcept nogil      # seq_cst loads
cdef bint bits_any(const uint64_t *words, int64_t first, int64_t count) noexcept nogil
cdef void bits_set_atomic(uint64_t *words, int64_t first, int64_t count) noexcept nogil         # release
cdef void bits_clear_atomic(uint64_t *words, int64_t first, int64_t count) noexcept nogil       # release
# Sets the range with seq_cst `or`; a word whose bits a seq_cst load already shows set is left alone.
cdef void bits_mark_seq(uint64_t *words, int64_t first, int64_t count) noexcept nogil
cdef int64_t bits_next_one(const uint64_t *words, int64_t first, int64_t end) noexcept nogil    # index, or end
cdef int64_t bits_next_zero(const uint64_t *words, int64_t first, int64_t end) noexcept nogil   # index, or end
# The next run of ones in first..end: its length, 0 when there is none; *run_first is its start (end when none).
cdef int64_t bits_next_run(const uint64_t *words, int64_t first, int64_t end, int64_t *run_first) noexcept nogil
# All runs of ones in first..end, at most `room` of them, into `runs`: how many, and in *resume where to go on (end when done).
cdef int64_t bits_runs(const uint64_t *words, int64_t first, int64_t end,
                       bit_run *runs, int64_t room, int64_t *resume) noexcept nogil
cdef int64_t bits_count(const uint64_t *words, int64_t first, int64_t count) noexcept nogil
# Claims what is free of first..first+count in one pass: bits that were zero are now one and ours; got[0 .. words spanned)
# (bit layout of the words spanned, the first word being first / 64) receives them. Returns how many. Acquire.
cdef int64_t bits_claim_atomic(uint64_t *words, uint64_t *got, int64_t first, int64_t count) noexcept nogil
# Word-wise, whole arrays, not atomic: target = left & ~right; target |= source. Arrays may be the same, not overlap otherwise.
cdef void words_and_not(uint64_t *target, const uint64_t *left, const uint64_t *right, int64_t words) noexcept nogil
cdef void words_or(uint64_t *target, const uint64_t *source, int64_t words) noexcept nogil
cdef int64_t words_count(const uint64_t *words, int64_t count) noexcept nogil                   # ones in `count` words
# target |= source by atomic `or` (release) of every word of source that is not zero: others may change target meanwhile.
cdef void words_or_atomic(uint64_t *target, const uint64_t *source, int64_t words) noexcept nogil
# Runs these kernels on an instruction set (csrc/cpu.h) from now on: 0, or -1 when the machine has not got it. For tests.
cdef int bits_choose(int level) noexcept nogil
