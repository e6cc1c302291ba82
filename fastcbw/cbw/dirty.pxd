# The named dirty bitmaps of an engine, and how they are switched.
from libc.stdint cimport int64_t

from fastcbw.bitmaps.dirty cimport DirtyWords, dirty_words
from fastcbw.cbw.lifecycle cimport Creation
from fastcbw.cbw.state cimport EngineState, Epoch
from fastcbw.sync cimport pthread_mutex_t

cdef class DirtyBitmap:
    cdef readonly str name
    cdef readonly int64_t granularity   # bytes of the disk that one bit stands for
    cdef readonly bint enabled      # guest writes mark it (control)
    cdef readonly str user          # whose snapshot has its content, for messages; or None (control)
    cdef readonly str kept_for      # whose it is beyond single snapshots: nobody else may change or use it; or None (control)
    cdef DirtyBitmaps owner         # None: removed
    cdef pthread_mutex_t lock       # held to change the two pointers (control as well), or to take references without control
    cdef dirty_words *live          # what marks go to
    cdef dirty_words *frozen        # what a user has of it, still a part of the bitmap until the user succeeds; or NULL

    cdef void put(self, dirty_words *live, dirty_words *frozen) noexcept
    cdef int64_t status(self, int64_t offset, int64_t length, bint *dirty) noexcept nogil   # the first extent; -errno
    cdef int check_free(self, user=*) except -1
    cdef DirtyBitmaps begin(self, bint free=*)
    cdef DirtyBitmaps owner_or_error(self)
    cdef int set_enabled(self, bint enabled) except -1

cdef class DirtyBitmaps:
    cdef EngineState state
    cdef object control             # the engine's
    cdef dict by_name               # name: DirtyBitmap (control)
    cdef readonly bint closed

    cdef int check_open(self) except -1
    cdef DirtyBitmap find(self, name)
    cdef DirtyBitmap make(self, name, granularity, bint enabled)
    cdef int list_words(self, dirty_words **words) noexcept
    cdef int switch(self) except -1
    cdef int drop(self, DirtyBitmap bitmap) except -1
    cdef int thaw(self, DirtyBitmap bitmap, bint forget) except -1
    # What a snapshot does to bitmaps, in this order: prepare, then abandon or (after the flips and drains) conclude.
    cdef DirtyWords prepare(self, options, Creation *creation)
    cdef int abandon(self, options) except -1
    cdef int conclude(self, options) except -1
