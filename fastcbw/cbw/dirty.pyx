"""Named dirty bitmaps of a disk: which granules guest writes have touched, since an instant that somebody chose.

Every guest write, write-zeroes and discard marks, before it tests `settled` and long before it reaches the disk, the bitmaps
that its epoch lists (cbw/state). A write relies on a bit that it finds set. So a bitmap is never emptied or taken
out of the writers' hands in place: the next epoch is given fresh words (or none), flipped in, and the epoch before is
drained; after that nobody marks the old words any more, and they hold every write that the flip came after. Everything
here that changes which words are marked is such a flip, with the engine's control lock held.

A snapshot that is made from a bitmap switches it in its own flip (prepare, conclude). Then either
    the bitmap goes on as it was     what was frozen is or-ed into the fresh words after the drains; or
    the snapshot has it (handed)     the bitmap is what changed since; give_back() forgets what was frozen when the job has
                                     succeeded, else or-s it in again, or what of it is left to copy. Until then both parts
                                     together are the bitmap.
A bitmap may be enabled or disabled at any time; its words stay, since nobody marks those of a disabled one.
"""

from libc.errno cimport EINVAL
from libc.stdint cimport int64_t

from types import MappingProxyType

from fastcbw.bitmaps.dirty cimport (DirtyWords, dirty_convert, dirty_extent, dirty_mark, dirty_new,
                                    dirty_ref, dirty_unref, dirty_words, hold_words)
from fastcbw.cbw.lifecycle cimport Creation
from fastcbw.cbw.state cimport DIRTY_MAX, EngineState, Epoch, drain, flip, map_bits, next_epoch
from fastcbw.sync cimport pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock

from fastcbw.cbw.options import check_name, parse_granularity
from fastcbw.errors import Error, LimitReached

#: Bytes per bit when nobody says: QEMU's.
GRANULARITY_DEFAULT = 64 << 10


