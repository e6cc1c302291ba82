"""The copier: moves the bytes of a source to a target, by N workers, in a stated order, with bounded memory.

    order.next ──▶ worker: read ─▶ zero test ─▶ write     each with one buffer of `chunk` bytes
                       or: from file to file by the kernel, then validated (offload.pyx)

What is copied next is the Order's to say (order.pyx).
Zeroes are known from block status (holes, preserved zeroes) or found by content in blocks of 4 KiB; a target that is
known to be all zeroes is not told about them, so that it stays sparse.

In flight: workers x chunk bytes of data at most, no queue; the pace says how many are at work, on how large steps of their pieces,
and how fast (pace.pyx). The first error wins and is kept, with what was being done
and where; the workers stop after their present step. A cancelled copier stops likewise.
"""

from libc.errno cimport EINTR, EIO, ENOMEM
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcmp

from fastcbw.bitmaps.dirty cimport DirtyWords, dirty_mark
from fastcbw.bitmaps.mapping cimport map_pages, unmap_pages
from fastcbw.block.device cimport BlockDevice, MAY_UNMAP, STATUS_ZERO
from fastcbw.cbw.landed cimport Landed
from fastcbw.cbw.offload cimport OFFLOAD_LACKING, Behind, Offload
from fastcbw.cbw.order cimport Order, Piece
from fastcbw.cbw.pace cimport Pace
from fastcbw.cbw.discard cimport granule_bytes
from fastcbw.cbw.reader cimport SnapshotDevice
from fastcbw.kernels.atomic cimport add_relaxed, add_seq, load_seq, store_seq
from fastcbw.kernels.bytes cimport is_zero
from fastcbw.sync cimport now_ns, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, run_in_background, sleep_ns

from fastcbw.cbw.landed import landed_for
from fastcbw.cbw.offload import behind_for

cdef enum:
    DIFFERS = -2000             # an error code beside -errno and the reader's own: two devices differ

cdef int64_t BLOCK = 4096
cdef int64_t POLL_NS = 5000000
cdef int64_t POLLS_BLIND = 100           # after so many a watching copier looks though nobody said that there is something
cdef int64_t ZEROES_CONSUMED_MAX = 1 << 30
cdef int64_t BEHIND_BYTES = 4 << 20      # of each worker, under way to a device
cdef int WORKERS_UNBOUND = 1 << 20       # without a pace: all that call run()

cdef dict DOING_TEXT = {
    DOING_STATUS: "block status of the source",
    DOING_READ: "read from the source",
    DOING_WRITE: "write to the target",
    DOING_COPY: "copy to the target",
    DOING_ZEROES: "write zeroes to the target",
    DOING_COMPARE: "compare the target",
    DOING_ALLOCATE: "allocate the buffer",
}


