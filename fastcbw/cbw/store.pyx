"""The store of one snapshot: RAM slots and the disk log.

RAM tier. Slots of one cluster in one anonymous mapping. Free slots are taken last in, first out, because the one that
was freed last is still in the processor's caches and certainly populated; memory that was never used is populated 64 KiB
at a time, which costs less than a page fault for each 4 KiB, or ahead of the guest by a thread (cbw/warm).
A slot's generation goes up at every allocation and is part of the location word: a reader copies, then looks the word up
again, and a slot that came back with other data can't be mistaken. Used slots are in a list by age, so that the flusher
finds the oldest. The limit is one of number, not of place: it may change at any time within the address space that was
reserved, which is the machine's memory. Above a limit that shrank, a slot that is freed gives its memory back.

Disk tier. A log that is only appended to, in segments of a header and up to 255 clusters. A position that a location word
has named is never used again; a segment whose last cluster was dropped is given back to the file system by a discard. The descriptors (cluster,
snapshot, CRC-32C) are kept in memory in the layout that the segment's header has on disk; writing the headers comes with
recovery, since a log that nobody reads after a crash needs none.

In place. Where the disk tier is to be a backup's target there is no log: each cluster's data lies at its own offset in it, position and
number are the same, nothing is ever given back to the file system, and room there always is. What is written there a second time, by a
copier that reads this snapshot for that very target, is the same data.

Both limits are hard: slots_take and log_take give less than was asked, and never wait. Who frees room wakes those that wait
for it (cbw/room); what comes into the list above the RAM tier's high-water mark wakes the flusher.
"""

from libc.errno cimport EIO
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from cpython.ref cimport PyObject

from fastcbw.bitmaps.mapping cimport forget_pages, map_pages, memory_bytes, populate_pages, unmap_pages
from fastcbw.block.device cimport BlockDevice
from fastcbw.block.sys cimport iovec
from fastcbw.cbw.locmap cimport GENERATION_MASK, SLOTS_MAX, WORD_DISK, WORD_RAM, word_position, word_slot, word_tag
from fastcbw.cbw.rate cimport rate_note, rate_now
from fastcbw.cbw.room cimport Room, room_changed, room_want_flush
from fastcbw.kernels.atomic cimport fence_release, load32_relaxed, load_relaxed, load_seq, store32_relaxed, store_relaxed, sub32_seq
from fastcbw.kernels.bytes cimport crc32c
from fastcbw.cbw.warm cimport warm_ask, warm_stop, warm_wanted
from fastcbw.sync cimport (cond_init, pthread_cond_destroy, pthread_cond_wait, pthread_mutex_destroy, pthread_mutex_init,
                           pthread_mutex_lock, pthread_mutex_unlock)

cdef extern from "check.h" nogil:
    void check "fcbw_check"(bint condition, const char *rule) noexcept

cdef int64_t POPULATE_BYTES = 64 << 10
cdef int FORGET_SLOTS = 64
cdef int64_t LOG_TURNOVER = 64          # a log may be written through this many times its limit


cdef Store *store_new(int index, int64_t cluster_bytes, int64_t ram_bytes, PyObject *log, int64_t log_bytes, int64_t in_place_bytes,
                      Room *room) noexcept nogil:
    """A store with room for RAM_BYTES / cluster slots and a log of at most LOG_BYTES on disk, or the whole disk in place; NULL without memory."""
    cdef Store *store = <Store *>calloc(1, sizeof(Store))
    cdef bint ok = True
    if store == NULL:
        return NULL
    if pthread_mutex_init(&store.lock, NULL) != 0:
        free(store)
        return NULL
    cond_init(&store.warm_wanted)
    cond_init(&store.warmed)
    store.index = index
    store.cluster_bytes = cluster_bytes
    store.room = room
    store.free_head = store.cold_head = store.oldest = store.youngest = SLOT_NONE
    store.slots_limit = ram_bytes // cluster_bytes
    ok = reserve(store)
    if log != NULL:
        store.log = log
        if in_place_bytes:
            store.in_place = True
            store.disk_bytes = in_place_bytes
            store.segment_clusters = (in_place_bytes + cluster_bytes - 1) // cluster_bytes      # all of it is one segment, never given back
            store.segments_limit = store.positions_limit = 1
        else:
            log_layout(store, log_bytes)
        store.live = <uint32_t *>map_pages(store.positions_limit * 4)
        store.positions_limit *= store.segment_clusters
        store.descriptors = <Descriptor *>map_pages(store.positions_limit * <int64_t>sizeof(Descriptor))
        ok = ok and store.live != NULL and store.descriptors != NULL
    if not ok:
        store_free(store)
        return NULL
    return store


