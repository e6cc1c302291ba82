# Filter: a device that stands on another one. What a subclass does not change is the child's.
from fastcbw.block.device cimport BlockDevice

cdef class Filter(BlockDevice):
    cdef readonly BlockDevice child

    cdef int stand_on(self, BlockDevice child, name) except -1
    cdef void may_wait_in_threads(self) noexcept
