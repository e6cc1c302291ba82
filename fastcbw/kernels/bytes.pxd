# Kernels over buffers of bytes: leaf, no I/O.
from libc.stdint cimport int64_t, uint32_t

cdef bint is_zero(const void *buffer, int64_t length) noexcept nogil            # any alignment, any length; 1 for length 0
cdef uint32_t crc32c(uint32_t seed, const void *buffer, int64_t length) noexcept nogil   # Castagnoli, seed 0; chains
# Runs these kernels on an instruction set (csrc/cpu.h) from now on: 0, or -1 when the machine has not got it. For tests.
cdef int bytes_choose(int level) noexcept nogil
