# For tests: places in the protocols where a thread can be held, so that a race that has no I/O in it can be made on purpose.
from fastcbw.sync cimport pthread_cond_t, pthread_mutex_t

cdef enum:
    STOP_WRITE_ENTERED = 0      # a guest write is counted and has something to preserve; it has no claim yet
    STOP_INSERT_READ = 1        # copy-on-read has read the disk, and is not counted yet
    STOP_INSERT_CLAIMED = 2     # it has a claim, and has not looked yet whether its epoch has passed
    STOP_INSERT_CHECKED = 3     # it has
    STOP_DROP_ENTERED = 4       # a drop is counted, and has no claim yet
    STOP_DROP_CLAIMED = 5       # it has a claim, and the epoch is still its own
    STOP_DROP_CLEARED = 6       # it has cleared `settled`, and not looked at `changed` yet
    STOP_DROP_DECIDED = 7       # nothing was changed; the word is still there
    STOP_READER_FOUND = 8       # a snapshot read has a RAM word, and has not copied yet
    STOP_READER_COPIED = 9      # it has copied, and not looked again yet
    STOP_GUEST_FOUND = 10       # the same of a guest read that is served from RAM
    STOP_GUEST_COPIED = 11
    STOP_DISCARD_ENTERED = 12   # a guest discard is counted and has something unsettled; it has no claim yet
    STOP_CARRY_CLAIMED = 13     # a recorded discard is to be carried out and claimed; whether the epoch has passed was not looked at yet
    STOPS = 14

cdef class Stops:
    cdef pthread_mutex_t mutex
    cdef pthread_cond_t changed
    cdef int held[STOPS]        # how many more threads are held; 0: none
    cdef int opened[STOPS]
    cdef int arrived[STOPS]     # since hold()
    cdef int waiting[STOPS]

    cdef void wait(self, int point) noexcept nogil
    cdef void open_one(self, int point) noexcept nogil

cdef inline void pass_stop(void *stops, int point) noexcept nogil:
    if stops != NULL:           # the engine's: NULL, but for tests
        (<Stops>stops).wait(point)