cdef void log_layout(Store *store, int64_t log_bytes) noexcept nogil:
    """Segments, and how many of them; positions_limit counts segments here."""
    store.segment_clusters = (log_bytes - SEGMENT_HEADER) // store.cluster_bytes
    if store.segment_clusters > SEGMENT_CLUSTERS_MAX:
        store.segment_clusters = SEGMENT_CLUSTERS_MAX
    # Segments of about 1 MiB, whatever the cluster, so that space comes back in useful pieces.
    while store.segment_clusters > 1 and store.segment_clusters * store.cluster_bytes >= (2 << 20):
        store.segment_clusters //= 2
    store.segments_limit = log_bytes // segment_bytes(store)
    store.positions_limit = (<BlockDevice>store.log).length // segment_bytes(store)
    if store.positions_limit > store.segments_limit * LOG_TURNOVER:
        store.positions_limit = store.segments_limit * LOG_TURNOVER


cdef bint reserve(Store *store) noexcept nogil:
    """Address space for as many slots as the machine has memory for, so that the limit can grow; at least for the limit."""
    cdef int64_t want = memory_bytes() // store.cluster_bytes
    if want > SLOTS_MAX:
        want = SLOTS_MAX
    if want < store.slots_limit:
        want = store.slots_limit
    while want:
        store.pages = <char *>map_pages(want * store.cluster_bytes)
        store.slots = <Slot *>map_pages(want * <int64_t>sizeof(Slot))
        store.slots_reserved = want
        if store.pages != NULL and store.slots != NULL:
            return True
        unreserve(store)
        if want == store.slots_limit:
            return False
        want = store.slots_limit        # the system commits address space (or a limit of ours): no growth then
    return True


cdef void unreserve(Store *store) noexcept nogil:
    if store.pages != NULL:
        unmap_pages(store.pages, store.slots_reserved * store.cluster_bytes)
    if store.slots != NULL:
        unmap_pages(store.slots, store.slots_reserved * <int64_t>sizeof(Slot))
    store.pages = NULL
    store.slots = NULL
    store.slots_reserved = 0


