"""Dirty bitmaps: words, granularities, extents. Who marks and who switches them is not their business (cbw/dirty).

A granule is a power of two from 512 bytes to 2 GiB. The words lie in mappings of our own with a summary level, so that a
bitmap of 512 bytes per bit of a 64 TiB disk costs what is dirty. Bits are only ever set: a bitmap is emptied by putting
fresh words in its place, so that a writer that finds its bit set can rely on it. Words are shared by reference: by the
bitmap that records, a snapshot that was made from it, a block status under way, a view in Python.

Conversions are rounded outwards: a bit of the target is set when any byte it stands for is dirty in the source.
"""

from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free

from fastcbw.bitmaps.bitmap cimport ClusterBitmap, wrap_words
from fastcbw.bitmaps.mapping cimport map_pages, unmap_pages
from fastcbw.kernels.atomic cimport add_seq, sub_seq
from fastcbw.kernels.bits cimport bit_run, bits_all, bits_next_zero
from fastcbw.kernels.sparse cimport sparse_bits, sparse_next_one, sparse_or_atomic, sparse_runs, sparse_set_atomic, summary_bits

import numpy as _np

#: dtype of an array of dirty extents, in bytes.
EXTENT_DTYPE = _np.dtype([("offset", "<i8"), ("length", "<i8")])

cdef enum:
    RUNS = 256              # of a conversion, at a time


cdef inline int64_t words_bytes(int64_t bits) noexcept nogil:
    return (bits + 63) // 64 * 8


cdef dirty_words *dirty_new(int64_t length, int shift) noexcept nogil:
    cdef dirty_words *dirty = <dirty_words *>calloc(1, sizeof(dirty_words))
    if dirty == NULL:
        return NULL
    dirty.refs = 1
    dirty.shift = shift
    dirty.length = length
    dirty.bits.length = ((length - 1) >> shift) + 1 if length else 1        # an empty disk has a bit that nobody sets
    dirty.bits.words = <uint64_t *>map_pages(words_bytes(dirty.bits.length))
    dirty.bits.summary = <uint64_t *>map_pages(words_bytes(summary_bits(dirty.bits.length)))
    if dirty.bits.words == NULL or dirty.bits.summary == NULL:
        dirty_free(dirty)
        return NULL
    return dirty


cdef void dirty_free(dirty_words *dirty) noexcept nogil:
    if dirty.bits.words != NULL:
        unmap_pages(dirty.bits.words, words_bytes(dirty.bits.length))
    if dirty.bits.summary != NULL:
        unmap_pages(dirty.bits.summary, words_bytes(summary_bits(dirty.bits.length)))
    free(dirty)


cdef void dirty_ref(dirty_words *dirty) noexcept nogil:
    add_seq(&dirty.refs, 1)


cdef void dirty_unref(dirty_words *dirty) noexcept nogil:
    if sub_seq(&dirty.refs, 1) == 1:
        dirty_free(dirty)


cdef void dirty_convert(sparse_bits *target, int target_shift, const sparse_bits *source, int source_shift) noexcept nogil:
    cdef bit_run runs[RUNS]
    cdef int64_t at = 0, next_free = 0
    cdef int64_t found, first, end
    cdef int i
    if target_shift == source_shift:
        sparse_or_atomic(target, source)
        return
    while at < source.length:
        found = sparse_runs(source, at, source.length, runs, RUNS, &at)
        for i in range(found):
            first = runs[i].first
            end = runs[i].first + runs[i].count
            if source_shift > target_shift:
                first <<= source_shift - target_shift
                end <<= source_shift - target_shift
            else:
                first >>= target_shift - source_shift
                end = ((end - 1) >> (target_shift - source_shift)) + 1
            if first < next_free:
                first = next_free       # the run before lies in the same bit
            if end > target.length:
                end = target.length     # a coarse granule at the end of the disk is longer than what is left
            if first < end:
                sparse_set_atomic(target, first, end - first)
                next_free = end


cdef int64_t dirty_extent(const dirty_words *dirty, const dirty_words *more, int64_t offset, int64_t length, bint *found) noexcept nogil:
    cdef int64_t first = offset >> dirty.shift
    cdef int64_t end = ((offset + length - 1) >> dirty.shift) + 1
    cdef int64_t stop
    found[0] = True
    if bits_all(dirty.bits.words, first, 1):
        stop = bits_next_zero(dirty.bits.words, first, end)
    elif more != NULL and bits_all(more.bits.words, first, 1):
        stop = bits_next_zero(more.bits.words, first, end)
    else:
        found[0] = False
        stop = sparse_next_one(&dirty.bits, first, end)
        if more != NULL:
            stop = sparse_next_one(&more.bits, first, stop)
    stop = (stop << dirty.shift) - offset
    return stop if stop < length else length


