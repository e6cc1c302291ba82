"""DelayDevice: a filter that makes requests late or holds them at a gate, all else is the child's.

Delays, a bandwidth limit and gates are set live, from any thread. A gate is how a test puts a request to sleep at a
known place without a sleep of its own: hold, let the other threads run, wait_arrived, look, open. Waiting is done
without the interpreter lock, in the thread of the request.
"""

cimport cython
from libc.errno cimport EAGAIN, ETIMEDOUT
from libc.stdint cimport int64_t, uint32_t, uint64_t

from fastcbw.block.device import engine_number as _engine_number
from fastcbw.block.device cimport BlockDevice, IO_DISCARD, IO_READ, IO_SYNC, IO_WRITE
from fastcbw.block.filter cimport Filter
from fastcbw.block.sys cimport iovec
from fastcbw.kernels.atomic cimport add_seq, load_relaxed, load_seq, store_relaxed, sub_seq
from fastcbw.sync cimport (
    cond_init, cond_wait_until, now_ns, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_wait,
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, sleep_ns,
)

cdef enum:
    READ = 0
    WRITE = 1
    ZERO = 2
    DISCARD = 3
    FLUSH = 4

OPERATION_NAMES = ("read", "write", "zero", "discard", "flush")

cdef void sleep_until(int64_t ns) noexcept nogil:
    """Sleep until the monotonic clock reads NS; signals don't shorten it."""
    cdef int64_t left = ns - now_ns()
    while left > 0:
        sleep_ns(left)
        left = ns - now_ns()


def _operation(name):
    """Return the index of operation NAME, or raise ValueError naming what exists."""
    try:
        return OPERATION_NAMES.index(name)
    except ValueError:
        raise ValueError(f"operation: {name!r} does not exist (there are {', '.join(OPERATION_NAMES)})") from None