cdef class DirtyBitmap:
    """A named dirty bitmap of a disk. Made by Disk.add_bitmap(); all methods are safe from any thread."""

    def __cinit__(self):
        pthread_mutex_init(&self.lock, NULL)

    def __dealloc__(self):
        # Whoever marks has the engine, which has us while it is open, and has ended when it is closed.
        if self.live != NULL:
            dirty_unref(self.live)
        if self.frozen != NULL:
            dirty_unref(self.frozen)
        pthread_mutex_destroy(&self.lock)

    cdef void put(self, dirty_words *live, dirty_words *frozen) noexcept:
        pthread_mutex_lock(&self.lock)
        self.live = live
        self.frozen = frozen
        pthread_mutex_unlock(&self.lock)

    cdef int64_t status(self, int64_t offset, int64_t length, bint *dirty) noexcept nogil:
        cdef dirty_words *live
        cdef dirty_words *frozen
        cdef int64_t got
        pthread_mutex_lock(&self.lock)
        live = self.live
        frozen = self.frozen
        if live != NULL:
            dirty_ref(live)
        if frozen != NULL:
            dirty_ref(frozen)
        pthread_mutex_unlock(&self.lock)
        if live == NULL:
            return -EINVAL          # removed
        got = dirty_extent(live, frozen, offset, length, dirty)
        dirty_unref(live)
        if frozen != NULL:
            dirty_unref(frozen)
        return got

    cdef int check_free(self, user=None) except -1:
        if self.kept_for is not None and self.kept_for != user:
            raise Error(f"bitmap {self.name!r}: is kept for {self.kept_for} (wait for its end)")
        if self.user is not None:
            raise Error(f"bitmap {self.name!r}: in use by {self.user} (wait for its end)")
        return 0

    # -- what it marks

    def snapshot_words(self):
        """Return DirtyWords: the live ones, or while a job has a part of it, both parts in words of their own."""
        cdef DirtyWords both
        cdef DirtyWords live
        if self.owner is None:
            raise Error(f"bitmap {self.name!r}: was removed")
        with self.owner.control:
            live = hold_words(self.live)
            if self.frozen == NULL:
                return live
            both = DirtyWords(live.words.length, 1 << live.words.shift)
            both.merge(live)
            both.merge(hold_words(self.frozen))
            return both

    def view(self):
        """Return the bits as a read-only ClusterBitmap, one per granule; `.numpy` and `.bitarray` are views of the same memory.

        It is live until the bitmap is cleared or used for a snapshot or job: take it again then.
        """
        return self.snapshot_words().view()

    def extents(self, offset=0, length=None):
        """Return the dirty extents of a range (default: the disk) as a structured array: offset, length in bytes."""
        return self.snapshot_words().extents(offset, length)

    def report(self):
        """Return the facts, in QEMU's words: name, granularity, count (bytes marked), recording, busy, persistent."""
        words = self.snapshot_words()
        return {"name": self.name, "granularity": words.granularity, "count": words.count(), "recording": self.enabled,
                "busy": self.user is not None or self.kept_for is not None, "persistent": False}

    def __repr__(self):
        state = "removed" if self.owner is None else "enabled" if self.enabled else "disabled"
        return f"<dirty bitmap {self.name}, {state}>"

    # -- changes; each raises Error when a job has the bitmap, and nothing has changed then

    cdef DirtyBitmaps begin(self, bint free=True):
        """Check that it can be changed; return its owner. With the control lock held."""
        if self.owner is None:
            raise Error(f"bitmap {self.name!r}: was removed")
        self.owner.check_open()
        if free:
            self.check_free()
        return self.owner

    def clear(self):
        """Forget what is marked: from here on it is what changes. Return DirtyWords of what it marked."""
        cdef DirtyBitmaps owner = self.owner_or_error()
        cdef dirty_words *old
        cdef dirty_words *fresh
        with owner.control:
            self.begin()
            old = self.live
            fresh = new_words(owner.state, old.shift, self.name)
            self.put(fresh, NULL)
            if self.enabled:
                owner.switch()
            forgotten = hold_words(old)
            dirty_unref(old)
            return forgotten

    def mark_again(self, DirtyWords words not None, user=None):
        """Mark what WORDS mark, which clear() returned. user: for whom it is kept."""
        cdef DirtyBitmaps owner = self.owner_or_error()
        with owner.control:
            self.begin(False)
            self.check_free(user)
            with nogil:
                dirty_convert(&self.live.bits, self.live.shift, &words.words.bits, words.words.shift)

    def mark_all(self):
        """Mark the whole disk, when nobody knows what was written."""
        cdef DirtyBitmaps owner = self.owner_or_error()
        with owner.control:
            self.begin()
            with nogil:
                if self.live.length:
                    dirty_mark(self.live, 0, self.live.length)

    def keep_for(self, user):
        """Let nobody but snapshots for USER use it, and nobody change it; None: as before."""
        cdef DirtyBitmaps owner = self.owner_or_error()
        with owner.control:
            self.begin(False)
            if self.kept_for is not None and user is not None:
                self.check_free(user)
            self.kept_for = user

    def enable(self):
        """Mark guest writes from here on. No error when it is enabled already."""
        self.set_enabled(True)

    def disable(self):
        """Mark no more guest writes: what it marks stays as it is. No error when it is disabled already."""
        self.set_enabled(False)

    cdef int set_enabled(self, bint enabled) except -1:
        cdef DirtyBitmaps owner = self.owner_or_error()
        with owner.control:
            self.begin()
            if self.enabled != enabled:
                self.enabled = enabled
                owner.switch()
        return 0

    def merge(self, *sources):
        """Mark also what the bitmaps SOURCES of the same disk (names or objects) mark; granularities may differ.

        Rounded outwards where this one is coarser. Sources stay as they are; of one that is enabled it takes what was marked when
        the call began, at least. All or nothing.
        """
        cdef DirtyBitmaps owner = self.owner_or_error()
        cdef DirtyBitmap source
        with owner.control:
            self.begin()
            found = []
            for given in sources:
                source = owner.find(given.name if isinstance(given, DirtyBitmap) else given)
                if isinstance(given, DirtyBitmap) and source is not given:
                    raise Error(f"bitmap {given.name!r}: is of another disk")
                source.check_free()
                found.append(source)
            for source in found:
                if source is not self:
                    with nogil:
                        dirty_convert(&self.live.bits, self.live.shift, &source.live.bits, source.live.shift)

    def remove(self):
        """Remove the bitmap."""
        cdef DirtyBitmaps owner = self.owner_or_error()
        with owner.control:
            self.begin()
            owner.drop(self)

    cdef DirtyBitmaps owner_or_error(self):
        owner = self.owner
        if owner is None:
            raise Error(f"bitmap {self.name!r}: was removed")
        (<DirtyBitmaps>owner).check_open()
        return owner


