"""qemu:dirty-bitmap:NAME, as QEMU exports it: bit 0 is set where the bitmap marks.

Of a disk it is the live bitmap, at some moment of the request; what a running job has of it is a part of it. A client that
has negotiated it keeps it: when the bitmap is removed, block status is an error from then on. Of a snapshot that was made from
a bitmap it is the bitmap of that instant, whatever became of it.
"""

from libc.stdint cimport int64_t, uint32_t

from fastcbw.bitmaps.dirty cimport DirtyWords, dirty_extent
from fastcbw.cbw.dirty cimport DirtyBitmap
from fastcbw.export.nbd.contexts cimport MetaContext

#: What stands before the bitmap's name.
PREFIX = "qemu:dirty-bitmap:"


cdef class LiveBitmapContext(MetaContext):
    """BITMAP of a disk, as it is when it is asked for."""

    def __cinit__(self, DirtyBitmap bitmap not None):
        self.name = PREFIX + bitmap.name
        self.bitmap = bitmap

    cdef int64_t status(self, int64_t offset, int64_t length, uint32_t *flags) noexcept nogil:
        cdef bint dirty = False
        cdef int64_t got = self.bitmap.status(offset, length, &dirty)
        flags[0] = dirty
        return got


cdef class FrozenBitmapContext(MetaContext):
    """WORDS of the bitmap NAME, which nobody marks any more."""

    def __cinit__(self, str name not None, DirtyWords words not None):
        self.name = PREFIX + name
        self.words = words

    cdef int64_t status(self, int64_t offset, int64_t length, uint32_t *flags) noexcept nogil:
        cdef bint dirty = False
        cdef int64_t got = dirty_extent(self.words.words, NULL, offset, length, &dirty)
        flags[0] = dirty
        return got


def contexts_of_disk(bitmaps):
    """Return the contexts of BITMAPS (name: DirtyBitmap) by name, as they are now."""
    return {PREFIX + name: LiveBitmapContext(bitmap) for name, bitmap in list(bitmaps.items())}


def contexts_of_snapshot(device):
    """Return the contexts of a SnapshotDevice by name: of the bitmap that it was made from, if any."""
    if device.bitmap is None:
        return {}
    return {PREFIX + device.bitmap_name: FrozenBitmapContext(device.bitmap_name, device.bitmap)}
