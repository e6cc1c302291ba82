"""The Engine: the only door from the control plane to copy-before-write.

It owns the state, the threads that serve it, and the snapshots; it takes the control lock for whatever begins or ends
one. Work per call is O(1), except for ending a snapshot, which walks what was preserved for it.

Threads, started with the first snapshot and joined at close: COPY_THREADS that make copies that may wait, and the keeper,
which ends what was broken so that its memory is free again, and carries out recorded discards that no snapshot needs any
more; with the first disk tier, the flusher. Importing starts nothing.
"""

from cpython.ref cimport PyObject
from libc.stdint cimport int64_t, uint64_t

import logging
import os
import select
import threading
import time
import weakref

from fastcbw.bitmaps.mapping cimport map_pages, resident_pages, unmap_pages
from fastcbw.block.device cimport BlockDevice
from fastcbw.cbw.dirty cimport DirtyBitmaps
from fastcbw.cbw.guest cimport GuestDevice
from fastcbw.cbw.flusher cimport Flusher
from fastcbw.cbw.intercept cimport FilterDevice
from fastcbw.cbw.keep cimport keep_drop_range, keep_trim
from fastcbw.cbw.latency cimport latency_meter
from fastcbw.cbw.lazy cimport lazy_carry_out, lazy_drop
from fastcbw.cbw.lifecycle cimport (Creation, creation_finish, creations_flip, end_lingering, find_store_index, retire, sweep_stores)
from fastcbw.cbw.locmap cimport SLOTS_MAX, STORES_MAX
from fastcbw.cbw.policy cimport why_text
from fastcbw.cbw.reader cimport SnapshotDevice
from fastcbw.cbw.report cimport guest_counters, inherited_bytes, snapshot_facts
from fastcbw.cbw.room cimport room_changed
from fastcbw.cbw.state cimport (BROKEN, DELETED, EngineState, Epoch, Geometry, LINES, SNAPSHOTS_MAX, Snap, WHY_COMMAND, bitmap_bytes,
                                cluster_end, geometry_new, geometry_ref, geometry_unref, snap_break, snap_new, snap_unref, wake_keeper)
from fastcbw.cbw.stops cimport Stops
from fastcbw.cbw.store cimport (SEGMENT_HEADER, Store, log_set_limit, segment_bytes, slots_set_limit, store_fill, store_free, store_new)
from fastcbw.cbw.worker cimport CopyPool
from fastcbw.kernels.atomic cimport add_seq, load_relaxed, load_seq, store_relaxed, store_seq, sub_seq
from fastcbw.sync cimport now_ns, sleep_ns

from fastcbw.cbw.options import CLUSTER_SIZE_DEFAULT, SnapshotOptions, check_name
from fastcbw.cbw.report import POLICIES
from fastcbw.cbw.spill import open_spill
from fastcbw.errors import Error, LimitReached, SnapshotBroken
from fastcbw.units import parse_size

_log = logging.getLogger("fastcbw.cbw")

COPY_THREADS = 4
JOIN_SECONDS = 10.0
KEEPER_RETRY_SECONDS = 0.02
cdef int64_t BUSY_POLL_NS = 100000

cdef int64_t FLUSH_END_NS = 2000000000      # how long the end of a snapshot waits for a batch of its own under way

# Devices that callers gave as disk tier: id of the device -> weak reference to the engine whose logs may hold it.
_spill_owners = {}


