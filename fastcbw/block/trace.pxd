# TraceDevice: a filter that writes down what passes. A recorder of what a guest asks of its disk.
from libc.stdint cimport int64_t, uint32_t

from fastcbw.block.filter cimport Filter
from fastcbw.block.sys cimport iovec
from fastcbw.sync cimport pthread_mutex_t

cdef enum:
    TRACE_BUFFER = 1 << 16      # bytes; written when less than a line is left
    TRACE_LINE_MAX = 96         # bytes of a line at most: three numbers of 20 digits, a word, a 0

cdef class TraceDevice(Filter):
    cdef readonly str path
    cdef int fd                     # of the trace; -1 once stop() has been called. All from here on under mutex
    cdef int64_t begun_ns           # when the first request came; 0: none yet
    cdef int64_t recorded           # requests
    cdef int64_t limit              # requests at most
    cdef int failed                 # the errno with which writing ended, or 0
    cdef int used                   # bytes of buffer
    cdef char buffer[TRACE_BUFFER]
    cdef pthread_mutex_t mutex
    cdef bint ready

    cdef void record(self, int operation, int64_t offset, int64_t length) noexcept nogil
    cdef void write_out(self) noexcept nogil
