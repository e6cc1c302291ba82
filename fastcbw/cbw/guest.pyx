"""GuestDevice: the filter as exports and queues use it: guest writes that never make their thread wait.

    pwritev_nowait      settled, or old data that is in memory: done here and now. Else -EAGAIN, with nothing done.
    queue_begin         settled: the write itself goes to the kernel. Else in stages:

        enter ─ mark ─ settled? ─ yes ──────────────────────────────────────▶ write ─▶ leave
                         │ no                                                   ▲
                         └─▶ claim ─ slots ─▶ [kernel: read old data] ─▶ publish ─ settle ─ release   (again, when there is more)

Whatever would have to wait (a claim of somebody else, no free slot, writes from before a creation, no memory), or fails, gives back
what it has, leaves the epoch, and is done by the synchronous method, in a thread that may wait. The steps and their order are the
intercept's own; only the reading differs.

Invariants. A claim is held over a stage of kernel I/O and nothing else: whoever has a stage under way lets it end by calling poll()
and must not sleep elsewhere. One thread has many writes counted, so while it has any, its line stands for the whole disk, and no
guest write of that thread may wait for old writes to end: they could be its own (they never do here: -EAGAIN, or the method).
A stage that misses the snapshot's cbw-timeout breaks the snapshot, unless its policy protects it; the write goes on by the method, and the claims and slots
are given back when the kernel answers at last, as with the copies of the pool.
"""

from libc.errno cimport EAGAIN, ETIMEDOUT
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from fastcbw.block.device cimport (BlockDevice, ENGINE_SYNC, FUA, IO_READ, IO_SYNC, IO_WRITE, KernelIo, QUEUE_ENDED, QUEUE_METHOD,
                                   QUEUE_NEXT)
from fastcbw.block.sys cimport iovec
from fastcbw.cbw.intercept cimport (COPY_NOTHING, COPY_READY, FilterDevice, count_touch, count_write, make_leaves, next_to_preserve, prepare,
                                    publish, settle_and_release, take_slots)
from fastcbw.cbw.keep cimport keep_has
from fastcbw.cbw.latency cimport LATENCY_PRESERVING, LATENCY_SETTLED, latency_begin, latency_end
from fastcbw.cbw.state cimport (BREAK_GUEST_WRITE, EngineState, Epoch, Line, Ticket, WHY_TIMEOUT, claim_release, cluster_end, enter, enter_guest, leave,
                                overlapped, snap_break)
from fastcbw.cbw.worker cimport (Copy, copy_give_back, copy_read, drop_references, find_zeroes, keep_references)
from fastcbw.kernels.atomic cimport add_relaxed, fence_release, load_relaxed, load_seq
from fastcbw.sync cimport now_ns

cdef uint64_t MINUS_ONE = ~(<uint64_t>0)


cdef bint is_ready_now(EngineState state, Ticket *ticket, Copy *copy) noexcept nogil:
    """Make a prepared copy ready to be read: leaves and a slot for every item, and nothing to wait for. False: give it up."""
    cdef int bits = ticket.epoch.geometry.cluster_bits
    if ticket.epoch.draining and overlapped(state, <int>((ticket.epoch.number - 1) & 3), copy.first << bits,
                                            (copy.first + copy.count) << bits):
        return False
    if load_seq(&state.room.waiting) != 0 or not make_leaves(copy):
        return False            # who waits for room comes first: the method queues behind it
    take_slots(state, ticket.epoch, copy)
    return copy.items[copy.items_count - 1].slot >= 0       # slots come first: every item has one


cdef void give_copy_up(Copy *copy) noexcept nogil:
    copy_give_back(copy)        # room first, so that who gets the claim finds it
    claim_release(copy.geometry, copy.got, copy.first, copy.count)


cdef inline void step_out(Ticket ticket) noexcept nogil:
    """Leave, with a write of a queue."""
    add_relaxed(&ticket.line.queued, MINUS_ONE)
    leave(ticket)


cdef inline void put_ticket(KernelIo *io, Ticket ticket, bint touched, int64_t began_ns) noexcept nogil:
    """What the stage of the write itself needs at its end."""
    io.above[0] = <int64_t>ticket.epoch
    io.above[1] = <int64_t>ticket.line
    io.above[2] = ticket.index
    io.above[3] = 0             # no Touch
    io.above[4] = touched
    io.above[5] = began_ns


cdef inline Ticket get_ticket(const KernelIo *io) noexcept nogil:
    cdef Ticket ticket
    ticket.epoch = <Epoch *>io.above[0]
    ticket.line = <Line *>io.above[1]
    ticket.index = <int>io.above[2]
    return ticket