cdef class Engine:
    """Copy-before-write on one disk.

    child: the active disk, any BlockDevice. Nothing else may write it while the engine lives, except through `device`.
    device: the filter; what the guest writes to.
    name: what the disk is called where that is not the child's name.

    All methods are safe from any thread. The engine does not close CHILD.
    """

    cdef EngineState state
    cdef readonly FilterDevice device
    cdef readonly str name              # of the disk, for what its snapshots are called in messages
    cdef readonly dict snapshots        # name: SnapshotDevice, live and broken ones, oldest first
    cdef readonly DirtyBitmaps bitmaps
    cdef object control                 # begins and ends one at a time
    cdef object threads
    cdef object pool
    cdef Flusher flusher                # None before the first disk tier
    cdef int wake                       # eventfd: something broke, or close; 0: none
    cdef set told                       # (snapshot, why) of refusals that were logged
    cdef dict logs                      # store index: device of the disk tier that we opened
    cdef uint64_t next_id
    cdef bint closed
    cdef object __weakref__

    def __cinit__(self, BlockDevice child not None, str name=None):
        self.state = EngineState(child)
        self.name = child.name if name is None else name
        self.device = GuestDevice(self.state)
        self.snapshots = {}
        self.control = threading.RLock()
        self.bitmaps = self.state.bitmaps = DirtyBitmaps(self.state, self.control)
        self.threads = []
        self.told = set()
        self.logs = self.state.logs = {}
        self.device.engine = self
        self.next_id = 1
        self.wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.state.broken_fd = self.wake

    def __del__(self):
        # Forgotten without close(): let the threads end; nobody is left who could wait for them.
        if self.pool is not None and not self.closed and not self.state.forked:
            self.closed = True      # what the keeper looks at when it wakes up
            self.pool.stop()
            if self.flusher is not None:
                self.flusher.stop()
            os.eventfd_write(self.wake, 1)

    def __dealloc__(self):
        if self.wake > 0:
            os.close(self.wake)

    # -- snapshots

    def snapshot(self, name, **options):
        """Take a snapshot; see take_snapshots."""
        return take_snapshots([self], name, [SnapshotOptions.parse(**options)])[0]

    cdef int cluster_bits_for(self, str name, options) except -1:
        """The cluster size for a new snapshot, or why there can't be one. Changes nothing."""
        cdef Epoch *epoch = &self.state.epochs[self.state.number & 3]
        cdef int bits
        self.check_open()
        if name in self.snapshots:
            raise Error(f"{self.device.name}: snapshot {name!r} exists already")
        if epoch.chain_count >= SNAPSHOTS_MAX:
            raise LimitReached(f"{self.device.name}: no more than {SNAPSHOTS_MAX} snapshots of a disk at once")
        if find_store_index(self.state) < 0:
            raise LimitReached(f"{self.device.name}: {STORES_MAX} stores, of ended snapshots too, hold what older ones read (delete an older one)")
        bits = (options.cluster_size or CLUSTER_SIZE_DEFAULT).bit_length() - 1
        if epoch.chain_count:
            if options.cluster_size and epoch.geometry.cluster_bits != bits:
                raise Error(f"{self.device.name}: cluster_size {options.cluster_size} differs from the "
                            f"{1 << epoch.geometry.cluster_bits} of the live snapshots (it is fixed until they end)")
            bits = epoch.geometry.cluster_bits
        # The options were checked against the cluster size they name; the live snapshots may have fixed a larger one.
        if options.ram and not 1 <= options.ram >> bits <= SLOTS_MAX:
            raise ValueError(f"ram: {options.ram} bytes are not between one cluster of {1 << bits} bytes and 2^26 of them")
        if options.in_place:
            self.check_in_place(options.spill)
        elif options.spill is not None and options.spill_limit < SEGMENT_HEADER + (1 << bits):
            raise ValueError(f"spill_limit: {options.spill_limit} is less than a header and one cluster, {SEGMENT_HEADER + (1 << bits)} bytes")
        if options.spill is self.device or options.spill is self.state.child:
            raise ValueError(f"spill: {self.device.name}: is the disk itself (name another device, or a folder)")
        if isinstance(options.spill, BlockDevice) and is_spill_in_use(options.spill):
            raise Error(f"spill: {options.spill.name}: is the disk tier of another snapshot (each needs its own device; a folder is shared)")
        return bits

    cdef int check_in_place(self, BlockDevice target) except -1:
        """Why old data can't lie in TARGET at its own offsets."""
        if target.length < self.state.length:
            raise ValueError(f"spill: {target.name}: its {target.length} bytes are less than the disk's {self.state.length} (in place each cluster "
                             "lies at its own offset)")
        for name, snapshot in self.snapshots.items():
            if not (<SnapshotDevice>snapshot).retired:      # it would come to need what lies in the backup, and outlive it there
                raise Error(f"{self.device.name}: a snapshot in place has to be the oldest one, and there is {name!r} (delete that first)")
        return 0

    cdef object prepare(self, str name, options, Creation *creation):
        """Allocate all that a snapshot needs; nothing is visible yet. Return the DirtyWords it is made of, or None.

        On an error nothing is held.
        """
        cdef Epoch *epoch = &self.state.epochs[self.state.number & 3]
        cdef int bits = self.cluster_bits_for(name, options)
        cdef int index = find_store_index(self.state)
        cdef Geometry *geometry = epoch.geometry
        cdef Store *store = NULL
        cdef Snap *snap = NULL
        cdef PyObject *log = NULL
        if geometry != NULL and geometry.cluster_bits != bits:
            # No snapshot, but discards that were recorded in clusters of another size: they go to the disk first.
            self.finish_discards()
            geometry = NULL
        device = None
        if options.spill is not None:
            device = options.spill if isinstance(options.spill, BlockDevice) else open_spill(options.spill, options.spill_limit)
            log = <PyObject *>device
        if geometry != NULL:
            geometry_ref(geometry)
        else:
            geometry = geometry_new(self.state.length, bits)
        if geometry != NULL:
            store = store_new(index, (<int64_t>1) << bits, options.ram, log, options.spill_limit, self.state.length if options.in_place else 0,
                              &self.state.room)
            if store != NULL:
                snap = snap_new(self.state, geometry, store, self.next_id)
            creation.settled = <uint64_t *>map_pages(bitmap_bytes(geometry.clusters))
            geometry_unref(geometry)        # the snapshot has its own
        if snap == NULL or creation.settled == NULL:
            if snap != NULL:
                snap_unref(snap)
            if store != NULL:
                store_free(store)
            if device is not None and device is not options.spill:
                device.close()
            raise MemoryError(f"{self.device.name}: no memory for snapshot {name!r}")
        snap.cbw_timeout_ns = options.cbw_timeout * <int64_t>1000000
        snap.on_full = POLICIES[options.on_full]
        snap.on_cbw_error = POLICIES[options.on_cbw_error]
        snap.copy_on_read = options.copy_on_read
        self.next_id += 1
        self.state.stores[index] = store
        if device is not None:
            self.logs[index] = (device, device is not options.spill)
            if device is options.spill:
                _spill_owners[id(device)] = weakref.ref(self)
        creation.state = <PyObject *>self.state
        creation.snap = snap
        try:
            return self.bitmaps.prepare(options, creation)
        except BaseException:
            self.undo(creation)
            raise

    cdef int abandon(self, options, Creation *creation) except -1:
        """Undo prepare: nothing has been flipped in."""
        self.bitmaps.abandon(options)
        return self.undo(creation)

    cdef int undo(self, Creation *creation) except -1:
        cdef Store *store = creation.snap.store
        unmap_pages(creation.settled, bitmap_bytes(creation.snap.geometry.clusters))
        store.retired = True
        snap_unref(creation.snap)
        self.sweep()
        return 0

    def delete(self, name):
        """End a snapshot: its readers get errors from now on, what older ones need of it goes to them, the rest is freed.

        Raises KeyError for an unknown name.
        """
        cdef SnapshotDevice snapshot
        with self.control:
            self.check_open()
            if name not in self.snapshots:
                raise KeyError(f"{self.device.name}: no snapshot {name!r}")
            snapshot = self.snapshots.pop(name)
            self.retire(snapshot, DELETED)
            snapshot.close()
            snapshot.engine = None

    cdef int retire(self, SnapshotDevice snapshot, uint64_t why) except -1:
        """With the control lock held."""
        if snapshot.retired:
            return 0
        snapshot.retired = True
        with nogil:
            retire(self.state, snapshot.snap, why)
            if self.flusher is not None:        # so that what its device held is free when we return, unless the device hangs
                self.flusher.await_unpinned(snapshot.snap.store, now_ns() + FLUSH_END_NS)
            if load_seq(&snapshot.snap.geometry.lazy_count):
                wake_keeper(self.state)     # there may be discards that only it kept waiting
        self.sweep()
        return 0

    def finish_discards(self):
        """Carry out recorded guest discards that no snapshot needs, and return when it is done."""
        with self.control, nogil:
            while lazy_carry_out(self.state) or not end_lingering(self.state):
                sleep_ns(BUSY_POLL_NS)      # claimed just now: by a guest write that cancels it, or the keeper at the same work

    def forget_discards(self, double timeout):
        """Drop what is recorded of guest discards, which are advisory: when it returns none of them is carried out any more.

        For a guest that is going to write past this engine. Without the control lock. TimeoutError: some were being carried out, or
        their clusters written to, for longer than TIMEOUT seconds; the others are dropped.
        """
        cdef int64_t until = now_ns() + <int64_t>(timeout * 1e9)
        cdef int64_t busy
        with nogil:
            busy = lazy_drop(self.state)
            while busy and now_ns() < until:
                sleep_ns(BUSY_POLL_NS)
                busy = lazy_drop(self.state)
            wake_keeper(self.state)     # perhaps the last snapshot has ended, and waited for them
        if busy:
            raise TimeoutError(f"{self.device.name}: {busy} clusters that the guest has discarded were in use for {timeout:g} s")

    cdef int sweep(self) except -1:
        cdef int index
        with nogil:
            sweep_stores(self.state)        # it may wait for guest writes to end
        for index in [i for i in self.logs if self.state.stores[<int>i] == NULL]:
            device, ours = self.logs.pop(index)
            if ours:
                device.close()
        return 0

    def break_snapshot(self, name):
        """Give a snapshot up as the engine itself does when it must; for tests and for operators."""
        cdef SnapshotDevice snapshot
        with self.control:
            self.check_open()
            snapshot = self.snapshots[name]
            snap_break(self.state, snapshot.snap, WHY_COMMAND, 0, 0)

    # -- room

    def set_limits(self, name, *, ram=None, spill_limit=None):
        """Change the limits of a snapshot's tiers, in bytes; None leaves one as it is.

        A limit below what is used takes effect as what is there goes: nothing is taken above it from now on, the flusher
        moves down what the disk tier has room for. Raises KeyError for an unknown name, ValueError, LimitReached, Error;
        then nothing has changed.
        """
        cdef SnapshotDevice snapshot
        cdef Store *store
        cdef int64_t size, slots, segments
        ram = None if ram is None else parse_size(ram, "ram")
        spill_limit = None if spill_limit is None else parse_size(spill_limit, "spill_limit")
        with self.control:
            self.check_open()
            if name not in self.snapshots:
                raise KeyError(f"{self.device.name}: no snapshot {name!r}")
            snapshot = self.snapshots[name]
            if snapshot.retired or load_seq(&snapshot.snap.dead) == BROKEN:
                raise SnapshotBroken(f"{snapshot.name}: {snapshot.broken_reason()}")
            store = snapshot.snap.store
            size = store.cluster_bytes
            slots = store.slots_limit if ram is None else ram // size
            segments = store.segments_limit if spill_limit is None else spill_limit // segment_bytes(store)
            if ram is not None and 0 < ram < size:
                raise ValueError(f"ram: {ram} is less than one cluster of {size} bytes (0 means no RAM tier)")
            if slots == 0 and store.log == NULL:
                raise ValueError(f"ram: {ram} and no spill: the snapshot would have no store at all")
            if slots > store.slots_reserved:
                raise LimitReached(f"ram: {ram} is more than the {store.slots_reserved * size} bytes of address space that the "
                                   "snapshot has (the memory of the machine, or what its limit was when it was taken)")
            if spill_limit is not None and store.log == NULL:
                raise ValueError(f"spill_limit: {spill_limit}: the snapshot has no disk tier (name one when it is taken)")
            if spill_limit is not None and store.in_place:
                raise ValueError(f"spill_limit: {spill_limit}: old data lies in place, in room of the disk's length")
            if spill_limit is not None and segments < 1:
                raise ValueError(f"spill_limit: {spill_limit} is less than one segment of its log, {segment_bytes(store)} bytes")
            if segments > store.positions_limit // max(store.segment_clusters, 1):
                raise LimitReached(f"spill_limit: {spill_limit} is more than the "
                                   f"{store.positions_limit // store.segment_clusters * segment_bytes(store)} bytes that its log can have")
            with nogil:
                if segments != store.segments_limit:
                    log_set_limit(store, segments)
                if slots != store.slots_limit:
                    slots_set_limit(store, slots)

    def set_policy(self, name, *, on_full=None, on_cbw_error=None):
        """Change what happens when a store is full or fails; who waits for room is judged anew. KeyError for an unknown name."""
        cdef SnapshotDevice snapshot
        with self.control:
            self.check_open()
            snapshot = self.snapshots[name]
            if on_full is not None:
                store_relaxed(&snapshot.snap.on_full, POLICIES[on_full])
            if on_cbw_error is not None:
                store_relaxed(&snapshot.snap.on_cbw_error, POLICIES[on_cbw_error])
            room_changed(&self.state.room)

    def tier_is_quiet(self, device):
        """Whether no copy to DEVICE, a snapshot's disk tier, is under way or hangs, and none from it."""
        with self.control:
            return not any(log is device and self.pins_of(index) for index, (log, _) in self.logs.items())

    def heirs_of_tier(self, name, device):
        """Return the names of the live snapshots older than NAME, when DEVICE, its disk tier, holds anything that they may come to need."""
        with self.control:
            if not any(log is device and self.is_holding(index) for index, (log, _) in self.logs.items()):
                return []
            names = list(self.snapshots)
            return [older for older in names[: names.index(name)] if not (<SnapshotDevice>self.snapshots[older]).retired]

    cdef bint is_holding(self, int index) except -1:
        cdef Store *store = self.state.stores[index]
        return store != NULL and store_fill(store).log_used != 0

    cdef uint64_t pins_of(self, int index):
        return load_seq(&self.state.stores[index].pins) if self.state.stores[index] != NULL else 0

    def consumer_begin(self, SnapshotDevice snapshot not None):
        """From here on somebody discards of SNAPSHOT what it has read: to wait for room makes sense. Undone by consumer_end."""
        add_seq(&snapshot.snap.consumers, 1)

    def consumer_end(self, SnapshotDevice snapshot not None):
        """Undo one consumer_begin; guest writes that wait for room are judged anew."""
        sub_seq(&snapshot.snap.consumers, 1)
        room_changed(&self.state.room)

    @property
    def flusher_idle(self):
        """Whether the flusher has nothing to do, or waits for a disk tier that fails; for tests."""
        return self.flusher is None or self.flusher.is_idle

    @property
    def kept_words(self):
        """Clusters for which guest reads look in RAM, with changed ones that were not taken out yet; for tests."""
        return load_seq(&self.state.kept)

    @property
    def room_waiters(self):
        """Guest writes that wait for room."""
        return load_seq(&self.state.room.waiting)

    def resident(self, name):
        """Return the bytes of memory that a live snapshot's RAM tier takes now, free slots included; for tests."""
        cdef SnapshotDevice snapshot
        with self.control:
            snapshot = self.snapshots[name]
            if snapshot.retired:
                raise KeyError(f"{snapshot.name}: is broken")
            return resident_pages(snapshot.snap.store.pages, snapshot.snap.store.slots_fresh * snapshot.snap.store.cluster_bytes)

    def drop(self, name, int64_t offset=0, length=None):
        """Drop what reads left in RAM and the guest has not changed, in a range of bytes of snapshot NAME (default: all).

        Clusters that are only in part in the range are dropped too. Returns the bytes of RAM that this freed. KeyError for an unknown name,
        ValueError for a range outside the disk. What is dropped is read from the disk again when somebody wants it.
        """
        cdef SnapshotDevice snapshot
        cdef int64_t left = self.state.length - offset if length is None else length
        cdef int64_t dropped = 0
        with self.control:
            self.check_open()
            if name not in self.snapshots:
                raise KeyError(f"{self.device.name}: no snapshot {name!r}")
            snapshot = self.snapshots[name]
            snapshot.check_range(offset, left)
            if left and not snapshot.retired:
                with nogil:
                    dropped = keep_drop_range(self.state, snapshot.snap, offset >> snapshot.cluster_bits,
                                              cluster_end(snapshot.snap.geometry, offset, left))
                self.sweep()        # what was handed over may have been the last of its store
            return dropped << snapshot.cluster_bits

    def set_stops(self, Stops stops):
        """For tests: hold threads at places of STOPS; None: no more. Nobody may be in the engine meanwhile."""
        self.state.stops_owner = stops
        self.state.stops = <void *><PyObject *>stops if stops is not None else NULL

    # -- threads

    cdef int start_flusher(self) except -1:
        """Idempotent; with the control lock held, before the first snapshot with a disk tier."""
        if self.flusher is None:
            flusher = Flusher(self.state)
            thread = threading.Thread(target=flusher.run, name="fastcbw-flusher", daemon=True)
            thread.start()
            self.threads.append(thread)
            self.flusher = flusher
        return 0

    cdef int start_threads(self) except -1:
        """Idempotent; with the control lock held."""
        if self.threads:
            return 0
        self.pool = CopyPool(self.state)
        self.state.workers = self.pool
        self.state.pool = <PyObject *>self.pool
        threads = [threading.Thread(target=self.pool.run, name=f"fastcbw-copy-{i}", daemon=True) for i in range(COPY_THREADS)]
        threads.append(threading.Thread(target=_keep, args=(weakref.ref(self), os.dup(self.wake)), name="fastcbw-keeper", daemon=True))
        for thread in threads:
            thread.start()
            self.threads.append(thread)
        return 0

    def _keep(self):
        """What the keeper does when it is woken. True: there is something left, to be tried again."""
        cdef bint left
        self._end_broken()
        with nogil:
            left = lazy_carry_out(self.state) != 0
        with self.control:
            if not self.closed:
                with nogil:
                    left = not end_lingering(self.state) or left    # it waits for guest writes to end
                return left
        return False

    def _end_broken(self):
        """Free what broken snapshots hold; they stay listed, with their reason, until they are deleted."""
        cdef SnapshotDevice snapshot
        with self.control:
            if self.closed:
                return
            for snapshot in self.snapshots.values():
                if not snapshot.retired and load_seq(&snapshot.snap.dead) == BROKEN:
                    _log.warning("%s: %s", snapshot.name, snapshot.broken_reason())
                    self.retire(snapshot, BROKEN)

    def _tell_refusals(self):
        """Log the first guest write of each kind that a policy made fail."""
        cdef SnapshotDevice snapshot
        for snapshot in list(self.snapshots.values()):
            why = load_relaxed(&snapshot.snap.refused_why)
            if why and (snapshot.name, why) not in self.told:
                self.told.add((snapshot.name, why))
                _log.warning("%s: a guest write failed for its sake: %s", snapshot.name, why_text(why).decode())

    def _drop_unneeded(self):
        """The keeper's: drop unchanged clusters where guest writes have left few slots free."""
        cdef SnapshotDevice snapshot
        if not load_seq(&self.state.trim_wanted):
            return
        store_seq(&self.state.trim_wanted, 0)
        with self.control:
            if not self.closed:
                for snapshot in self.snapshots.values():
                    if not snapshot.retired:
                        with nogil:
                            keep_trim(self.state, snapshot.snap)

    @property
    def is_closed(self):
        """Whether close() has begun."""
        return self.closed

    @property
    def copies_abandoned(self):
        """Copies whose guest write went on without them and whose device has not answered yet; they keep their room."""
        return self.pool.abandoned if self.pool is not None else 0

    # -- reports

    def counters(self):
        """Return guest counters: writes, bytes, touches (with something to preserve), waits, wait_us_max; of guest reads ram_reads and
        ram_read_bytes, what came from RAM.

        Of guest discards, in bytes: lazy_bytes are recorded now; lazy_recorded, lazy_cancelled (by a write, or forgotten), lazy_carried_out and
        lazy_failed (by the disk; not tried again) since the disk was opened.
        """
        return guest_counters(self.state)

    def inherited(self):
        """Return inherited_ram_bytes and inherited_disk_bytes: what ended snapshots have left that older ones read, where it lay."""
        with self.control:
            return inherited_bytes(self.state)

    def latency_meter(self):
        """Return a LatencyMeter: from now on, until its close(), guest writes are measured."""
        self.check_open()
        return latency_meter(&self.state.latency, LINES, self.state)

    def report(self, name):
        """Return the facts of one snapshot as a dict: sizes in bytes, counts in clusters. KeyError for an unknown name."""
        with self.control:
            self.check_open()
            return snapshot_facts(self.state, self.snapshots[name])

    @property
    def cluster_size(self):
        """Bytes of a cluster while a snapshot lives, else None."""
        with self.control:
            return (1 << self.state.epochs[self.state.number & 3].geometry.cluster_bits
                    if self.state.epochs[self.state.number & 3].chain_count else None)

    def check_open(self):
        """Raise ValueError when closed, RuntimeError in the child of a fork."""
        if self.closed:
            raise ValueError(f"{self.device.name}: the disk is closed")
        if self.state.forked:
            raise RuntimeError(f"{self.device.name}: a fork does not take disks along (open it anew)")

    def mark_forked(self):
        """In the child of a fork: refuse everything from now on. The threads are the parent's."""
        self.state.forked = True
        self.control = threading.RLock()        # whoever holds the old one is in the parent
        self.bitmaps.take_control(self.control)
        self.device.mark_closed()
        for snapshot in self.snapshots.values():
            (<SnapshotDevice>snapshot).mark_closed()

    def close(self):
        """End all snapshots and threads. The guest's requests have ended. Closing twice is no error.

        A thread whose device does not answer is left behind after JOIN_SECONDS; it is a daemon thread and harms nothing.
        """
        if self.closed or self.state.forked:
            return
        with self.control:
            for name in list(reversed(list(self.snapshots))):
                self.delete(name)
            self.finish_discards()
            self.closed = True
            self.bitmaps.close()
            self.device.close()
        if self.threads:
            self.pool.stop()
            if self.flusher is not None:
                self.flusher.stop()
            os.eventfd_write(self.wake, 1)
            end = time.monotonic() + JOIN_SECONDS
            for thread in self.threads:
                if thread is not threading.current_thread():
                    thread.join(max(0.0, end - time.monotonic()))
            self.threads = []
        with self.control:
            self.sweep()        # what copies that hung have kept until now
            self.device.engine = None
            if self.wake > 0:
                self.state.broken_fd = -1
                os.close(self.wake)
                self.wake = 0


