"""DirectDevice: a raw image opened O_DIRECT: requests of any alignment, the page cache of the host left alone.

A leaf of the data plane, beside FileDevice. What is aligned, memory included, goes to the device as it is; the rest
goes through a bounce buffer, of which there is a small number:

    block    |-------|-------|-------|-------|-------|      (alignment: 512 or 4096 bytes, as the file wants it)
    request      xxxxxxxxxxxxxxxxxxxxxxxxx
                 head|     body      |tail

A head or a tail of a write changes a part of a block: read the block, change it, write it. Nothing may happen to the
block in between: not another such write, which would lose one of the two; and no plain write of the whole block either,
which would come back to what was read before it. So every write is in a list while it is under way, and one that changes
a part of a block waits for those before it that touch the block, and is waited for.

Invariants: of a range that is exclusive no other is under way; who waits in the list holds no bounce buffer and no other
place in the list; who waits for a bounce buffer waits only for those whose I/O is under way. So nobody waits in a circle.

The bytes after the last whole grain of an image whose length is no multiple of the block cannot be written directly: the
file would grow. They, and only they, go through the page cache; a grain is never less than a page or a block of the file
system, so the cache holds nothing else that could be written back over a direct write.
"""

from libc.errno cimport EAGAIN, EINVAL, EIO, ENOMEM, EOPNOTSUPP
from libc.stdint cimport int64_t, uint32_t
from libc.stdlib cimport free

import errno as _errno
import os as _os

from fastcbw.block.device cimport BlockDevice, FAST_ONLY, FUA, IO_READ, IO_WRITE, KernelIo
from fastcbw.block.file cimport FileDevice
from fastcbw.block.sys cimport iovec
from fastcbw.sync cimport (cond_init, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_signal,
                           pthread_cond_wait, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
                           pthread_mutex_unlock)

cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void **pointer, size_t alignment, size_t size) noexcept

cdef extern from "<unistd.h>" nogil:
    int64_t lseek(int fd, int64_t offset, int whence) noexcept
    enum:
        SEEK_END

cdef extern from "sysio.h" nogil:
    int fcbw_pread_all(int fd, char *buffer, int64_t offset, int64_t length) noexcept
    int fcbw_pwrite_all(int fd, const char *buffer, int64_t offset, int64_t length) noexcept
    int fcbw_preadv_all(int fd, const iovec *vector, int count, int64_t offset, int64_t length) noexcept
    int fcbw_pwritev_all(int fd, const iovec *vector, int count, int64_t offset, int64_t length) noexcept

cdef extern from "direct.h" nogil:
    enum:
        FCBW_ALIGNMENT_MAX
    int fcbw_direct_alignment(int fd, bint in_memory, int64_t *memory, int64_t *block) noexcept
    bint fcbw_iov_aligned(const iovec *vector, int count, int64_t memory, int64_t block) noexcept
    int fcbw_iov_slice(const iovec *vector, int count, int64_t skip, int64_t length, iovec *part, int max) noexcept
    void fcbw_iov_copy(bint gather, char *buffer, const iovec *vector, int count, int64_t skip, int64_t length) noexcept

cdef enum:
    PART_ENTRIES = 64       # a body of more pieces of memory is bounced


cdef inline int64_t least(int64_t a, int64_t b) noexcept nogil:
    return a if a < b else b


def _lacks(path, why):
    raise OSError(_errno.EINVAL, f"direct: {why} (open the image without direct)", path)


