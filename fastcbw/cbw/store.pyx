"""The store of one snapshot: RAM slots and the disk log.

RAM tier. Slots of one cluster in one anonymous mapping. Free slots are taken last in, first out, because the one that
was freed last is still in the processor's caches and certainly populated; memory that was never used is populated 64 KiB
at a time, which costs less than a page fault for each 4 KiB, and never in huge pages (a cold one takes milliseconds).
A slot's generation goes up at every allocation and is part of the location word: a reader copies, then looks the word up
again, and a slot that came back with other data can't be mistaken.

Disk tier. A log that is only appended to, in segments of a header and up to 255 clusters. A position is never used
twice; a segment whose last cluster was dropped is given back to the file system by a discard. The descriptors (cluster,
snapshot, CRC-32C) are kept in memory in the layout that the segment's header has on disk; writing the headers comes with
recovery, since a log that nobody reads after a crash needs none.

Both limits are hard: slots_take and log_take give less than was asked, and never wait.
"""

from libc.errno cimport EIO
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from cpython.ref cimport PyObject

from fastcbw.bitmaps.mapping cimport map_pages, populate_pages, unmap_pages
from fastcbw.block.device cimport BlockDevice
from fastcbw.cbw.locmap cimport GENERATION_MASK, WORD_DISK, WORD_RAM, word_position, word_slot, word_tag
from fastcbw.kernels.atomic cimport fence_release, load32_relaxed, store32_relaxed, sub32_seq
from fastcbw.kernels.bytes cimport crc32c
from fastcbw.sync cimport pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock

cdef extern from "check.h" nogil:
    void check "fcbw_check"(bint condition, const char *rule) noexcept

cdef int64_t POPULATE_BYTES = 64 << 10
cdef int64_t LOG_TURNOVER = 64          # a log may be written through this many times its limit


cdef Store *store_new(int index, int64_t cluster_bytes, int64_t ram_bytes, PyObject *log, int64_t log_bytes) noexcept nogil:
    """A store with room for RAM_BYTES / cluster slots and a log of at most LOG_BYTES on disk; NULL without memory."""
    cdef Store *store = <Store *>calloc(1, sizeof(Store))
    cdef bint ok = True
    if store == NULL:
        return NULL
    if pthread_mutex_init(&store.lock, NULL) != 0:
        free(store)
        return NULL
    store.index = index
    store.cluster_bytes = cluster_bytes
    store.free_head = SLOT_NONE
    store.slots_limit = ram_bytes // cluster_bytes
    if store.slots_limit:
        store.pages = <char *>map_pages(store.slots_limit * cluster_bytes)
        store.slots = <Slot *>map_pages(store.slots_limit * <int64_t>sizeof(Slot))
        ok = store.pages != NULL and store.slots != NULL
    if log != NULL:
        store.log = log
        store.segment_clusters = (log_bytes - SEGMENT_HEADER) // cluster_bytes
        if store.segment_clusters > SEGMENT_CLUSTERS_MAX:
            store.segment_clusters = SEGMENT_CLUSTERS_MAX
        # Segments of about 1 MiB, whatever the cluster, so that space comes back in useful pieces.
        while store.segment_clusters > 1 and store.segment_clusters * cluster_bytes >= (2 << 20):
            store.segment_clusters //= 2
        store.segments_limit = log_bytes // segment_bytes(store)
        store.positions_limit = (<BlockDevice>log).length // segment_bytes(store)
        if store.positions_limit > store.segments_limit * LOG_TURNOVER:
            store.positions_limit = store.segments_limit * LOG_TURNOVER
        store.live = <uint32_t *>map_pages(store.positions_limit * 4)
        store.positions_limit *= store.segment_clusters
        store.descriptors = <Descriptor *>map_pages(store.positions_limit * <int64_t>sizeof(Descriptor))
        ok = ok and store.live != NULL and store.descriptors != NULL
    if not ok:
        store_free(store)
        return NULL
    return store


