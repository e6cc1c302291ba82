"""ClusterBitmap: one bit per cluster, the bitmap of the public API.

The words are the engine's (uint64, bit i in word i / 64, bits past the end always zero) in a mapping of our own with a summary
level beside it, so that a bitmap of a 64 TiB disk costs what is dirty, in memory and in time. Python sees the same memory as
NumPy words or as a bitarray, without a copy and read-only: bits are changed by the methods only, which keep the summary true.
Another Cython module can show its own words as a ClusterBitmap (wrap_words): a live view.
"""

from cpython.buffer cimport PyBuffer_FillInfo
from cpython.long cimport PyLong_AsLongLongAndOverflow
from cpython.number cimport PyIndex_Check
from libc.stdint cimport INT64_MAX, int64_t, uint64_t
from libc.string cimport memset

cimport cython

from fastcbw.bitmaps.mapping cimport map_pages, populate_pages, resident_pages, unmap_pages
from fastcbw.bitmaps.runs cimport RunList
from fastcbw.kernels.bits cimport bit_run, bits_all, bits_claim_atomic, bits_clear_atomic, bits_next_zero, bits_runs
from fastcbw.kernels.lent cimport Lent, lend
from fastcbw.kernels.sparse cimport (
    sparse_and_not, sparse_bits, sparse_copy, sparse_count, sparse_equal, sparse_mark, sparse_next_one, sparse_next_run,
    sparse_or_atomic, sparse_runs, sparse_set_atomic, sparse_stretch, sparse_tidy, summary_bits,
)

import bitarray as _bitarray
import numpy as _np

cdef enum:
    SHORT_BITS = 1 << 16        # a range up to this is done before giving up the interpreter lock would pay
    CLAIM_WORDS = 512           # a claim works through its range in pieces of this
    RUNS_ROOM = 64              # rows a walk begins with

cdef int64_t LENGTH_MAX = 1 << 46

# Given to __cinit__ by wrap_words: the caller fills in the words.
cdef object WRAPPED = object()


cdef int64_t as_int(object value, str what) except? -1:
    """Return VALUE as a number; what no int64 can hold becomes -1 or the largest, which no range check lets pass."""
    cdef int overflow = 0
    cdef int64_t number
    if not PyIndex_Check(value):
        raise TypeError(f"{what}: expected an int, got {type(value).__name__}")
    number = PyLong_AsLongLongAndOverflow(value, &overflow)
    if overflow:
        return INT64_MAX if overflow > 0 else -1
    return number


cdef inline int64_t words_of(int64_t length) noexcept nogil:
    return (length + 63) >> 6


