"""Access: what is known of each cluster, for block status, maps and reports. Never for a read, which looks at the words.

Summary bitmaps, walked as the copy order walks them: what was never preserved is one step, so that the map of a large disk costs what is
used. Everything is of some moment during the call; the guest goes on.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.block.device cimport BlockDevice, STATUS_HOLE, STATUS_ZERO
from fastcbw.cbw.intercept cimport FilterDevice
from fastcbw.cbw.kinds cimport Kinds, kinds_of_word, kinds_untouched
from fastcbw.cbw.reader cimport ERROR_BROKEN, ERROR_NOT_IN_SNAPSHOT, SnapshotDevice
from fastcbw.cbw.state cimport ALIVE, EngineState, Epoch, Snap, Ticket, copy_run, enter, leave
from fastcbw.kernels.atomic cimport load_relaxed, load_seq
from fastcbw.kernels.lent cimport Lent, lend
from fastcbw.kernels.sparse cimport sparse_next_one

import numpy as _np

cdef enum:
    STRETCHES = 4096        # looked at while counted once

#: dtype of a map: bytes, bytes, STATUS_* of block status, ACCESS_* bits.
MAP_DTYPE = _np.dtype([("offset", "<i8"), ("length", "<i8"), ("flags", "<u4"), ("access", "<u4")])

READABLE = ACCESS_READABLE
IN_RAM = ACCESS_RAM
ON_DISK = ACCESS_DISK
IS_ZERO = ACCESS_ZERO
CHANGED = ACCESS_CHANGED


cdef inline uint64_t changed_word(const Epoch *epoch, const Snap *last, int64_t word) noexcept nogil:
    """`changed` of LAST is its own or that of any newer snapshot."""
    cdef uint64_t bits = 0
    cdef int i
    for i in range(epoch.chain_count):
        bits |= load_relaxed((<Snap *>epoch.chain[i]).changed.words + word)
        if epoch.chain[i] == last:
            break
    return bits


cdef inline int64_t unchanged_until(const Epoch *epoch, const Snap *last, int64_t first, int64_t end) noexcept nogil:
    cdef int i
    for i in range(epoch.chain_count):
        end = sparse_next_one(&(<Snap *>epoch.chain[i]).changed, first, end)
        if epoch.chain[i] == last:
            break
    return end


cdef uint32_t access_extent(SnapshotDevice snapshot, int64_t first, int64_t end, int64_t *stop) noexcept nogil:
    cdef Snap *snap = snapshot.snap
    cdef Kinds of
    cdef Ticket ticket
    cdef int64_t at = first, until, inside_end = -1
    cdef int64_t word
    cdef uint64_t changed, bit
    cdef uint32_t flags, found = 0
    cdef bint inside = False
    cdef int left = STRETCHES
    stop[0] = end
    if load_seq(&snap.dead) != ALIVE:
        return 0
    ticket = enter(snapshot.state)
    if ticket.epoch.geometry != snap.geometry:
        leave(ticket)
        return 0
    while at < end and left:
        left -= 1
        if at >= inside_end:
            inside_end = copy_run(snap, at, end, &inside)
        if not inside:
            flags = 0
            until = inside_end
        else:
            flags = ACCESS_READABLE
            until = kinds_untouched(ticket.epoch, snap, at, inside_end)
            if until > at:
                until = unchanged_until(ticket.epoch, snap, at, until)
            if until <= at:
                # The clusters of one word, each by itself.
                word = at >> 6
                kinds_of_word(ticket.epoch, snap, word, &of)
                changed = changed_word(ticket.epoch, snap, word)
                until = (word + 1) << 6
                if until > inside_end:
                    until = inside_end
                while at < until:
                    bit = (<uint64_t>1) << (at & 63)
                    flags = ACCESS_READABLE
                    if of.ram & bit:
                        flags |= ACCESS_RAM
                    elif of.disk & bit:
                        flags |= ACCESS_DISK
                    elif of.zero & bit:
                        flags |= ACCESS_ZERO
                    if changed & bit:
                        flags |= ACCESS_CHANGED
                    if at > first and flags != found:
                        break
                    found = flags
                    at += 1
                if at < until:
                    break
                continue
        if at > first and flags != found:
            break
        found = flags
        at = until
    leave(ticket)
    stop[0] = at
    return found


cdef int64_t access_status(SnapshotDevice snapshot, int64_t offset, int64_t length, uint32_t *flags) noexcept nogil:
    cdef int bits = snapshot.cluster_bits
    cdef int64_t stop
    flags[0] = access_extent(snapshot, offset >> bits, ((offset + length - 1) >> bits) + 1, &stop)
    stop = (stop << bits) - offset
    return stop if stop < length else length


cdef int64_t disk_access(EngineState state, int64_t offset, int64_t length, uint32_t *flags) noexcept nogil:
    """Of the active disk: all is readable; changed since the newest snapshot, where there is one."""
    cdef Ticket ticket = enter(state)
    cdef Snap *newest
    cdef int64_t first, end, until
    cdef int bits
    flags[0] = ACCESS_READABLE
    if ticket.epoch.geometry != NULL and ticket.epoch.need_count:
        newest = <Snap *>ticket.epoch.need[0]
        bits = ticket.epoch.geometry.cluster_bits
        first = offset >> bits
        end = ((offset + length - 1) >> bits) + 1
        until = sparse_next_one(&newest.changed, first, end)
        if until == first:
            flags[0] |= ACCESS_CHANGED
            while until < end and (load_relaxed(newest.changed.words + (until >> 6)) >> (until & 63)) & 1:
                until += 1
        until = (until << bits) - offset
        if until < length:
            length = until
    leave(ticket)
    return length


def map_extents(BlockDevice device not None, int64_t offset=0, length=None, *, int64_t limit=1 << 20):
    """Return (rows, next): the map of a range (default: to the end) as a structured array of MAP_DTYPE, at most LIMIT rows.

    device: a snapshot's, or the filter's of a disk. next: the offset at which to go on, or None when the range is done.
    Neighbours that are alike are merged. Of a broken snapshot all is unreadable. Raises ValueError for a bad range, OSError.
    """
    cdef SnapshotDevice snapshot = None
    cdef FilterDevice filtered = None
    cdef int64_t end
    cdef int64_t got = 0, alike = 0
    cdef uint32_t flags = 0, access = 0
    cdef bint readable
    end = offset + (device.length - offset if length is None else length)
    device.check_range(offset, end - offset)
    if isinstance(device, SnapshotDevice):
        snapshot = device
    elif isinstance(device, FilterDevice):
        filtered = device
    else:
        raise TypeError(f"{device.name}: has no map (expected a disk or a snapshot)")
    rows = []
    while offset < end:
        with nogil:
            if snapshot is not None:
                alike = access_status(snapshot, offset, end - offset, &access)
            else:
                alike = disk_access(filtered.state, offset, end - offset, &access)
            readable = access & ACCESS_READABLE
            flags = 0
            got = device.block_status(offset, alike, &flags) if readable else alike
        if got < 0:
            if snapshot is None or got not in (ERROR_BROKEN, ERROR_NOT_IN_SNAPSHOT):
                device.fail(<int>got, "block status", offset, alike)
            continue            # it broke, or lost that cluster, just now: look again
        flags &= STATUS_HOLE | STATUS_ZERO
        if rows and rows[-1][2:] == (flags, access):
            rows[-1] = (rows[-1][0], rows[-1][1] + got, flags, access)
        else:
            if len(rows) >= limit:
                break
            rows.append((offset, got, flags, access))
        offset += got
    return _np.array(rows, dtype=MAP_DTYPE), offset if offset < end else None


def cluster_states(SnapshotDevice snapshot not None):
    """Return the whole state of every cluster of a live snapshot, for tests: the access bits, and 32 settled, 64 a recorded discard, 128 claimed.

    A uint32 array. It walks the disk: for small ones.
    """
    cdef EngineState state = snapshot.state
    cdef Ticket ticket
    cdef int64_t c, stop, clusters = (snapshot.length + ((<int64_t>1) << snapshot.cluster_bits) - 1) >> snapshot.cluster_bits
    cdef uint32_t access
    states = _np.zeros(clusters, _np.uint32)
    cdef Lent view = lend(states, "states", "uint32", True)
    for c in range(clusters):
        access = access_extent(snapshot, c, c + 1, &stop)
        ticket = enter(state)
        if ticket.epoch.geometry == snapshot.snap.geometry:
            if (load_seq(ticket.epoch.settled + (c >> 6)) >> (c & 63)) & 1:
                access |= 32
            if (load_seq(ticket.epoch.geometry.lazy.words + (c >> 6)) >> (c & 63)) & 1:
                access |= 64
            if (load_seq(ticket.epoch.geometry.claims + (c >> 6)) >> (c & 63)) & 1:
                access |= 128
        leave(ticket)
        (<uint32_t *>view.start)[c] = access
    return states
