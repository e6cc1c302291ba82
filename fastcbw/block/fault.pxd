# FaultDevice: a filter that counts requests and fails those that a rule names. For tests.
from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.block.filter cimport Filter
from fastcbw.block.sys cimport iovec
from fastcbw.sync cimport pthread_mutex_t

cdef enum:
    RULES_MAX = 32
    FAULT_OPERATIONS = 6        # read, write, zero, discard, flush, status: the order of OPERATION_NAMES

cdef struct RuleState:          # all of it under FaultDevice.mutex
    bint used
    int operation
    int code                    # the errno, positive; 0: it only stalls
    int64_t stall_ns            # before it fails, or goes on to the child
    int64_t offset              # bytes; requests that touch offset..end match
    int64_t end
    int64_t skip                # matching requests still let through
    int64_t skip_bytes          # bytes of matching requests still let through
    int64_t left                # matching requests still to fail; -1 = all
    int64_t hits                # requests failed by it

cdef class FaultDevice(Filter):
    cdef uint64_t requests[FAULT_OPERATIONS]        # atomic, relaxed: requests seen, failed ones included
    cdef uint64_t bytes[FAULT_OPERATIONS]           # atomic, relaxed: their lengths
    cdef uint64_t fua_requests                      # atomic, relaxed: write-like requests that had FUA
    cdef uint64_t rules_used                        # atomic: 0 is the path without the mutex
    cdef RuleState rules[RULES_MAX]
    cdef pthread_mutex_t mutex
    cdef bint ready

    cdef int meet(self, int operation, int64_t offset, int64_t length, uint32_t flags) noexcept nogil
    cdef void note(self, int operation, int64_t length, uint32_t flags) noexcept nogil
    cdef void stall(self, const RuleState *rule, int64_t until) noexcept nogil
    cdef bint has_rule(self, int operation, int64_t offset, int64_t length) noexcept nogil

cdef class Rule:
    cdef FaultDevice device
    cdef int index              # in device.rules; -1 once removed
    cdef int64_t hits_last