@cython.final
cdef class ClusterBitmap:
    """A fixed number of bits, all zero at first or, with FILL, all one.

    length_bits: how many, 0 to 2^46. Memory is used where bits are set (FILL touches all of it).
    Bits are addressed from 0; ranges are (first, count). set, clear, claim and update are atomic bit by bit: safe from
    any number of threads at once. The other methods see each bit of a bitmap that changes meanwhile old or new.

    Raises ValueError for a range outside the bitmap, IndexError for a single bit outside it, TypeError for what is no
    int or no ClusterBitmap; nothing has changed then.
    """

    def __cinit__(self, length_bits, *, bint fill=False):
        cdef int64_t length
        self.writable = True
        if length_bits is WRAPPED:
            return
        length = as_int(length_bits, "length_bits")
        if length < 0 or length > LENGTH_MAX:
            raise ValueError(f"length_bits: {length_bits} is not in 0..{LENGTH_MAX}")
        self.bits.length = length
        self.bits.words = <uint64_t *>map_pages(max(words_of(length), 1) * 8)
        self.bits.summary = <uint64_t *>map_pages(max(words_of(summary_bits(length)), 1) * 8)
        if self.bits.words == NULL or self.bits.summary == NULL:
            raise MemoryError(f"bitmap: {length} bits cannot be mapped")
        if fill and length:
            sparse_mark(&self.bits, 0, length)
            with nogil:
                populate_pages(self.bits.words, words_of(length) * 8)
                memset(self.bits.words, 0xff, <size_t>words_of(length) * 8)
            self.bits.words[words_of(length) - 1] = ~(<uint64_t>0) >> (-length & 63)

    def __dealloc__(self):
        if self.owner is None:
            if self.bits.words != NULL:
                unmap_pages(self.bits.words, max(words_of(self.bits.length), 1) * 8)
            if self.bits.summary != NULL:
                unmap_pages(self.bits.summary, max(words_of(summary_bits(self.bits.length)), 1) * 8)

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.bits.words, words_of(self.bits.length) * 8, 1, flags)

    # -- checks

    cdef int check_writable(self) except -1:
        if not self.writable:
            raise ValueError("bitmap: this is a read-only view of a live bitmap (copy() gives one that can be changed)")
        return 0

    cdef int take_range(self, object first, object count, int64_t *first_out, int64_t *count_out) except -1:
        """Check a range; a COUNT of None is all that is left from FIRST on."""
        first_out[0] = as_int(first, "first")
        count_out[0] = self.bits.length - first_out[0] if count is None else as_int(count, "count")
        if first_out[0] < 0 or count_out[0] < 0 or first_out[0] > self.bits.length - count_out[0]:
            raise ValueError(f"bitmap: range {first}+{'' if count is None else count} is not within its {self.bits.length} bits")
        return 0

    cdef ClusterBitmap same_length(self, other, str what):
        if not isinstance(other, ClusterBitmap):
            raise TypeError(f"{what}: expected a ClusterBitmap, got {type(other).__name__}")
        if (<ClusterBitmap>other).bits.length != self.bits.length:
            raise ValueError(f"{what}: {(<ClusterBitmap>other).bits.length} bits do not match the bitmap's {self.bits.length}")
        return <ClusterBitmap>other

    # -- bits and ranges

    def __len__(self):
        return self.bits.length

    def __repr__(self):
        return f"<ClusterBitmap of {self.bits.length} bits{'' if self.writable else ', read-only view'}>"

    def test(self, index):
        """Return True when bit INDEX is set."""
        cdef int64_t bit = as_int(index, "index")
        if bit < 0 or bit >= self.bits.length:
            raise IndexError(f"bitmap: bit {index} is not within its {self.bits.length} bits")
        return bits_all(self.bits.words, bit, 1)

    def set(self, first, count=1):
        """Set the COUNT bits from FIRST on."""
        cdef int64_t f = 0, c = 0
        self.take_range(first, count, &f, &c)
        self.check_writable()
        if c <= SHORT_BITS:
            sparse_set_atomic(&self.bits, f, c)
        else:
            with nogil:
                sparse_set_atomic(&self.bits, f, c)

    def clear(self, first, count=1):
        """Clear the COUNT bits from FIRST on."""
        cdef int64_t f = 0, c = 0
        self.take_range(first, count, &f, &c)
        self.check_writable()
        if c <= SHORT_BITS:
            bits_clear_atomic(self.bits.words, f, c)
        else:
            with nogil:
                bits_clear_atomic(self.bits.words, f, c)

    def claim(self, first, count=1):
        """Set the bits of a range that are zero, and return which they were, as an array of runs.

        Returns a structured array (first, count), ascending. Of any number of threads that claim the same bit, exactly
        one gets it. Whoever gives a bit back clears it.
        """
        cdef int64_t f = 0, c = 0
        cdef int code = 0
        cdef RunList got = RunList()
        self.take_range(first, count, &f, &c)
        self.check_writable()
        with nogil:
            code = claim_runs(&self.bits, f, c, got)
        if code:
            raise MemoryError("bitmap: no memory for the runs claimed")
        return got.array()

    def any(self, first=0, count=None):
        """Return True when a bit of the range (default: the bitmap) is set."""
        cdef int64_t f = 0, c = 0
        cdef bint found
        self.take_range(first, count, &f, &c)
        with nogil:
            found = sparse_next_one(&self.bits, f, f + c) != f + c
        return found

    def all(self, first=0, count=None):
        """Return True when no bit of the range (default: the bitmap) is zero."""
        cdef int64_t f = 0, c = 0
        cdef bint found
        self.take_range(first, count, &f, &c)
        with nogil:
            found = bits_all(self.bits.words, f, c)
        return found

    def count(self, first=0, count=None):
        """Return how many bits of the range (default: the bitmap) are set."""
        cdef int64_t f = 0, c = 0
        cdef int64_t total
        self.take_range(first, count, &f, &c)
        with nogil:
            total = sparse_count(&self.bits, f, f + c)
        return total

    # -- searches

    def next_one(self, first=0, count=None):
        """Return the index of the first set bit of the range (default: from FIRST to the end), or None."""
        cdef int64_t f = 0, c = 0
        cdef int64_t found
        self.take_range(first, count, &f, &c)
        with nogil:
            found = sparse_next_one(&self.bits, f, f + c)
        return None if found == f + c else found

    def next_zero(self, first=0, count=None):
        """Return the index of the first zero bit of the range (default: from FIRST to the end), or None."""
        cdef int64_t f = 0, c = 0
        cdef int64_t found
        self.take_range(first, count, &f, &c)
        with nogil:
            found = bits_next_zero(self.bits.words, f, f + c)
        return None if found == f + c else found

    def next_run(self, first=0, count=None):
        """Return (first, count) of the first run of set bits of the range (default: from FIRST to the end), or None."""
        cdef int64_t f = 0, c = 0
        cdef int64_t start = 0
        cdef int64_t length
        self.take_range(first, count, &f, &c)
        with nogil:
            length = sparse_next_run(&self.bits, f, f + c, &start)
        return (start, length) if length else None

    def runs(self, first=0, count=None, *, limit=None):
        """Return the runs of set bits of the range (default: the bitmap) as a structured array (first, count), ascending.

        limit: at most so many; go on from the end of the last one.
        """
        cdef int64_t f = 0, c = 0
        cdef int64_t most = INT64_MAX
        cdef int code = 0
        cdef RunList found = RunList()
        self.take_range(first, count, &f, &c)
        if limit is not None:
            most = as_int(limit, "limit")
            if most < 0:
                raise ValueError(f"limit: {limit} is negative")
        with nogil:
            code = collect_runs(&self.bits, f, f + c, most, found)
        if code:
            raise MemoryError("bitmap: no memory for the runs found")
        return found.array()

    # -- whole bitmaps

    def copy(self):
        """Return a bitmap of its own with the same bits."""
        cdef ClusterBitmap twin = ClusterBitmap(self.bits.length)
        with nogil:
            populate_as(&twin.bits, &self.bits)
            sparse_copy(&twin.bits, &self.bits)
        return twin

    def and_not(self, other, *, out=None):
        """Return the bits set here and not in OTHER (same length), as a new bitmap or in OUT.

        out: a ClusterBitmap of the same length that no other thread changes; it may be this one or OTHER.
        """
        cdef ClusterBitmap right = self.same_length(other, "other")
        cdef ClusterBitmap target
        if out is None:
            target = ClusterBitmap(self.bits.length)
            populate_as(&target.bits, &self.bits)
        else:
            target = self.same_length(out, "out")
            target.check_writable()
        with nogil:
            sparse_and_not(&target.bits, &self.bits, &right.bits)
        return target

    def or_(self, other):
        """Return the bits set here or in OTHER (same length), as a new bitmap."""
        cdef ClusterBitmap right = self.same_length(other, "other")
        cdef ClusterBitmap target = self.copy()
        with nogil:
            sparse_or_atomic(&target.bits, &right.bits)
        return target

    def update(self, other):
        """Set the bits that are set in OTHER (same length). Atomic bit by bit, as set is."""
        cdef ClusterBitmap source = self.same_length(other, "other")
        self.check_writable()
        with nogil:
            sparse_or_atomic(&self.bits, &source.bits)

    def tidy(self):
        """Forget which parts once held set bits and no longer do, so that searches skip them.

        No other thread may set bits meanwhile.
        """
        self.check_writable()
        with nogil:
            sparse_tidy(&self.bits)

    def resident(self):
        """Return the bytes of the words and the summary that are in memory now, in whole pages."""
        cdef int64_t words, summary = 0
        with nogil:
            words = resident_pages(self.bits.words, max(words_of(self.bits.length), 1) * 8)
            if self.bits.summary != NULL:
                summary = resident_pages(self.bits.summary, max(words_of(summary_bits(self.bits.length)), 1) * 8)
        if words < 0 or summary < 0:
            raise OSError(-min(words, summary), "bitmap: mincore of its words")
        return words + summary

    def __eq__(self, other):
        cdef ClusterBitmap right
        cdef bint same
        if not isinstance(other, ClusterBitmap):
            return NotImplemented
        right = <ClusterBitmap>other
        with nogil:
            same = sparse_equal(&self.bits, &right.bits)
        return same

    __hash__ = None

    # -- other shapes of the same bits

    @classmethod
    def wrap(cls, words, length_bits):
        """Return a live read-only view of LENGTH_BITS bits in WORDS: a contiguous buffer of 64-bit words.

        words: 8-byte aligned, of at least length_bits / 64 words rounded up, the bits of the last one past the end zero
            (now, and as long as the view is used). It is kept alive. The view has no summary: searches read every word.
        """
        cdef int64_t length = as_int(length_bits, "length_bits")
        cdef Lent octets = lend(memoryview(words).cast("B"), "words", "uint8", False)
        cdef uint64_t *first = <uint64_t *>octets.start if octets.count else NULL
        if length < 0 or length > octets.count * 8 or words_of(length) * 8 > octets.count:
            raise ValueError(f"length_bits: {length_bits} is not in 0..{octets.count // 8 * 64}, what the words hold")
        if <size_t>first & 7:
            raise ValueError(f"words: the buffer at {<size_t>first:#x} is not aligned to 8 bytes")
        if length & 63 and first[length >> 6] >> (length & 63):
            raise ValueError(f"words: bits past the end ({length}) are set in the last word")
        return wrap_words(first, NULL, length, octets, False)

    @property
    def numpy(self):
        """The words, as a live read-only NumPy array of uint64; no copy."""
        if self.bits.length == 0:
            return _np.empty(0, _np.uint64)
        return _np.frombuffer(self, _np.uint64)

    @property
    def bitarray(self):
        """The bits, as a live read-only little-endian bitarray; no copy. Its length is rounded up to 64, the padding zero."""
        return _bitarray.bitarray(buffer=self, endian="little")

    def to_bools(self, first=0, count=None):
        """Return the range (default: the bitmap) as a NumPy array of bool, a copy of one byte per bit."""
        cdef int64_t f = 0, c = 0
        self.take_range(first, count, &f, &c)
        octets = self.numpy.view(_np.uint8)[f >> 3:(f + c + 7) >> 3]
        return _np.unpackbits(octets, bitorder="little")[f & 7:(f & 7) + c].view(_np.bool_)

    @classmethod
    def from_bools(cls, array):
        """Return a bitmap with the bits of ARRAY: one-dimensional, of bool, any length."""
        cdef ClusterBitmap bitmap
        cdef Lent words
        cdef sparse_bits source
        array = _np.asarray(array)
        if array.dtype != _np.bool_ or array.ndim != 1:
            raise TypeError(f"array: expected one dimension of bool, got {array.ndim} of {array.dtype}")
        bitmap = ClusterBitmap(len(array))
        if len(array):
            octets = _np.packbits(array, bitorder="little")
            words = lend(_np.pad(octets, (0, -len(octets) & 7)).view("<u8"), "array", "uint64", False)
            source.words = <uint64_t *>words.start
            source.summary = NULL
            source.length = bitmap.bits.length
            with nogil:
                sparse_or_atomic(&bitmap.bits, &source)
                sparse_tidy(&bitmap.bits)
        return bitmap


