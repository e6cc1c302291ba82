"""Zero test and CRC-32C of buffers: where an image's bytes are looked at, not moved.

The zero test decides that a cluster costs no slot and a sparse target stays sparse; the checksum guards records of the
disk tier. Any alignment, any length, no Python object, no syscall. The loops, one for each instruction set and all
with the same result, are in csrc/byteops.h. The crc tables are filled and the widest set is chosen at import.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t

cdef extern from "byteops.h" nogil:
    ctypedef struct byteops "struct fcbw_byteops":
        int (*is_zero)(const uint8_t *p, int64_t length) noexcept nogil
        uint32_t (*crc)(uint32_t crc, const uint8_t *p, int64_t length) noexcept nogil
    byteops ops "fcbw_byteops"
    int fcbw_byteops_choose(int level) noexcept
    int fcbw_level_best() noexcept
    int fcbw_is_zero_short(const uint8_t *p, int64_t length) noexcept
    int FCBW_ZERO_LEAST


cdef bint is_zero(const void *buffer, int64_t length) noexcept nogil:
    if length < FCBW_ZERO_LEAST:
        return fcbw_is_zero_short(<const uint8_t *>buffer, length)
    return ops.is_zero(<const uint8_t *>buffer, length)


cdef uint32_t crc32c(uint32_t seed, const void *buffer, int64_t length) noexcept nogil:
    return ~ops.crc(~seed, <const uint8_t *>buffer, length)


cdef int bytes_choose(int level) noexcept nogil:
    return fcbw_byteops_choose(level)


bytes_choose(fcbw_level_best())