cdef void store_free(Store *store) noexcept nogil:
    """Nobody may look into the store any more."""
    warm_stop(store)
    unreserve(store)
    if store.live != NULL:
        unmap_pages(store.live, store.positions_limit // store.segment_clusters * 4)
    if store.descriptors != NULL:
        unmap_pages(store.descriptors, store.positions_limit * <int64_t>sizeof(Descriptor))
    pthread_cond_destroy(&store.warm_wanted)
    pthread_cond_destroy(&store.warmed)
    pthread_mutex_destroy(&store.lock)
    free(store)


# -- RAM tier

cdef int64_t slots_reserve(const Store *store) noexcept nogil:
    return (<int64_t>load_relaxed(<const uint64_t *>&store.slots_limit) + 7) // 8


cdef int64_t slots_take(Store *store, uint32_t *slots, int64_t count) noexcept nogil:
    return take(store, slots, count, 0)


cdef int64_t slots_take_spare(Store *store, uint32_t *slots, int64_t count) noexcept nogil:
    return take(store, slots, count, slots_reserve(store))


cdef int64_t take(Store *store, uint32_t *slots, int64_t count, int64_t leave_free) noexcept nogil:
    cdef int64_t i, taken = 0, fresh_end, grow = 0, grow_at = 0
    cdef uint32_t slot
    cdef bint ask
    pthread_mutex_lock(&store.lock)
    # All that is left is being populated: a moment, as a page fault would be. Near the limit nothing is populated ahead, so rare.
    while store.warming and store.slots_limit - store.slots_used - store.warming < count:
        pthread_cond_wait(&store.warmed, &store.lock)
    if count > store.slots_limit - store.slots_used - leave_free:
        count = max(store.slots_limit - store.slots_used - leave_free, 0)
    while taken < count and store.free_head != SLOT_NONE:
        slots[taken] = store.free_head
        store.free_head = store.slots[store.free_head].next
        taken += 1
    while taken < count and store.cold_head != SLOT_NONE:
        slots[taken] = store.cold_head
        store.cold_head = store.slots[store.cold_head].next
        taken += 1
    # Nothing is free among those before: the limit of number is one of place here.
    fresh_end = store.slots_fresh
    while taken < count:
        slots[taken] = <uint32_t>fresh_end
        fresh_end += 1
        taken += 1
    store.slots_fresh = fresh_end
    if taken > 0:
        store_relaxed(<uint64_t *>&store.slots_used, <uint64_t>(store.slots_used + taken))
        rate_note(&store.filling, taken)
    if store.slots_used > store.slots_used_max:
        store.slots_used_max = store.slots_used
    if fresh_end * store.cluster_bytes > store.populated:
        grow_at = store.populated
        grow = (fresh_end * store.cluster_bytes - grow_at + POPULATE_BYTES - 1) // POPULATE_BYTES * POPULATE_BYTES
        if grow > store.slots_limit * store.cluster_bytes - grow_at:
            grow = store.slots_limit * store.cluster_bytes - grow_at
        store.populated = grow_at + grow
    ask = warm_wanted(store)
    pthread_mutex_unlock(&store.lock)
    if ask:
        warm_ask(store)
    if grow:
        populate_pages(store.pages + grow_at, grow)
    for i in range(taken):
        slot = slots[i]
        check(load32_relaxed(&store.slots[slot].refs) == 0, "a free slot has no references")
        # Relaxed is enough: the generation reaches others inside a location word, published with release.
        store32_relaxed(&store.slots[slot].generation, (store.slots[slot].generation + 1) & GENERATION_MASK)
        store32_relaxed(&store.slots[slot].refs, 1)
        store.slots[slot].older = SLOT_OFF
    # A reader that copies from a reused slot must see that its word has changed: the word was cleared before the slot came
    # back here, and this fence keeps the new data behind that.
    fence_release()
    return taken


cdef void slot_unref(Store *store, int64_t slot) noexcept nogil:
    cdef uint32_t before = sub32_seq(&store.slots[slot].refs, 1)
    cdef bint cold = False
    check(before > 0, "a slot is freed once")
    if before != 1:
        return
    if slots_free(store) < 0:       # a limit that shrank; a racing change of it costs a page more or less
        forget_pages(slot_data(store, slot), store.cluster_bytes)
        cold = True
    pthread_mutex_lock(&store.lock)
    if store.slots[slot].older != SLOT_OFF:
        unlist(store, <uint32_t>slot)
    if cold:
        store.slots[slot].next = store.cold_head
        store.cold_head = <uint32_t>slot
    else:
        store.slots[slot].next = store.free_head
        store.free_head = <uint32_t>slot
    store_relaxed(<uint64_t *>&store.slots_used, <uint64_t>(store.slots_used - 1))
    rate_note(&store.filling, -1)
    pthread_mutex_unlock(&store.lock)
    room_changed(store.room)


cdef inline void enlist(Store *store, uint32_t slot) noexcept nogil:
    store.slots[slot].older = store.youngest
    store.slots[slot].next = SLOT_NONE
    if store.youngest == SLOT_NONE:
        store.oldest = slot
    else:
        store.slots[store.youngest].next = slot
    store.youngest = slot


cdef inline void unlist(Store *store, uint32_t slot) noexcept nogil:
    cdef uint32_t older = store.slots[slot].older
    cdef uint32_t younger = store.slots[slot].next
    if older == SLOT_NONE:
        store.oldest = younger
    else:
        store.slots[older].next = younger
    if younger == SLOT_NONE:
        store.youngest = older
    else:
        store.slots[younger].older = older
    store.slots[slot].older = SLOT_OFF


cdef void slots_enlist(Store *store, const int64_t *slots, const int64_t *clusters, int64_t count, bint ask) noexcept nogil:
    cdef int64_t i
    pthread_mutex_lock(&store.lock)
    for i in range(count):
        store.slots[slots[i]].cluster = <uint64_t>clusters[i]
        enlist(store, <uint32_t>slots[i])
    ask = ask and not store.flush_asked and store.slots_used > high_water(store)
    if ask:
        store.flush_asked = True
    pthread_mutex_unlock(&store.lock)
    if ask:
        room_want_flush(store.room)


cdef int64_t slots_oldest(Store *store, int64_t *slots, int64_t *clusters, uint32_t *generations, int64_t count) noexcept nogil:
    cdef int64_t i, got = 0
    cdef uint32_t slot
    pthread_mutex_lock(&store.lock)
    slot = store.oldest
    while got < count and slot != SLOT_NONE:
        slots[got] = slot
        clusters[got] = <int64_t>store.slots[slot].cluster
        generations[got] = store.slots[slot].generation
        got += 1
        slot = store.slots[slot].next
    for i in range(got):
        unlist(store, <uint32_t>slots[i])
        enlist(store, <uint32_t>slots[i])
    pthread_mutex_unlock(&store.lock)
    return got


cdef void slots_set_limit(Store *store, int64_t limit) noexcept nogil:
    cdef int64_t left
    cdef bint ask = False
    pthread_mutex_lock(&store.lock)
    store_relaxed(<uint64_t *>&store.slots_limit, <uint64_t>limit)
    left = store.slots_fresh - store.slots_used if store.slots_fresh > limit else 0
    if store.populated > store.slots_fresh * store.cluster_bytes:
        forget_pages(store.pages + store.slots_fresh * store.cluster_bytes,
                     store.populated - store.slots_fresh * store.cluster_bytes)
        store.populated = store.slots_fresh * store.cluster_bytes
    if store.log != NULL and not store.flush_asked and store.slots_used > high_water(store):
        store.flush_asked = ask = True
    while left > 0 and store.free_head != SLOT_NONE:
        forget_some(store, FORGET_SLOTS)
        left -= FORGET_SLOTS
        pthread_mutex_unlock(&store.lock)       # a guest's first touch may be waiting
        pthread_mutex_lock(&store.lock)
    pthread_mutex_unlock(&store.lock)
    if ask:
        room_want_flush(store.room)
    room_changed(store.room)


cdef void forget_some(Store *store, int count) noexcept nogil:
    """Give the memory of COUNT free slots back to the system, under the lock, since nobody may take them meanwhile."""
    cdef uint32_t slot
    while count > 0 and store.free_head != SLOT_NONE:
        slot = store.free_head
        store.free_head = store.slots[slot].next
        forget_pages(slot_data(store, slot), store.cluster_bytes)
        store.slots[slot].next = store.cold_head
        store.cold_head = slot
        count -= 1


cdef StoreFill store_fill(Store *store) noexcept nogil:
    cdef StoreFill fill
    pthread_mutex_lock(&store.lock)
    fill.slots_used = store.slots_used
    fill.slots_used_max = store.slots_used_max
    fill.slots_limit = store.slots_limit
    fill.log_used = store.log_used
    fill.log_limit = store.segments_limit * store.segment_clusters
    fill.rate = rate_now(&store.filling)
    pthread_mutex_unlock(&store.lock)
    return fill


cdef int64_t store_room(Store *store, bint with_log) noexcept nogil:
    cdef int64_t room
    pthread_mutex_lock(&store.lock)
    room = store.slots_limit - store.slots_used
    if room < 0:
        room = 0
    if store.in_place and with_log:
        room += store.positions_limit - store.log_used
    elif with_log and store.log != NULL and store.head < store.positions_limit and store.segments_used <= store.segments_limit:
        if store.head % store.segment_clusters:
            room += store.segment_clusters - store.head % store.segment_clusters
        if store.segments_used < store.segments_limit:
            room += (store.segments_limit - store.segments_used) * store.segment_clusters
    pthread_mutex_unlock(&store.lock)
    return room


cdef void store_droppable(Store *store, int64_t count) noexcept nogil:
    pthread_mutex_lock(&store.lock)
    rate_note(&store.filling, -count)
    pthread_mutex_unlock(&store.lock)


# -- disk tier

cdef int64_t log_offset(const Store *store, int64_t position) noexcept nogil:
    if store.in_place:
        return position * store.cluster_bytes
    return (position // store.segment_clusters * segment_bytes(store) + SEGMENT_HEADER
            + position % store.segment_clusters * store.cluster_bytes)


cdef int64_t log_length(const Store *store, int64_t position, int64_t count) noexcept nogil:
    """Bytes of COUNT clusters on the device: in place the last one ends where the disk does."""
    cdef int64_t length = count * store.cluster_bytes
    if store.in_place and length > store.disk_bytes - position * store.cluster_bytes:
        length = store.disk_bytes - position * store.cluster_bytes
    return length


cdef int64_t log_take(Store *store, int64_t count, int64_t *first) noexcept nogil:
    cdef int64_t left
    first[0] = -1
    if store.log == NULL:
        return 0
    pthread_mutex_lock(&store.lock)
    if store.in_place:          # there is always room: each cluster has its own place
        store.log_used += count
        rate_note(&store.filling, count)
        pthread_mutex_unlock(&store.lock)
        return count
    if store.segments_used > store.segments_limit:      # a limit that shrank
        pthread_mutex_unlock(&store.lock)
        return 0
    left = store.segment_clusters - store.head % store.segment_clusters
    if left == store.segment_clusters:          # a new segment begins
        if store.segments_used >= store.segments_limit or store.head >= store.positions_limit:
            pthread_mutex_unlock(&store.lock)
            return 0
        store.segments_used += 1
    if count > left:
        count = left
    first[0] = store.head
    store.head += count
    store.log_used += count
    rate_note(&store.filling, count)
    store.live[first[0] // store.segment_clusters] += <uint32_t>count
    pthread_mutex_unlock(&store.lock)
    return count


cdef void log_give_back(Store *store, int64_t position) noexcept nogil:
    cdef int64_t segment = position // store.segment_clusters
    cdef bint empty
    pthread_mutex_lock(&store.lock)
    check(store.log_used > 0 and (store.in_place or store.live[segment] > 0), "a log record is freed once")
    store.log_used -= 1
    rate_note(&store.filling, -1)
    if store.in_place:          # what is there stays: it is the backup's
        pthread_mutex_unlock(&store.lock)
        return
    store.live[segment] -= 1
    # The segment that is being appended to stays, even when nothing in it is live just now.
    empty = store.live[segment] == 0 and store.head >= (segment + 1) * store.segment_clusters
    pthread_mutex_unlock(&store.lock)
    if empty:
        # Give the space back first, then count it as free: the limit is on what the disk holds.
        (<BlockDevice>store.log).discard_at(segment * segment_bytes(store), segment_bytes(store), 0)
        pthread_mutex_lock(&store.lock)
        store.segments_used -= 1
        pthread_mutex_unlock(&store.lock)
        log_came_free(store)


cdef int64_t log_dead(Store *store) noexcept nogil:
    cdef int64_t dead = 0
    if store.log == NULL or store.in_place:         # each cluster has its place there
        return 0
    pthread_mutex_lock(&store.lock)
    dead = store.segments_used * store.segment_clusters - store.log_used
    if store.head % store.segment_clusters:
        dead -= store.segment_clusters - store.head % store.segment_clusters
    pthread_mutex_unlock(&store.lock)
    return dead


cdef void log_came_free(Store *store) noexcept nogil:
    cdef bint ask
    pthread_mutex_lock(&store.lock)
    ask = store.flush_asked
    pthread_mutex_unlock(&store.lock)
    if ask:
        room_want_flush(store.room)
    room_changed(store.room)


cdef void log_untake(Store *store, int64_t position) noexcept nogil:
    cdef bint last
    pthread_mutex_lock(&store.lock)
    last = not store.in_place and position == store.head - 1
    if last:
        store.head = position
        store.live[position // store.segment_clusters] -= 1
        store.log_used -= 1
        rate_note(&store.filling, -1)
        if position % store.segment_clusters == 0:
            store.segments_used -= 1        # begun for it
    pthread_mutex_unlock(&store.lock)
    if not last:
        log_give_back(store, position)


cdef void log_set_limit(Store *store, int64_t segments) noexcept nogil:
    pthread_mutex_lock(&store.lock)
    store.segments_limit = segments
    pthread_mutex_unlock(&store.lock)
    log_came_free(store)


cdef int log_write(Store *store, int64_t position, const void *data, int64_t count, int64_t cluster, uint64_t snapshot) noexcept nogil:
    cdef int64_t i
    for i in range(count):
        store.descriptors[position + i].cluster = <uint64_t>(cluster + i)
        store.descriptors[position + i].snapshot = <uint32_t>snapshot
        store.descriptors[position + i].crc = crc32c(0, <const char *>data + i * store.cluster_bytes, store.cluster_bytes)
    return (<BlockDevice>store.log).pwrite(data, log_offset(store, position), log_length(store, position, count), 0)


cdef int log_write_slots(Store *store, int64_t position, const int64_t *slots, const int64_t *clusters, const uint64_t *snapshots,
                         int64_t count) noexcept nogil:
    cdef int64_t begin, i = 0
    cdef int code
    if not store.in_place:
        return write_slots(store, position, slots, clusters, snapshots, count)
    while i < count:            # each run of neighbours to its own place
        begin = i
        i += 1
        while i < count and clusters[i] == clusters[i - 1] + 1:
            i += 1
        code = write_slots(store, clusters[begin], slots + begin, clusters + begin, snapshots + begin, i - begin)
        if code:
            return code
    return 0


cdef int write_slots(Store *store, int64_t position, const int64_t *slots, const int64_t *clusters, const uint64_t *snapshots,
                     int64_t count) noexcept nogil:
    cdef iovec vector[SEGMENT_CLUSTERS_MAX]
    cdef Descriptor *descriptor
    cdef int64_t i, bytes
    cdef int64_t left = log_length(store, position, count)
    cdef int64_t length = left
    cdef int vectors = 0
    for i in range(count):
        descriptor = &store.descriptors[position + i]
        descriptor.cluster = <uint64_t>clusters[i]
        descriptor.snapshot = <uint32_t>snapshots[i]
        descriptor.crc = crc32c(0, slot_data(store, slots[i]), store.cluster_bytes)
        bytes = min(left, store.cluster_bytes)
        left -= bytes
        if vectors and slot_data(store, slots[i]) == <char *>vector[vectors - 1].iov_base + vector[vectors - 1].iov_len:
            vector[vectors - 1].iov_len += <size_t>bytes
        else:
            vector[vectors].iov_base = slot_data(store, slots[i])
            vector[vectors].iov_len = <size_t>bytes
            vectors += 1
    return (<BlockDevice>store.log).pwritev(vector, vectors, log_offset(store, position), length, 0)


cdef int log_read(Store *store, int64_t position, void *data) noexcept nogil:
    cdef uint32_t crc = store.descriptors[position].crc
    cdef int64_t length = log_length(store, position, 1)
    cdef int code = (<BlockDevice>store.log).pread(data, log_offset(store, position), length)
    memset(<char *>data + length, 0, <size_t>(store.cluster_bytes - length))
    if code == 0 and crc32c(0, data, store.cluster_bytes) != crc:
        return -EIO
    return code


cdef void store_drop(Store *store, uint64_t word) noexcept nogil:
    if word_tag(word) == WORD_RAM:
        slot_unref(store, word_slot(word))
    elif word_tag(word) == WORD_DISK:
        log_give_back(store, word_position(word))