cdef void populate_as(sparse_bits *target, const sparse_bits *source) noexcept nogil:
    """Populate what will be written, where SOURCE may hold ones: a call a stretch costs less than a fault a page."""
    cdef int64_t first = 0
    cdef int64_t stop = 0
    if source.summary == NULL:      # its stretch is everything, which says nothing about what it holds
        return
    while first < source.length:
        first = sparse_stretch(source, first, source.length, &stop)
        if first < stop:
            populate_pages(target.words + (first >> 6), (words_of(stop) - (first >> 6)) * 8)
        first = stop


cdef ClusterBitmap wrap_words(uint64_t *words, uint64_t *summary, int64_t length_bits, object owner, bint writable):
    cdef ClusterBitmap view
    assert owner is not None, "a wrapped bitmap needs an owner of its words"
    view = ClusterBitmap(WRAPPED)
    view.bits.words = words
    view.bits.summary = summary
    view.bits.length = length_bits
    view.owner = owner
    view.writable = writable
    return view


cdef int claim_runs(sparse_bits *bitmap, int64_t first, int64_t count, RunList got) noexcept nogil:
    """Claim piece by piece; a run that goes on in the next piece is joined. 0, or -ENOMEM with all of it given back."""
    cdef uint64_t words[CLAIM_WORDS]
    cdef bit_run runs[64]
    cdef int64_t end = first + count
    cdef int64_t base, piece, at, stop, found, i
    cdef int code
    sparse_mark(bitmap, first, count)
    while first < end:
        base = first & ~(<int64_t>63)
        piece = min(base + CLAIM_WORDS * 64, end) - first
        code = got.reserve(piece // 2 + 1)      # before the claim: what is claimed can always be told
        if code:
            for i in range(got.used):
                bits_clear_atomic(bitmap.words, got.rows[i].first, got.rows[i].count)
            return code
        if bits_claim_atomic(bitmap.words, words, first, piece):
            at = first - base
            stop = at + piece
            while at < stop:
                found = bits_runs(words, at, stop, runs, 64, &at)
                for i in range(found):
                    got.append(base + runs[i].first, runs[i].count)
        first += piece
    return 0


cdef int collect_runs(const sparse_bits *bitmap, int64_t first, int64_t end, int64_t limit, RunList found) noexcept nogil:
    """Walk the runs of first..end into FOUND, at most LIMIT. 0 or -ENOMEM."""
    cdef int64_t room
    cdef int code
    while first < end and found.used < limit:
        room = min(max(<int64_t>RUNS_ROOM, found.used), limit - found.used)     # doubles
        code = found.reserve(room)
        if code:
            return code
        found.used += sparse_runs(bitmap, first, end, found.rows + found.used, room, &first)
    return 0
