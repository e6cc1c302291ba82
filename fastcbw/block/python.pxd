# PythonDevice: the adapter that makes a device written in Python a BlockDevice. The one place below the doors with the GIL.
from libc.stdint cimport int64_t, uint32_t

from fastcbw.block.device cimport BlockDevice
from fastcbw.block.sys cimport iovec

cdef class PythonDevice(BlockDevice):
    cdef readonly object device         # the user's Device; its methods are called from the threads of the requests
    cdef readonly object last_error     # the last exception it raised, None while none did (under the GIL)
    cdef object last_thread             # ident of the thread that raised it
    cdef bint has_zeroes                # the user's class overrides write_zeroes

    cdef int give_read(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept with gil
    cdef int give_write(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept with gil
    cdef int give_zeroes(self, int64_t offset, int64_t length, uint32_t flags) noexcept with gil
    cdef int give_discard(self, int64_t offset, int64_t length, uint32_t flags) noexcept with gil
    cdef int give_flush(self) noexcept with gil
    cdef int64_t give_extent(self, int64_t offset, int64_t length, uint32_t *flags) noexcept with gil
    cdef int remember(self, str operation, int64_t offset, int64_t length, error)
