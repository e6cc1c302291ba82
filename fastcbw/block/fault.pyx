"""FaultDevice: a filter that counts what passes and fails what a rule names; all else is the child's.

Rules are made and removed live, from any thread. A request that a rule fails does not reach the child. Several rules
may match: each counts the request, the first that is due gives the error.
"""

from libc.errno cimport EAGAIN
from libc.stdint cimport int64_t, uint32_t, uint64_t

import errno as _errno

from fastcbw.block.device import engine_number as _engine_number
from fastcbw.block.device cimport BlockDevice, ENGINE_SYNC, FUA, IO_READ, IO_SYNC, IO_WRITE, KernelIo
from fastcbw.block.filter cimport Filter
from fastcbw.block.sys cimport iovec
from fastcbw.kernels.atomic cimport add_relaxed, add_seq, load_relaxed, load_seq, store_relaxed, sub_seq
from fastcbw.sync cimport now_ns, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, sleep_ns

cdef enum:
    READ = 0
    WRITE = 1
    ZERO = 2
    DISCARD = 3
    FLUSH = 4
    STATUS = 5

ERRNO_MAX = 4095
STALL_MS_MAX = 3_600_000
cdef int64_t STALL_POLL_NS = 10000000
RULES_LIMIT = RULES_MAX
OPERATION_NAMES = ("read", "write", "zero", "discard", "flush", "status")


