"""Copies of old data, and the threads that make those that may have to wait.

A guest write must not wait for a snapshot longer than its cbw-timeout, whatever a device does. So the guest's own thread
reads old data only where the device promises not to wait (preadv_nowait); any other copy, and every write to the disk
tier, is made by a thread of the pool, while the guest's thread waits with a deadline. At the deadline the copy is
abandoned: the snapshot is broken, the guest goes on, and the pool's thread gives back claims and room when its device
answers at last.

Taken by the guest's thread beforehand: the claims, and as many slots as there are. Done here: I/O, the zero test, and
taking room in the log for what is not zero and has no slot: zeroes need no room, and all that may touch the disk tier is
here. Publishing is the guest's thread's again, so that an abandoned copy can never publish.
"""

from cpython.ref cimport PyObject
from libc.errno cimport ENOMEM, ENOSPC, ETIMEDOUT
from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from fastcbw.block.device cimport BlockDevice
from fastcbw.block.sys cimport iovec
from fastcbw.cbw.state cimport (WHY_FULL, WHY_SOURCE, WHY_STORE, claim_release, geometry_ref, geometry_unref, snap_ref, snap_unref)
from fastcbw.cbw.store cimport Store, log_came_free, log_place, log_take, log_untake, log_write, slot_data, slot_unref
from fastcbw.kernels.atomic cimport add_seq, load_seq, sub_seq
from fastcbw.kernels.bytes cimport is_zero
from fastcbw.sync cimport (cond_init, cond_wait_until, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_signal,
                           pthread_cond_wait, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
                           pthread_mutex_unlock)


cdef int copy_read(Copy *copy, bint nowait) noexcept nogil:
    cdef iovec vector[ROUND_CLUSTERS]
    cdef int64_t cluster_bytes = copy.snap.store.cluster_bytes
    cdef int64_t offset, length, piece
    cdef int i = 0, begin, vectors, code
    while i < copy.items_count:
        begin = i
        vectors = 0
        offset = copy.items[i].cluster * cluster_bytes
        length = 0
        while i < copy.items_count and copy.items[i].cluster == copy.items[begin].cluster + (i - begin):
            piece = copy.disk_length - copy.items[i].cluster * cluster_bytes
            if piece > cluster_bytes:
                piece = cluster_bytes
            else:       # the disk ends within this cluster: the rest of its old data is zeroes
                memset(copy.items[i].data + piece, 0, <size_t>(cluster_bytes - piece))
            if vectors and copy.items[i].data == <char *>vector[vectors - 1].iov_base + vector[vectors - 1].iov_len:
                vector[vectors - 1].iov_len += <size_t>piece        # slots are neighbours as a rule
            else:
                vector[vectors].iov_base = copy.items[i].data
                vector[vectors].iov_len = <size_t>piece
                vectors += 1
            length += piece
            i += 1
        if nowait:
            code = (<BlockDevice>copy.disk).preadv_nowait(vector, vectors, offset, length)
        else:
            code = (<BlockDevice>copy.disk).preadv(vector, vectors, offset, length)
        if code:
            copy.why = WHY_SOURCE
            copy.error_offset = offset
            return code
    find_zeroes(copy)
    return 0


cdef void find_zeroes(Copy *copy) noexcept nogil:
    cdef int i
    for i in range(copy.items_count):
        copy.items[i].zero = is_zero(copy.items[i].data, copy.snap.store.cluster_bytes)


cdef int copy_write_log(Copy *copy) noexcept nogil:
    """Write what has a position, in runs of neighbours; zeroes are not written."""
    cdef Store *store = copy.snap.store
    cdef int i = 0, begin, code
    cdef CopyItem *item
    while i < copy.items_count:
        begin = i
        item = &copy.items[begin]
        i += 1
        if item.position < 0 or item.zero:
            continue
        while i < copy.items_count and not copy.items[i].zero and copy.items[i].position == item.position + (i - begin) \
                and copy.items[i].cluster == item.cluster + (i - begin) \
                and copy.items[i].data == item.data + (i - begin) * store.cluster_bytes \
                and copy.items[i].position % store.segment_clusters != 0:       # a segment's header lies before it
            i += 1
        code = log_write(store, item.position, item.data, i - begin, item.cluster, copy.snap.id)
        if code:
            copy.why = WHY_STORE
            copy.error_offset = item.cluster * store.cluster_bytes
            return code
    return 0


