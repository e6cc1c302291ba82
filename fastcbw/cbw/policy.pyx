"""The policies on-full and on-cbw-error, and the wait for room (PROTOCOL section 7).

A wait for room holds nothing: the claims are released and the epoch is left, so that neither creations nor deletions nor
readers wait for it. It ends when there is room and it is its turn, when somebody else settled the cluster, when the
snapshot is gone or broken, when the policy changed, when nothing that runs can free room any more, or at cbw-timeout. Each of
these wakes the queue: slots and log space that are freed (cbw/store), a settled cluster (cbw/intercept), a break
(cbw/state) or an end (cbw/lifecycle) of a snapshot, the end of a consumer or another limit (cbw/engine).

Room comes from a consumer, that is a job or a client that discards what it has read, or from the flusher, when clusters are
on their way to the disk tier or that tier failed and may recover. Where neither is, a wait would only make the guest late:
it is over at once. That a wait is over is an error of the store: on-cbw-error says what it costs. Clusters on their way to the disk
tier take room in both; whatever the policy, a store is not called full while there are any.
"""

from libc.errno cimport EIO, ENOSPC, ETIMEDOUT
from libc.stdint cimport int64_t, uint64_t

from fastcbw.cbw.locmap cimport WORD_NONE
from fastcbw.cbw.room cimport Waiter, room_is_first, room_queue
from fastcbw.cbw.state cimport (ALIVE, BREAK_GUEST_WRITE, EngineState, STALL_ROOM, Snap, Ticket, WAIT_FOR_ROOM, WHY_FULL,
                                WHY_MEMORY, WHY_NO_ROOM, WHY_ROOM_TIMEOUT, WHY_SOURCE, WHY_STORE, WHY_TIMEOUT,
                                count_stall, enter, leave, lookup, newest_needing, snap_break, snap_ref, snap_unref,
                                wake_keeper)
from fastcbw.cbw.store cimport Store, store_room
from fastcbw.kernels.atomic cimport add_relaxed, load_relaxed, load_seq, store_relaxed
from fastcbw.sync cimport cond_wait_until, now_ns, pthread_mutex_lock, pthread_mutex_unlock

cdef enum:
    WAIT_ON = 0
    TRY_AGAIN = 1
    HOPELESS = 2


cdef const char *why_text(uint64_t why) noexcept nogil:
    if why == WHY_FULL:
        return "its store is full (both tiers at their limits)"
    if why == WHY_SOURCE:
        return "old data could not be read from the disk"
    if why == WHY_STORE:
        return "the disk tier could not be written"
    if why == WHY_TIMEOUT:
        return "preserving old data took longer than cbw-timeout"
    if why == WHY_MEMORY:
        return "no memory for the location map"
    if why == WHY_ROOM_TIMEOUT:
        return "its store is full, and no room came within cbw-timeout"
    if why == WHY_NO_ROOM:
        return "its store is full, and nothing that runs can free room (on-full=wait needs a job or client that consumes)"
    return "by command"


cdef int refusal_errno(int code) noexcept nogil:
    cdef int64_t why = REFUSED - code
    if why == WHY_FULL or why == WHY_NO_ROOM:
        return ENOSPC
    if why == WHY_TIMEOUT or why == WHY_ROOM_TIMEOUT:
        return ETIMEDOUT
    return EIO if WHY_SOURCE <= why <= WHY_MEMORY else 0


cdef int give_up_copy(EngineState state, Snap *snap, uint64_t why, int code, int64_t offset) noexcept nogil:
    cdef uint64_t policy = load_relaxed(&snap.on_full if why == WHY_FULL else &snap.on_cbw_error)
    if policy != BREAK_GUEST_WRITE:
        snap_break(state, snap, why, code, offset)
        return START_OVER
    add_relaxed(&snap.refused, 1)
    if load_relaxed(&snap.refused_why) != why:
        store_relaxed(&snap.refused_why, why)
        wake_keeper(state)          # it logs the first of each kind
    return REFUSED - <int>why


cdef int judge(EngineState state, Snap *snap, int64_t cluster, int64_t need, const Waiter *waiter) noexcept nogil:
    """What a wait does next. Under the room's lock; counted for as long as it looks."""
    cdef Ticket ticket
    cdef Store *store
    cdef bint waiting = load_relaxed(&snap.on_full) == WAIT_FOR_ROOM
    cdef bint failing, in_transit
    cdef uint64_t transits
    cdef int64_t room
    if load_seq(&snap.dead) != ALIVE:
        return TRY_AGAIN
    ticket = enter(state)
    if ticket.epoch.geometry != snap.geometry or newest_needing(ticket.epoch, cluster) != snap \
            or lookup(ticket.epoch, snap, cluster) != WORD_NONE:
        leave(ticket)
        return TRY_AGAIN        # somebody else has preserved it, or it is another snapshot's business now
    store = snap.store
    # A batch that begins or ends while the room is counted hides some: then we are woken when it has ended.
    transits = load_seq(&store.transits)
    failing = load_seq(&store.log_error) != 0
    room = store_room(store, not (waiting and failing))
    in_transit = transits & 1 or load_seq(&store.transits) != transits
    leave(ticket)
    if room >= need:
        return TRY_AGAIN if not waiting or room_is_first(&state.room, waiter) else WAIT_ON
    if in_transit or (waiting and (failing or load_seq(&snap.consumers) != 0)):
        return WAIT_ON
    return HOPELESS


cdef int wait_for_room(EngineState state, Ticket *ticket, Snap *snap, int64_t cluster, int64_t need, int64_t started_ns,
                       Waiter *waiter) noexcept nogil:
    cdef int64_t began_ns = now_ns()
    cdef int64_t offset = cluster << snap.geometry.cluster_bits
    cdef int verdict = HOPELESS
    cdef int code = START_OVER
    snap_ref(snap)
    add_relaxed(&ticket.line.waits, 1)
    leave(ticket[0])
    pthread_mutex_lock(&state.room.lock)
    if room_queue(&state.room, waiter, snap):
        verdict = judge(state, snap, cluster, need, waiter)
        while verdict == WAIT_ON:
            if cond_wait_until(&state.room.changed, &state.room.lock, started_ns + snap.cbw_timeout_ns) == ETIMEDOUT:
                break
            verdict = judge(state, snap, cluster, need, waiter)
    pthread_mutex_unlock(&state.room.lock)
    count_stall(snap, STALL_ROOM, began_ns)
    if verdict == HOPELESS:
        code = give_up_copy(state, snap, WHY_NO_ROOM if load_relaxed(&snap.on_full) == WAIT_FOR_ROOM else WHY_FULL, 0, offset)
    elif verdict == WAIT_ON:
        code = give_up_copy(state, snap, WHY_ROOM_TIMEOUT, 0, offset)
    snap_unref(snap)
    return code
