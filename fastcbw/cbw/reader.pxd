# Reading a snapshot.
from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.block.device cimport BlockDevice
from fastcbw.block.sys cimport iovec
from fastcbw.cbw.state cimport EngineState, Epoch, Snap

cdef enum:
    # codes of the snapshot's own errors, beside -errno: a door or an export turns them into what its users know
    ERROR_BROKEN = -1000        # the snapshot was broken: EIO outside
    ERROR_NOT_IN_SNAPSHOT = -1001       # outside `copy`: EINVAL outside
    ERROR_TOO_FINE = -1002      # a discard that is not cut in granules: EINVAL outside

cdef class SnapshotDevice(BlockDevice):
    cdef EngineState state
    cdef readonly object engine         # keeps what owns the newer snapshots alive, which a read may look into; None when it ended
    cdef Snap *snap             # one reference, until close
    cdef readonly int cluster_bits
    cdef readonly object bitmap         # DirtyWords that `copy` was made of, as they were at the instant; or None
    cdef readonly str bitmap_name
    cdef readonly str export            # what exports of it let their clients do: "ro", "discard", "read-once"
    cdef readonly bint retired          # the engine has unlinked it (control)
    cdef readonly BlockDevice in_place  # what its store keeps old data on, each cluster at the disk's own offset; or None
    cdef int store_index                # its store's, as location words have it

    # NOWAIT: -EAGAIN, with anything in BUFFER, instead of waiting for a device
    cdef int read_pieces(self, char *buffer, int64_t offset, int64_t length, bint nowait) noexcept nogil
    cdef int read_range(self, char *buffer, int64_t offset, int64_t length, bint nowait) noexcept nogil
    cdef void read_through(self, int64_t offset, int64_t end, bint nowait) noexcept nogil
    cdef int read_batch(self, char *buffer, int64_t offset, int64_t end, bint nowait) noexcept nogil
    cdef int take_counted(self, const Epoch *epoch, char *buffer, int64_t offset, int64_t end, int count, uint64_t *words) noexcept nogil
    cdef int take_from_log(self, char *buffer, int64_t offset, int64_t end, int64_t cluster, uint64_t *word) noexcept nogil
    cdef int verdict(self, int64_t offset, int64_t length) noexcept nogil
    cdef int64_t nowhere(self, int64_t offset, int64_t length) noexcept nogil
    cdef int drop(self, int64_t offset, int64_t length) noexcept nogil       # what its reader has done with; 0 or why not
    cdef str broken_reason(self)
    cdef int mark_closed(self) except -1