cdef class DirectDevice(FileDevice):
    """The bytes of a file, past the page cache.

    Parameters as for FileDevice, and
    alignment: bytes, a power of two: use at least this block, where the file would take less; default: what it asks for.

    Raises as FileDevice does, and OSError (EINVAL) with the file's name where the file system has no direct I/O.
    """

    def __cinit__(self, path, *, bint read_only=False, create_length=None, str name=None, bint lock=True,
                  bint exclusive=False, str io="sync", alignment=None):
        self.edge_fd = -1
        self.always_waits = True
        pthread_mutex_init(&self.mutex, NULL)
        cond_init(&self.ended)
        cond_init(&self.returned)
        self.ready = True
        try:
            self._find_alignment(alignment)
        except BaseException:
            FileDevice.close(self)
            if create_length is not None:
                _os.unlink(self.path)
            raise

    def _open(self, create):
        """Open as FileDevice does, then the same file again, directly: the file system wants to know from the start."""
        plain = FileDevice._open(self, create)
        access = _os.O_RDONLY if self.read_only else _os.O_RDWR
        try:
            return _os.open(f"/proc/self/fd/{plain}", access | _os.O_DIRECT | _os.O_CLOEXEC)
        except OSError as error:
            if create:
                _os.unlink(self.path)
            if error.errno == _errno.EINVAL:
                _lacks(self.path, "the file system has no direct I/O for it")
            raise OSError(error.errno, error.strerror, self.path) from None
        finally:
            _os.close(plain)

    def _find_alignment(self, wanted):
        cdef int64_t memory = 0, block = 0
        cdef int code
        if wanted is not None and (wanted < 1 or wanted > FCBW_ALIGNMENT_MAX or wanted & (wanted - 1)):
            raise ValueError(f"alignment: {wanted} is no power of two of 1 to {FCBW_ALIGNMENT_MAX}")
        code = fcbw_direct_alignment(self.fd, self.in_memory, &memory, &block)
        if code == -EOPNOTSUPP:
            _lacks(self.path, "the kernel says that it has no direct I/O for it")
        if code:
            raise OSError(-code, f"direct: its alignment cannot be found out: {_os.strerror(-code)}", self.path)
        if max(memory, block) > FCBW_ALIGNMENT_MAX:
            _lacks(self.path, f"it wants an alignment of {max(memory, block)}, more than {FCBW_ALIGNMENT_MAX}")
        self.memory_alignment = memory
        self.alignment = max(block, wanted or 1)
        self.grain = max(self.alignment, _os.sysconf("SC_PAGE_SIZE"), self._file_system_block())
        self.direct_end = self.length
        if self.length % self.alignment:
            self.direct_end = self.length - self.length % self.grain
            self.edge_fd = _os.open(f"/proc/self/fd/{self.fd}",
                                    (_os.O_RDONLY if self.read_only else _os.O_RDWR) | _os.O_CLOEXEC)

    def _file_system_block(self):
        block = _os.fstatvfs(self.fd).f_bsize
        return block if block & (block - 1) == 0 and block <= FCBW_ALIGNMENT_MAX else FCBW_ALIGNMENT_MAX

    def __dealloc__(self):
        cdef int i
        for i in range(BOUNCE_BUFFERS):
            free(self.bounces[i])
        if self.ready:
            pthread_cond_destroy(&self.returned)
            pthread_cond_destroy(&self.ended)
            pthread_mutex_destroy(&self.mutex)
        if self.ready and self.edge_fd >= 0:
            try:
                _os.close(self.edge_fd)
            except (OSError, AttributeError, TypeError):    # the interpreter is going down
                pass

    def close(self):
        """Close the file and with it drop the image locks. Closing twice is no error. The caller has ended all requests."""
        cdef int fd = self.edge_fd
        self.edge_fd = -1
        if fd >= 0:
            _os.close(fd)
        FileDevice.close(self)

    # -- the writes under way

    cdef void begin_write(self, WriteRange *mine, int64_t offset, int64_t length, bint exclusive) noexcept nogil:
        cdef WriteRange *other
        mine.first = offset
        mine.end = offset + length
        mine.exclusive = exclusive
        mine.later = NULL
        pthread_mutex_lock(&self.mutex)
        mine.earlier = self.newest
        if self.newest != NULL:
            self.newest.later = mine
        else:
            self.oldest = mine
        self.newest = mine
        # Turns go by arrival: who came earlier, waiting or not, is waited for; who comes later does not get in between.
        other = mine.earlier
        while other != NULL:
            if other.first < mine.end and mine.first < other.end and (exclusive or other.exclusive):
                pthread_cond_wait(&self.ended, &self.mutex)
                other = mine.earlier
            else:
                other = other.earlier
        pthread_mutex_unlock(&self.mutex)

    cdef bint try_begin_write(self, WriteRange *mine, int64_t offset, int64_t length) noexcept nogil:
        cdef WriteRange *other
        mine.first = offset
        mine.end = offset + length
        mine.exclusive = False
        mine.later = NULL
        pthread_mutex_lock(&self.mutex)
        other = self.newest
        while other != NULL and not (other.exclusive and other.first < mine.end and mine.first < other.end):
            other = other.earlier
        if other == NULL:
            mine.earlier = self.newest
            if self.newest != NULL:
                self.newest.later = mine
            else:
                self.oldest = mine
            self.newest = mine
        pthread_mutex_unlock(&self.mutex)
        return other == NULL

    cdef void end_write(self, WriteRange *mine) noexcept nogil:
        pthread_mutex_lock(&self.mutex)
        if mine.earlier != NULL:
            mine.earlier.later = mine.later
        else:
            self.oldest = mine.later
        if mine.later != NULL:
            mine.later.earlier = mine.earlier
            pthread_cond_broadcast(&self.ended)     # only who came later can be waiting for this one
        else:
            self.newest = mine.earlier
        pthread_mutex_unlock(&self.mutex)

    # -- bounce buffers

    cdef char *take_bounce(self) noexcept nogil:
        """Return a buffer of BOUNCE_BYTES, when there is one; NULL when there is no memory for the first of them."""
        cdef void *made = NULL
        cdef int i
        pthread_mutex_lock(&self.mutex)
        while True:
            for i in range(BOUNCE_BUFFERS):
                if self.bounces_taken >> i & 1:
                    continue
                if self.bounces[i] == NULL:
                    if posix_memalign(&made, FCBW_ALIGNMENT_MAX, BOUNCE_BYTES) != 0:
                        break
                    self.bounces[i] = <char *>made
                self.bounces_taken |= <uint32_t>1 << i
                pthread_mutex_unlock(&self.mutex)
                return self.bounces[i]
            if self.bounces_taken == 0:
                pthread_mutex_unlock(&self.mutex)
                return NULL
            pthread_cond_wait(&self.returned, &self.mutex)

    cdef void return_bounce(self, char *buffer) noexcept nogil:
        cdef int i
        pthread_mutex_lock(&self.mutex)
        for i in range(BOUNCE_BUFFERS):
            if self.bounces[i] == buffer:
                self.bounces_taken &= ~(<uint32_t>1 << i)
        pthread_cond_signal(&self.returned)
        pthread_mutex_unlock(&self.mutex)

    # -- data plane: reads

    cdef bint straight(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        """Whether a request may go to the device as it is."""
        return ((offset | length) & (self.alignment - 1)) == 0 and offset + length <= self.direct_end \
            and fcbw_iov_aligned(vector, count, self.memory_alignment, self.alignment)

    cdef int read_failed(self, int code, int64_t offset, int64_t length) noexcept nogil:
        """The code to return for CODE: what ended inside a block of a shrunk file was asked to go on where it can't."""
        if code == -EINVAL and lseek(self.fd, 0, SEEK_END) < offset + length:
            return -EIO
        return code

    cdef int pread(self, void *buffer, int64_t offset, int64_t length) noexcept nogil:
        return BlockDevice.pread(self, buffer, offset, length)

    cdef int preadv(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        if self.straight(vector, count, offset, length):
            return self.read_failed(fcbw_preadv_all(self.fd, vector, count, offset, length), offset, length)
        return self.preadv_cut(vector, count, offset, length)

    cdef int preadv_nowait(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        return -EAGAIN      # there is nothing of it in memory

    cdef int pwritev_nowait(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        return -EAGAIN

    cdef bint may_wait(self, int operation) noexcept nogil:
        # On tmpfs as well: a part of a block waits for the writes under way there, and those of a queue end in its poll().
        return True

    cdef int preadv_cut(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        """Whole blocks into the bounce buffer, and what was asked for out of it; a body that is aligned goes straight."""
        cdef iovec part[PART_ENTRIES]
        cdef int64_t block = self.alignment, at = offset, end = offset + length, first, last, stop
        cdef int64_t body = (offset + block - 1) & ~(block - 1), body_end = least(end, self.direct_end) & ~(block - 1)
        cdef int n = 0, code = 0
        cdef char *bounce = NULL
        if body < body_end:
            n = fcbw_iov_slice(vector, count, body - offset, body_end - body, part, PART_ENTRIES)
            if n and not fcbw_iov_aligned(part, n, self.memory_alignment, block):
                n = 0
        while code == 0 and at < end:
            if n and at == body:
                code = self.read_failed(fcbw_preadv_all(self.fd, part, n, at, body_end - body), at, body_end - body)
                at = body_end
                continue
            if bounce == NULL:
                bounce = self.take_bounce()
                if bounce == NULL:
                    return -ENOMEM
            if at >= self.direct_end:       # at most a grain
                first = at
                last = stop = end
                code = fcbw_pread_all(self.edge_fd, bounce, first, last - first)
            else:
                first = at & ~(block - 1)
                last = least((end + block - 1) & ~(block - 1), self.direct_end)
                if n and at < body:
                    last = body
                last = least(last, first + BOUNCE_BYTES)
                stop = least(last, end)
                code = self.read_failed(fcbw_pread_all(self.fd, bounce, first, last - first), first, last - first)
            if code == 0:
                fcbw_iov_copy(False, bounce + (at - first), vector, count, at - offset, stop - at)
            at = stop
        if bounce != NULL:
            self.return_bounce(bounce)
        return code

    # -- data plane: writes

    cdef int pwrite(self, const void *buffer, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        return BlockDevice.pwrite(self, buffer, offset, length, flags)

    cdef int pwritev(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef WriteRange mine
        cdef int code
        if self.straight(vector, count, offset, length):
            self.begin_write(&mine, offset, length, False)
            code = FileDevice.pwritev(self, vector, count, offset, length, flags)
            self.end_write(&mine)
            return code
        code = self.pwritev_cut(vector, count, offset, length)
        if code == 0 and flags & FUA:
            return self.sync()
        return code

    cdef int pwritev_cut(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        """Head, body, tail, and what lies behind the last grain; one after the other, each on its own in the list."""
        cdef int64_t block = self.alignment, at = offset, end = offset + length, stop
        cdef int code = 0
        while code == 0 and at < end:
            if at >= self.direct_end:
                stop = end
                code = self.write_edge(vector, count, at - offset, at, stop - at)
            elif at & (block - 1) or end - at < block:
                stop = least((at & ~(block - 1)) + block, end)
                code = self.write_part(vector, count, at - offset, at, stop - at)
            else:
                stop = least(end, self.direct_end) & ~(block - 1)
                code = self.write_body(vector, count, at - offset, at, stop - at)
            at = stop
        return code

    cdef int write_part(self, const iovec *vector, int count, int64_t skip, int64_t offset, int64_t length) noexcept nogil:
        """Change LENGTH bytes at OFFSET, within one block."""
        cdef int64_t first = offset & ~(self.alignment - 1)
        cdef WriteRange mine
        cdef char *bounce
        cdef int code = -ENOMEM
        self.begin_write(&mine, first, self.alignment, True)
        bounce = self.take_bounce()
        if bounce != NULL:
            code = self.read_failed(fcbw_pread_all(self.fd, bounce, first, self.alignment), first, self.alignment)
            if code == 0:
                fcbw_iov_copy(True, bounce + (offset - first), vector, count, skip, length)
                code = fcbw_pwrite_all(self.fd, bounce, first, self.alignment)
            self.return_bounce(bounce)
        self.end_write(&mine)
        return code

    cdef int write_body(self, const iovec *vector, int count, int64_t skip, int64_t offset, int64_t length) noexcept nogil:
        """Write whole blocks: as they are, or what memory is not aligned by way of a bounce buffer."""
        cdef iovec part[PART_ENTRIES]
        cdef WriteRange mine
        cdef int64_t done = 0, piece
        cdef char *bounce
        cdef int n, code = 0
        n = fcbw_iov_slice(vector, count, skip, length, part, PART_ENTRIES)
        self.begin_write(&mine, offset, length, False)
        if n and fcbw_iov_aligned(part, n, self.memory_alignment, self.alignment):
            code = fcbw_pwritev_all(self.fd, part, n, offset, length)
        else:
            bounce = self.take_bounce()
            if bounce == NULL:
                code = -ENOMEM
            while code == 0 and done < length:
                piece = least(length - done, BOUNCE_BYTES)
                fcbw_iov_copy(True, bounce, vector, count, skip + done, piece)
                code = fcbw_pwrite_all(self.fd, bounce, offset + done, piece)
                done += piece
            if bounce != NULL:
                self.return_bounce(bounce)
        self.end_write(&mine)
        return code

    cdef int write_edge(self, const iovec *vector, int count, int64_t skip, int64_t offset, int64_t length) noexcept nogil:
        """Write behind the last grain, through the page cache, which keeps neighbours apart itself."""
        cdef char *bounce = self.take_bounce()
        cdef int code
        if bounce == NULL:
            return -ENOMEM
        fcbw_iov_copy(True, bounce, vector, count, skip, length)
        code = fcbw_pwrite_all(self.edge_fd, bounce, offset, length)
        self.return_bounce(bounce)
        return code

    # -- data plane: zeroes and discards. The kernel zeroes a part of a file system's block through its page cache; so it gets
    #    whole grains only.

    cdef int write_zeroes_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef int64_t end = offset + length
        cdef int64_t first = (offset + self.grain - 1) & ~(self.grain - 1), last = end & ~(self.grain - 1)
        cdef WriteRange mine
        cdef int code = 0
        if flags & FAST_ONLY and (first != offset or last != end):
            return -EOPNOTSUPP
        if last <= first:
            code = BlockDevice.write_zeroes_at(self, offset, length, 0)
        else:
            self.begin_write(&mine, first, last - first, False)
            code = self.zero_by_kernel(first, last - first, flags)
            self.end_write(&mine)
            if code == -EOPNOTSUPP:
                code = BlockDevice.write_zeroes_at(self, first, last - first, flags & FAST_ONLY)
            if code == 0 and offset < first:
                code = BlockDevice.write_zeroes_at(self, offset, first - offset, 0)
            if code == 0 and last < end:
                code = BlockDevice.write_zeroes_at(self, last, end - last, 0)
        if code == 0 and flags & FUA:
            return self.sync()
        return code

    cdef int discard_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef int64_t first = (offset + self.grain - 1) & ~(self.grain - 1), last = (offset + length) & ~(self.grain - 1)
        cdef WriteRange mine
        cdef int code
        if last <= first:
            return BlockDevice.discard_at(self, offset, length, flags)
        self.begin_write(&mine, first, last - first, False)
        code = FileDevice.discard_at(self, first, last - first, flags)
        self.end_write(&mine)
        return code

    # -- data plane: for queues

    cdef bint queue_begin(self, int operation, const iovec *vector, int count, int64_t offset, int64_t length,
                          uint32_t flags, KernelIo *io) noexcept nogil:
        if operation == IO_READ or operation == IO_WRITE and not flags & FUA:
            if not self.straight(vector, count, offset, length):
                return False
            if operation == IO_WRITE and not self.try_begin_write(<WriteRange *>io.own, offset, length):
                return False
        return FileDevice.queue_begin(self, operation, vector, count, offset, length, flags, io)

    cdef int queue_end(self, int operation, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags,
                       KernelIo *io, int code) noexcept nogil:
        if operation == IO_WRITE:
            self.end_write(<WriteRange *>io.own)
        return FileDevice.queue_end(self, operation, vector, count, offset, length, flags, io, code)
