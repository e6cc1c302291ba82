# struct iovec, under a name of ours so that every module sees the same one.
from libc.stdint cimport int64_t

cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len
