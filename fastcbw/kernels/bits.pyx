"""Bitmap words: test, set, clear, claim, runs, count. (First cut: word-wise, plain.)"""

from libc.stdint cimport int64_t, uint64_t

from fastcbw.kernels.atomic cimport and_release, load_relaxed, load_seq, or_acquire, or_release, or_seq

cdef extern from * nogil:
    int ctzll "__builtin_ctzll"(unsigned long long) noexcept
    int popcountll "__builtin_popcountll"(unsigned long long) noexcept


cdef inline uint64_t word_mask(int64_t word, int64_t first, int64_t end) noexcept nogil:
    """The bits of WORD that lie in first..end."""
    cdef int64_t low = first - word * 64
    cdef int64_t high = end - word * 64
    cdef uint64_t mask = ~(<uint64_t>0)
    if low > 0:
        mask &= mask << low
    if high < 64:
        mask &= ((<uint64_t>1) << high) - 1
    return mask


cdef bint bits_all(const uint64_t *words, int64_t first, int64_t count) noexcept nogil:
    return bits_next_zero(words, first, first + count) == first + count


cdef bint bits_all_seq(const uint64_t *words, int64_t first, int64_t count) noexcept nogil:
    cdef int64_t end = first + count
    cdef int64_t w
    cdef uint64_t mask
    for w in range(first >> 6, (end + 63) >> 6):
        mask = word_mask(w, first, end)
        if (load_seq(words + w) & mask) != mask:
            return False
    return True


cdef bint bits_any(const uint64_t *words, int64_t first, int64_t count) noexcept nogil:
    return bits_next_one(words, first, first + count) != first + count


cdef void bits_set_atomic(uint64_t *words, int64_t first, int64_t count) noexcept nogil:
    cdef int64_t w
    for w in range(first >> 6, (first + count + 63) >> 6):
        or_release(words + w, word_mask(w, first, first + count))


cdef void bits_clear_atomic(uint64_t *words, int64_t first, int64_t count) noexcept nogil:
    cdef int64_t w
    for w in range(first >> 6, (first + count + 63) >> 6):
        and_release(words + w, ~word_mask(w, first, first + count))


cdef void bits_mark_seq(uint64_t *words, int64_t first, int64_t count) noexcept nogil:
    cdef int64_t w
    cdef uint64_t mask
    for w in range(first >> 6, (first + count + 63) >> 6):
        mask = word_mask(w, first, first + count)
        if (load_seq(words + w) & mask) != mask:
            or_seq(words + w, mask)


cdef int64_t bits_next_one(const uint64_t *words, int64_t first, int64_t end) noexcept nogil:
    cdef int64_t w
    cdef uint64_t bits
    for w in range(first >> 6, (end + 63) >> 6):
        bits = load_relaxed(words + w) & word_mask(w, first, end)
        if bits:
            return w * 64 + ctzll(bits)
    return end


cdef int64_t bits_next_zero(const uint64_t *words, int64_t first, int64_t end) noexcept nogil:
    cdef int64_t w
    cdef uint64_t bits
    for w in range(first >> 6, (end + 63) >> 6):
        bits = ~load_relaxed(words + w) & word_mask(w, first, end)
        if bits:
            return w * 64 + ctzll(bits)
    return end


cdef int64_t bits_next_run(const uint64_t *words, int64_t first, int64_t end, int64_t *run_first) noexcept nogil:
    run_first[0] = bits_next_one(words, first, end)
    return bits_next_zero(words, run_first[0], end) - run_first[0]


cdef int64_t bits_count(const uint64_t *words, int64_t first, int64_t count) noexcept nogil:
    cdef int64_t w, total = 0
    for w in range(first >> 6, (first + count + 63) >> 6):
        total += popcountll(load_relaxed(words + w) & word_mask(w, first, first + count))
    return total


cdef int64_t bits_claim_atomic(uint64_t *words, uint64_t *got, int64_t first, int64_t count) noexcept nogil:
    cdef int64_t w, total = 0
    cdef uint64_t mask
    for w in range(first >> 6, (first + count + 63) >> 6):
        mask = word_mask(w, first, first + count)
        got[w - (first >> 6)] = mask & ~or_acquire(words + w, mask)
        total += popcountll(got[w - (first >> 6)])
    return total


cdef void words_and_not(uint64_t *target, const uint64_t *left, const uint64_t *right, int64_t words) noexcept nogil:
    cdef int64_t w
    for w in range(words):
        target[w] = left[w] & ~right[w]


cdef void words_or(uint64_t *target, const uint64_t *source, int64_t words) noexcept nogil:
    cdef int64_t w
    for w in range(words):
        target[w] |= source[w]