cdef class GuestDevice(FilterDevice):
    """The disk the guest sees, for exports as well."""

    def __cinit__(self, EngineState state not None):
        # Whether requests may leave their thread is for who opened the disk to say. Of two filters one above the other only one
        # can have stages.
        self.io_engine = ENGINE_SYNC if isinstance(state.child, FilterDevice) else state.child.io_engine
        self.queueable = self.io_engine != ENGINE_SYNC
        self.always_waits = self.queueable and state.child.always_waits

    cdef bint may_wait(self, int operation) noexcept nogil:
        cdef Ticket ticket
        cdef bint preserves
        if not self.queueable:
            return False
        if operation == IO_READ or operation == IO_SYNC:
            return self.child.may_wait(operation)
        ticket = enter(self.state)
        preserves = ticket.epoch.geometry != NULL
        leave(ticket)
        return preserves or self.child.may_wait(operation)

    # -- at once or not at all

    cdef int pwritev_nowait(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef Ticket ticket
        cdef int64_t began_ns = latency_begin(&self.state.latency)
        cdef int64_t started_ns = 0
        cdef int code
        if not enter_guest(self.state, offset, length, &ticket):
            started_ns = now_ns()
            if not self.settle_now(&ticket, offset, length):
                leave(ticket)
                return -EAGAIN
        fence_release()
        code = self.child.pwritev_nowait(vector, count, offset, length, flags)
        if code != -EAGAIN:
            if started_ns:
                count_touch(ticket.line, started_ns)
            count_write(ticket.line, length)
        leave(ticket)
        if began_ns and code != -EAGAIN:
            latency_end(&self.state.latency, ticket.line - self.state.lines, LATENCY_PRESERVING if started_ns else LATENCY_SETTLED, began_ns)
        return code

    cdef bint settle_now(self, Ticket *ticket, int64_t offset, int64_t length) noexcept nogil:
        """Preserve what the write needs, where that can't wait. False: something would; what was settled on the way stays so."""
        cdef Copy copy
        cdef int64_t first = offset >> ticket.epoch.geometry.cluster_bits
        cdef int64_t end = cluster_end(ticket.epoch.geometry, offset, length)
        cdef int64_t round_end = end
        cdef int what
        while True:
            first = next_to_preserve(ticket.epoch, first, end, &round_end)
            if first == end:
                return True
            what = prepare(self.state, ticket.epoch, &copy, first, round_end)
            if what == COPY_NOTHING:
                continue
            if what != COPY_READY:
                return False
            if not is_ready_now(self.state, ticket, &copy) or copy_read(&copy, True) != 0:
                give_copy_up(&copy)
                return False
            publish(&copy)
            settle_and_release(self.state, ticket.epoch, &copy)

    # -- by stages of kernel I/O

    cdef bint queue_begin(self, int operation, const iovec *vector, int count, int64_t offset, int64_t length,
                          uint32_t flags, KernelIo *io) noexcept nogil:
        cdef Ticket ticket
        cdef Touch *touch
        cdef int64_t began_ns
        if operation != IO_WRITE:
            if operation == IO_READ and load_relaxed(&self.state.kept) and keep_has(self.state, offset, length):
                return False        # the method takes it from RAM
            return (operation == IO_READ or operation == IO_SYNC) \
                and self.child.queue_begin(operation, vector, count, offset, length, flags, io)
        if flags & FUA:
            return False
        began_ns = latency_begin(&self.state.latency)
        if enter_guest(self.state, offset, length, &ticket):
            fence_release()
            if not self.child.queue_begin(IO_WRITE, vector, count, offset, length, flags, io):
                leave(ticket)
                return False
            add_relaxed(&ticket.line.queued, 1)
            count_write(ticket.line, length)
            put_ticket(io, ticket, False, began_ns)
            return True
        touch = <Touch *>malloc(sizeof(Touch))
        if touch == NULL:
            leave(ticket)
            return False
        add_relaxed(&ticket.line.queued, 1)
        touch.ticket = ticket
        touch.began_ns = began_ns
        touch.started_ns = now_ns()
        touch.end = cluster_end(ticket.epoch.geometry, offset, length)
        touch.late = False
        return self.go_on(touch, vector, count, offset, length, flags, io) == QUEUE_NEXT

    cdef int go_on(self, Touch *touch, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags,
                   KernelIo *io) noexcept nogil:
        """The next stage: old data that is still to be preserved, else the write itself. QUEUE_METHOD: TOUCH is gone, not counted."""
        cdef Ticket ticket = touch.ticket
        cdef int64_t first = offset >> ticket.epoch.geometry.cluster_bits
        cdef int64_t round_end = touch.end
        cdef int what
        while True:
            first = next_to_preserve(ticket.epoch, first, touch.end, &round_end)
            if first == touch.end:
                break
            what = prepare(self.state, ticket.epoch, &touch.copy, first, round_end)
            if what == COPY_NOTHING:
                continue
            if what == COPY_READY:
                touch.next_item = 0
                if is_ready_now(self.state, &ticket, &touch.copy) and self.ask_for_old(touch, io):
                    return QUEUE_NEXT
                give_copy_up(&touch.copy)
            step_out(ticket)
            free(touch)
            return QUEUE_METHOD
        io.operation = IO_WRITE
        io.vector = NULL
        io.deadline_ns = 0
        fence_release()
        what = QUEUE_METHOD
        if self.child.queue_begin(IO_WRITE, vector, count, offset, length, flags, io):
            count_touch(ticket.line, touch.started_ns)
            count_write(ticket.line, length)
            put_ticket(io, ticket, True, touch.began_ns)
            what = QUEUE_NEXT
        else:
            step_out(ticket)
        free(touch)
        return what

    cdef bint ask_for_old(self, Touch *touch, KernelIo *io) noexcept nogil:
        """Ask for the next run of old data, straight into its slots. False: the kernel can't be asked for it."""
        cdef Copy *copy = &touch.copy
        cdef int64_t cluster_bytes = copy.snap.store.cluster_bytes
        cdef int64_t piece, length = 0
        cdef int i = touch.next_item, pieces = 0
        touch.item = i
        while i < copy.items_count and copy.items[i].cluster == copy.items[touch.item].cluster + (i - touch.item):
            piece = copy.disk_length - copy.items[i].cluster * cluster_bytes
            if piece > cluster_bytes:
                piece = cluster_bytes
            if pieces and copy.items[i].data == <char *>touch.vector[pieces - 1].iov_base + touch.vector[pieces - 1].iov_len:
                touch.vector[pieces - 1].iov_len += <size_t>piece       # slots are neighbours as a rule
            elif pieces == STAGE_PIECES:
                break
            else:
                touch.vector[pieces].iov_base = copy.items[i].data
                touch.vector[pieces].iov_len = <size_t>piece
                pieces += 1
            if piece < cluster_bytes:   # the disk ends within this cluster: the rest of its old data is zeroes
                memset(copy.items[i].data + piece, 0, <size_t>(cluster_bytes - piece))
            length += piece
            i += 1
        touch.next_item = i
        io.operation = IO_READ
        io.vector = touch.vector
        io.count = pieces
        io.offset = copy.items[touch.item].cluster * cluster_bytes
        io.length = length
        io.deadline_ns = touch.started_ns + copy.snap.cbw_timeout_ns
        io.above[3] = <int64_t>touch
        return self.child.queue_begin(IO_READ, io.vector, pieces, io.offset, length, 0, io)

    cdef int queue_end(self, int operation, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags,
                       KernelIo *io, int code) noexcept nogil:
        cdef Ticket ticket
        cdef Touch *touch
        cdef int what
        if operation != IO_WRITE:
            return self.child.queue_end(operation, vector, count, offset, length, flags, io, code)
        touch = <Touch *>io.above[3]
        if touch == NULL:
            what = self.child.queue_end(IO_WRITE, vector, count, offset, length, flags, io, code)
            ticket = get_ticket(io)
            step_out(ticket)
            if io.above[5]:
                latency_end(&self.state.latency, ticket.line - self.state.lines, LATENCY_PRESERVING if io.above[4] else LATENCY_SETTLED, io.above[5])
            return what
        self.child.queue_end(IO_READ, io.vector, io.count, io.offset, io.length, 0, io, code)
        if touch.late:
            give_copy_up(&touch.copy)
            drop_references(&touch.copy)
            free(touch)
            return QUEUE_ENDED
        if code == 0:
            if touch.next_item < touch.copy.items_count:
                if self.ask_for_old(touch, io):
                    return QUEUE_NEXT
            else:
                find_zeroes(&touch.copy)
                publish(&touch.copy)
                settle_and_release(self.state, touch.ticket.epoch, &touch.copy)
                return self.go_on(touch, vector, count, offset, length, flags, io)
        # The method reads again, and what it finds decides: of the snapshot, not of the guest's write.
        give_copy_up(&touch.copy)
        step_out(touch.ticket)
        free(touch)
        return QUEUE_METHOD

    cdef void queue_late(self, int operation, KernelIo *io) noexcept nogil:
        cdef Touch *touch = <Touch *>io.above[3]
        # With break-guest-write the method finds the claim busy, and refuses the write after cbw-timeout.
        if load_relaxed(&touch.copy.snap.on_cbw_error) != BREAK_GUEST_WRITE:
            snap_break(self.state, touch.copy.snap, WHY_TIMEOUT, ETIMEDOUT, touch.copy.items[touch.item].cluster * touch.copy.snap.store.cluster_bytes)
        keep_references(&touch.copy)
        touch.late = True
        step_out(touch.ticket)
