"""A small synchronous NBD client in plain Python. Internal: for the tests and for the guest process of `fastcbw demo`.

One request at a time through read(), write() and so on; or many, and malformed ones, through send() and receive_reply().
Not fast and not public; a device behind an NBD URI is another thing. Importing it starts nothing and loads no extension.
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass, field

from fastcbw.wire import constants as c


class NbdError(OSError):
    """The server answered with an error: errno is the protocol's number, the text is the server's."""


class ProtocolError(Exception):
    """What the server sent makes no sense."""


@dataclass
class Reply:
    """A whole reply: the chunks of a structured one put together."""

    cookie: int
    error: int = 0
    message: str = ""
    error_offset: int | None = None
    data: list[tuple[int, bytes]] = field(default_factory=list)         # (offset, bytes)
    status: dict[int, list[tuple[int, int]]] = field(default_factory=dict)      # context id to (length, flags)
    chunks: int = 0


class Client:
    """A connection to EXPORT at ADDRESS (a socket path, (host, port), or a connected socket).

    structured: ask for structured replies. contexts: names of meta contexts to ask for. begin: False stops after
    the greeting, so that a test can negotiate by hand (option(), go()). timeout: seconds, of every socket operation.
    Raises OSError when the server is not there, NbdError when it refuses.
    """

    def __init__(self, address, export="", *, structured=True, contexts=(c.BASE_ALLOCATION,), begin=True, timeout=30.0):
        if isinstance(address, socket.socket):
            self.sock = address
        elif isinstance(address, tuple):
            self.sock = socket.create_connection(address, timeout)
        else:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                self.sock.settimeout(timeout)
                self.sock.connect(os.fspath(address))
            except BaseException:
                self.sock.close()
                raise
        self.sock.settimeout(timeout)
        self.structured = False
        self.contexts: dict[str, int] = {}
        self.length = 0
        self.flags = 0
        self.info: dict[int, bytes] = {}
        self._cookie = 0
        try:
            self._greet()
            if begin:
                if structured:
                    self.structured_replies()
                    if contexts:
                        self.set_meta_contexts(export, contexts)
                self.go(export)
        except BaseException:
            self.sock.close()
            raise

    # -- bytes

    def receive(self, length: int) -> bytes:
        """Receive exactly LENGTH bytes. Raises EOFError when the server closes before."""
        data = bytearray(length)
        view = memoryview(data)
        while view:
            got = self.sock.recv_into(view)
            if not got:
                raise EOFError(f"the server closed the connection, {len(view)} of {length} bytes were to come")
            view = view[got:]
        return bytes(data)

    # -- handshake

    def _greet(self) -> None:
        magic, option_magic, flags = struct.unpack(">QQH", self.receive(18))
        if magic != c.MAGIC or option_magic != c.OPTION_MAGIC or not flags & c.FLAG_FIXED_NEWSTYLE:
            raise ProtocolError("not a fixed newstyle server")
        self.sock.sendall(struct.pack(">I", flags & (c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES)))

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; return its replies (kind, data), the last is ACK or an error."""
        self.sock.sendall(struct.pack(">QII", c.OPTION_MAGIC, option, len(data)) + data)
        replies = []
        while True:
            magic, to, kind, length = struct.unpack(">QIII", self.receive(20))
            if magic != c.OPTION_REPLY_MAGIC or to != option:
                raise ProtocolError(f"a reply to option {to} instead of {option}")
            replies.append((kind, self.receive(length)))
            if kind == c.REP_ACK or kind & c.REP_FLAG_ERROR:
                return replies

    def _accepted(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        replies = self.option(option, data)
        kind, text = replies[-1]
        if kind != c.REP_ACK:
            raise NbdError(c.EINVAL, f"{c.OPTION_NAMES[option]}: {text.decode(errors='replace')} (reply {kind:#x})")
        return replies[:-1]

    def structured_replies(self) -> None:
        """Negotiate structured replies."""
        self._accepted(c.OPT_STRUCTURED_REPLY)
        self.structured = True

    def set_meta_contexts(self, export: str, names) -> None:
        """Negotiate meta contexts; `contexts` has those that the server has."""
        self.contexts = {}
        for _, data in self._accepted(c.OPT_SET_META_CONTEXT, meta_query(export, names)):
            self.contexts[data[4:].decode()] = struct.unpack_from(">I", data)[0]

    def exports(self) -> list[tuple[str, str]]:
        """Return name and description of the server's exports."""
        listed = []
        for _, data in self._accepted(c.OPT_LIST):
            (length,) = struct.unpack_from(">I", data)
            listed.append((data[4 : 4 + length].decode(), data[4 + length :].decode()))
        return listed

    def go(self, export: str, option: int = c.OPT_GO) -> None:
        """Begin with EXPORT (or, with OPT_INFO, only ask about it)."""
        name = export.encode()
        wanted = (c.INFO_NAME, c.INFO_DESCRIPTION, c.INFO_BLOCK_SIZE)
        data = struct.pack(f">I{len(name)}sH{len(wanted)}H", len(name), name, len(wanted), *wanted)
        for _, info in self._accepted(option, data):
            (kind,) = struct.unpack_from(">H", info)
            self.info[kind] = info[2:]
        self.length, self.flags = struct.unpack(">QH", self.info[c.INFO_EXPORT])

    # -- transmission, raw

    def send(self, kind: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> int:
        """Send a request and return its cookie, without waiting for the reply."""
        self._cookie += 1
        header = struct.pack(">IHHQQI", c.REQUEST_MAGIC, flags, kind, self._cookie, offset & (1 << 64) - 1, length)
        self.sock.sendall(header + payload if len(payload) < 65536 else header)
        if len(payload) >= 65536:
            self.sock.sendall(payload)
        return self._cookie

    def receive_reply(self) -> Reply:
        """Receive the next whole reply: of the oldest request where none waits for a disk, else of any."""
        reply = None
        while True:
            (magic,) = struct.unpack(">I", self.receive(4))
            if magic == c.SIMPLE_REPLY_MAGIC:
                error, cookie = struct.unpack(">IQ", self.receive(12))
                if reply is not None:
                    raise ProtocolError("a simple reply in the middle of a structured one")
                return Reply(cookie, error)
            if magic != c.STRUCTURED_REPLY_MAGIC or not self.structured:
                raise ProtocolError(f"reply magic {magic:#x}")
            flags, kind, cookie, length = struct.unpack(">HHQI", self.receive(16))
            reply = reply or Reply(cookie)
            if cookie != reply.cookie:
                raise ProtocolError("chunks of two replies mixed")
            self._add_chunk(reply, kind, self.receive(length))
            if flags & c.REPLY_FLAG_DONE:
                return reply

    def _add_chunk(self, reply: Reply, kind: int, body: bytes) -> None:
        reply.chunks += 1
        if kind == c.REPLY_TYPE_OFFSET_DATA:
            reply.data.append((struct.unpack_from(">Q", body)[0], body[8:]))
        elif kind == c.REPLY_TYPE_OFFSET_HOLE:
            offset, length = struct.unpack(">QI", body)
            reply.data.append((offset, bytes(length)))
        elif kind == c.REPLY_TYPE_BLOCK_STATUS:
            (context,) = struct.unpack_from(">I", body)
            reply.status[context] = list(struct.iter_unpack(">II", body[4:]))
        elif kind in (c.REPLY_TYPE_ERROR, c.REPLY_TYPE_ERROR_OFFSET):
            reply.error, length = struct.unpack_from(">IH", body)
            reply.message = body[6 : 6 + length].decode()
            if kind == c.REPLY_TYPE_ERROR_OFFSET:
                (reply.error_offset,) = struct.unpack_from(">Q", body, 6 + length)
        elif kind != c.REPLY_TYPE_NONE:
            raise ProtocolError(f"chunk of type {kind}")

    def call(self, kind: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> Reply:
        """Send a request and return its reply. Raises NbdError when that is an error."""
        cookie = self.send(kind, offset, length, flags, payload)
        if kind == c.CMD_READ and not self.structured:
            reply = self._simple_read_reply(offset, length)
        else:
            reply = self.receive_reply()
        if reply.cookie != cookie:
            raise ProtocolError(f"a reply to request {reply.cookie} instead of {cookie}")
        if reply.error:
            raise NbdError(reply.error, reply.message or os.strerror(reply.error))
        return reply

    def _simple_read_reply(self, offset: int, length: int) -> Reply:
        reply = self.receive_reply()
        if not reply.error:
            reply.data.append((offset, self.receive(length)))
        return reply

    # -- transmission

    def read(self, offset: int, length: int, *, unfragmented: bool = False) -> bytes:
        """Return LENGTH bytes at OFFSET."""
        reply = self.call(c.CMD_READ, offset, length, c.CMD_FLAG_DF if unfragmented else 0)
        data = bytearray(length)
        filled = 0
        for at, piece in reply.data:
            data[at - offset : at - offset + len(piece)] = piece
            filled += len(piece)
        if filled != length or len(data) != length:
            raise ProtocolError(f"{filled} bytes instead of {length}")
        return bytes(data)

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        """Write DATA at OFFSET."""
        self.call(c.CMD_WRITE, offset, len(data), c.CMD_FLAG_FUA if fua else 0, data)

    def zero(self, offset: int, length: int, *, fua: bool = False, hole: bool = True, fast: bool = False) -> None:
        """Make a range read as zeroes; `hole`: it may be deallocated; `fast`: ENOTSUP rather than writing zeroes."""
        flags = (c.CMD_FLAG_FUA if fua else 0) | (0 if hole else c.CMD_FLAG_NO_HOLE) | (c.CMD_FLAG_FAST_ZERO if fast else 0)
        self.call(c.CMD_WRITE_ZEROES, offset, length, flags)

    def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Tell the server that a range is not needed."""
        self.call(c.CMD_TRIM, offset, length, c.CMD_FLAG_FUA if fua else 0)

    def cache(self, offset: int, length: int) -> None:
        """Ask the server to have a range at hand."""
        self.call(c.CMD_CACHE, offset, length)

    def flush(self) -> None:
        """Return when all that was acknowledged is on stable storage."""
        self.call(c.CMD_FLUSH)

    def block_status(self, offset: int, length: int, *, one: bool = False) -> dict[str, list[tuple[int, int]]]:
        """Return, by context name, extents (length, flags) from OFFSET on."""
        reply = self.call(c.CMD_BLOCK_STATUS, offset, length, c.CMD_FLAG_REQ_ONE if one else 0)
        names = {identifier: name for name, identifier in self.contexts.items()}
        return {names[identifier]: extents for identifier, extents in reply.status.items()}

    def close(self) -> None:
        """Disconnect as the protocol wants it; without a word when the server is gone."""
        try:
            self.send(c.CMD_DISC)
        except OSError:
            pass
        self.sock.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def meta_query(export: str, names) -> bytes:
    """Return the data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    data = struct.pack(">I", len(export.encode())) + export.encode() + struct.pack(">I", len(names))
    return data + b"".join(struct.pack(">I", len(name.encode())) + name.encode() for name in names)
