# A growing array of runs that a nogil loop fills and NumPy takes over without a copy.
from libc.stdint cimport int64_t

from fastcbw.kernels.bits cimport bit_run

cdef class RunList:
    cdef bit_run *rows              # malloc; never moved once array() was called
    cdef int64_t used               # rows that hold a run
    cdef int64_t room               # rows allocated

    cdef int reserve(self, int64_t more) noexcept nogil                     # room for `more` further rows: 0 or -ENOMEM
    cdef void append(self, int64_t first, int64_t count) noexcept nogil     # reserved before; joins a run that it continues
    cdef object array(self)                                                 # structured array; the list is finished
