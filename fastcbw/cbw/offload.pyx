"""What the kernel does for a copier whose ends are regular files in the page cache.

Copying. copy_file_range moves a range from file to file without a buffer of ours: on tmpfs faster than pread and
pwrite. The kernel reads the live disk, so that
what it copied is the point in time only where the reader's rule says so: looked up again afterwards, still in no store. Old
data is published before a guest write starts, so a write that may have been seen, wholly or in part, shows itself:

    in no store? ──no──▶ read through the snapshot, write
        │ yes
    copy_file_range ─ fence ─ in no store still? ──no──▶ those clusters again, read through the snapshot
        │ yes                                            (what the target has there is wrong: zeroes are written, too)
    dead? outside `copy`? ──▶ the error of a reader

Nothing looks at the content, so only holes of the disk stay holes in the target.

Writing back. A target on a device fills the page cache with dirty data at the speed of memory; the guest's own writes and flushes
then wait behind all of it. So what makes a range of RANGE_PART of the limit, or is not continued, is sent to the device, no more than a few MiB
are under way there, and what has arrived is dropped from the cache, which the backup will not need again. Ranges of 1 MiB, not pieces:
each is one request to the device, and a request costs as much time as 100 KiB of copying.
"""

from libc.errno cimport EINVAL, ENOSYS, ESPIPE
from libc.stdint cimport int64_t, uint64_t

import os
import stat

from fastcbw.block.device cimport BlockDevice
from fastcbw.block.file cimport FileDevice
from fastcbw.cbw.locmap cimport WORD_NONE
from fastcbw.cbw.reader cimport SnapshotDevice
from fastcbw.cbw.state cimport Ticket, enter, leave, lookup
from fastcbw.kernels.atomic cimport add_relaxed, fence_acquire, load_seq, store_seq

cdef int RANGE_PART = 4          # of the limit: a range that is this part of it is sent

cdef extern from "pushio.h" nogil:
    int fcbw_copy_range(int source, int target, int64_t offset, int64_t length, int64_t *done) noexcept
    bint fcbw_copy_is_lacking(int code) noexcept
    bint fcbw_appends(int fd) noexcept
    int fcbw_write_back(int fd, int64_t offset, int64_t length) noexcept
    int fcbw_write_back_end(int fd, int64_t offset, int64_t length) noexcept


cdef FileDevice plain_file(BlockDevice device):
    """DEVICE when it is a regular file through the page cache and nothing else, not a subclass or a filter; else None."""
    if type(device) is not FileDevice or not stat.S_ISREG(os.fstat((<FileDevice>device).fd).st_mode):
        return None
    return None if fcbw_appends((<FileDevice>device).fd) else <FileDevice>device


def offload_for(BlockDevice source, BlockDevice target, BlockDevice gate=None):
    """Return an Offload for a copy from SOURCE to TARGET, or None: a snapshot of one file into another, both in memory.

    In memory is where it was measured to be faster; on a disk both ways wait for the device alike. With copy-on-read the data is
    to pass through the snapshot's RAM, which the kernel's copy does not.
    """
    cdef Offload offload
    cdef FileDevice file = plain_file(target)
    if file is None or not isinstance(source, SnapshotDevice) or (<SnapshotDevice>source).snap.copy_on_read:
        return None
    disk = plain_file((<SnapshotDevice>source).state.child)
    if disk is None or not (file.in_memory and (<FileDevice>disk).in_memory):
        return None
    offload = Offload.__new__(Offload)
    offload.snapshot = <SnapshotDevice>source
    offload.disk = disk
    offload.target = file
    offload.gate = gate
    return offload


cdef class Offload:
    """Made by offload_for(); shared by the workers of one copier."""

    def __init__(self):
        raise TypeError("an Offload is made by offload_for()")

    cdef int64_t nowhere(self, int64_t offset, int64_t length) noexcept nogil:
        return self.snapshot.nowhere(offset, length)

    cdef int verdict(self, int64_t offset, int64_t length) noexcept nogil:
        return self.snapshot.verdict(offset, length)

    cdef int64_t held(self, int64_t offset, int64_t length) noexcept nogil:
        cdef int bits = self.snapshot.cluster_bits
        cdef int64_t cluster = offset >> bits
        cdef int64_t end = ((offset + length - 1) >> bits) + 1
        cdef Ticket ticket = enter(self.snapshot.state)
        while cluster < end and lookup(ticket.epoch, self.snapshot.snap, cluster) != WORD_NONE:
            cluster += 1
        leave(ticket)
        cluster = (cluster << bits) - offset
        return 0 if cluster < 0 else min(cluster, length)

    cdef int copy(self, int64_t offset, int64_t length) noexcept nogil:
        cdef int64_t done = 0
        cdef char byte
        cdef int code
        if self.gate is not None:
            code = self.gate.pread(&byte, offset, 1)
            if code:
                return code
        code = fcbw_copy_range(self.disk.fd, self.target.fd, offset, length, &done)
        fence_acquire()         # before the look-up that judges what was copied (R5; a system call is no fence by contract)
        if code == 0:
            if not load_seq(&self.proven):
                store_seq(&self.proven, 1)
            add_relaxed(&self.copied_bytes, <uint64_t>length)
        elif done == 0 and not load_seq(&self.proven) and fcbw_copy_is_lacking(code):
            store_seq(&self.lacking, 1)
            return OFFLOAD_LACKING
        return code


def behind_for(BlockDevice target, int64_t limit):
    """Return a Behind of a worker that writes to TARGET, or None where nothing would be gained: it is no file on a device and no block device, or past the page cache.

    limit: bytes under way to the device.
    """
    cdef Behind behind
    if type(target) is not FileDevice or (<FileDevice>target).in_memory:
        return None
    behind = Behind.__new__(Behind)
    behind.target = <FileDevice>target
    behind.limit = limit
    return behind


cdef class Behind:
    """Made by behind_for(); of one worker."""

    def __init__(self):
        raise TypeError("a Behind is made by behind_for()")

    cdef int wrote(self, int64_t offset, int64_t length) noexcept nogil:
        """The range has been written: send it to the device when it is worth a request, and wait for the oldest where that is too much.

        0 or -errno.
        """
        cdef int64_t enough = self.limit // RANGE_PART
        cdef int last, code
        if self.limit == 0:
            return 0
        last = (self.first + self.count - 1) % BEHIND_RANGES
        self.pending += length
        if self.count and self.lengths[last] < enough:
            if self.offsets[last] + self.lengths[last] == offset:
                self.lengths[last] += length
                return self.send(last) if self.lengths[last] >= enough else 0
            code = self.send(last)
            if code or self.limit == 0:
                return code
        while self.count == BEHIND_RANGES or (self.count and self.pending > self.limit):
            code = self.retire()
            if code:
                return code
        last = (self.first + self.count) % BEHIND_RANGES
        self.offsets[last] = offset
        self.lengths[last] = length
        self.count += 1
        return self.send(last) if length >= enough else 0

    cdef int send(self, int which) noexcept nogil:
        cdef int code = fcbw_write_back(self.target.fd, self.offsets[which], self.lengths[which])
        if code == -ENOSYS or code == -EINVAL or code == -ESPIPE:
            self.limit = 0          # not this file system: its own flusher does it, later
            return 0
        return code

    cdef int retire(self) noexcept nogil:
        """Wait for the oldest range."""
        cdef int64_t length = self.lengths[self.first]
        cdef int code = fcbw_write_back_end(self.target.fd, self.offsets[self.first], length)
        self.first = (self.first + 1) % BEHIND_RANGES
        self.count -= 1
        self.pending -= length
        return code