cdef DirtyWords hold_words(dirty_words *words):
    cdef DirtyWords held = DirtyWords.__new__(DirtyWords)
    dirty_ref(words)
    held.words = words
    return held


cdef class DirtyWords:
    """One generation of a dirty bitmap of a disk of LENGTH bytes, GRANULARITY bytes per bit (a power of two, 512 to 2 GiB).

    Bits are only ever set. mark and merge are safe from any threads at once; the others see each bit old or new.
    """

    def __init__(self, length, granularity):
        cdef int shift = int(granularity).bit_length() - 1
        if granularity != 1 << shift or not GRANULARITY_BITS_MIN <= shift <= GRANULARITY_BITS_MAX:
            raise ValueError(f"granularity: {granularity} is no power of two from 512 bytes to 2 GiB")
        if self.words != NULL:
            raise ValueError("dirty words are made once")
        self.words = dirty_new(length, shift)
        if self.words == NULL:
            raise MemoryError(f"dirty bitmap: no memory for {length} bytes at {granularity} per bit")

    def __dealloc__(self):
        if self.words != NULL:
            dirty_unref(self.words)

    @property
    def granularity(self):
        """Bytes of the disk that one bit stands for."""
        return 1 << self.words.shift

    def mark(self, int64_t offset, int64_t length):
        """Mark a range of bytes, as a guest write to it does."""
        if offset < 0 or length < 0 or offset > self.words.length - length:
            raise ValueError(f"dirty bitmap: range {offset}+{length} is not within its {self.words.length} bytes")
        if length:
            with nogil:
                dirty_mark(self.words, offset, length)

    def merge(self, DirtyWords source not None):
        """Mark what SOURCE marks, a bitmap of the same disk with any granularity."""
        if source.words.length != self.words.length:
            raise ValueError(f"dirty bitmap: {source.words.length} bytes do not match the bitmap's {self.words.length}")
        with nogil:
            dirty_convert(&self.words.bits, self.words.shift, &source.words.bits, source.words.shift)

    def without(self, DirtyWords done not None):
        """Return a bitmap of this granularity that marks what this one marks and DONE does not, rounded outwards."""
        cdef DirtyWords left = DirtyWords(self.words.length, self.granularity)
        cdef int64_t at = 0, end, got
        cdef bint found
        if done.words.length != self.words.length:
            raise ValueError(f"dirty bitmap: {done.words.length} bytes do not match the bitmap's {self.words.length}")
        with nogil:
            while at < self.words.length:
                end = at + dirty_extent(self.words, NULL, at, self.words.length - at, &found)
                while found and at < end:
                    got = dirty_extent(done.words, NULL, at, end - at, &found)
                    if not found:
                        dirty_mark(left.words, at, got)
                    found = True
                    at += got
                at = end
        return left

    def converted(self, granularity):
        """Return a bitmap of another granularity that marks the same, rounded outwards."""
        target = DirtyWords(self.words.length, granularity)
        target.merge(self)
        return target

    def view(self):
        """Return a live read-only ClusterBitmap of the bits; its numpy and bitarray are views of the same memory."""
        return wrap_words(self.words.bits.words, self.words.bits.summary, self.words.bits.length, self, False)

    def extents(self, int64_t offset=0, length=None):
        """Return the dirty extents of a range (default: the disk) as a structured array of EXTENT_DTYPE, in bytes, ascending."""
        cdef int64_t left = self.words.length - offset if length is None else length
        if offset < 0 or left < 0 or offset > self.words.length - left:
            raise ValueError(f"dirty bitmap: range {offset}+{length} is not within its {self.words.length} bytes")
        if left == 0:
            return _np.empty(0, EXTENT_DTYPE)
        first = offset >> self.words.shift
        runs = self.view().runs(first, ((offset + left - 1) >> self.words.shift) + 1 - first)
        rows = _np.empty(len(runs), EXTENT_DTYPE)
        begin = _np.maximum(runs["first"] << self.words.shift, offset)
        end = _np.minimum((runs["first"] + runs["count"]) << self.words.shift, offset + left)
        rows["offset"], rows["length"] = begin, end - begin
        return rows

    def count(self):
        """Return how many bytes of the disk are marked."""
        cdef int64_t bits = self.view().count()
        cdef int64_t last = self.words.bits.length - 1
        cdef int64_t total = bits << self.words.shift
        if bits and bits_all(self.words.bits.words, last, 1):
            total -= (self.words.bits.length << self.words.shift) - self.words.length
        return total
