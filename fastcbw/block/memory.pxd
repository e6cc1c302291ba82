from fastcbw.block.device cimport BlockDevice

cdef class MemoryDevice(BlockDevice):
    cdef char *pages            # our own mapping: zero pages until touched
