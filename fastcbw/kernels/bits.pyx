"""Bitmap words: test, set, clear, claim, runs, count.

Everything the engine and the bitmaps know about which cluster is what goes through here: pointers and integers in,
no Python object, syscall or lock. Two kinds of function: short ones on the guest's path, which touch the one or two
words of a request with explicit atomics; and bulk ones, whose inner loops are in csrc/wordops.h, once for each
instruction set, the widest being chosen at import. Bits beyond the range given are never read for a decision and never written.
"""

from libc.stdint cimport int64_t, uint64_t

from fastcbw.kernels.atomic cimport and_release, load_relaxed, load_seq, or_acquire, or_release, or_seq

cdef extern from "wordops.h" nogil:
    ctypedef struct wordops "struct fcbw_wordops":
        int64_t (*count)(const uint64_t *p, int64_t words) noexcept nogil
        void (*and_not)(uint64_t *target, const uint64_t *left, const uint64_t *right, int64_t words) noexcept nogil
        void (*or_into)(uint64_t *target, const uint64_t *source, int64_t words) noexcept nogil
        int64_t (*skip_zeroes)(const uint64_t *p, int64_t word, int64_t end) noexcept nogil
        int64_t (*skip_ones)(const uint64_t *p, int64_t word, int64_t end) noexcept nogil
        int64_t (*runs)(const uint64_t *p, int64_t first, int64_t end, bit_run *out, int64_t room, int64_t *resume) noexcept nogil
    wordops ops "fcbw_wordops"
    int fcbw_wordops_choose(int level) noexcept
    int fcbw_level_best() noexcept

cdef extern from * nogil:
    int ctzll "__builtin_ctzll"(unsigned long long) noexcept
    int popcountll "__builtin_popcountll"(unsigned long long) noexcept

cdef enum:
    NEAR_WORDS = 8      # a search looks at this many words itself before it calls the bulk loop


cdef inline uint64_t word_mask(int64_t word, int64_t first, int64_t end) noexcept nogil:
    """The bits of WORD that lie in first..end; none when the range is empty or elsewhere."""
    cdef int64_t low = first - word * 64
    cdef int64_t high = end - word * 64
    cdef uint64_t mask = ~(<uint64_t>0)
    if low >= 64 or high <= 0:
        return 0
    if low > 0:
        mask <<= low
    if high < 64:
        mask &= ((<uint64_t>1) << high) - 1
    return mask


cdef inline int64_t words_end(int64_t end) noexcept nogil:
    return (end + 63) >> 6


# -- the guest's path: a few words, explicit order


cdef inline bint in_one_word(int64_t first, int64_t count) noexcept nogil:
    """The range is not empty and does not leave its first word: what nearly every request of a guest asks."""
    return count > 0 and first >> 6 == (first + count - 1) >> 6


cdef bint bits_all(const uint64_t *words, int64_t first, int64_t count) noexcept nogil:
    return count <= 0 or bits_next_zero(words, first, first + count) == first + count


cdef bint bits_all_seq(const uint64_t *words, int64_t first, int64_t count) noexcept nogil:
    cdef int64_t end = first + count
    cdef int64_t w
    cdef uint64_t mask
    if in_one_word(first, count):
        mask = (~(<uint64_t>0) >> (64 - count)) << (first & 63)
        return (load_seq(words + (first >> 6)) & mask) == mask
    for w in range(first >> 6, words_end(end)):
        mask = word_mask(w, first, end)
        if (load_seq(words + w) & mask) != mask:
            return False
    return True


cdef bint bits_any(const uint64_t *words, int64_t first, int64_t count) noexcept nogil:
    return count > 0 and bits_next_one(words, first, first + count) != first + count


cdef void bits_set_atomic(uint64_t *words, int64_t first, int64_t count) noexcept nogil:
    # A word that is all ones already is or-ed too: leaving it alone would leave out the release.
    cdef int64_t w
    if count > 0:
        for w in range(first >> 6, words_end(first + count)):
            or_release(words + w, word_mask(w, first, first + count))


cdef void bits_clear_atomic(uint64_t *words, int64_t first, int64_t count) noexcept nogil:
    cdef int64_t w
    if count > 0:
        for w in range(first >> 6, words_end(first + count)):
            and_release(words + w, ~word_mask(w, first, first + count))


