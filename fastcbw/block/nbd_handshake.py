"""The handshake of the NBD client device: from a URI to connected sockets in the transmission phase.

Fixed newstyle, NBD_OPT_GO. Structured replies and base:allocation are asked for and done without where the server has
neither. Block sizes are not asked for: a server that needs aligned requests then pads them itself, or refuses by name.
Source: NetworkBlockDevice/nbd, doc/proto.md.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from dataclasses import dataclass

from fastcbw.block.nbd_uri import NbdUri
from fastcbw.wire import constants as c

#: Seconds for connecting and the whole handshake of one connection.
DEADLINE_SECONDS = 10.0
_OPTION_REPLY_LENGTH_MAX = 64 << 10
_OPTION_REPLIES_MAX = 1024


@dataclass
class Negotiated:
    """A connection that is ready for requests. The socket blocks, and is the caller's to close."""

    sock: socket.socket
    length: int                     # bytes of the export
    flags: int                      # FLAG_* of the export
    payload_max: int                # bytes of one READ or WRITE that the server takes
    structured: bool
    allocation_context: int | None  # id of base:allocation

    @property
    def export(self) -> tuple[int, int, int]:
        """What every connection to one export must agree on."""
        return self.length, self.flags, self.payload_max


class _Refused(Exception):
    """An option was answered with an error."""

    def __init__(self, kind: int, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def negotiate(uri: NbdUri) -> Negotiated:
    """Connect to URI and negotiate. Raises OSError naming the URI and the reason; nothing is left open."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    try:
        sock = _connected(uri.address)
    except OSError as error:
        code = errno.EHOSTUNREACH if isinstance(error, socket.gaierror) else error.errno or errno.ETIMEDOUT
        raise _os_error(code, uri, f"cannot connect: {_reason(error)}") from None
    try:
        return _Handshake(sock, uri, deadline).run()
    except _Refused as refusal:
        raise _refusal(uri, refusal) from None
    except TimeoutError:
        raise _os_error(errno.ETIMEDOUT, uri, f"no answer within {DEADLINE_SECONDS:g} s of the handshake") from None
    except EOFError:
        raise _os_error(errno.ECONNRESET, uri, "the server closed the connection during the handshake") from None
    except (struct.error, _Nonsense) as error:
        raise _os_error(errno.EPROTO, uri, f"is served by something that does not speak NBD as it should: {error}") from None
    except OSError as error:
        raise _os_error(error.errno or errno.EIO, uri, f"handshake: {_reason(error)}") from None


class _Nonsense(Exception):
    """What the server sent makes no sense."""


def _os_error(code: int, uri: NbdUri, what: str) -> OSError:
    return OSError(code, f"{uri.text}: {what}")


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _refusal(uri: NbdUri, refusal: _Refused) -> OSError:
    words = f": {refusal}" if str(refusal) else ""
    if refusal.kind == c.REP_ERR_UNKNOWN:
        return _os_error(errno.ENOENT, uri, f"the server has no export {uri.export!r}{words}")
    if refusal.kind == c.REP_ERR_TLS_REQD:
        return _os_error(errno.EACCES, uri, f"the server wants TLS, which is not built yet{words}")
    if refusal.kind == c.REP_ERR_BLOCK_SIZE_REQD:
        return _os_error(errno.ENOTSUP, uri, f"the server takes only requests of its block size, which is not built yet{words}")
    if refusal.kind == c.REP_ERR_UNSUP:
        return _os_error(errno.ENOTSUP, uri, f"the server is too old: it does not know NBD_OPT_GO{words}")
    kinds = {c.REP_ERR_POLICY: "by its policy", c.REP_ERR_SHUTDOWN: "because it is shutting down"}
    return _os_error(errno.EACCES, uri, f"the server refuses {kinds.get(refusal.kind, f'with reply {refusal.kind:#x}')}{words}")


def _connected(address: str | tuple[str, int]) -> socket.socket:
    if isinstance(address, tuple):
        sock = socket.create_connection(address, DEADLINE_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return sock
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(DEADLINE_SECONDS)
        sock.connect(os.fspath(address))
    except BaseException:
        sock.close()
        raise
    return sock


class _Handshake:
    """One handshake on SOCK, which it closes unless run() returns."""

    def __init__(self, sock: socket.socket, uri: NbdUri, deadline: float) -> None:
        self.sock = sock
        self.name = uri.export.encode()
        self.deadline = deadline

    def run(self) -> Negotiated:
        try:
            self.greet()
            structured = self.structured_replies()
            context = self.allocation_context() if structured else None
            length, flags, payload_max = self.go()
            self.sock.settimeout(None)
            return Negotiated(self.sock, length, flags, payload_max, structured, context)
        except BaseException:
            self.sock.close()
            raise

    def greet(self) -> None:
        magic, option_magic = struct.unpack(">QQ", self.receive(16))
        if magic != c.MAGIC:
            raise _Nonsense("its greeting is not NBD's")
        if option_magic != c.OPTION_MAGIC:
            raise _Nonsense("its handshake is the oldstyle one")
        (flags,) = struct.unpack(">H", self.receive(2))
        if not flags & c.FLAG_FIXED_NEWSTYLE:
            raise _Nonsense("its handshake is not the fixed newstyle one")
        self.send(struct.pack(">I", flags & (c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES)))

    def structured_replies(self) -> bool:
        try:
            self.option(c.OPT_STRUCTURED_REPLY)
        except _Refused as refusal:
            if refusal.kind == c.REP_ERR_TLS_REQD:
                raise
            return False
        return True

    def allocation_context(self) -> int | None:
        context = c.BASE_ALLOCATION.encode()
        query = struct.pack(">I", len(self.name)) + self.name + struct.pack(">II", 1, len(context)) + context
        try:
            replies = self.option(c.OPT_SET_META_CONTEXT, query)
        except _Refused as refusal:
            if refusal.kind == c.REP_ERR_UNKNOWN:
                raise
            return None
        for kind, data in replies:
            if kind == c.REP_META_CONTEXT and data[4:] == context:
                return struct.unpack_from(">I", data)[0]
        return None

    def go(self) -> tuple[int, int, int]:
        replies = self.option(c.OPT_GO, struct.pack(">I", len(self.name)) + self.name + struct.pack(">H", 0))
        length, payload_max = None, c.PAYLOAD_LENGTH_MAX
        for kind, data in replies:
            if kind != c.REP_INFO:
                continue
            (what,) = struct.unpack_from(">H", data)
            if what == c.INFO_EXPORT:
                length, flags = struct.unpack(">QH", data[2:])
            elif what == c.INFO_BLOCK_SIZE:
                smallest, _, largest = struct.unpack(">III", data[2:])
                if smallest > 1:
                    raise _Refused(c.REP_ERR_BLOCK_SIZE_REQD, f"blocks of {smallest} bytes")
                if largest < 512:
                    raise _Nonsense(f"it takes no more than {largest} bytes")
                payload_max = min(largest, c.PAYLOAD_LENGTH_MAX)
        if length is None:
            raise _Nonsense("it does not tell the export's length")
        if not 0 < length < 1 << 63:
            raise _Nonsense(f"an export of {length} bytes (a device has at least one)")
        return length, flags, payload_max

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; return its replies before the final ACK. Raises _Refused when the final one is an error."""
        self.send(struct.pack(">QII", c.OPTION_MAGIC, option, len(data)) + data)
        replies = []
        while len(replies) < _OPTION_REPLIES_MAX:
            magic, to, kind, length = struct.unpack(">QIII", self.receive(20))
            if magic != c.OPTION_REPLY_MAGIC or to != option or length > _OPTION_REPLY_LENGTH_MAX:
                raise _Nonsense(f"an answer to option {option} that is none")
            body = self.receive(length)
            if kind == c.REP_ACK:
                return replies
            if kind & c.REP_FLAG_ERROR:
                raise _Refused(kind, body.decode(errors="replace").strip())
            replies.append((kind, body))
        raise _Nonsense(f"more than {_OPTION_REPLIES_MAX} answers to option {option}")

    def send(self, data: bytes) -> None:
        self.arm()
        self.sock.sendall(data)

    def receive(self, length: int) -> bytes:
        data = bytearray(length)
        view = memoryview(data)
        while view:
            self.arm()
            got = self.sock.recv_into(view)
            if not got:
                raise EOFError
            view = view[got:]
        return bytes(data)

    def arm(self) -> None:
        """Give the next socket call what is left of the time."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.sock.settimeout(left)