cdef class DelayDevice(Filter):
    """CHILD, later.

    read_ms, write_ms, zero_ms, discard_ms, flush_ms: what each request of that kind waits before it goes to the child.
    bytes_per_s: limit for reads and writes together, 0 = none; requests wait after the child, as for a slow link.
    offset, length: only requests that touch this range are late (a flush always is); default: all.
    io: the engine of queues for this device; with "sync" (default) none may have its requests done by other threads.
    Everything but io can be changed live by set(). Closing it opens all gates and closes the child.
    """

    def __cinit__(self, BlockDevice child not None, *, read_ms=0, write_ms=0, zero_ms=0, discard_ms=0, flush_ms=0,
                  bytes_per_s=0, offset=0, length=None, name=None, str io="sync"):
        self.io_engine = _engine_number(io)
        self.queueable = self.io_engine != 0
        self.stand_on(child, name)
        pthread_mutex_init(&self.mutex, NULL)
        cond_init(&self.changed)
        self.ready = True
        self.end_byte = <uint64_t>child.length
        self.set(read_ms=read_ms, write_ms=write_ms, zero_ms=zero_ms, discard_ms=discard_ms, flush_ms=flush_ms,
                 bytes_per_s=bytes_per_s, offset=offset, length=length)

    def __dealloc__(self):
        if self.ready:
            pthread_cond_destroy(&self.changed)
            pthread_mutex_destroy(&self.mutex)

    # -- control plane

    def set(self, *, read_ms=None, write_ms=None, zero_ms=None, discard_ms=None, flush_ms=None, bytes_per_s=None,
            offset=None, length=None):
        """Change what is given, from the next request on. The range changes when OFFSET is given (LENGTH None: to the end)."""
        cdef int i
        values = (read_ms, write_ms, zero_ms, discard_ms, flush_ms)
        for name, value in zip((*(f"{operation}_ms" for operation in OPERATION_NAMES), "bytes_per_s"), (*values, bytes_per_s)):
            if value is not None and value < 0:
                raise ValueError(f"{name}: {value} is negative")
        if offset is not None:
            end = self.length if length is None else offset + length
            if not 0 <= offset <= end <= self.length:
                raise ValueError(f"offset, length: {offset}+{length} is not within the device's {self.length} bytes")
        elif length is not None:
            raise ValueError("length: given without an offset")
        for i in range(OPERATIONS):
            if values[i] is not None:
                store_relaxed(&self.delay_ns[i], <uint64_t>int(values[i] * 1000000))
        if bytes_per_s is not None:
            store_relaxed(&self.bytes_per_s, <uint64_t>int(bytes_per_s))
        if offset is not None:
            store_relaxed(&self.first_byte, <uint64_t>offset)
            store_relaxed(&self.end_byte, <uint64_t>end)

    def hold(self, operation, int64_t offset=0, length=None, *, bint after=False):
        """Close a gate for requests of OPERATION that touch a range (default: all), and return it.

        operation: "read", "write", "zero", "discard" or "flush" (a flush touches every range).
        after: hold them between the child's answer and the return, not before the child.
        The gate is held until open(), the end of its `with` block, or its last reference goes.
        Raises RuntimeError when GATES_MAX gates are in use.
        """
        cdef Gate gate
        cdef int kind = _operation(operation)
        cdef int64_t end = self.length if length is None else offset + length
        cdef int i, found = -1
        self.check_range(offset, end - offset)
        pthread_mutex_lock(&self.mutex)
        for i in range(GATES_MAX):
            if not self.gates[i].used:
                found = i
                self.gates[i].used = True
                self.gates[i].held = True
                self.gates[i].after = after
                self.gates[i].operation = kind
                self.gates[i].offset = offset
                self.gates[i].end = end
                self.gates[i].arrived = 0
                self.gates[i].waiting = 0
                add_seq(&self.gates_held, 1)
                break
        pthread_mutex_unlock(&self.mutex)
        if found < 0:
            raise RuntimeError(f"{self.name}: all {GATES_MAX} gates are in use")
        gate = Gate.__new__(Gate)
        gate.device = self
        gate.index = found
        return gate

    def open_all(self):
        """Open every gate, also those whose Gate is held elsewhere."""
        cdef int i
        pthread_mutex_lock(&self.mutex)
        for i in range(GATES_MAX):
            if self.gates[i].held:
                self.gates[i].held = False
                sub_seq(&self.gates_held, 1)
        pthread_cond_broadcast(&self.changed)
        pthread_mutex_unlock(&self.mutex)

    def close(self):
        """Open the gates and close the child."""
        self.closed = True
        self.open_all()
        self.child.close()

    # -- data plane

    cdef void pass_gates(self, int operation, int64_t offset, int64_t length, bint after) noexcept nogil:
        """Wait at each gate that the request meets, in their order. Looks again after a wait: gates come and go."""
        cdef GateState *gate
        cdef int i
        if load_seq(&self.gates_held) == 0:
            return
        pthread_mutex_lock(&self.mutex)
        for i in range(GATES_MAX):
            gate = &self.gates[i]
            if not gate.held or gate.after != after or gate.operation != operation:
                continue
            if operation != FLUSH and (offset >= gate.end or offset + length <= gate.offset):
                continue
            gate.arrived += 1
            gate.waiting += 1
            pthread_cond_broadcast(&self.changed)
            while gate.held:
                pthread_cond_wait(&self.changed, &self.mutex)
            gate.waiting -= 1
            pthread_cond_broadcast(&self.changed)
        pthread_mutex_unlock(&self.mutex)

    cdef void before(self, int operation, int64_t offset, int64_t length) noexcept nogil:
        cdef uint64_t delay = load_relaxed(&self.delay_ns[operation])
        self.pass_gates(operation, offset, length, False)
        if delay and (operation == FLUSH or (offset < <int64_t>load_relaxed(&self.end_byte)
                                             and offset + length > <int64_t>load_relaxed(&self.first_byte))):
            sleep_until(now_ns() + <int64_t>delay)

    cdef void after(self, int operation, int64_t offset, int64_t length) noexcept nogil:
        cdef uint64_t rate
        cdef int64_t until, now
        if operation == READ or operation == WRITE:
            rate = load_relaxed(&self.bytes_per_s)
            if rate and offset < <int64_t>load_relaxed(&self.end_byte) \
                    and offset + length > <int64_t>load_relaxed(&self.first_byte):
                now = now_ns()
                pthread_mutex_lock(&self.mutex)
                if self.free_ns < now:
                    self.free_ns = now
                self.free_ns += <int64_t>(<double>length * 1e9 / <double>rate)
                until = self.free_ns
                pthread_mutex_unlock(&self.mutex)
                sleep_until(until)
        self.pass_gates(operation, offset, length, True)

    cdef bint would_wait(self, int operation, int64_t offset, int64_t length) noexcept nogil:
        """Whether a request for the range would be late or held."""
        cdef int i
        cdef bint held = False
        if load_relaxed(&self.delay_ns[operation]) or load_relaxed(&self.bytes_per_s):
            if offset < <int64_t>load_relaxed(&self.end_byte) and offset + length > <int64_t>load_relaxed(&self.first_byte):
                return True
        if load_seq(&self.gates_held) == 0:
            return False
        pthread_mutex_lock(&self.mutex)
        for i in range(GATES_MAX):
            if self.gates[i].held and self.gates[i].operation == operation \
                    and offset < self.gates[i].end and offset + length > self.gates[i].offset:
                held = True
        pthread_mutex_unlock(&self.mutex)
        return held

    cdef int preadv(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        cdef int code
        self.before(READ, offset, length)
        code = self.child.preadv(vector, count, offset, length)
        self.after(READ, offset, length)
        return code

    cdef int preadv_nowait(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        if self.would_wait(READ, offset, length):
            return -EAGAIN
        return self.child.preadv_nowait(vector, count, offset, length)

    cdef int pwritev_nowait(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        if not self.queueable:
            return self.pwritev(vector, count, offset, length, flags)
        if self.would_wait(WRITE, offset, length):
            return -EAGAIN
        return self.child.pwritev_nowait(vector, count, offset, length, flags)

    cdef bint may_wait(self, int operation) noexcept nogil:
        cdef int kind = READ
        if operation == IO_WRITE:
            kind = WRITE
        elif operation == IO_SYNC:
            kind = FLUSH
        elif operation != IO_READ:
            kind = DISCARD if operation == IO_DISCARD else ZERO
        return self.queueable and (self.would_wait(kind, 0, self.length) or self.child.may_wait(operation))

    cdef int pwritev(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef int code
        self.before(WRITE, offset, length)
        code = self.child.pwritev(vector, count, offset, length, flags)
        self.after(WRITE, offset, length)
        return code

    cdef int write_zeroes_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef int code
        self.before(ZERO, offset, length)
        code = self.child.write_zeroes_at(offset, length, flags)
        self.after(ZERO, offset, length)
        return code

    cdef int discard_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef int code
        self.before(DISCARD, offset, length)
        code = self.child.discard_at(offset, length, flags)
        self.after(DISCARD, offset, length)
        return code

    cdef int sync(self) noexcept nogil:
        cdef int code
        self.before(FLUSH, 0, self.length)
        code = self.child.sync()
        self.after(FLUSH, 0, self.length)
        return code


@cython.no_gc_clear     # __dealloc__ needs the device
cdef class Gate:
    """A closed gate of a DelayDevice; made by hold(). Opens at the end of a `with` block."""

    def __init__(self):
        raise TypeError("a Gate is made by DelayDevice.hold()")

    @property
    def arrived(self):
        """Requests that came to the gate while it was held."""
        cdef int64_t arrived
        if self.index < 0:
            return self.arrived_last
        pthread_mutex_lock(&self.device.mutex)
        arrived = self.device.gates[self.index].arrived
        pthread_mutex_unlock(&self.device.mutex)
        return arrived

    def wait_arrived(self, int64_t n=1, double timeout=10):
        """Return when N requests have come to the gate; TimeoutError after TIMEOUT seconds."""
        cdef DelayDevice device = self.device
        cdef int64_t until
        cdef int index = self.index
        cdef int code = 0
        cdef int64_t arrived = self.arrived_last
        if index >= 0:
            until = now_ns() + <int64_t>(timeout * 1e9)
            with nogil:
                pthread_mutex_lock(&device.mutex)
                while device.gates[index].arrived < n and code != ETIMEDOUT:
                    code = cond_wait_until(&device.changed, &device.mutex, until)
                arrived = device.gates[index].arrived
                pthread_mutex_unlock(&device.mutex)
        if arrived < n:
            raise TimeoutError(f"{device.name}: {arrived} of {n} requests came to the gate within {timeout} s")

    def open(self):
        """Let everybody through, and return when those who waited have left. Opening twice is no error."""
        with nogil:
            self.let_go()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.open()

    def __dealloc__(self):
        self.let_go()       # a gate that nobody can open any more must not hold anybody

    cdef void let_go(self) noexcept nogil:
        cdef GateState *gate
        if self.index < 0 or self.device is None:
            return
        gate = &self.device.gates[self.index]
        self.index = -1
        pthread_mutex_lock(&self.device.mutex)
        self.arrived_last = gate.arrived
        if gate.held:
            gate.held = False
            sub_seq(&self.device.gates_held, 1)
        pthread_cond_broadcast(&self.device.changed)
        while gate.waiting > 0:     # they are on their way out: they need only the mutex
            pthread_cond_wait(&self.device.changed, &self.device.mutex)
        gate.used = False
        pthread_mutex_unlock(&self.device.mutex)