cdef void bits_mark_seq(uint64_t *words, int64_t first, int64_t count) noexcept nogil:
    cdef int64_t w
    cdef uint64_t mask
    if in_one_word(first, count):
        mask = (~(<uint64_t>0) >> (64 - count)) << (first & 63)
        if (load_seq(words + (first >> 6)) & mask) != mask:
            or_seq(words + (first >> 6), mask)
        return
    for w in range(first >> 6, words_end(first + count)):
        mask = word_mask(w, first, first + count)
        if (load_seq(words + w) & mask) != mask:
            or_seq(words + w, mask)


cdef int64_t bits_claim_atomic(uint64_t *words, uint64_t *got, int64_t first, int64_t count) noexcept nogil:
    cdef int64_t w, total = 0
    cdef uint64_t mask, ours
    if count <= 0:
        return 0
    for w in range(first >> 6, words_end(first + count)):
        mask = word_mask(w, first, first + count)
        ours = mask & ~or_acquire(words + w, mask)
        got[w - (first >> 6)] = ours
        total += popcountll(ours)
    return total


# -- searches


cdef int64_t bits_next_one(const uint64_t *words, int64_t first, int64_t end) noexcept nogil:
    cdef int64_t w = first >> 6
    cdef int64_t stop = words_end(end)
    cdef int64_t near
    cdef uint64_t bits
    if first >= end:
        return end
    near = w + NEAR_WORDS if w + NEAR_WORDS < stop else stop
    while True:
        while w < near:
            bits = load_relaxed(words + w) & word_mask(w, first, end)
            if bits:
                return w * 64 + ctzll(bits)
            w += 1
        if w == stop:
            return end
        w = ops.skip_zeroes(words, w, stop)
        near = w + 1 if w < stop else stop      # look again: its bit may lie past the end, or have gone meanwhile


cdef int64_t bits_next_zero(const uint64_t *words, int64_t first, int64_t end) noexcept nogil:
    cdef int64_t w = first >> 6
    cdef int64_t stop = words_end(end)
    cdef int64_t near
    cdef uint64_t bits
    if first >= end:
        return end
    near = w + NEAR_WORDS if w + NEAR_WORDS < stop else stop
    while True:
        while w < near:
            bits = ~load_relaxed(words + w) & word_mask(w, first, end)
            if bits:
                return w * 64 + ctzll(bits)
            w += 1
        if w == stop:
            return end
        w = ops.skip_ones(words, w, stop)
        near = w + 1 if w < stop else stop


cdef int64_t bits_next_run(const uint64_t *words, int64_t first, int64_t end, int64_t *run_first) noexcept nogil:
    run_first[0] = bits_next_one(words, first, end)
    return bits_next_zero(words, run_first[0], end) - run_first[0]


cdef int64_t bits_runs(const uint64_t *words, int64_t first, int64_t end,
                       bit_run *runs, int64_t room, int64_t *resume) noexcept nogil:
    resume[0] = end
    if first >= end:
        return 0
    return ops.runs(words, first, end, runs, room, resume)


# -- whole arrays


cdef int64_t bits_count(const uint64_t *words, int64_t first, int64_t count) noexcept nogil:
    cdef int64_t end = first + count
    cdef int64_t head = first >> 6
    cdef int64_t tail = (end - 1) >> 6
    if count <= 0:
        return 0
    if head == tail:
        return popcountll(load_relaxed(words + head) & word_mask(head, first, end))
    return (popcountll(load_relaxed(words + head) & word_mask(head, first, end))
            + ops.count(words + head + 1, tail - head - 1)
            + popcountll(load_relaxed(words + tail) & word_mask(tail, first, end)))


cdef int64_t words_count(const uint64_t *words, int64_t count) noexcept nogil:
    return ops.count(words, count)


cdef void words_and_not(uint64_t *target, const uint64_t *left, const uint64_t *right, int64_t words) noexcept nogil:
    ops.and_not(target, left, right, words)


cdef void words_or(uint64_t *target, const uint64_t *source, int64_t words) noexcept nogil:
    ops.or_into(target, source, words)


cdef void words_or_atomic(uint64_t *target, const uint64_t *source, int64_t words) noexcept nogil:
    cdef int64_t w = ops.skip_zeroes(source, 0, words)
    while w < words:
        or_release(target + w, load_relaxed(source + w))
        w += 1
        if w < words and load_relaxed(source + w) == 0:
            w = ops.skip_zeroes(source, w, words)


cdef int bits_choose(int level) noexcept nogil:
    return fcbw_wordops_choose(level)


bits_choose(fcbw_level_best())
