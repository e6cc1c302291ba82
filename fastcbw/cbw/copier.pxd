# The copier: ordered copy-out from a device (a snapshot, mostly) to another.
from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.bitmaps.dirty cimport DirtyWords
from fastcbw.block.device cimport BlockDevice
from fastcbw.cbw.landed cimport Landed
from fastcbw.cbw.offload cimport Behind, Offload
from fastcbw.cbw.order cimport Order, Piece
from fastcbw.cbw.pace cimport Pace
from fastcbw.cbw.reader cimport SnapshotDevice
from fastcbw.sync cimport pthread_mutex_t

cdef enum:
    # what was being done when an error came
    DOING_NOTHING = 0
    DOING_STATUS = 1
    DOING_READ = 2
    DOING_WRITE = 3
    DOING_ZEROES = 4
    DOING_COMPARE = 5
    DOING_ALLOCATE = 6
    DOING_COPY = 7

cdef class Copier:
    cdef readonly BlockDevice source
    cdef bint watching                  # only what gets into a store is copied, until finish()
    cdef uint64_t finishing             # atomic
    cdef DirtyWords copied              # what is in the target is marked here; or None
    cdef readonly BlockDevice target
    cdef readonly int64_t chunk         # bytes of one read and write
    cdef bint target_is_zero            # zeroes need not be written
    cdef SnapshotDevice consuming       # what is in the target is dropped from it; or None
    cdef bint comparing                 # compare instead of copy
    cdef readonly Pace pace             # how many workers, how large steps, how fast
    cdef Landed landed                  # what guest writes have put into the target is not copied; or None
    cdef readonly Offload offload       # the kernel copies from file to file; None where it does not
    cdef Order order                    # hands out the pieces
    cdef pthread_mutex_t lock           # over the first error
    # reports (atomic)
    cdef uint64_t done_bytes            # of the source's length: copied, skipped or compared
    cdef uint64_t data_bytes            # written to the target, or compared
    cdef uint64_t zero_bytes            # found to be zeroes
    cdef uint64_t landed_bytes          # of done_bytes, not copied: in the target already
    cdef uint64_t cancelled
    cdef uint64_t failed                # 1 when the first error was noted
    cdef int error_code
    cdef int error_doing
    cdef int64_t error_offset
    cdef int64_t error_length

    cdef bint next_piece(self, Piece *piece) noexcept nogil
    cdef void note_error(self, int code, int doing, int64_t offset, int64_t length) noexcept nogil
    cdef int work(self, const Piece *piece, char *buffer, char *other, Behind behind) noexcept nogil
    cdef bint await_more(self, int64_t *polls) noexcept nogil
    cdef void note_copied(self, const Piece *piece) noexcept nogil
    cdef void consume(self, const Piece *piece) noexcept nogil
    cdef int copy_piece(self, const Piece *piece, char *buffer) noexcept nogil
    cdef int copy_data(self, int64_t offset, int64_t length, char *buffer, bint target_is_zero) noexcept nogil
    cdef int copy_by_kernel(self, int64_t offset, int64_t length, char *buffer) noexcept nogil
    cdef int write_data(self, const char *buffer, int64_t offset, int64_t length, bint target_is_zero) noexcept nogil
    cdef int write_zero(self, int64_t offset, int64_t length, bint target_is_zero) noexcept nogil
    cdef int compare_piece(self, const Piece *piece, char *buffer, char *other) noexcept nogil
