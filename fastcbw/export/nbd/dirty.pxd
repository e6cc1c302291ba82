# Meta contexts of dirty bitmaps.
from libc.stdint cimport int64_t, uint32_t

from fastcbw.bitmaps.dirty cimport DirtyWords
from fastcbw.cbw.dirty cimport DirtyBitmap
from fastcbw.export.nbd.contexts cimport MetaContext

cdef class LiveBitmapContext(MetaContext):
    cdef DirtyBitmap bitmap

cdef class FrozenBitmapContext(MetaContext):
    cdef DirtyWords words
