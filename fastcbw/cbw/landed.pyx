"""What a copier need not copy: old data that guest writes have put into its target, where the snapshot's store lies in place in it.

    copier ─▶ is the cluster's word one of the snapshot's own store in place? ──yes──▶ it is in the target
                                                                            └─no──▶ read, write

A cluster that lands just after it was found missing is written twice, with the same data: who publishes has written what it read before
the guest did, and the copier writes what the reader vouches for. So neither waits for the other, and no order between them matters.
What the kernel copies from file to file it does not vouch for before it is in the target (offload.pyx): no offload in place.
"""

from libc.stdint cimport int64_t, uint64_t

from fastcbw.block.device cimport BlockDevice
from fastcbw.block.switch cimport SwitchDevice
from fastcbw.cbw.locmap cimport WORD_DISK, word_store, word_tag
from fastcbw.cbw.reader cimport SnapshotDevice
from fastcbw.cbw.state cimport ALIVE, Ticket, enter, leave, lookup
from fastcbw.kernels.atomic cimport fence_acquire, load_seq


def landed_for(BlockDevice source, BlockDevice target):
    """Return a Landed for copies from SOURCE to TARGET; None unless SOURCE is a snapshot whose store lies in place in TARGET."""
    cdef Landed landed
    if not isinstance(source, SnapshotDevice) or (<SnapshotDevice>source).in_place is None:
        return None
    if behind_switches((<SnapshotDevice>source).in_place) is not behind_switches(target):
        return None
    landed = Landed.__new__(Landed)
    landed.snapshot = <SnapshotDevice>source
    return landed


cdef BlockDevice behind_switches(BlockDevice device):
    """What is at a place now; changed by the control plane only, which keeps it while a job runs."""
    while type(device) is SwitchDevice:
        device = (<SwitchDevice>device).child
    return device


cdef class Landed:
    """Made by landed_for(); shared by the workers of one copier."""

    def __init__(self):
        raise TypeError("a Landed is made by landed_for()")

    cdef int64_t there(self, int64_t offset, int64_t length) noexcept nogil:
        return self.run(offset, length, True)

    cdef int64_t missing(self, int64_t offset, int64_t length) noexcept nogil:
        return self.run(offset, length, False)

    cdef int64_t run(self, int64_t offset, int64_t length, bint there) noexcept nogil:
        cdef int bits = self.snapshot.cluster_bits
        cdef int64_t cluster = offset >> bits
        cdef int64_t end = ((offset + length - 1) >> bits) + 1
        cdef Ticket ticket = enter(self.snapshot.state)
        cdef uint64_t word
        while cluster < end:
            word = lookup(ticket.epoch, self.snapshot.snap, cluster)
            if (word_tag(word) == WORD_DISK and <int>word_store(word) == self.snapshot.store_index) != there:
                break
            cluster += 1
        leave(ticket)
        fence_acquire()
        if load_seq(&self.snapshot.snap.dead) != ALIVE:      # its store's number may be another's by now: let the reader say so
            return 0 if there else length
        cluster = (cluster << bits) - offset
        return 0 if cluster < 0 else min(cluster, length)