cdef void store_free(Store *store) noexcept nogil:
    """Nobody may look into the store any more."""
    if store.pages != NULL:
        unmap_pages(store.pages, store.slots_limit * store.cluster_bytes)
    if store.slots != NULL:
        unmap_pages(store.slots, store.slots_limit * <int64_t>sizeof(Slot))
    if store.live != NULL:
        unmap_pages(store.live, store.positions_limit // store.segment_clusters * 4)
    if store.descriptors != NULL:
        unmap_pages(store.descriptors, store.positions_limit * <int64_t>sizeof(Descriptor))
    pthread_mutex_destroy(&store.lock)
    free(store)


# -- RAM tier

cdef int64_t slots_take(Store *store, uint32_t *slots, int64_t count) noexcept nogil:
    cdef int64_t i, taken = 0, fresh_end, grow = 0, grow_at = 0
    cdef uint32_t slot
    if store.slots_limit == 0:
        return 0
    pthread_mutex_lock(&store.lock)
    while taken < count and store.free_head != SLOT_NONE:
        slots[taken] = store.free_head
        store.free_head = store.slots[store.free_head].next
        taken += 1
    fresh_end = store.slots_fresh + (count - taken)
    if fresh_end > store.slots_limit:
        fresh_end = store.slots_limit
    while store.slots_fresh < fresh_end:
        slots[taken] = <uint32_t>store.slots_fresh
        store.slots_fresh += 1
        taken += 1
    store.slots_used += taken
    if store.slots_used > store.slots_used_max:
        store.slots_used_max = store.slots_used
    if fresh_end * store.cluster_bytes > store.populated:
        grow_at = store.populated
        grow = (fresh_end * store.cluster_bytes - grow_at + POPULATE_BYTES - 1) // POPULATE_BYTES * POPULATE_BYTES
        if grow > store.slots_limit * store.cluster_bytes - grow_at:
            grow = store.slots_limit * store.cluster_bytes - grow_at
        store.populated = grow_at + grow
    pthread_mutex_unlock(&store.lock)
    if grow:
        populate_pages(store.pages + grow_at, grow)
    for i in range(taken):
        slot = slots[i]
        check(load32_relaxed(&store.slots[slot].refs) == 0, "a free slot has no references")
        # Relaxed is enough: the generation reaches others inside a location word, published with release.
        store32_relaxed(&store.slots[slot].generation, (store.slots[slot].generation + 1) & GENERATION_MASK)
        store32_relaxed(&store.slots[slot].refs, 1)
    # A reader that copies from a reused slot must see that its word has changed: the word was cleared before the slot came
    # back here, and this fence keeps the new data behind that.
    fence_release()
    return taken


cdef void slot_unref(Store *store, int64_t slot) noexcept nogil:
    cdef uint32_t before = sub32_seq(&store.slots[slot].refs, 1)
    check(before > 0, "a slot is freed once")
    if before != 1:
        return
    pthread_mutex_lock(&store.lock)
    store.slots[slot].next = store.free_head
    store.free_head = <uint32_t>slot
    store.slots_used -= 1
    pthread_mutex_unlock(&store.lock)


# -- disk tier

cdef inline int64_t segment_bytes(const Store *store) noexcept nogil:
    return SEGMENT_HEADER + store.segment_clusters * store.cluster_bytes


cdef int64_t log_offset(const Store *store, int64_t position) noexcept nogil:
    return (position // store.segment_clusters * segment_bytes(store) + SEGMENT_HEADER
            + position % store.segment_clusters * store.cluster_bytes)


cdef int64_t log_take(Store *store, int64_t count, int64_t *first) noexcept nogil:
    cdef int64_t left
    first[0] = -1
    if store.log == NULL:
        return 0
    pthread_mutex_lock(&store.lock)
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
    store.live[first[0] // store.segment_clusters] += <uint32_t>count
    pthread_mutex_unlock(&store.lock)
    return count


cdef void log_give_back(Store *store, int64_t position) noexcept nogil:
    cdef int64_t segment = position // store.segment_clusters
    cdef bint empty
    pthread_mutex_lock(&store.lock)
    check(store.live[segment] > 0, "a log record is freed once")
    store.live[segment] -= 1
    store.log_used -= 1
    # The segment that is being appended to stays, even when nothing in it is live just now.
    empty = store.live[segment] == 0 and store.head >= (segment + 1) * store.segment_clusters
    pthread_mutex_unlock(&store.lock)
    if empty:
        # Give the space back first, then count it as free: the limit is on what the disk holds.
        (<BlockDevice>store.log).discard_at(segment * segment_bytes(store), segment_bytes(store), 0)
        pthread_mutex_lock(&store.lock)
        store.segments_used -= 1
        pthread_mutex_unlock(&store.lock)


cdef int log_write(Store *store, int64_t position, const void *data, int64_t count, int64_t cluster, uint64_t snapshot) noexcept nogil:
    cdef int64_t i
    for i in range(count):
        store.descriptors[position + i].cluster = <uint64_t>(cluster + i)
        store.descriptors[position + i].snapshot = <uint32_t>snapshot
        store.descriptors[position + i].crc = crc32c(0, <const char *>data + i * store.cluster_bytes, store.cluster_bytes)
    return (<BlockDevice>store.log).pwrite(data, log_offset(store, position), count * store.cluster_bytes, 0)


cdef int log_read(Store *store, int64_t position, void *data) noexcept nogil:
    cdef uint32_t crc = store.descriptors[position].crc
    cdef int code = (<BlockDevice>store.log).pread(data, log_offset(store, position), store.cluster_bytes)
    if code == 0 and crc32c(0, data, store.cluster_bytes) != crc:
        return -EIO
    return code


cdef void store_drop(Store *store, uint64_t word) noexcept nogil:
    if word_tag(word) == WORD_RAM:
        slot_unref(store, word_slot(word))
    elif word_tag(word) == WORD_DISK:
        log_give_back(store, word_position(word))
