# NbdDevice: an export of an NBD server as a device.
from libc.stdint cimport int64_t, uint32_t

from fastcbw.block.device cimport BlockDevice
from fastcbw.block.nbd_connection cimport Cursor, NbdConnection

cdef enum:
    CONNECTIONS_MAX = 16

cdef class NbdDevice(BlockDevice):
    cdef readonly str uri
    cdef readonly int connections           # how many there are
    cdef readonly uint32_t flags            # FLAG_* of the export
    cdef readonly bint structured           # structured replies are spoken
    cdef bint has_status                    # so is base:allocation
    cdef object uri_parts                   # NbdUri
    cdef tuple owned                        # the connections, kept alive
    cdef void *connection[CONNECTIONS_MAX]  # and borrowed, for the data plane: NbdConnection
    cdef int64_t payload_max                # bytes of one READ or WRITE

    cdef int call(self, int kind, uint32_t flags, int64_t offset, int64_t length, const Cursor *data, int64_t *extent,
                  uint32_t *status) noexcept nogil
    cdef int call_on(self, int which, int kind, uint32_t flags, int64_t offset, int64_t length, const Cursor *data,
                     int64_t *extent, uint32_t *status) noexcept nogil
    cdef int transfer(self, int kind, uint32_t flags, const Cursor *data, int64_t offset, int64_t length) noexcept nogil
    cdef int without_data(self, int kind, uint32_t flags, int64_t offset, int64_t length) noexcept nogil
