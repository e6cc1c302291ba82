# Reading and writing the protocol's big-endian integers at any alignment. Header only.
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef extern from "<endian.h>" nogil:
    uint16_t htobe16(uint16_t value) noexcept
    uint32_t htobe32(uint32_t value) noexcept
    uint64_t htobe64(uint64_t value) noexcept

cdef inline uint16_t load16(const char *at) noexcept nogil:
    cdef uint16_t value
    memcpy(&value, at, 2)
    return htobe16(value)

cdef inline uint32_t load32(const char *at) noexcept nogil:
    cdef uint32_t value
    memcpy(&value, at, 4)
    return htobe32(value)

cdef inline uint64_t load64(const char *at) noexcept nogil:
    cdef uint64_t value
    memcpy(&value, at, 8)
    return htobe64(value)

cdef inline void store16(char *at, uint16_t value) noexcept nogil:
    value = htobe16(value)
    memcpy(at, &value, 2)

cdef inline void store32(char *at, uint32_t value) noexcept nogil:
    value = htobe32(value)
    memcpy(at, &value, 4)

cdef inline void store64(char *at, uint64_t value) noexcept nogil:
    value = htobe64(value)
    memcpy(at, &value, 8)
