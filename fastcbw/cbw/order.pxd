# The copy order: which clusters of a source are copied next, and how many at once.
from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.block.device cimport BlockDevice
from fastcbw.cbw.heat cimport Heat
from fastcbw.cbw.reader cimport SnapshotDevice
from fastcbw.cbw.state cimport Epoch, Snap
from fastcbw.kernels.sparse cimport sparse_bits
from fastcbw.sync cimport pthread_mutex_t

cdef enum:
    # kinds of clusters, in the order of policies.KINDS
    RAM = 0
    DISK = 1
    ZERO = 2
    HOT = 3
    COLD = 4
    KINDS = 5
    # sets of them; HOT and COLD are both in no store
    SET_NOWHERE = 1 << COLD
    SET_ANY = -1

cdef struct Piece:
    int64_t offset          # bytes
    int64_t length
    bint zero               # known to be zeroes without reading
    bint in_ram             # all of it was in the RAM tier when it was chosen

cdef struct Run:
    int64_t first           # clusters
    int64_t count
    int of_class
    bint in_ram

# Which kinds are in which class; for walks over a snapshot.
cdef struct Classes:
    int count
    int of_kind[KINDS]

cdef class Order:
    cdef readonly BlockDevice source
    cdef readonly str policy
    cdef readonly int64_t chunk         # bytes: no piece of data is longer
    cdef SnapshotDevice snapshot        # the source when it is a snapshot, else None
    cdef int bits                       # log2 of the unit that is handed out, a cluster
    cdef int64_t clusters
    cdef Classes classes
    cdef pthread_mutex_t lock           # over everything below
    cdef int64_t at[KINDS + 1]          # by class: the walk's next cluster; the last walk takes whatever is left
    cdef bint stored_only               # nothing but what is in a store is handed out, as it gets there; see again()
    cdef bint dry[KINDS + 1]            # the walk of this class has come to the end
    cdef int64_t handed_out             # runs since the walks of dry classes began again
    cdef uint64_t arrivals              # of geometry.recent_count: new clusters in RAM were looked for up to here
    cdef Heat heat
    cdef sparse_bits taken              # handed out; unused with one class
    cdef uint64_t *full                 # bit per page of `taken`: all of the page is, whatever its words say
    cdef const sparse_bits *within      # the snapshot's, all that is handed out with more than one class; NULL: everything
    cdef int64_t rest_begin             # bytes: what is left of a cluster longer than a piece
    cdef int64_t rest_end
    cdef int64_t extent_begin           # bytes: the source's block status is known in here ...
    cdef int64_t extent_end
    cdef uint32_t extent_flags          # ... and is this
    cdef readonly uint64_t stretches    # looked at so far: what the walks have cost, for tests
    cdef uint64_t skipped               # bytes that are not in the snapshot, so in no piece (atomic)

    # The next piece: 1; 0 when everything was handed out; -errno when the block status at piece.offset can't be had.
    # gather: bytes that a short piece may be widened to over its neighbours, if that is more than usual. Any thread. Each byte of the source is in one
    # piece, but for what is not in the snapshot.
    cdef int next(self, Piece *piece, int64_t gather) noexcept nogil

    # With stored_only: has there been a first touch since the last again() (a hint); look from the beginning once more. Any thread.
    cdef bint arrived(self) noexcept nogil
    cdef void again(self) noexcept nogil

    cdef int next_locked(self, Piece *piece, int64_t gather) noexcept nogil
    cdef bint choose(self, Run *run, int64_t limit, int64_t part) noexcept nogil
    cdef bint choose_stored(self, Run *run, int64_t limit) noexcept nogil
    cdef bint choose_arrival(self, Run *run, int64_t limit, int64_t part) noexcept nogil
    cdef bint choose_hot(self, Run *run, int64_t limit, int64_t part) noexcept nogil
    cdef void gather(self, Run *run, int64_t part) noexcept nogil
    cdef bint walk(self, int kinds, int64_t first, int64_t end, int64_t limit, Run *run) noexcept nogil
    cdef int64_t stretch(self, const Epoch *epoch, int kinds, int64_t first, int64_t end, int64_t *leaf, uint64_t *mask, uint64_t *ram) noexcept nogil
    cdef bint is_taken(self, int64_t cluster) noexcept nogil
    cdef void take(self, int64_t first, int64_t count) noexcept nogil

# The class of FIRST under CLASSES, and in *stop where the run of that class ends, at most END. Clusters; HEAT: fed by the caller.
cdef int class_extent(SnapshotDevice snapshot, const Classes *classes, const Heat *heat, int64_t first, int64_t end, int64_t *stop) noexcept nogil
cdef int classes_fill(Classes *classes, str policy) except -1
