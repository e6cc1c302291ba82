# NotifiedView: what a WriteNotifier preserves, and the disk where it has preserved nothing, as one read-only device.
from fastcbw.block.device cimport BlockDevice
from fastcbw.cbw.notifier cimport WriteNotifier

cdef class NotifiedView(BlockDevice):
    cdef readonly WriteNotifier notifier
