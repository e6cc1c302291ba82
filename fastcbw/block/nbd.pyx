"""NbdDevice: an export of an NBD server as a device, so that a URI can be a disk, a source or a target.

A leaf of the data plane. It cuts requests to what the server takes, chooses a connection for each piece (the one with the fewest
requests under way, the first of equals: a lone thread stays on one, and N threads spread over N) and translates flags;
block/nbd_connection does the rest. Payloads go straight between the caller's buffers and the socket.

Invariants. A connection that dies takes the others with it: what was acknowledged on it and not flushed may be lost,
so to go on would be a lie; there is no reconnecting. Every later request fails with the first reason. FUA is a
flag where the server has it, else a write and a flush. A flush goes over one connection when the server promises
(CAN_MULTI_CONN) that it covers them all, else over each.
"""

from libc.errno cimport EIO
from libc.stdint cimport int64_t, uint32_t
from libc.stdio cimport snprintf

import errno as _errno

from fastcbw.block.nbd_connection import SLOTS as _SLOTS
from fastcbw.block.nbd_handshake import negotiate as _negotiate
from fastcbw.block.nbd_uri import parse_nbd_uri as _parse_nbd_uri
from fastcbw.units import parse_size as _parse_size
from fastcbw.wire import constants as _c

from fastcbw.block.device cimport BlockDevice, ENGINE_THREADS, FAST_ONLY, FUA, MAY_UNMAP, STATUS_HOLE, STATUS_ZERO
from fastcbw.block.nbd_connection cimport REASON_LENGTH, Cursor, NbdConnection
from fastcbw.block.sys cimport iovec
from fastcbw.kernels.atomic cimport load32_acquire, load32_relaxed
from fastcbw.sync cimport pthread_mutex_lock, pthread_mutex_unlock
from fastcbw.wire.constants cimport (
    CMD_BLOCK_STATUS, CMD_FLAG_FAST_ZERO, CMD_FLAG_FUA, CMD_FLAG_NO_HOLE, CMD_FLAG_REQ_ONE, CMD_FLUSH, CMD_READ, CMD_TRIM,
    CMD_WRITE, CMD_WRITE_ZEROES, FLAG_CAN_MULTI_CONN, FLAG_SEND_FAST_ZERO, FLAG_SEND_FLUSH, FLAG_SEND_FUA, FLAG_SEND_TRIM,
    FLAG_SEND_WRITE_ZEROES)

cdef extern from "<errno.h>" nogil:
    int EOPNOTSUPP

#: Connections that are made when the server promises that several are as good as one.
CONNECTIONS_DEFAULT = 4

# Bytes of one request without a payload. The protocol has 32 bits; servers stop at 2 GiB.
cdef int64_t WITHOUT_DATA_MAX = 1 << 30