cdef int take_room(Copy *copy) noexcept nogil:
    """Room for the data that has no slot: slots that zeroes turned out not to need, then the log, neighbours together."""
    cdef Store *store = copy.snap.store
    cdef CopyItem *item
    cdef int i, spare = 0
    cdef int64_t left = 0, got = 0, position = 0
    for i in range(copy.items_count):
        item = &copy.items[i]
        if item.slot >= 0 or item.zero:
            continue
        while spare < copy.items_count and not (copy.items[spare].zero and copy.items[spare].slot >= 0):
            spare += 1
        if spare == copy.items_count:
            left += 1
            continue
        item.slot = copy.items[spare].slot
        copy.items[spare].slot = -1
        memcpy(slot_data(store, item.slot), item.data, <size_t>store.cluster_bytes)
        item.data = slot_data(store, item.slot)
    for i in range(copy.items_count):
        item = &copy.items[i]
        if item.slot >= 0 or item.zero:
            continue
        if got == 0:
            # One that waits for room leaves a failing disk tier to the flusher, which tries again.
            got = 0 if copy.partial and load_seq(&store.log_error) else log_take(store, left, &position)
            if got == 0 and copy.partial:
                copy.left = <int>left
                break
            if got == 0:
                copy.why = WHY_FULL
                copy.error_offset = item.cluster * store.cluster_bytes
                return -ENOSPC
        item.position = log_place(store, position, item.cluster)
        position += 1
        got -= 1
        left -= 1
    return 0


cdef void positions_give_back(Copy *copy) noexcept nogil:
    """May tell the disk tier to drop a segment: never on the guest's own thread. The flusher may have found no room meanwhile."""
    cdef int i
    cdef bint any = False
    for i in range(copy.items_count - 1, -1, -1):
        if copy.items[i].position >= 0:
            log_untake(copy.snap.store, copy.items[i].position)
            copy.items[i].position = -1
            any = True
    if any:
        log_came_free(copy.snap.store)


cdef void copy_give_back(Copy *copy) noexcept nogil:
    cdef int i
    for i in range(copy.items_count):
        if copy.items[i].slot >= 0:
            slot_unref(copy.snap.store, copy.items[i].slot)
    positions_give_back(copy)


cdef void copy_run(Copy *copy) noexcept nogil:
    copy.code = copy_read(copy, False)
    if copy.code == 0:
        copy.code = take_room(copy)
    if copy.code == 0:
        copy.code = copy_write_log(copy)
    if copy.code:
        positions_give_back(copy)


cdef void copy_free(Copy *copy) noexcept nogil:
    pthread_cond_destroy(&copy.finished)
    free(copy.bounce)
    free(copy)


cdef int give_bounce(Copy *copy) noexcept nogil:
    """Memory for the items without a slot, one piece after the other so that runs can be written at once."""
    cdef int64_t cluster_bytes = copy.snap.store.cluster_bytes
    cdef int64_t need = 0
    cdef int i
    for i in range(copy.items_count):
        if copy.items[i].slot < 0:
            need += cluster_bytes
    copy.bounce = NULL
    if need == 0:
        return 0
    copy.bounce = <char *>malloc(<size_t>need)
    if copy.bounce == NULL:
        return -ENOMEM
    need = 0
    for i in range(copy.items_count):
        if copy.items[i].slot < 0:
            copy.items[i].data = copy.bounce + need
            need += cluster_bytes
    return 0


