"""Bitmaps with a summary level, for disks of which little is dirty.

Reading a page of a mapping that was never written costs a fault and an entry in a page table, and 2 GiB of words (16 Gi bits)
have half a million such pages. The summary tells which may hold ones; everything that looks for ones walks the
stretches of marked pages and runs the kernels of bits.pyx inside them. Two neighbouring marked pages are one stretch, so that no
run of ones is ever cut. A bitmap without summary is one stretch.

Order: a writer marks, then sets (release). One who finds the page marked already leaves the mark alone: having read it,
whoever is synchronised with it reads it too.
"""

from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from fastcbw.kernels.atomic cimport load_relaxed, or_release
from fastcbw.kernels.bits cimport (
    bit_run, bits_clear_atomic, bits_count, bits_next_one, bits_next_zero, bits_runs, bits_set_atomic,
    words_and_not, words_or_atomic,
)

cdef enum:
    PAGE_SHIFT = 15         # PAGE_BITS == 1 << PAGE_SHIFT


cdef int64_t summary_bits(int64_t length) noexcept nogil:
    return (length + PAGE_BITS - 1) >> PAGE_SHIFT


cdef inline int64_t words_from(int64_t first, int64_t stop) noexcept nogil:
    """How many words first..stop spans, FIRST being the start of a word."""
    return ((stop + 63) >> 6) - (first >> 6)


cdef void sparse_mark(sparse_bits *bitmap, int64_t first, int64_t count) noexcept nogil:
    cdef int64_t page
    cdef uint64_t bit
    if bitmap.summary == NULL or count <= 0:
        return
    for page in range(first >> PAGE_SHIFT, ((first + count - 1) >> PAGE_SHIFT) + 1):
        bit = (<uint64_t>1) << (page & 63)
        if not load_relaxed(bitmap.summary + (page >> 6)) & bit:
            or_release(bitmap.summary + (page >> 6), bit)


cdef void sparse_set_atomic(sparse_bits *bitmap, int64_t first, int64_t count) noexcept nogil:
    sparse_mark(bitmap, first, count)
    bits_set_atomic(bitmap.words, first, count)


cdef int64_t sparse_stretch(const sparse_bits *bitmap, int64_t first, int64_t end, int64_t *stop) noexcept nogil:
    cdef int64_t page, pages, begin
    stop[0] = end
    if first >= end or bitmap.summary == NULL:
        return first if first < end else end
    pages = summary_bits(end)
    page = bits_next_one(bitmap.summary, first >> PAGE_SHIFT, pages)
    if page == pages:
        return end
    begin = page << PAGE_SHIFT
    page = bits_next_zero(bitmap.summary, page, pages)
    if page << PAGE_SHIFT < end:
        stop[0] = page << PAGE_SHIFT
    return begin if begin > first else first


cdef int64_t sparse_next_one(const sparse_bits *bitmap, int64_t first, int64_t end) noexcept nogil:
    cdef int64_t stop = 0
    cdef int64_t found
    while first < end:
        first = sparse_stretch(bitmap, first, end, &stop)
        if first == end:
            break
        found = bits_next_one(bitmap.words, first, stop)
        if found != stop:
            return found
        first = stop
    return end


cdef int64_t sparse_next_run(const sparse_bits *bitmap, int64_t first, int64_t end, int64_t *run_first) noexcept nogil:
    run_first[0] = sparse_next_one(bitmap, first, end)
    return bits_next_zero(bitmap.words, run_first[0], end) - run_first[0]


cdef int64_t sparse_runs(const sparse_bits *bitmap, int64_t first, int64_t end,
                         bit_run *runs, int64_t room, int64_t *resume) noexcept nogil:
    cdef int64_t stop = 0
    cdef int64_t found = 0
    while found < room:
        first = sparse_stretch(bitmap, first, end, &stop)
        if first == end:
            break
        found += bits_runs(bitmap.words, first, stop, runs + found, room - found, &first)
    resume[0] = first
    return found


