# ClusterBitmap for other Cython modules: its words, and how to show words that live elsewhere.
from libc.stdint cimport int64_t, uint64_t

from fastcbw.kernels.sparse cimport sparse_bits

cdef class ClusterBitmap:
    cdef sparse_bits bits           # words, summary, length in bits. Who sets bits in the words marks first (sparse_mark)
    cdef object owner               # what keeps the words alive; None: they are our own pages
    cdef readonly bint writable     # the Python methods may change it

    cdef int check_writable(self) except -1
    cdef int take_range(self, object first, object count, int64_t *first_out, int64_t *count_out) except -1
    cdef ClusterBitmap same_length(self, other, str what)

# A live view of words that OWNER keeps alive; read-only for Python unless WRITABLE. summary may be NULL.
cdef ClusterBitmap wrap_words(uint64_t *words, uint64_t *summary, int64_t length_bits, object owner, bint writable)
