# One request as it came, and what all handlers of requests share.
from libc.stdint cimport int64_t, uint16_t, uint64_t

cdef struct Request:
    uint16_t flags
    uint16_t kind
    uint64_t cookie
    int64_t offset                  # checked to be within the device before anything uses it
    int64_t length
