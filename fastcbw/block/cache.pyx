"""CacheDevice: a bounded RAM cache over a slow device.

    read  ─▶ block here? ─ sectors missing: read them from the child, leave them here ─▶ copy out
    write ─▶ block here  ─ writeback: dirty, until a flush, or until its room is wanted; else written through at once

Blocks of 32 KiB, with a bit for each sector that is here (`valid`) and each that the child lacks (`dirty`). A write of whole sectors reads
nothing. Room is found by a hand that goes round and takes what was not used since it last came by; what is dirty is written back first.

Who works on a block has it to itself (`busy`), over the I/O of the child, and waits for no other meanwhile, so that waiting for a block or
for room ends. Zeroes and discards of whole blocks go to the child at once: nobody gets a block of the range meanwhile (the barrier, one at a
time), all slots of it are taken, also from write-back, and what they hold goes when the child has succeeded.

Write-back is a disk's volatile cache: sync() writes all back that is dirty, then flushes the child; FUA does so for its blocks. What the
child does not take stays dirty and the error is reported, by the flush, or by the write that wanted the room; a read goes past. Memory that is
lost (a crash) takes what no flush has covered along, as a disk does. close() writes back.
"""

from libc.errno cimport EAGAIN
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from fastcbw.bitmaps.mapping cimport map_pages, unmap_pages
from fastcbw.block.device cimport BlockDevice, FUA
from fastcbw.block.filter cimport Filter
from fastcbw.block.sys cimport iovec
from fastcbw.kernels.atomic cimport add_relaxed, load_relaxed
from fastcbw.sync cimport (cond_init, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_wait, pthread_mutex_destroy,
                           pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, waits)
from fastcbw.units import parse_size

cdef extern from * nogil:
    int ctzll "__builtin_ctzll"(unsigned long long) noexcept
    int popcountll "__builtin_popcountll"(unsigned long long) noexcept

SIZE_MIN, SIZE_MAX = 1 << 20, 1 << 40
cdef enum:
    ONLY_HERE = 0
    FREE_ROOM = 1
    WAIT = 2

cdef int64_t STATUS_STEP = 1 << 30


cdef inline uint64_t sectors(int64_t first, int64_t end) noexcept nogil:
    """The bits first..end of a block, end up to 64."""
    if first >= end:
        return 0
    return (~<uint64_t>0 >> (64 - (end - first))) << first


cdef void copy_out(VectorPlace *place, const char *data, int64_t length) noexcept nogil:
    cdef size_t step
    while length:
        step = min(<size_t>length, place.vector.iov_len - place.done)
        memcpy(<char *>place.vector.iov_base + place.done, data, step)
        move_on(place, step)
        data += step
        length -= <int64_t>step


cdef void copy_in(VectorPlace *place, char *data, int64_t length) noexcept nogil:
    cdef size_t step
    if place.vector == NULL:
        memset(data, 0, <size_t>length)
        return
    while length:
        step = min(<size_t>length, place.vector.iov_len - place.done)
        memcpy(data, <char *>place.vector.iov_base + place.done, step)
        move_on(place, step)
        data += step
        length -= <int64_t>step


cdef void move_on(VectorPlace *place, size_t step) noexcept nogil:
    place.done += step
    if place.done == place.vector.iov_len:
        place.vector += 1
        place.done = 0


