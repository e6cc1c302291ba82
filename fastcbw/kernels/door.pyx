"""The door from Python to the kernels over buffers, and the choice of their instruction set.

Most bitmap kernels are reached through ClusterBitmap; those that only the engine uses (all_seq and what follows it) have a door
here for their tests. Choosing an instruction set is for tests and benchmarks: the widest one the machine has is chosen at
import, and all give the same result.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.kernels.bits cimport bits_all_seq, bits_any, bits_choose, bits_mark_seq, bits_next_run, words_or
from fastcbw.kernels.bytes cimport bytes_choose
from fastcbw.kernels.bytes cimport crc32c as bytes_crc32c
from fastcbw.kernels.bytes cimport is_zero as bytes_is_zero
from fastcbw.kernels.lent cimport Lent, lend

cdef extern from "cpu.h" nogil:
    int FCBW_LEVELS
    const char **fcbw_level_names
    int fcbw_level_runs(int level) noexcept
    int fcbw_level_best() noexcept

cdef Py_ssize_t LONG_BUFFER = 1 << 16     # from here on the interpreter lock is given up: the loop takes longer than that costs

cdef int current = fcbw_level_best()


def is_zero(buffer):
    """Return True when every byte of BUFFER (bytes-like, contiguous) is zero, also when it is empty."""
    cdef Py_buffer view
    cdef bint zero
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    try:
        if view.len < LONG_BUFFER:
            zero = bytes_is_zero(view.buf, view.len)
        else:
            with nogil:
                zero = bytes_is_zero(view.buf, view.len)
        return zero
    finally:
        PyBuffer_Release(&view)


def crc32c(buffer, uint32_t seed=0):
    """Return the CRC-32C (Castagnoli) of BUFFER (bytes-like, contiguous).

    seed: the checksum of what comes before it, so that crc32c(b, crc32c(a)) == crc32c(a + b).
    """
    cdef Py_buffer view
    cdef uint32_t crc
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    try:
        if view.len < LONG_BUFFER:
            crc = bytes_crc32c(seed, view.buf, view.len)
        else:
            with nogil:
                crc = bytes_crc32c(seed, view.buf, view.len)
        return crc
    finally:
        PyBuffer_Release(&view)


cdef Lent lend_span(words, int64_t first, int64_t count, bint writable):
    """Return WORDS (uint64), of which a kernel is to see bits first..first+count."""
    cdef Lent lent = lend(words, "words", "uint64", writable)
    if first < 0 or count < 0 or first > lent.count * 64 - count:
        raise ValueError(f"words: range {first}+{count} is not within their {lent.count * 64} bits")
    return lent


def all_seq(words, int64_t first, int64_t count):
    """Return True when bits first..first+count of WORDS (uint64) are all set: bits_all_seq, the test for settled."""
    cdef Lent lent = lend_span(words, first, count, False)
    return bits_all_seq(<uint64_t *>lent.start, first, count)


def mark_seq(words, int64_t first, int64_t count):
    """Set bits first..first+count of WORDS (uint64): bits_mark_seq, the mark for changed."""
    cdef Lent lent = lend_span(words, first, count, True)
    bits_mark_seq(<uint64_t *>lent.start, first, count)


def any_one(words, int64_t first, int64_t count):
    """Return True when one of bits first..first+count of WORDS (uint64) is set: bits_any."""
    cdef Lent lent = lend_span(words, first, count, False)
    return bits_any(<uint64_t *>lent.start, first, count)


def next_run(words, int64_t first, int64_t end):
    """Return (first, count) of the next run in bits first..end of WORDS (uint64); (end, 0) when none: bits_next_run."""
    cdef int64_t begin = 0
    cdef Lent lent = lend_span(words, first, end - first, False)
    cdef int64_t count = bits_next_run(<uint64_t *>lent.start, first, end, &begin)
    return begin, count


def or_into(target, source):
    """Set in TARGET (uint64) what is set in SOURCE, as many words: words_or."""
    cdef Lent into = lend(target, "target", "uint64", True)
    cdef Lent words = lend(source, "source", "uint64", False)
    if into.count != words.count:
        raise ValueError(f"source: {words.count} words do not match the target's {into.count}")
    words_or(<uint64_t *>into.start, <uint64_t *>words.start, into.count)


def instruction_sets():
    """Return the names of the instruction sets that this machine can run, plainest first."""
    return tuple([fcbw_level_names[level].decode() for level in range(FCBW_LEVELS) if fcbw_level_runs(level)])


def instruction_set():
    """Return the name of the instruction set that the kernels run on."""
    return fcbw_level_names[current].decode()


def use_instruction_set(str name):
    """Run all kernels of the process on the instruction set NAME from now on; return the name of the one before.

    Raises ValueError for a name that this machine does not have: never another one in its place. Not while other
    threads use bitmaps or devices.
    """
    global current
    cdef int level
    before = instruction_set()
    for level in range(FCBW_LEVELS):
        if fcbw_level_names[level].decode() == name and fcbw_level_runs(level):
            bits_choose(level)
            bytes_choose(level)
            current = level
            return before
    raise ValueError(f"instruction set: {name!r} is not one of this machine's ({', '.join(instruction_sets())})")