def is_spill_in_use(device):
    """Whether a store of any engine keeps its log on DEVICE."""
    cdef Engine engine
    owner = _spill_owners.get(id(device))
    engine = owner() if owner is not None else None
    return engine is not None and any(log is device for log, _ in engine.logs.values())


def _keep(engine_ref, wake):
    """The keeper: waits for a break or an end, then has the engine free what is broken and carry out discards. Holds no reference while it waits."""
    left = False
    try:
        while True:
            select.select([wake], [], [], KEEPER_RETRY_SECONDS if left else None)
            try:
                os.eventfd_read(wake)       # before the look at what it may have been for: the end that comes after that wakes us again
            except BlockingIOError:
                pass
            engine = engine_ref()
            if engine is None or engine.is_closed:
                return
            try:
                engine._tell_refusals()
                left = engine._keep()
                engine._drop_unneeded()
            except Exception:
                _log.exception("the keeper failed to end a broken snapshot, or to carry out discards")
                left = False
            del engine
    finally:
        os.close(wake)


def take_snapshots(engines, name, options):
    """Take a snapshot NAME of each of ENGINES at one instant; return the SnapshotDevices in the same order.

    options: SnapshotOptions of all, or one for each.

    No guest write is drained or delayed, except that for several disks new writes wait for the few stores of the flips.
    Returns when each view is constant: then every write that was under way at the instant has ended.
    Raises ValueError, Error, LimitReached, MemoryError, OSError; then no snapshot was taken on any disk.
    """
    cdef Creation creations[64]
    cdef Engine engine
    cdef int count = 0, i
    frozen = []
    check_name(name)
    if not engines:
        raise ValueError("snapshot: no disks given")
    if len(engines) > 64:
        raise LimitReached(f"snapshot: {len(engines)} disks at once; no more than 64")
    if isinstance(options, SnapshotOptions):
        options = [options] * len(engines)
    if len(set(engines)) != len(engines):
        raise ValueError("snapshot: a disk is named twice")
    ordered = sorted(engines, key=id)       # one order for everybody, so that two groups can't wait for each other
    for engine in ordered:
        engine.control.acquire()
    try:
        for i in range(len(engines)):
            engine = engines[i]
            engine.sweep()
            engine.cluster_bits_for(name, options[i])
        try:
            for engine in engines:
                frozen.append(engine.prepare(name, options[count], &creations[count]))
                count += 1
            for i in range(count):
                engine = engines[i]
                engine.start_threads()
                if options[i].spill is not None:
                    engine.start_flusher()
        except BaseException:
            for i in range(count):
                engine = engines[i]
                engine.abandon(options[i], &creations[i])
            raise
        with nogil:
            creations_flip(creations, count)
            for i in range(count):
                creation_finish(&creations[i])
        devices = []
        for i in range(count):
            engine = engines[i]
            engine.bitmaps.conclude(options[i])
        for i in range(count):
            engine = engines[i]
            device = _make_device(engine, creations[i].snap, name)
            device.bitmap, device.bitmap_name = frozen[i], None if frozen[i] is None else options[i].bitmap
            device.export = options[i].export
            device.in_place = options[i].spill if options[i].in_place else None
            engine.snapshots[name] = device
            devices.append(device)
        return devices
    finally:
        for engine in ordered:
            engine.control.release()


cdef SnapshotDevice _make_device(Engine engine, Snap *snap, name):
    cdef SnapshotDevice device = SnapshotDevice.__new__(SnapshotDevice)
    device.state = engine.state
    device.engine = engine
    device.snap = snap
    device.cluster_bits = snap.geometry.cluster_bits
    device.store_index = snap.store.index
    device.length = engine.state.length
    device.queueable, device.io_engine = engine.device.queueable, engine.device.io_engine
    device.can_cache = snap.store.slots_limit > 0
    device.name = f"{engine.name}@{name}"
    return device
