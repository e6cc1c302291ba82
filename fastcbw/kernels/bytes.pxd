# Kernels over buffers of bytes: leaf, no I/O.
from libc.stdint cimport int64_t, uint32_t

cdef bint is_zero(const void *buffer, int64_t length) noexcept nogil            # any alignment, any length; 1 for length 0
cdef uint32_t crc32c(uint32_t seed, const void *buffer, int64_t length) noexcept nogil   # Castagnoli, seed 0; chains