cdef class CacheDevice(Filter):
    """CHILD, with SIZE bytes of RAM in front of it.

    size: bytes, from 1 MiB on. writeback: writes wait in RAM for a flush, or for somebody who needs their room; else they go through.
    Closing it writes back, flushes and closes CHILD; OSError when that fails, with CHILD closed all the same.
    Raises ValueError, TypeError for arguments, MemoryError.
    """

    def __cinit__(self, BlockDevice child not None, *, size, bint writeback=False, name=None):
        cdef int64_t i
        self.size = parse_size(size, "size")
        if not SIZE_MIN <= self.size <= SIZE_MAX:
            raise ValueError(f"size: {self.size} bytes are not within {SIZE_MIN} to {SIZE_MAX}")
        self.stand_on(child, name)
        self.writeback = writeback
        self.can_cache = True
        self.may_wait_in_threads()
        self.slot_count = self.size >> CACHE_BLOCK_BITS
        self.slots = <CacheSlot *>calloc(self.slot_count, sizeof(CacheSlot))
        self.pages = <char *>map_pages(self.slot_count << CACHE_BLOCK_BITS)
        self.slot_of = <uint32_t *>map_pages(self.blocks() * sizeof(uint32_t))
        if self.slots == NULL or self.pages == NULL or self.slot_of == NULL:
            raise MemoryError(f"{self.name}: no memory for a cache of {self.size} bytes")
        for i in range(self.slot_count):
            self.slots[i].block = -1
        pthread_mutex_init(&self.mutex, NULL)
        cond_init(&self.changed)
        self.ready = True

    def __dealloc__(self):
        free(self.slots)
        if self.pages != NULL:
            unmap_pages(self.pages, self.slot_count << CACHE_BLOCK_BITS)
        if self.slot_of != NULL:
            unmap_pages(self.slot_of, self.blocks() * sizeof(uint32_t))
        if self.ready:
            pthread_cond_destroy(&self.changed)
            pthread_mutex_destroy(&self.mutex)

    cdef int64_t blocks(self) noexcept nogil:
        return (self.length + CACHE_BLOCK - 1) >> CACHE_BLOCK_BITS

    # -- control plane

    def counters(self):
        """Return, in bytes: hit (reads served from RAM), read (from the child), written_back; dirty and used, now, of the blocks at rest."""
        cdef int64_t i, dirty = 0, used = 0
        with nogil:
            pthread_mutex_lock(&self.mutex)
            for i in range(self.slot_count):
                if not self.slots[i].busy:
                    used += popcountll(self.slots[i].valid)
                    dirty += popcountll(self.slots[i].dirty)
            pthread_mutex_unlock(&self.mutex)
        return {"hit": load_relaxed(&self.hit_bytes), "read": load_relaxed(&self.read_bytes),
                "written_back": load_relaxed(&self.written_bytes), "dirty": dirty << SECTOR_BITS, "used": used << SECTOR_BITS}

    def close(self):
        """Write back, flush and close the child."""
        if self.closed:
            return
        try:
            if self.writeback:
                self.flush()
        finally:
            self.closed = True
            self.child.close()

    # -- blocks

    cdef char *data_of(self, const CacheSlot *slot) noexcept nogil:
        return self.pages + ((slot - self.slots) << CACHE_BLOCK_BITS)

    cdef void wait_changed(self) noexcept nogil:
        self.waiting += 1
        waits()
        pthread_cond_wait(&self.changed, &self.mutex)
        self.waiting -= 1

    cdef void unlink(self, CacheSlot *slot) noexcept nogil:
        if slot.block >= 0:
            self.slot_of[slot.block] = 0
        slot.block = -1
        slot.valid = slot.dirty = 0

    cdef CacheSlot *find_room(self) noexcept nogil:
        """The next slot that nobody has or used lately; NULL: somebody has every one. Under the mutex."""
        cdef CacheSlot *slot
        cdef int64_t i
        for i in range(2 * self.slot_count):
            slot = &self.slots[self.hand]
            self.hand = self.hand + 1 if self.hand + 1 < self.slot_count else 0
            if slot.busy:
                continue
            if not slot.recent:
                return slot
            slot.recent = False
        return NULL

    cdef CacheSlot *acquire(self, int64_t block, int how, int *code) noexcept nogil:
        """Have the slot of BLOCK to oneself. NULL: *code is the error, -EAGAIN when HOW allows no more.

        how: ONLY_HERE, when it is here and nobody has it; FREE_ROOM, one is made when that takes no wait; WAIT.
        """
        cdef CacheSlot *slot
        code[0] = 0
        pthread_mutex_lock(&self.mutex)
        while True:
            slot = self.usable(block, how)
            if slot != NULL and slot.dirty and slot.block != block:
                if how == WAIT:
                    slot.busy = True
                    pthread_mutex_unlock(&self.mutex)
                    code[0] = self.write_back(slot)
                    pthread_mutex_lock(&self.mutex)
                    slot.busy = False
                    if self.waiting:
                        pthread_cond_broadcast(&self.changed)
                    if code[0] or self.slot_of[block] or self.is_barred(block):
                        slot = NULL
                else:
                    slot = NULL
            if slot != NULL or code[0]:
                break
            if how != WAIT:
                code[0] = -EAGAIN
                break
            if self.is_barred(block) or self.slot_of[block] == 0 or self.slots[self.slot_of[block] - 1].busy:
                self.wait_changed()         # else it came while we wrote back
        if slot != NULL:
            if slot.block != block:
                self.unlink(slot)
                slot.block = block
                self.slot_of[block] = <uint32_t>(slot - self.slots) + 1
            slot.busy = slot.recent = True
        pthread_mutex_unlock(&self.mutex)
        return slot

    cdef bint is_barred(self, int64_t block) noexcept nogil:
        return self.barrier_first <= block < self.barrier_end

    cdef CacheSlot *usable(self, int64_t block, int how) noexcept nogil:
        """The slot of the block, or one for it (perhaps a dirty one of another block); NULL: none without a wait. Under the mutex."""
        cdef CacheSlot *slot
        if self.is_barred(block):
            return NULL
        if self.slot_of[block]:
            slot = &self.slots[self.slot_of[block] - 1]
            return NULL if slot.busy else slot
        return NULL if how == ONLY_HERE else self.find_room()

    cdef void release(self, CacheSlot *slot) noexcept nogil:
        pthread_mutex_lock(&self.mutex)
        slot.busy = False
        if slot.valid == 0:
            self.unlink(slot)
        if self.waiting:
            pthread_cond_broadcast(&self.changed)
        pthread_mutex_unlock(&self.mutex)

    cdef int fill(self, CacheSlot *slot, uint64_t wanted) noexcept nogil:
        """Read the sectors WANTED that are not here. The slot is the caller's."""
        cdef int64_t base = slot.block << CACHE_BLOCK_BITS
        cdef uint64_t missing = wanted & ~slot.valid
        cdef int64_t first, end, length
        cdef int code
        while missing:
            first = ctzll(missing)
            end = first + ctzll(~(missing >> first)) if missing >> first != ~<uint64_t>0 else 64
            length = min(end << SECTOR_BITS, self.length - base) - (first << SECTOR_BITS)
            code = self.child.pread(self.data_of(slot) + (first << SECTOR_BITS), base + (first << SECTOR_BITS), length)
            if code:
                return code
            add_relaxed(&self.read_bytes, <uint64_t>length)
            slot.valid |= sectors(first, end)
            missing &= ~sectors(first, end)
        return 0

    cdef int write_back(self, CacheSlot *slot) noexcept nogil:
        """Write what is dirty to the child. The slot is the caller's; what fails stays dirty."""
        cdef int64_t base = slot.block << CACHE_BLOCK_BITS
        cdef int64_t first, end, length
        cdef int code
        while slot.dirty:
            first = ctzll(slot.dirty)
            end = first + ctzll(~(slot.dirty >> first)) if slot.dirty >> first != ~<uint64_t>0 else 64
            length = min(end << SECTOR_BITS, self.length - base) - (first << SECTOR_BITS)
            code = self.child.pwrite(self.data_of(slot) + (first << SECTOR_BITS), base + (first << SECTOR_BITS), length, 0)
            if code:
                return code
            add_relaxed(&self.written_bytes, <uint64_t>length)
            slot.dirty &= ~sectors(first, end)
        return 0

    cdef int write_all_back(self) noexcept nogil:
        """Write back every block that is dirty when its turn comes; 0, or the first error after all were tried."""
        cdef CacheSlot *slot
        cdef int64_t i
        cdef int code, first_code = 0
        for i in range(self.slot_count):
            slot = &self.slots[i]
            pthread_mutex_lock(&self.mutex)
            while slot.busy:
                self.wait_changed()
            if slot.dirty == 0:
                pthread_mutex_unlock(&self.mutex)
                continue
            slot.busy = True
            pthread_mutex_unlock(&self.mutex)
            code = self.write_back(slot)
            self.release(slot)
            if first_code == 0:
                first_code = code
        return first_code

    cdef int read_part(self, CacheSlot *slot, VectorPlace *place, int64_t at, int64_t length) noexcept nogil:
        cdef uint64_t wanted = sectors(at >> SECTOR_BITS, (at + length + 511) >> SECTOR_BITS)
        cdef int code = 0
        if wanted & ~slot.valid:
            code = self.fill(slot, wanted)
        else:
            add_relaxed(&self.hit_bytes, <uint64_t>length)
        if code == 0:
            copy_out(place, self.data_of(slot) + at, length)
        return code

    cdef int read_past(self, VectorPlace *place, int64_t offset, int64_t length) noexcept nogil:
        """Read a part of a block that is not here, and for which there is no room because the child does not take what is dirty.

        Who brings it here meanwhile writes beside this read, which may show either.
        """
        cdef size_t step
        cdef int code = 0
        while length and code == 0:
            step = min(<size_t>length, place.vector.iov_len - place.done)
            if step:
                code = self.child.pread(<char *>place.vector.iov_base + place.done, offset, <int64_t>step)
                add_relaxed(&self.read_bytes, <uint64_t>step)
            move_on(place, step)
            offset += <int64_t>step
            length -= <int64_t>step
        return code

    cdef int write_part(self, CacheSlot *slot, VectorPlace *place, int64_t at, int64_t length, uint32_t flags) noexcept nogil:
        """Change a part of a block. Sectors that are written in part and not here are read first."""
        cdef int64_t base = slot.block << CACHE_BLOCK_BITS
        cdef int64_t end = at + length
        cdef uint64_t written = sectors(at >> SECTOR_BITS, (end + 511) >> SECTOR_BITS)
        cdef uint64_t parts = 0
        cdef int code
        if at & 511:
            parts |= sectors(at >> SECTOR_BITS, (at >> SECTOR_BITS) + 1)
        if end & 511 and base + end != self.length:
            parts |= sectors(end >> SECTOR_BITS, (end >> SECTOR_BITS) + 1)
        code = self.fill(slot, parts)
        if code:
            return code
        copy_in(place, self.data_of(slot) + at, length)
        slot.valid |= written
        if self.writeback:
            slot.dirty |= written
            return self.write_back(slot) if flags & FUA else 0
        code = self.child.pwrite(self.data_of(slot) + at, base + at, length, flags)
        if code:
            slot.valid &= ~written      # the child holds any mixture
        return code

    cdef int write_range(self, const iovec *vector, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        """Write what VECTOR has, NULL: zeroes."""
        cdef VectorPlace place
        cdef CacheSlot *slot
        cdef int64_t step
        cdef int code = 0
        place.vector = vector
        place.done = 0
        while length:
            step = min(length, CACHE_BLOCK - (offset & (CACHE_BLOCK - 1)))
            slot = self.acquire(offset >> CACHE_BLOCK_BITS, WAIT, &code)
            if slot == NULL:
                return code
            code = self.write_part(slot, &place, offset & (CACHE_BLOCK - 1), step, flags)
            self.release(slot)
            if code:
                return code
            offset += step
            length -= step
        return self.child.sync() if self.writeback and flags & FUA else 0

    cdef int clear_blocks(self, int64_t first, int64_t end, bint zero, uint32_t flags) noexcept nogil:
        """Zero or discard whole blocks, the last of the device included, in the child; what is here of them goes."""
        cdef int64_t offset = first << CACHE_BLOCK_BITS
        cdef int64_t length = min(end << CACHE_BLOCK_BITS, self.length) - offset
        cdef CacheSlot *slot
        cdef int64_t i
        cdef int code
        pthread_mutex_lock(&self.mutex)
        while self.barrier_end:
            self.wait_changed()
        self.barrier_first, self.barrier_end = first, end
        for i in range(self.slot_count):
            slot = &self.slots[i]
            while first <= slot.block < end and slot.busy:
                self.wait_changed()
            if first <= slot.block < end:
                slot.busy = True            # so that nobody writes back what it holds
        pthread_mutex_unlock(&self.mutex)
        code = self.child.write_zeroes_at(offset, length, flags) if zero else self.child.discard_at(offset, length, flags)
        pthread_mutex_lock(&self.mutex)
        for i in range(self.slot_count):
            slot = &self.slots[i]
            if not (first <= slot.block < end):
                continue
            slot.busy = False
            if code == 0:
                self.unlink(slot)
            else:
                slot.valid = slot.dirty     # of the rest the child holds any mixture
        self.barrier_first = self.barrier_end = 0
        pthread_cond_broadcast(&self.changed)
        pthread_mutex_unlock(&self.mutex)
        return code

    # -- data plane

    cdef int preadv(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        cdef VectorPlace place
        cdef CacheSlot *slot
        cdef int64_t step
        cdef int code = 0
        place.vector = vector
        place.done = 0
        while length and code == 0:
            step = min(length, CACHE_BLOCK - (offset & (CACHE_BLOCK - 1)))
            slot = self.acquire(offset >> CACHE_BLOCK_BITS, WAIT, &code)
            if slot == NULL:
                code = self.read_past(&place, offset, step)
            else:
                code = self.read_part(slot, &place, offset & (CACHE_BLOCK - 1), step)
                self.release(slot)
            offset += step
            length -= step
        return code

    cdef int preadv_nowait(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        """Within one block, when it is here."""
        cdef int64_t at = offset & (CACHE_BLOCK - 1)
        cdef VectorPlace place
        cdef CacheSlot *slot
        cdef int code = -EAGAIN
        if at + length > CACHE_BLOCK:
            return -EAGAIN
        slot = self.acquire(offset >> CACHE_BLOCK_BITS, ONLY_HERE, &code)
        if slot == NULL:
            return -EAGAIN
        place.vector = vector
        place.done = 0
        if sectors(at >> SECTOR_BITS, (at + length + 511) >> SECTOR_BITS) & ~slot.valid:
            code = -EAGAIN
        else:
            code = self.read_part(slot, &place, at, length)
        self.release(slot)
        return code

    cdef int pwritev(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        return self.write_range(vector, offset, length, flags)

    cdef int pwritev_nowait(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        """Within one block, in whole sectors, when it stays in RAM."""
        cdef int64_t at = offset & (CACHE_BLOCK - 1)
        cdef VectorPlace place
        cdef CacheSlot *slot
        cdef int code = -EAGAIN
        if not self.writeback or flags & FUA or at + length > CACHE_BLOCK or (at | length) & 511:
            return -EAGAIN
        slot = self.acquire(offset >> CACHE_BLOCK_BITS, FREE_ROOM, &code)
        if slot == NULL:
            return -EAGAIN
        place.vector = vector
        place.done = 0
        code = self.write_part(slot, &place, at, length, flags)
        self.release(slot)
        return code

    cdef int write_zeroes_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        """Whole blocks in the child; the head and the tail as writes."""
        cdef int64_t end = offset + length
        cdef int64_t first = (offset + CACHE_BLOCK - 1) >> CACHE_BLOCK_BITS
        cdef int64_t stop = self.blocks() if end == self.length else end >> CACHE_BLOCK_BITS
        cdef int code
        if first >= stop:
            return self.write_range(NULL, offset, length, flags)
        code = self.clear_blocks(first, stop, True, flags)          # first: when it is not fast enough, nothing has been done
        if code == 0 and offset < first << CACHE_BLOCK_BITS:
            code = self.write_range(NULL, offset, (first << CACHE_BLOCK_BITS) - offset, flags)
        if code == 0 and stop << CACHE_BLOCK_BITS < end:
            code = self.write_range(NULL, stop << CACHE_BLOCK_BITS, end - (stop << CACHE_BLOCK_BITS), flags)
        return code

    cdef int discard_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef int64_t end = offset + length
        cdef int64_t first = (offset + CACHE_BLOCK - 1) >> CACHE_BLOCK_BITS
        cdef int64_t stop = self.blocks() if end == self.length else end >> CACHE_BLOCK_BITS
        if first < stop:
            return self.clear_blocks(first, stop, False, flags)
        return self.sync() if flags & FUA else 0        # parts of a block: advisory

    cdef int sync(self) noexcept nogil:
        cdef int code = self.write_all_back() if self.writeback else 0
        return code if code else self.child.sync()

    cdef bint may_wait(self, int operation) noexcept nogil:
        return True

    cdef int64_t block_status(self, int64_t offset, int64_t length, uint32_t *flags) noexcept nogil:
        """The child's, up to the next block with something dirty; such a block is data."""
        cdef int64_t block = offset >> CACHE_BLOCK_BITS
        cdef int64_t end
        cdef bint dirty
        if not self.writeback:
            return self.child.block_status(offset, length, flags)
        end = (offset + min(length, STATUS_STEP) + CACHE_BLOCK - 1) >> CACHE_BLOCK_BITS
        pthread_mutex_lock(&self.mutex)
        dirty = self.is_dirty(block)
        block += 1
        while block < end and self.is_dirty(block) == dirty:
            block += 1
        pthread_mutex_unlock(&self.mutex)
        length = min(length, (block << CACHE_BLOCK_BITS) - offset)
        if dirty:
            flags[0] = 0
            return length
        return self.child.block_status(offset, length, flags)

    cdef bint is_dirty(self, int64_t block) noexcept nogil:
        cdef CacheSlot *slot
        if self.slot_of[block] == 0:
            return False
        slot = &self.slots[self.slot_of[block] - 1]
        return slot.busy or slot.dirty != 0

    cdef int cache_at(self, int64_t offset, int64_t length) noexcept nogil:
        """Read the range into RAM, as much as has room."""
        cdef int64_t block, end
        cdef CacheSlot *slot
        cdef int code = 0
        length = min(length, self.size)
        end = (offset + length + CACHE_BLOCK - 1) >> CACHE_BLOCK_BITS
        for block in range(offset >> CACHE_BLOCK_BITS, end):
            slot = self.acquire(block, WAIT, &code)
            if slot == NULL:
                return code
            code = self.fill(slot, sectors(0, min(<int64_t>64, (self.length - (block << CACHE_BLOCK_BITS) + 511) >> SECTOR_BITS)))
            self.release(slot)
            if code:
                return code
        return 0
