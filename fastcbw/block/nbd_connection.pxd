# NbdConnection: one connection of the NBD client device in its transmission phase.
from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.block.sys cimport iovec
from fastcbw.sync cimport pthread_cond_t, pthread_mutex_t

cdef enum:
    REQUESTS_MAX = 64           # slots of one connection
    RECEIVE_LENGTH = 16384      # bytes of the receive buffer: whole small replies, never needed for large ones
    REASON_LENGTH = 320         # bytes of a text about an error, the ending 0 included

# A place in a caller's vector.
cdef struct Cursor:
    const iovec *entry          # entries from here on
    int entries
    size_t skip                 # bytes done of the first of them

# A request under way: filled in by its thread under the lock, then the receiver's until `done`.
cdef struct Slot:
    uint64_t cookie             # low byte: index of the slot; 0: the slot is free                          lock
    bint waiting                # its thread sleeps on `wake`                                               lock
    bint done                   # answered in full                                                          lock
    int code                    # 0, or -errno of the first error chunk                                     receiver
    int kind                    # CMD_*
    bint begun                  # a chunk of the reply has come                                             receiver
    int64_t offset              # bytes; what was asked for
    int64_t length
    int64_t received            # bytes of data and holes; of block status: of the extent                   receiver
    uint32_t status             # flags of the extent                                                       receiver
    Cursor data                 # where a read goes, where a write comes from
    pthread_cond_t wake

cdef class NbdConnection:
    # constant
    cdef int fd                         # -1 after close()
    cdef bint structured
    cdef bint has_context               # base:allocation was negotiated
    cdef uint32_t context               # its id
    cdef int requests_limit             # bounds of what is in flight; a request larger than bytes_limit goes alone
    cdef int64_t bytes_limit
    cdef int64_t timeout_ns             # of each wait; 0: none
    # sending: one request at a time, whole
    cdef pthread_mutex_t send_lock
    # the table
    cdef pthread_mutex_t lock
    cdef pthread_cond_t room            # broadcast when a request has ended, or the connection
    cdef Slot slots[REQUESTS_MAX]
    cdef uint32_t requests              # in flight, and waiting for room: the load, for choosing a connection   lock; read atomically
    cdef int in_flight                  # slots in use                                                          lock
    cdef int64_t bytes_in_flight        # of their payloads                                                     lock
    cdef uint64_t turn_next, turn_now   # who may take a slot: first come, first served                         lock
    cdef uint64_t cookies               # given out so far                                                      lock
    cdef bint receiving                 # somebody has the receive role                                         lock
    cdef uint32_t dead                  # no more requests; set once                               lock; read atomically
    cdef int death_code                 # -errno                                                   written before `dead`
    cdef char death[REASON_LENGTH]      # why                                                      written before `dead`
    cdef int text_code                  # -errno of the last error with a text, and the text                    lock
    cdef char text[REASON_LENGTH]
    cdef int64_t text_ns
    # receiving: whoever has the receive role
    cdef char *buffer
    cdef int start, end                 # bytes in the buffer that are not parsed yet

    # One request from sending to its whole reply: 0 or -errno. DATA: LENGTH bytes of a READ or WRITE. EXTENT, STATUS: of BLOCK_STATUS.
    cdef int call(self, int kind, uint32_t flags, int64_t offset, int64_t length, const Cursor *data, int64_t *extent,
                  uint32_t *status) noexcept nogil
    # End the connection: everybody who waits gets CODE (-errno) at once. The first call decides what is told.
    cdef void kill(self, int code, const char *why) noexcept nogil

    cdef Slot *claim(self, int kind, int64_t offset, int64_t length, const Cursor *data, int64_t payload,
                     int64_t deadline_ns) noexcept nogil
    cdef void release(self, Slot *slot, int64_t payload) noexcept nogil
    cdef int sleep(self, pthread_cond_t *on, int64_t deadline_ns) noexcept nogil
    cdef void kill_locked(self, int code, const char *why) noexcept nogil
    cdef void kill_errno(self, const char *doing, int error) noexcept nogil
    cdef void send(self, const Slot *slot, uint32_t flags, int64_t deadline_ns) noexcept nogil
    cdef int await_socket(self, short events, int64_t deadline_ns) noexcept nogil
    cdef void wait(self, Slot *slot, int64_t deadline_ns) noexcept nogil
    cdef void hand_over(self) noexcept nogil
    cdef void receive(self, const Slot *mine, int64_t deadline_ns) noexcept nogil
    cdef bint fetch(self, int need, int64_t deadline_ns) noexcept nogil
    cdef bint take_data(self, Cursor *to, int64_t length, int64_t deadline_ns) noexcept nogil
    cdef bint drop(self, int64_t length, int64_t deadline_ns) noexcept nogil
    cdef int64_t receive_some(self, iovec *vector, int count, int64_t deadline_ns) noexcept nogil
    cdef Slot *slot_of(self, uint64_t cookie) noexcept nogil
    cdef bint simple_reply(self, int64_t deadline_ns) noexcept nogil
    cdef bint chunk(self, int64_t deadline_ns) noexcept nogil
    cdef bint data_chunk(self, Slot *slot, int64_t length, int64_t deadline_ns) noexcept nogil
    cdef bint hole_chunk(self, Slot *slot, int64_t length, int64_t deadline_ns) noexcept nogil
    cdef bint status_chunk(self, Slot *slot, int64_t length, int64_t deadline_ns) noexcept nogil
    cdef bint error_chunk(self, Slot *slot, int kind, int64_t length, int64_t deadline_ns) noexcept nogil
    cdef bint within(self, const Slot *slot, uint64_t offset, int64_t length) noexcept nogil
    cdef bint malformed(self, const char *what) noexcept nogil
    cdef void complete(self, Slot *slot) noexcept nogil
