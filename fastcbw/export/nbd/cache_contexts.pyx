"""Meta contexts of a snapshot's cache: what a backup tool can know of it by block status. See docs/copy-order.md.

`x-fastcbw:access`: a bit each for readable, in RAM, in the disk tier, zero, changed by the guest since. `x-fastcbw:order`: the class
of the default copy order, 0 to be copied first. `qemu:allocation-depth`: 1 preserved in a store of the snapshot (or the disk's own data), 2
read from the active disk, 0 not in the snapshot.

Each answer is of the moment of the request, and a hint: a cluster may be preserved, or move, while the reply is under way.
"""

from libc.stdint cimport int64_t, uint32_t

from fastcbw.block.device cimport BlockDevice
from fastcbw.cbw.access cimport ACCESS_DISK, ACCESS_RAM, ACCESS_READABLE, ACCESS_ZERO, access_status
from fastcbw.cbw.heat cimport Heat, heat_feed, heat_init
from fastcbw.cbw.order cimport Classes, class_extent, classes_fill
from fastcbw.cbw.reader cimport SnapshotDevice
from fastcbw.export.nbd.contexts cimport MetaContext
from fastcbw.sync cimport pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock

from fastcbw.cbw.policies import ORDER_DEFAULT


cdef class AccessContext(MetaContext):
    """x-fastcbw:access of SNAPSHOT."""

    cdef SnapshotDevice snapshot

    def __cinit__(self, SnapshotDevice snapshot not None):
        self.name = "x-fastcbw:access"
        self.snapshot = snapshot

    cdef int64_t status(self, int64_t offset, int64_t length, uint32_t *flags) noexcept nogil:
        return access_status(self.snapshot, offset, length, flags)


cdef class OrderContext(MetaContext):
    """x-fastcbw:order of SNAPSHOT: the class of each cluster under POLICY."""

    cdef SnapshotDevice snapshot
    cdef Classes classes
    cdef Heat heat              # under the lock
    cdef pthread_mutex_t lock

    def __cinit__(self, SnapshotDevice snapshot not None, str policy=ORDER_DEFAULT):
        self.name = "x-fastcbw:order"
        self.snapshot = snapshot
        classes_fill(&self.classes, policy)
        heat_init(&self.heat, snapshot.cluster_bits)
        pthread_mutex_init(&self.lock, NULL)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.lock)

    cdef int64_t status(self, int64_t offset, int64_t length, uint32_t *flags) noexcept nogil:
        cdef int bits = self.snapshot.cluster_bits
        cdef Heat heat
        cdef int64_t stop
        pthread_mutex_lock(&self.lock)
        heat_feed(&self.heat, self.snapshot.snap.geometry)
        heat = self.heat
        pthread_mutex_unlock(&self.lock)
        flags[0] = <uint32_t>class_extent(self.snapshot, &self.classes, &heat, offset >> bits, ((offset + length - 1) >> bits) + 1, &stop)
        stop = (stop << bits) - offset
        return stop if stop < length else length


cdef class DepthContext(MetaContext):
    """qemu:allocation-depth of DEVICE."""

    cdef SnapshotDevice snapshot        # None: a disk, which is one layer

    def __cinit__(self, BlockDevice device not None):
        self.name = "qemu:allocation-depth"
        self.snapshot = device if isinstance(device, SnapshotDevice) else None

    cdef int64_t status(self, int64_t offset, int64_t length, uint32_t *flags) noexcept nogil:
        cdef uint32_t access = 0
        flags[0] = 1
        if self.snapshot is None:
            return length
        length = access_status(self.snapshot, offset, length, &access)
        if not access & ACCESS_READABLE:
            flags[0] = 0
        elif not access & (ACCESS_RAM | ACCESS_DISK | ACCESS_ZERO):
            flags[0] = 2
        return length


def contexts_of(BlockDevice device not None):
    """Return the meta contexts that DEVICE has beside base:allocation, by name."""
    contexts = [DepthContext(device)]
    if isinstance(device, SnapshotDevice):
        contexts += [AccessContext(device), OrderContext(device)]
    return {(<MetaContext>context).name: context for context in contexts}