cdef class FaultDevice(Filter):
    """CHILD, failing where told. Closing it closes the child.

    io: the engine of queues for this device; None: the child's. Rules that stall do so in the thread of the request.
    """

    def __cinit__(self, BlockDevice child not None, *, name=None, io=None):
        self.stand_on(child, name)
        self.queueable, self.io_engine, self.always_waits = child.queueable, child.io_engine, child.always_waits
        if io is not None:
            self.io_engine = _engine_number(io)
            self.queueable = self.io_engine != ENGINE_SYNC
        pthread_mutex_init(&self.mutex, NULL)
        self.ready = True

    def __dealloc__(self):
        if self.ready:
            pthread_mutex_destroy(&self.mutex)

    # -- control plane

    def fail_on(self, operation, int64_t offset=0, length=None, *, int errno=_errno.EIO, int64_t count=-1,
                int64_t after=0, int64_t after_bytes=0, double stall_ms=0):
        """Fail requests of OPERATION that touch a range (default: all) with ERRNO, and return the Rule.

        operation: "read", "write", "zero", "discard", "flush" (touches every range) or "status".
        count: how many to fail, -1 for all from then on; after: how many matching ones pass before; after_bytes: as many bytes as
        matching ones may move before, all together: a disk that fills up. stall_ms: they wait that long first, and with an errno of 0 go on.
        Raises ValueError for what makes no sense, RuntimeError when RULES_MAX rules are in use.
        """
        cdef Rule rule
        cdef int64_t end = self.length if length is None else offset + length
        cdef int i, kind, found = -1
        if operation not in OPERATION_NAMES:
            raise ValueError(f"operation: {operation!r} does not exist (there are {', '.join(OPERATION_NAMES)})")
        kind = OPERATION_NAMES.index(operation)
        self.check_range(offset, end - offset)
        if errno < 0 or errno > ERRNO_MAX or (errno == 0 and not stall_ms):
            raise ValueError(f"errno: {errno} is no error number")
        if count < -1 or after < 0 or after_bytes < 0:
            raise ValueError(f"count, after, after_bytes: {count}, {after}, {after_bytes}: expected a count of -1 or more, the others 0 or more")
        if not 0 <= stall_ms <= STALL_MS_MAX:
            raise ValueError(f"stall_ms: {stall_ms} is not within 0 to {STALL_MS_MAX}")
        pthread_mutex_lock(&self.mutex)
        for i in range(RULES_MAX):
            if not self.rules[i].used:
                found = i
                self.rules[i].used = True
                self.rules[i].operation = kind
                self.rules[i].code = errno
                self.rules[i].offset = offset
                self.rules[i].end = end
                self.rules[i].stall_ns = <int64_t>(stall_ms * 1e6)
                self.rules[i].skip = after
                self.rules[i].skip_bytes = after_bytes
                self.rules[i].left = count
                self.rules[i].hits = 0
                add_seq(&self.rules_used, 1)
                break
        pthread_mutex_unlock(&self.mutex)
        if found < 0:
            raise RuntimeError(f"{self.name}: all {RULES_MAX} rules are in use")
        rule = Rule.__new__(Rule)
        rule.device = self
        rule.index = found
        return rule

    @property
    def requests(self):
        """Requests seen since reset_counts(): dict operation -> number; "fua": the writes, zeroes, discards that had it.

        A read without waiting counts when the child had the data, so that a request counts once.
        """
        cdef int i
        counts = {OPERATION_NAMES[i]: load_relaxed(&self.requests[i]) for i in range(FAULT_OPERATIONS)}
        counts["fua"] = load_relaxed(&self.fua_requests)
        return counts

    @property
    def bytes(self):
        """Bytes of the requests seen since reset_counts(): dict operation -> bytes."""
        cdef int i
        return {OPERATION_NAMES[i]: load_relaxed(&self.bytes[i]) for i in range(FAULT_OPERATIONS)}

    def reset_counts(self):
        """Set the counters to zero. Requests in flight may count before or after."""
        cdef int i
        for i in range(FAULT_OPERATIONS):
            store_relaxed(&self.requests[i], 0)
            store_relaxed(&self.bytes[i], 0)
        store_relaxed(&self.fua_requests, 0)

    # -- data plane

    cdef int meet(self, int operation, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        """Count the request; 0, or the -errno it fails with."""
        cdef RuleState *rule
        cdef RuleState *stalling = NULL
        cdef int64_t until = 0
        cdef int i, code = 0
        add_relaxed(&self.requests[operation], 1)
        if operation != FLUSH:
            add_relaxed(&self.bytes[operation], <uint64_t>length)
        if flags & FUA:
            add_relaxed(&self.fua_requests, 1)
        if load_seq(&self.rules_used) == 0:
            return 0
        pthread_mutex_lock(&self.mutex)
        for i in range(RULES_MAX):
            rule = &self.rules[i]
            if not rule.used or rule.operation != operation or rule.left == 0:
                continue
            if operation != FLUSH and (offset >= rule.end or offset + length <= rule.offset):
                continue
            if rule.skip > 0:
                rule.skip -= 1
                continue
            if operation != FLUSH and rule.skip_bytes and rule.skip_bytes >= length:
                rule.skip_bytes -= length
                continue
            rule.skip_bytes = 0         # full is full, also for a smaller one
            if code == 0 and until == 0:
                code = -rule.code
                if rule.stall_ns:
                    stalling = rule
                    until = now_ns() + rule.stall_ns
                rule.hits += 1
                if rule.left > 0:
                    rule.left -= 1
        pthread_mutex_unlock(&self.mutex)
        if stalling != NULL:
            self.stall(stalling, until)
        return code

    cdef void stall(self, const RuleState *rule, int64_t until) noexcept nogil:
        """Sleep until then, or until the rule is removed."""
        cdef int64_t left = until - now_ns()
        cdef bint used = True
        while used and left > 0:
            sleep_ns(min(left, STALL_POLL_NS))
            left = until - now_ns()
            pthread_mutex_lock(&self.mutex)
            used = rule.used
            pthread_mutex_unlock(&self.mutex)

    cdef bint has_rule(self, int operation, int64_t offset, int64_t length) noexcept nogil:
        cdef int i
        cdef bint found = False
        if load_seq(&self.rules_used) == 0:
            return False
        pthread_mutex_lock(&self.mutex)
        for i in range(RULES_MAX):
            if self.rules[i].used and self.rules[i].operation == operation and self.rules[i].left != 0 \
                    and offset < self.rules[i].end and offset + length > self.rules[i].offset:
                found = True
        pthread_mutex_unlock(&self.mutex)
        return found

    cdef int preadv(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        cdef int code = self.meet(READ, offset, length, 0)
        return code if code else self.child.preadv(vector, count, offset, length)

    cdef int preadv_nowait(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        """Where a rule watches, the caller is sent to preadv, so that the rule meets the request once."""
        cdef int code
        if self.has_rule(READ, offset, length):
            return -EAGAIN
        code = self.child.preadv_nowait(vector, count, offset, length)
        if code != -EAGAIN:
            add_relaxed(&self.requests[READ], 1)
            add_relaxed(&self.bytes[READ], <uint64_t>length)
        return code

    cdef int pwritev(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef int code = self.meet(WRITE, offset, length, flags)
        return code if code else self.child.pwritev(vector, count, offset, length, flags)

    cdef int write_zeroes_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef int code = self.meet(ZERO, offset, length, flags)
        return code if code else self.child.write_zeroes_at(offset, length, flags)

    cdef int discard_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef int code = self.meet(DISCARD, offset, length, flags)
        return code if code else self.child.discard_at(offset, length, flags)

    cdef int sync(self) noexcept nogil:
        cdef int code = self.meet(FLUSH, 0, self.length, 0)
        return code if code else self.child.sync()

    cdef int pwritev_nowait(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef int code
        if self.has_rule(WRITE, offset, length):
            return -EAGAIN if self.queueable else self.pwritev(vector, count, offset, length, flags)
        code = self.child.pwritev_nowait(vector, count, offset, length, flags)
        if code != -EAGAIN:
            self.note(WRITE, length, flags)
        return code

    cdef bint may_wait(self, int operation) noexcept nogil:
        return self.child.may_wait(operation)

    cdef void note(self, int operation, int64_t length, uint32_t flags) noexcept nogil:
        add_relaxed(&self.requests[operation], 1)
        if operation != FLUSH:
            add_relaxed(&self.bytes[operation], <uint64_t>length)
        if flags & FUA:
            add_relaxed(&self.fua_requests, 1)

    cdef bint queue_begin(self, int operation, const iovec *vector, int count, int64_t offset, int64_t length,
                          uint32_t flags, KernelIo *io) noexcept nogil:
        """As preadv_nowait: where a rule watches, the method meets it. The kernel is asked what the child would ask."""
        cdef int kind = READ if operation == IO_READ else WRITE if operation == IO_WRITE else FLUSH
        if self.has_rule(kind, 0 if kind == FLUSH else offset, self.length if kind == FLUSH else length):
            return False
        if not self.child.queue_begin(operation, vector, count, offset, length, flags, io):
            return False
        self.note(kind, length, flags)
        return True

    cdef int64_t block_status(self, int64_t offset, int64_t length, uint32_t *flags) noexcept nogil:
        cdef int code = self.meet(STATUS, offset, length, 0)
        return code if code else self.child.block_status(offset, length, flags)


cdef class Rule:
    """A rule of a FaultDevice; made by fail_on(). Lasts until remove(), the end of a `with` block, or the device's end."""

    def __init__(self):
        raise TypeError("a Rule is made by FaultDevice.fail_on()")

    @property
    def hits(self):
        """Requests that the rule has failed."""
        cdef int64_t hits
        if self.index < 0:
            return self.hits_last
        pthread_mutex_lock(&self.device.mutex)
        hits = self.device.rules[self.index].hits
        pthread_mutex_unlock(&self.device.mutex)
        return hits

    def remove(self):
        """End the rule. Removing twice is no error."""
        cdef RuleState *rule
        if self.index < 0:
            return
        rule = &self.device.rules[self.index]
        self.index = -1
        pthread_mutex_lock(&self.device.mutex)
        self.hits_last = rule.hits
        rule.used = False
        sub_seq(&self.device.rules_used, 1)
        pthread_mutex_unlock(&self.device.mutex)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.remove()