cdef int copy_in_pool(PyObject *pool, Copy *copy, int64_t deadline_ns) noexcept nogil:
    cdef Copy *task = <Copy *>malloc(sizeof(Copy))
    cdef int code = 0
    copy.why = WHY_STORE
    copy.error_offset = copy.first * copy.snap.store.cluster_bytes
    if task == NULL:
        return -ENOMEM
    memcpy(task, copy, sizeof(Copy))
    if give_bounce(task) != 0 or cond_init(&task.finished) != 0:
        free(task.bounce)
        free(task)
        return -ENOMEM
    task.done = task.abandoned = False
    task.next = NULL
    keep_references(task)
    (<CopyPool>pool).submit(task)
    code = (<CopyPool>pool).await_done(task, deadline_ns)
    if code == 0:
        code = task.code
        memcpy(copy.items, task.items, sizeof(task.items))
        copy.left = task.left
        copy.why = task.why
        copy.error_offset = task.error_offset
        drop_references(task)
        copy_free(task)
    return code


cdef void keep_references(Copy *task) noexcept nogil:
    snap_ref(task.snap)
    geometry_ref(task.geometry)
    add_seq(&task.snap.store.pins, 1)


cdef void drop_references(Copy *task) noexcept nogil:
    sub_seq(&task.snap.store.pins, 1)
    geometry_unref(task.geometry)
    snap_unref(task.snap)


cdef class CopyPool:
    """Threads for copies that may wait. Each calls run(); stop() ends them when their present copy ends."""

    def __cinit__(self, owner):
        self.owner = owner
        pthread_mutex_init(&self.lock, NULL)
        cond_init(&self.wanted)

    def __dealloc__(self):
        pthread_cond_destroy(&self.wanted)
        pthread_mutex_destroy(&self.lock)

    cdef void submit(self, Copy *task) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        if self.tail == NULL:
            self.head = task
        else:
            self.tail.next = task
        self.tail = task
        pthread_cond_signal(&self.wanted)
        pthread_mutex_unlock(&self.lock)

    cdef int await_done(self, Copy *task, int64_t deadline_ns) noexcept nogil:
        cdef int code = 0
        pthread_mutex_lock(&self.lock)
        while not task.done and code != ETIMEDOUT:
            code = cond_wait_until(&task.finished, &self.lock, deadline_ns)
        code = 0
        if not task.done:
            task.abandoned = True
            self.left_behind += 1
            code = -ETIMEDOUT
        pthread_mutex_unlock(&self.lock)
        return code

    cdef Copy *take(self) noexcept nogil:
        """The next copy, or NULL when the pool stops and nothing is queued. Waits."""
        cdef Copy *task
        pthread_mutex_lock(&self.lock)
        while self.head == NULL and not self.stopping:
            pthread_cond_wait(&self.wanted, &self.lock)
        task = self.head
        if task != NULL:
            self.head = task.next
            if self.head == NULL:
                self.tail = NULL
            # One that was abandoned before it began is not begun: its device has enough to do.
            task.wanted = not task.abandoned
        pthread_mutex_unlock(&self.lock)
        return task

    cdef void finish(self, Copy *task) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        task.done = True
        if not task.abandoned:
            pthread_cond_signal(&task.finished)     # the waiter frees it
            pthread_mutex_unlock(&self.lock)
            return
        pthread_mutex_unlock(&self.lock)
        # Nobody else knows it any more: room first, then the claims, so that who gets the claim finds the room.
        copy_give_back(task)
        claim_release(task.geometry, task.got, task.first, task.count)
        drop_references(task)
        copy_free(task)
        pthread_mutex_lock(&self.lock)
        self.left_behind -= 1
        pthread_mutex_unlock(&self.lock)

    def run(self):
        """Make copies until stop(); for a thread of its own. Never holds the interpreter lock."""
        cdef Copy *task
        with nogil:
            while True:
                task = self.take()
                if task == NULL:
                    break
                if task.wanted:
                    copy_run(task)
                self.finish(task)

    @property
    def abandoned(self):
        """Copies whose guest write went on without them, not yet ended."""
        cdef int count
        pthread_mutex_lock(&self.lock)
        count = self.left_behind
        pthread_mutex_unlock(&self.lock)
        return count

    def stop(self):
        """Let every thread end once its present copy has ended. Returns at once."""
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.stopping = True
            pthread_cond_broadcast(&self.wanted)
            pthread_mutex_unlock(&self.lock)