cdef int64_t sparse_count(const sparse_bits *bitmap, int64_t first, int64_t end) noexcept nogil:
    cdef int64_t stop = 0
    cdef int64_t total = 0
    while first < end:
        first = sparse_stretch(bitmap, first, end, &stop)
        total += bits_count(bitmap.words, first, stop - first)
        first = stop
    return total


cdef void zero_stretches(sparse_bits *bitmap, int64_t first, int64_t end) noexcept nogil:
    """Zero what may hold ones of first..end; both are page starts, or the end of the bitmap."""
    cdef int64_t stop = 0
    while first < end:
        first = sparse_stretch(bitmap, first, end, &stop)
        memset(bitmap.words + (first >> 6), 0, <size_t>words_from(first, stop) * 8)
        first = stop


cdef void sparse_and_not(sparse_bits *target, const sparse_bits *left, const sparse_bits *right) noexcept nogil:
    cdef int64_t first = 0
    cdef int64_t stop = 0
    cdef int64_t done = 0
    while done < target.length:
        first = sparse_stretch(left, done, target.length, &stop)
        zero_stretches(target, done, first)
        sparse_mark(target, first, stop - first)
        words_and_not(target.words + (first >> 6), left.words + (first >> 6), right.words + (first >> 6),
                      words_from(first, stop))
        done = stop


cdef void sparse_copy(sparse_bits *target, const sparse_bits *source) noexcept nogil:
    cdef int64_t first = 0
    cdef int64_t stop = 0
    cdef int64_t done = 0
    while done < target.length:
        first = sparse_stretch(source, done, target.length, &stop)
        zero_stretches(target, done, first)
        sparse_mark(target, first, stop - first)
        memcpy(target.words + (first >> 6), source.words + (first >> 6), <size_t>words_from(first, stop) * 8)
        done = stop


cdef void sparse_or_atomic(sparse_bits *target, const sparse_bits *source) noexcept nogil:
    cdef int64_t first = 0
    cdef int64_t stop = 0
    while first < target.length:
        first = sparse_stretch(source, first, target.length, &stop)
        sparse_mark(target, first, stop - first)
        words_or_atomic(target.words + (first >> 6), source.words + (first >> 6), words_from(first, stop))
        first = stop


cdef bint sparse_equal(const sparse_bits *left, const sparse_bits *right) noexcept nogil:
    """Compare stretch by stretch where either may hold ones."""
    cdef int64_t first = 0
    cdef int64_t end = left.length
    cdef int64_t left_at, right_at, left_stop = 0, right_stop = 0
    if right.length != end:
        return False
    while first < end:
        left_at = sparse_stretch(left, first, end, &left_stop)
        right_at = sparse_stretch(right, first, end, &right_stop)
        if left_at == right_at:
            left_stop = left_stop if left_stop < right_stop else right_stop
        elif left_at < right_at:
            left_stop = left_stop if left_stop < right_at else right_at
        else:
            left_stop = right_stop if right_stop < left_at else left_at
            left_at = right_at
        if memcmp(left.words + (left_at >> 6), right.words + (left_at >> 6), <size_t>words_from(left_at, left_stop) * 8):
            return False
        first = left_stop
    return True


cdef void sparse_tidy(sparse_bits *bitmap) noexcept nogil:
    cdef int64_t page, first, end
    cdef int64_t pages = summary_bits(bitmap.length)
    if bitmap.summary == NULL:
        return
    page = bits_next_one(bitmap.summary, 0, pages)
    while page < pages:
        first = page << PAGE_SHIFT
        end = first + PAGE_BITS if first + PAGE_BITS < bitmap.length else bitmap.length
        if bits_next_one(bitmap.words, first, end) == end:
            bits_clear_atomic(bitmap.summary, page, 1)
        page = bits_next_one(bitmap.summary, page + 1, pages)