cdef class NbdDevice(BlockDevice):
    """The export that URI names.

    uri: nbd://HOST[:PORT]/NAME or nbd+unix:///NAME?socket=PATH.
    read_only: refuse writes; without it the server must take them.
    connections: 1 to 16; default: 4 where the server promises CAN_MULTI_CONN, else 1.
    requests: 1 to 64, in_flight: bytes or a size with a suffix; bounds of what is under way on each connection.
    timeout: seconds that a request may take before the connection is given up with ETIMEDOUT; None: for ever.
    name: for messages; default: the URI.

    Raises ValueError for arguments and for a URI that makes no sense or is not built; OSError with the URI for a server that is not
    there or refuses; PermissionError for a read-only export without read_only. Nothing is left open.
    """

    def __cinit__(self, uri, *, bint read_only=False, connections=None, int requests=16, in_flight="16M", timeout=None,
                  str name=None):
        cdef NbdConnection connection
        self.uri_parts = _parse_nbd_uri(uri)
        self.uri = uri
        self.name = uri if name is None else name
        self.read_only = read_only
        if connections is not None and not 1 <= connections <= CONNECTIONS_MAX:
            raise ValueError(f"connections: {connections} is not within 1 to {CONNECTIONS_MAX}")
        if not 1 <= requests <= _SLOTS:
            raise ValueError(f"requests: {requests} is not within 1 to {_SLOTS}")
        in_flight = _parse_size(in_flight, "in_flight")
        if in_flight < 4096:
            raise ValueError(f"in_flight: {in_flight} bytes are less than 4096")
        if timeout is not None and not 0 < timeout <= 1e9:
            raise ValueError(f"timeout: {timeout} is no number of seconds above 0")
        made = []
        try:
            first = _negotiate(self.uri_parts)
            made.append(first)
            if first.flags & _c.FLAG_READ_ONLY and not read_only:
                raise PermissionError(_errno.EACCES, f"{uri}: the server exports it read-only (open it read-only)")
            if connections is None:
                connections = CONNECTIONS_DEFAULT if first.flags & _c.FLAG_CAN_MULTI_CONN else 1
            while len(made) < connections:
                made.append(_negotiate(self.uri_parts))
                if made[-1].export != first.export:
                    raise OSError(_errno.EPROTO, f"{uri}: the server's export is another one on each connection")
            opened = []
            for other in made:
                connection = NbdConnection(
                    other.sock.fileno(), structured=other.structured, context=other.allocation_context, requests=requests,
                    bytes=in_flight, timeout_ns=0 if timeout is None else int(timeout * 1e9))
                other.sock.detach()
                self.connection[len(opened)] = <void *>connection
                opened.append(connection)
        except BaseException:
            for other in made:
                other.sock.close()      # nothing when it was detached: then the connection closes it
            raise
        self.owned = tuple(opened)
        self.connections = len(opened)
        self.length = first.length
        self.queueable = self.always_waits = True       # every request waits for the server
        self.io_engine = ENGINE_THREADS
        self.flags = first.flags
        self.structured = all(other.structured for other in made)
        self.has_status = all(other.allocation_context is not None for other in made)
        self.payload_max = first.payload_max

    def same_export(self, str uri):
        """Tell whether URI names the export that this device is, as far as names can tell."""
        return self.uri_parts.same_as(_parse_nbd_uri(uri))

    def close(self):
        """End the connections. Requests that are under way get ESHUTDOWN. Closing twice is no error."""
        cdef NbdConnection connection
        self.closed = True
        for connection in self.owned or ():
            connection.close()

    # -- data plane: which connection

    cdef int call(self, int kind, uint32_t flags, int64_t offset, int64_t length, const Cursor *data, int64_t *extent,
                  uint32_t *status) noexcept nogil:
        cdef uint32_t least = 0, load
        cdef int chosen = 0, i
        for i in range(self.connections):
            load = load32_relaxed(&(<NbdConnection>self.connection[i]).requests)
            if i == 0 or load < least:
                least = load
                chosen = i
            if least == 0:
                break
        return self.call_on(chosen, kind, flags, offset, length, data, extent, status)

    cdef int call_on(self, int which, int kind, uint32_t flags, int64_t offset, int64_t length, const Cursor *data,
                     int64_t *extent, uint32_t *status) noexcept nogil:
        cdef int code = (<NbdConnection>self.connection[which]).call(kind, flags, offset, length, data, extent, status)
        cdef int i
        if code and load32_acquire(&(<NbdConnection>self.connection[which]).dead):
            for i in range(self.connections):
                if i != which:
                    (<NbdConnection>self.connection[i]).kill(
                        (<NbdConnection>self.connection[which]).death_code, (<NbdConnection>self.connection[which]).death)
        return code

    # -- data plane: requests

    cdef int transfer(self, int kind, uint32_t flags, const Cursor *data, int64_t offset, int64_t length) noexcept nogil:
        """A READ or WRITE, in pieces that the server takes."""
        cdef Cursor rest = data[0]
        cdef int64_t piece = self.payload_max
        cdef size_t left, part
        cdef int code
        while True:
            if piece > length:
                piece = length
            code = self.call(kind, flags, offset, piece, &rest, NULL, NULL)
            offset += piece
            length -= piece
            if code or length == 0:
                return code
            left = <size_t>piece
            while left > 0:
                part = rest.entry.iov_len - rest.skip
                if part > left:
                    rest.skip += left
                    break
                left -= part
                rest.entry += 1
                rest.entries -= 1
                rest.skip = 0

    cdef int without_data(self, int kind, uint32_t flags, int64_t offset, int64_t length) noexcept nogil:
        """A request on any range that carries no payload, in pieces; the last one is durable for itself only, as each is."""
        cdef int64_t piece
        cdef int code = 0
        while length > 0 and code == 0:
            piece = length if length < WITHOUT_DATA_MAX else WITHOUT_DATA_MAX
            code = self.call(kind, flags, offset, piece, NULL, NULL, NULL)
            offset += piece
            length -= piece
        return code

    cdef int preadv(self, const iovec *vector, int count, int64_t offset, int64_t length) noexcept nogil:
        cdef Cursor data
        data.entry = vector
        data.entries = count
        data.skip = 0
        return self.transfer(CMD_READ, 0, &data, offset, length)

    cdef int pwritev(self, const iovec *vector, int count, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef Cursor data
        cdef bint by_flag = self.flags & FLAG_SEND_FUA
        cdef int code
        data.entry = vector
        data.entries = count
        data.skip = 0
        code = self.transfer(CMD_WRITE, CMD_FLAG_FUA if flags & FUA and by_flag else 0, &data, offset, length)
        if code == 0 and flags & FUA and not by_flag:
            code = self.sync()
        return code

    cdef int write_zeroes_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef bint by_flag = self.flags & FLAG_SEND_FUA
        cdef uint32_t wanted = 0
        cdef int code = -EOPNOTSUPP
        if flags & FAST_ONLY and not self.flags & FLAG_SEND_FAST_ZERO:
            return -EOPNOTSUPP
        if self.flags & FLAG_SEND_WRITE_ZEROES:
            if not flags & MAY_UNMAP:
                wanted |= CMD_FLAG_NO_HOLE
            if flags & FAST_ONLY:
                wanted |= CMD_FLAG_FAST_ZERO
            if flags & FUA and by_flag:
                wanted |= CMD_FLAG_FUA
            code = self.without_data(CMD_WRITE_ZEROES, wanted, offset, length)
        if code == -EOPNOTSUPP and not flags & FAST_ONLY:
            return BlockDevice.write_zeroes_at(self, offset, length, flags)
        if code == 0 and flags & FUA and not by_flag:
            code = self.sync()
        return code

    cdef int discard_at(self, int64_t offset, int64_t length, uint32_t flags) noexcept nogil:
        cdef bint by_flag = self.flags & FLAG_SEND_FUA
        cdef int code = 0
        if self.flags & FLAG_SEND_TRIM:
            code = self.without_data(CMD_TRIM, CMD_FLAG_FUA if flags & FUA and by_flag else 0, offset, length)
        if code == 0 and flags & FUA and not (by_flag and self.flags & FLAG_SEND_TRIM):
            code = self.sync()
        return code

    cdef int sync(self) noexcept nogil:
        cdef int code = 0
        cdef int i
        if not self.flags & FLAG_SEND_FLUSH:
            return 0                    # the protocol's way to say that there is nothing to flush
        if self.flags & FLAG_CAN_MULTI_CONN:
            return self.call(CMD_FLUSH, 0, 0, 0, NULL, NULL, NULL)
        for i in range(self.connections):
            code = self.call_on(i, CMD_FLUSH, 0, 0, 0, NULL, NULL, NULL)
            if code:
                break
        return code

    cdef int64_t block_status(self, int64_t offset, int64_t length, uint32_t *flags) noexcept nogil:
        cdef int64_t extent = 0
        cdef uint32_t status = 0
        cdef int code
        flags[0] = 0
        if not self.has_status:
            return length
        if length > WITHOUT_DATA_MAX:
            length = WITHOUT_DATA_MAX
        code = self.call(CMD_BLOCK_STATUS, CMD_FLAG_REQ_ONE, offset, length, NULL, &extent, &status)
        if code:
            return code
        flags[0] = status & (STATUS_HOLE | STATUS_ZERO)
        return extent if extent < length else length

    # -- errors

    cdef int explain(self, int code, char *text, size_t size) noexcept nogil:
        """The reason of a dead connection; else what the server said with the last error of this kind."""
        cdef char latest[REASON_LENGTH]
        cdef void *borrowed
        cdef int64_t latest_ns = -1
        cdef int i
        for i in range(self.connections):
            borrowed = self.connection[i]
            if load32_acquire(&(<NbdConnection>borrowed).dead) and (<NbdConnection>borrowed).death_code == code:
                snprintf(text, size, "the connection is lost: %s", (<NbdConnection>borrowed).death)
                return -code
            pthread_mutex_lock(&(<NbdConnection>borrowed).lock)
            if (<NbdConnection>borrowed).text_code == code and (<NbdConnection>borrowed).text_ns > latest_ns:
                latest_ns = (<NbdConnection>borrowed).text_ns
                snprintf(latest, sizeof(latest), "%s", (<NbdConnection>borrowed).text)
            pthread_mutex_unlock(&(<NbdConnection>borrowed).lock)
        if latest_ns < 0:
            return BlockDevice.explain(self, code, text, size)
        snprintf(text, size, "the server says: %s", latest)
        return -code

    cdef int fail(self, int code, str operation, int64_t offset, int64_t length) except -1:
        cdef char text[REASON_LENGTH + 64]
        self.explain(code, text, sizeof(text))
        raise OSError(-code, f"{self.name}: {operation} {offset}+{length}: {text.decode(errors='replace')}")