cdef class Copier:
    """Copies all of SOURCE to TARGET, or compares them.

    chunk: bytes of one read and one write, a multiple of 4 KiB. order: see Order. target_is_zero: every byte of the
    target reads as zero now. comparing: read both and report the first difference as an error. pace: default: every worker, chunk bytes
    a step. offload: of offload_for(); digests and comparing want the data to pass through here. copied: words in which whole granules
    are marked when they are in the target. watching: copy of a snapshot what guest writes have preserved, as they go on, until
    finish(); order is then nobody's choice. What guest writes have put into the target, where SOURCE's store lies in place there, is not copied.
    Call run() in as many threads as shall work; when all have returned, look at `error`.
    """

    def __cinit__(self, BlockDevice source not None, BlockDevice target not None, *, int64_t chunk=1 << 18,
                  str order="sequential", bint target_is_zero=False, bint comparing=False, bint consuming=False, Pace pace=None,
                  Offload offload=None, DirtyWords copied=None, bint watching=False):
        if chunk < BLOCK or chunk % BLOCK:
            raise ValueError(f"chunk: {chunk} is no multiple of {BLOCK}")
        if target.length < source.length:
            raise ValueError(f"target {target.name}: its {target.length} bytes are less than the source's {source.length}")
        self.source = source
        self.target = target
        self.chunk = chunk
        self.target_is_zero = target_is_zero
        self.comparing = comparing
        self.copied = copied
        self.pace = Pace([(WORKERS_UNBOUND, chunk)]) if pace is None else pace
        self.landed = None if comparing else landed_for(source, target)
        self.offload = None if comparing or self.landed is not None else offload
        self.watching = watching
        self.order = Order(source, "disk-early" if watching else order, chunk=chunk, stored_only=watching)
        if consuming and (comparing or not isinstance(source, SnapshotDevice)):
            raise ValueError(f"consuming: {source.name} is no snapshot, or is to be compared")
        self.consuming = <SnapshotDevice>source if consuming else None
        pthread_mutex_init(&self.lock, NULL)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.lock)

    # -- workers

    def run(self, bint in_background=False):
        """Work until everything is handed out, an error, or cancel(). For threads of its own; holds no interpreter lock.

        in_background: the calling thread gives way to any other from here on, and keeps doing so after the return.
        """
        cdef Piece piece
        cdef char *buffer
        cdef char *other = NULL
        cdef int64_t polls = 0
        cdef bint more
        cdef Behind behind = None if self.comparing else behind_for(self.target, BEHIND_BYTES)
        with nogil:
            if in_background:
                run_in_background()
            buffer = <char *>map_pages(self.chunk)
            if self.comparing:
                other = <char *>map_pages(self.chunk)
            if buffer == NULL or (self.comparing and other == NULL):
                self.note_error(-ENOMEM, DOING_ALLOCATE, 0, self.chunk)
            else:
                more = self.pace.take()
                while more:
                    if not self.next_piece(&piece):
                        self.pace.give()
                        more = self.watching and self.await_more(&polls) and self.pace.take()
                    elif self.work(&piece, buffer, other, behind):
                        self.pace.give()
                        more = False
                    else:
                        more = self.pace.again()
                self.pace.stop(False)       # who sleeps is not needed any more
            if buffer != NULL:
                unmap_pages(buffer, self.chunk)
            if other != NULL:
                unmap_pages(other, self.chunk)

    cdef int work(self, const Piece *piece, char *buffer, char *other, Behind behind) noexcept nogil:
        """Do a piece, in steps as the pace has them. Not 0: it failed, which is noted, or was cancelled."""
        cdef Piece step
        cdef int64_t at = 0, begun = 0
        cdef bint landed = False
        cdef int code
        step.zero = piece.zero
        while at < piece.length:
            step.offset = piece.offset + at
            step.length = piece.length - at
            if self.landed is not None and not piece.zero:
                step.length = self.landed.there(step.offset, piece.length - at)
                landed = step.length != 0
                if not landed:
                    step.length = max(1, self.landed.missing(step.offset, piece.length - at))
            if not piece.zero and not landed:           # these move no data
                step.length = self.pace.step(step.length)
                if step.length == 0:
                    return -EINTR
                begun = now_ns()
            if self.comparing:
                code = self.compare_piece(&step, buffer, other)
            elif landed:
                code = 0
                add_seq(&self.landed_bytes, <uint64_t>step.length)
            else:
                code = self.copy_piece(&step, buffer)
                if code == 0 and behind is not None and not piece.zero:
                    code = behind.wrote(step.offset, step.length)
                    if code:
                        self.note_error(code, DOING_WRITE, step.offset, step.length)
            if code:
                return code
            if self.consuming is not None:
                self.consume(&step)
            if self.copied is not None:
                self.note_copied(&step)
            if not piece.zero and not landed:
                self.pace.moved(step.length, now_ns() - begun)
            add_seq(&self.done_bytes, <uint64_t>step.length)
            at += step.length
        return 0

    cdef bint await_more(self, int64_t *polls) noexcept nogil:
        """Watching, and nothing is left: wait for more of it. False when the end has come. POLLS: of this worker; negative: its last round."""
        if load_seq(&self.cancelled) or load_seq(&self.failed) or polls[0] < 0:
            return False
        if load_seq(&self.finishing):
            polls[0] = -1       # what was preserved before finish() is found by this round: it begins after it
            self.order.again()
            return True
        sleep_ns(POLL_NS)
        polls[0] += 1
        if self.order.arrived() or polls[0] % POLLS_BLIND == 0:
            self.order.again()
        return True

    cdef void note_copied(self, const Piece *piece) noexcept nogil:
        """Rounded inwards: what is marked as copied is; a granule that two pieces share counts as not copied."""
        cdef int64_t mask = ((<int64_t>1) << self.copied.words.shift) - 1
        cdef int64_t begin = (piece.offset + mask) & ~mask
        cdef int64_t end = piece.offset + piece.length
        if end < self.source.length:
            end &= ~mask
        if begin < end:
            dirty_mark(self.copied.words, begin, end - begin)

    cdef void consume(self, const Piece *piece) noexcept nogil:
        """It is in the target: drop it from the snapshot, whole granules of it. What stays for an error costs room, no data."""
        cdef int64_t granule = granule_bytes(self.consuming.cluster_bits)
        cdef int64_t begin = (piece.offset + granule - 1) // granule * granule
        cdef int64_t end = piece.offset + piece.length
        if piece.zero and piece.length > ZEROES_CONSUMED_MAX:
            return              # takes no room, and the bitmaps of so much would
        if end != self.source.length:
            end = end // granule * granule
        if begin < end:
            self.consuming.drop(begin, end - begin)

    cdef int copy_piece(self, const Piece *piece, char *buffer) noexcept nogil:
        if piece.zero:
            return self.write_zero(piece.offset, piece.length, self.target_is_zero)
        if self.offload is not None and not load_seq(&self.offload.lacking):
            return self.copy_by_kernel(piece.offset, piece.length, buffer)
        return self.copy_data(piece.offset, piece.length, buffer, self.target_is_zero)

    cdef int copy_data(self, int64_t offset, int64_t length, char *buffer, bint target_is_zero) noexcept nogil:
        cdef int code
        self.pace.read_begin()
        code = self.source.pread(buffer, offset, length)
        self.pace.read_end()
        if code:
            self.note_error(code, DOING_READ, offset, length)
            return code
        return self.write_data(buffer, offset, length, target_is_zero)

    cdef int copy_by_kernel(self, int64_t offset, int64_t length, char *buffer) noexcept nogil:
        """As copy_data, from file to file where no store holds the data (see offload.pyx)."""
        cdef int64_t end = offset + length
        cdef int64_t begin = offset, stop, held
        cdef int code
        while offset < end:
            stop = offset + self.offload.nowhere(offset, end - offset)
            if stop > offset:
                code = self.offload.copy(offset, stop - offset)
                if code == OFFLOAD_LACKING:
                    return self.copy_data(offset, end - offset, buffer, self.target_is_zero)
                if code:
                    self.note_error(code, DOING_COPY, offset, stop - offset)
                    return code
                add_seq(&self.data_bytes, <uint64_t>(stop - offset))
                while offset < stop:
                    # Looked up again: what is in a store now may have been copied too late. It is not zero in the target, either.
                    offset += self.offload.nowhere(offset, stop - offset)
                    if offset < stop:
                        held = self.offload.held(offset, stop - offset)
                        code = self.copy_data(offset, held, buffer, False)
                        if code:
                            return code
                        add_relaxed(&self.offload.rewritten_bytes, <uint64_t>held)
                        offset += held
            else:
                held = self.offload.held(offset, end - offset)
                code = self.copy_data(offset, held, buffer, self.target_is_zero) if held else 0
                if code:
                    return code
                offset += held
        code = self.offload.verdict(begin, length)
        if code:
            self.note_error(code, DOING_READ, begin, length)
        return code

    cdef int write_data(self, const char *buffer, int64_t offset, int64_t length, bint target_is_zero) noexcept nogil:
        """Write the runs of blocks that are not zero; the others are zeroes."""
        cdef int64_t at = 0, begin, step
        cdef bint zero
        cdef int code
        while at < length:
            begin = at
            step = BLOCK if length - at > BLOCK else length - at
            zero = is_zero(buffer + at, step)
            at += step
            while at < length:
                step = BLOCK if length - at > BLOCK else length - at
                if is_zero(buffer + at, step) != zero:
                    break
                at += step
            if zero:
                code = self.write_zero(offset + begin, at - begin, target_is_zero)
            else:
                code = self.target.pwrite(buffer + begin, offset + begin, at - begin, 0)
                if code:
                    self.note_error(code, DOING_WRITE, offset + begin, at - begin)
                add_seq(&self.data_bytes, <uint64_t>(at - begin))
            if code:
                return code
        return 0

    cdef int write_zero(self, int64_t offset, int64_t length, bint target_is_zero) noexcept nogil:
        cdef int code = 0
        add_seq(&self.zero_bytes, <uint64_t>length)
        if not target_is_zero:
            code = self.target.write_zeroes_at(offset, length, MAY_UNMAP)
            if code:
                self.note_error(code, DOING_ZEROES, offset, length)
        return code

    cdef int compare_piece(self, const Piece *piece, char *buffer, char *other) noexcept nogil:
        cdef int64_t offset = piece.offset
        cdef int64_t end = piece.offset + piece.length
        cdef int64_t step, half
        cdef uint32_t flags
        cdef int code
        cdef bint same
        while offset < end:
            step = end - offset
            if piece.zero:
                step = self.target.block_status(offset, step, &flags)
                if step > 0 and flags & STATUS_ZERO:
                    offset += step
                    continue
                if step <= 0:
                    step = end - offset
            if step > self.chunk:
                step = self.chunk
            code = self.target.pread(other, offset, step)
            if code == 0 and not piece.zero:
                code = self.source.pread(buffer, offset, step)
                if code:
                    self.note_error(code, DOING_READ, offset, step)
                    return code
            if code:
                self.note_error(code, DOING_COMPARE, offset, step)
                return code
            same = is_zero(other, step) if piece.zero else memcmp(buffer, other, <size_t>step) == 0
            if not same:
                while step > 1:     # narrow down to the first difference
                    half = step // 2
                    if is_zero(other, half) if piece.zero else memcmp(buffer, other, <size_t>half) == 0:
                        offset += half
                        other += half
                        buffer += half
                        step -= half
                    else:
                        step = half
                self.note_error(DIFFERS, DOING_COMPARE, offset, 1)
                return -EIO
            add_seq(&self.data_bytes, <uint64_t>step)
            offset += step
        return 0

    cdef void note_error(self, int code, int doing, int64_t offset, int64_t length) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        if self.error_doing == DOING_NOTHING:
            self.error_code = code
            self.error_doing = doing
            self.error_offset = offset
            self.error_length = length
        pthread_mutex_unlock(&self.lock)
        store_seq(&self.failed, 1)
        self.pace.stop(True)

    cdef bint next_piece(self, Piece *piece) noexcept nogil:
        cdef int code
        if load_seq(&self.cancelled) or load_seq(&self.failed):
            return False
        code = self.order.next(piece, self.pace.gather())
        if code < 0:
            self.note_error(code, DOING_STATUS, piece.offset, self.source.length - piece.offset)
        return code > 0

    # -- control plane

    def finish(self):
        """Watching: copy what guest writes have preserved until now, and end."""
        store_seq(&self.finishing, 1)

    def cancel(self):
        """Let the workers end after their present step."""
        store_seq(&self.cancelled, 1)
        self.pace.stop(True)

    @property
    def is_cancelled(self):
        """Whether cancel() was called."""
        return load_seq(&self.cancelled) != 0

    @property
    def done(self):
        """Bytes of the source that are dealt with."""
        return load_seq(&self.done_bytes) + load_seq(&self.order.skipped)

    def counters(self):
        """Return done, data (written or compared), zero, and landed (guest writes had put it into the target), in bytes."""
        return {"done": self.done, "data": load_seq(&self.data_bytes), "zero": load_seq(&self.zero_bytes),
                "landed": load_seq(&self.landed_bytes)}

    @property
    def error(self):
        """None, or what went wrong first: text with the operation, the offset, the length and the reason."""
        cdef BlockDevice device
        cdef char text[256]
        if not load_seq(&self.failed):
            return None
        device = self.target
        if self.error_doing == DOING_STATUS or self.error_doing == DOING_READ:
            device = self.source
        words = f"{device.name}: {DOING_TEXT[self.error_doing]} at offset {self.error_offset}"
        if self.error_code == DIFFERS:
            return f"{words}: it differs from the source"
        device.explain(self.error_code, text, sizeof(text))
        return f"{words}, length {self.error_length}: {text.decode(errors='replace')}"
