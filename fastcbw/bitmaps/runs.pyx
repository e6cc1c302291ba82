"""Runs of bits as a NumPy structured array, filled in the data plane.

How many runs a bitmap holds is known only after the walk, so that the rows grow by doubling (large blocks are moved by
the kernel's page tables, not copied) and the array at the end is a view of them.
"""

from cpython.buffer cimport PyBuffer_FillInfo
from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t
from libc.stdlib cimport free, realloc

import numpy as _np

#: dtype of an array of runs, in bits.
RUN_DTYPE = _np.dtype([("first", "<i8"), ("count", "<i8")])


cdef class RunList:
    """Rows of (first, count); the buffer of the array that array() returns."""

    def __dealloc__(self):
        free(self.rows)

    cdef int reserve(self, int64_t more) noexcept nogil:
        cdef int64_t room = self.room * 2 if self.room else 64
        cdef bit_run *rows
        if self.used + more <= self.room:
            return 0
        if room < self.used + more:
            room = self.used + more
        rows = <bit_run *>realloc(self.rows, <size_t>room * sizeof(bit_run))
        if rows == NULL:
            return -ENOMEM
        self.rows = rows
        self.room = room
        return 0

    cdef void append(self, int64_t first, int64_t count) noexcept nogil:
        cdef bit_run *last
        if self.used:
            last = self.rows + self.used - 1
            if last.first + last.count == first:
                last.count += count
                return
        self.rows[self.used].first = first
        self.rows[self.used].count = count
        self.used += 1

    cdef object array(self):
        if self.used == 0:
            return _np.empty(0, RUN_DTYPE)
        return _np.frombuffer(self, RUN_DTYPE)

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.rows, self.used * sizeof(bit_run), 0, flags)
