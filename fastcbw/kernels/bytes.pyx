"""Zero test and CRC-32C. (First cut: plain loops.)"""

from libc.stdint cimport int64_t, uint8_t, uint32_t
from libc.string cimport memcmp


cdef bint is_zero(const void *buffer, int64_t length) noexcept nogil:
    cdef const uint8_t *p = <const uint8_t *>buffer
    if length == 0:
        return True
    return p[0] == 0 and memcmp(p, p + 1, <size_t>(length - 1)) == 0


cdef uint32_t crc32c(uint32_t seed, const void *buffer, int64_t length) noexcept nogil:
    cdef const uint8_t *p = <const uint8_t *>buffer
    cdef uint32_t crc = ~seed
    cdef int64_t i
    cdef int k
    for i in range(length):
        crc ^= p[i]
        for k in range(8):
            crc = (crc >> 1) ^ (0x82F63B78U & (0U - (crc & 1)))
    return ~crc