cdef class DirtyBitmaps:
    """The dirty bitmaps of one engine. Bound to its control lock; the engine closes it."""

    def __cinit__(self, EngineState state not None, control):
        self.state = state
        self.control = control
        self.by_name = {}

    def take_control(self, control):
        """In the child of a fork: whoever holds the old lock is in the parent."""
        self.control = control

    def close(self):
        """Refuse everything from now on; nobody marks any more."""
        self.closed = True

    @property
    def named(self):
        """All bitmaps by name, a read-only live mapping, oldest first."""
        return MappingProxyType(self.by_name)

    def report(self):
        """Return the facts of all bitmaps; see DirtyBitmap.report."""
        with self.control:
            return [bitmap.report() for bitmap in self.by_name.values()]

    cdef int check_open(self) except -1:
        if self.closed:
            raise ValueError(f"{self.state.child.name}: the disk is closed")
        if self.state.forked:
            raise RuntimeError(f"{self.state.child.name}: a fork does not take disks along (open it anew)")
        return 0

    cdef DirtyBitmap find(self, name):
        if name not in self.by_name:
            raise Error(f"bitmap {name!r}: not found (bitmaps of this disk: {', '.join(self.by_name) or 'none'})")
        return self.by_name[name]

    cdef DirtyBitmap make(self, name, granularity, bint enabled):
        """Check, allocate and list a bitmap; it is not in any epoch yet. Control lock held."""
        cdef DirtyBitmap bitmap
        cdef int shift = parse_granularity(GRANULARITY_DEFAULT if granularity is None else granularity).bit_length() - 1
        check_name(name, "bitmap name")
        if name in self.by_name:
            raise Error(f"bitmap {name!r}: exists already")
        if len(self.by_name) >= DIRTY_MAX:
            raise LimitReached(f"bitmap {name!r}: a disk has {DIRTY_MAX} dirty bitmaps at most (remove one)")
        bitmap = DirtyBitmap()
        bitmap.name = name
        bitmap.enabled = enabled
        bitmap.granularity = (<int64_t>1) << shift
        bitmap.live = new_words(self.state, shift, name)
        bitmap.owner = self
        self.by_name[name] = bitmap
        return bitmap

    cdef int list_words(self, dirty_words **words) noexcept:
        """What guest writes have to mark, as the bitmaps say now; return how many."""
        cdef DirtyBitmap bitmap
        cdef int count = 0
        for bitmap in self.by_name.values():
            if bitmap.enabled:
                words[count] = bitmap.live
                count += 1
        return count

    cdef int switch(self) except -1:
        """Have guest writes mark what the bitmaps say now; when it returns, nobody marks anything else. Control lock held."""
        cdef Epoch *epoch = next_epoch(self.state)
        epoch.dirty_count = self.list_words(epoch.dirty)
        with nogil:
            drain(self.state, flip(self.state))
        return 0

    def add(self, name, *, granularity=None, enabled=True):
        """Add an empty bitmap; return it. Every write that begins after the return is marked, if it is enabled.

        granularity: bytes per bit, a power of two from 512 to 2G; default 64K.
        Raises ValueError, TypeError, Error (the name exists), LimitReached, MemoryError; nothing has changed then.
        """
        cdef DirtyBitmap bitmap
        with self.control:
            self.check_open()
            bitmap = self.make(name, granularity, enabled)
            if bitmap.enabled:
                self.switch()
            return bitmap

    def remove(self, name):
        """Remove the bitmap NAME. Error when there is none, or a job has it."""
        cdef DirtyBitmap bitmap
        with self.control:
            self.check_open()
            bitmap = self.find(name)
            bitmap.check_free()
            self.drop(bitmap)

    cdef int drop(self, DirtyBitmap bitmap) except -1:
        cdef dirty_words *old = bitmap.live
        del self.by_name[bitmap.name]
        bitmap.owner = None
        if bitmap.enabled:
            self.switch()
        bitmap.put(NULL, NULL)
        dirty_unref(old)
        return 0

    # -- snapshots

    cdef DirtyWords prepare(self, options, Creation *creation):
        """Do what OPTIONS ask for but the flip: bitmap, bitmap_for, new_bitmap. Return what is frozen, or None. Control lock held.

        On an error nothing has changed.
        """
        cdef DirtyBitmap bitmap = None
        cdef DirtyWords frozen = None
        cdef dirty_words *fresh = NULL
        creation.frozen = NULL
        if options.bitmap is not None:
            bitmap = self.find(options.bitmap)
            bitmap.check_free(options.bitmap_for)
            fresh = new_words(self.state, bitmap.live.shift, bitmap.name)
            if not options.whole and not map_bits(&creation.snap.within, creation.snap.geometry.clusters):
                dirty_unref(fresh)
                raise MemoryError(f"bitmap {bitmap.name!r}: no memory for the clusters it marks")
        if options.new_bitmap is not None:
            granularity = options.new_bitmap_granularity
            if granularity is None and bitmap is not None:
                granularity = 1 << bitmap.live.shift
            try:
                self.make(options.new_bitmap, granularity, True)
            except BaseException:
                if bitmap is not None:
                    dirty_unref(fresh)
                raise
        if bitmap is not None:
            bitmap.put(fresh, bitmap.live)
            if not options.whole:
                frozen = hold_words(bitmap.frozen)
                creation.frozen = bitmap.frozen
        creation.dirty_count = self.list_words(creation.dirty)
        return frozen

    cdef int abandon(self, options) except -1:
        """Undo prepare: nothing was flipped in."""
        cdef DirtyBitmap bitmap
        cdef dirty_words *fresh
        if options.new_bitmap is not None:
            bitmap = self.by_name.pop(options.new_bitmap)
            bitmap.owner = None
        if options.bitmap is not None:
            bitmap = self.by_name[options.bitmap]
            fresh = bitmap.live
            bitmap.put(bitmap.frozen, NULL)
            dirty_unref(fresh)
        return 0

    cdef int conclude(self, options) except -1:
        """After the drains: the bitmap goes on as it was, or its content is the snapshot's until give_back()."""
        if options.bitmap is not None:
            if options.bitmap_for is not None:
                (<DirtyBitmap>self.by_name[options.bitmap]).user = options.bitmap_for
            else:
                self.thaw(self.by_name[options.bitmap], False)
        return 0

    cdef int thaw(self, DirtyBitmap bitmap, bint forget) except -1:
        cdef dirty_words *frozen = bitmap.frozen
        if not forget:
            with nogil:
                dirty_convert(&bitmap.live.bits, bitmap.live.shift, &frozen.bits, frozen.shift)
        bitmap.put(bitmap.live, NULL)
        dirty_unref(frozen)
        return 0

    def give_back(self, name, bint success, DirtyWords left=None):
        """End the use of the bitmap NAME by a job: with SUCCESS it is what changed since the job's instant, else all of it again.

        left: what the job has not copied of what it was to copy, and that is to be marked instead of all of it.
        """
        cdef DirtyBitmap bitmap
        with self.control:
            bitmap = self.find(name)
            if bitmap.user is not None:
                if left is not None and not success:
                    if left.words.length != bitmap.live.length:
                        raise ValueError(f"bitmap {name!r}: {left.words.length} bytes do not match the disk's {bitmap.live.length}")
                    with nogil:
                        dirty_convert(&bitmap.live.bits, bitmap.live.shift, &left.words.bits, left.words.shift)
                bitmap.user = None
                self.thaw(bitmap, success or left is not None)


cdef dirty_words *new_words(EngineState state, int shift, str name) except NULL:
    cdef dirty_words *words = dirty_new(state.length, shift)
    if words == NULL:
        raise MemoryError(f"bitmap {name!r}: no memory")
    return words
