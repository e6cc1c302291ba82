"""The handshake of one NBD connection: fixed newstyle, from the greeting to the chosen export.

Control plane: plain blocking Python with one deadline for the whole handshake, a bound on the length and the number of
options, and exact reads, so that no byte of the transmission phase is taken from the socket. Whatever a client
sends, the outcome is a Negotiated, or HandshakeEnded with a phrase for the log; nothing else gets out but the socket's
own OSError.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from fastcbw.errors import Error
from fastcbw.export.nbd.contexts import MetaContext
from fastcbw.wire import constants as c

#: A longer option is skipped and answered with ERR_TOO_BIG; one longer than OPTION_SKIP_MAX ends the connection.
OPTION_LENGTH_MAX = 64 << 10
OPTION_SKIP_MAX = 16 << 20
#: A client that asks for more than this has no intention to begin.
OPTIONS_MAX = 256
DEADLINE_SECONDS = 10.0

BLOCK_SIZE_MIN = 1
BLOCK_SIZE_PREFERRED = 4096


class HandshakeEnded(Exception):
    """No transmission phase follows; the text says why."""


class Offered(Protocol):
    """What the handshake must know of an export."""

    name: str
    description: str
    length: int
    read_only: bool
    drops: str | None
    can_cache: bool
    contexts: Mapping[str, MetaContext]


@dataclass
class Negotiated:
    """What the client and we have agreed on."""

    export: Offered
    structured: bool
    contexts: list[tuple[int, MetaContext]]


def export_flags(export: Offered, structured: bool) -> int:
    """Return the transmission flags of EXPORT: each of them works."""
    flags = c.FLAG_HAS_FLAGS | c.FLAG_SEND_FLUSH | c.FLAG_SEND_FUA | c.FLAG_CAN_MULTI_CONN
    if export.read_only:
        flags |= c.FLAG_READ_ONLY
    elif export.drops is not None:
        flags |= c.FLAG_SEND_TRIM
    else:
        flags |= c.FLAG_SEND_TRIM | c.FLAG_SEND_WRITE_ZEROES | c.FLAG_SEND_FAST_ZERO
    if export.can_cache:
        flags |= c.FLAG_SEND_CACHE
    if structured:
        flags |= c.FLAG_SEND_DF
    return flags


class Handshake:
    """One handshake on SOCK, which is left blocking and without a timeout after success.

    lookup: export name ("" is the default export) to Offered; raises KeyError with a text for the client.
    listing: the exports to name in LIST.
    enter: called with the export just before the client is told that it has it; raises Error to refuse it. The caller
        undoes it when run() raises after that: `entered` says so.
    """

    def __init__(
        self,
        sock,
        lookup: Callable[[str], Offered],
        listing: Callable[[], list[Offered]],
        enter: Callable[[Offered], None],
        deadline_seconds: float = DEADLINE_SECONDS,
    ):
        self._sock = sock
        self._lookup = lookup
        self._listing = listing
        self._enter = enter
        self._deadline = time.monotonic() + deadline_seconds
        self._no_zeroes = False
        self._structured = False
        self._context_export: str | None = None     # the name given with SET_META_CONTEXT
        self._contexts: list[tuple[int, MetaContext]] = []
        self.entered: Offered | None = None

    # -- bytes

    def _wait(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise HandshakeEnded("the handshake took too long")
        self._sock.settimeout(left)

    def _receive(self, length: int) -> bytes:
        data = bytearray(length)
        view = memoryview(data)
        while view:
            self._wait()
            try:
                got = self._sock.recv_into(view)
            except TimeoutError:
                raise HandshakeEnded("the handshake took too long") from None
            if not got:
                raise HandshakeEnded("the client closed the socket during the handshake")
            view = view[got:]
        return bytes(data)

    def _skip(self, length: int) -> None:
        while length:
            length -= len(self._receive(min(length, OPTION_LENGTH_MAX)))

    def _send(self, data: bytes) -> None:
        self._wait()
        try:
            self._sock.sendall(data)
        except TimeoutError:
            raise HandshakeEnded("the handshake took too long") from None

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self._send(struct.pack(">QIII", c.OPTION_REPLY_MAGIC, option, kind, len(data)) + data)

    def _refuse(self, option: int, kind: int, text: str) -> None:
        self._reply(option, kind, text.encode(errors="replace")[: c.STRING_LENGTH_MAX])

    # -- the course

    def run(self) -> Negotiated:
        """Negotiate; return what was agreed. Raises HandshakeEnded, or OSError of the socket."""
        self._send(struct.pack(">QQH", c.MAGIC, c.OPTION_MAGIC, c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES))
        (flags,) = struct.unpack(">I", self._receive(4))
        if flags & ~(c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES):
            raise HandshakeEnded(f"client flags {flags:#x} are not known")
        if not flags & c.FLAG_FIXED_NEWSTYLE:
            raise HandshakeEnded("the client does not speak fixed newstyle")
        self._no_zeroes = bool(flags & c.FLAG_NO_ZEROES)
        for _ in range(OPTIONS_MAX):
            magic, option, length = struct.unpack(">QII", self._receive(16))
            if magic != c.OPTION_MAGIC:
                raise HandshakeEnded("an option without the protocol's magic number")
            if length > OPTION_LENGTH_MAX:
                if length > OPTION_SKIP_MAX or option == c.OPT_EXPORT_NAME:
                    raise HandshakeEnded(f"an option of {length} bytes")
                self._skip(length)
                self._refuse(option, c.REP_ERR_TOO_BIG, f"{length} bytes are more than {OPTION_LENGTH_MAX}")
                continue
            export = self._option(option, self._receive(length))
            if export is not None:
                self._sock.settimeout(None)
                keep = self._structured and self._context_export == export.name
                return Negotiated(export, self._structured, self._contexts if keep else [])
        raise HandshakeEnded(f"more than {OPTIONS_MAX} options")

    def _option(self, option: int, data: bytes) -> Offered | None:
        """Answer one option; return the export when the transmission phase follows."""
        if option == c.OPT_EXPORT_NAME:
            return self._export_name(data)
        if option in (c.OPT_GO, c.OPT_INFO):
            return self._info(option, data)
        if option == c.OPT_ABORT:
            self._reply(option, c.REP_ACK)
            raise HandshakeEnded("the client gave up the handshake")
        if option == c.OPT_LIST:
            self._list(data)
        elif option == c.OPT_STRUCTURED_REPLY:
            if data:
                self._refuse(option, c.REP_ERR_INVALID, "STRUCTURED_REPLY carries no data")
            else:
                self._structured = True
                self._reply(option, c.REP_ACK)
        elif option in (c.OPT_LIST_META_CONTEXT, c.OPT_SET_META_CONTEXT):
            self._meta_context(option, data)
        else:
            self._refuse(option, c.REP_ERR_UNSUP, f"option {c.OPTION_NAMES.get(option, option)} is not supported")
        return None

    def _chosen(self, export: Offered) -> Offered:
        self._enter(export)
        self.entered = export
        return export

    def _export_name(self, data: bytes) -> Offered:
        """The old way to begin: no error reply is possible, so an unknown name ends the connection."""
        try:
            export = self._chosen(self._lookup(data.decode()))
        except (KeyError, UnicodeDecodeError, Error) as error:
            raise HandshakeEnded(f"EXPORT_NAME: {_text(error)}") from None
        answer = struct.pack(">QH", export.length, export_flags(export, self._structured))
        self._send(answer if self._no_zeroes else answer + bytes(124))
        return export

    def _info(self, option: int, data: bytes) -> Offered | None:
        """GO and INFO: the same answer, and GO begins the transmission phase."""
        try:
            name, rest = _string(data)
            (count,) = struct.unpack_from(">H", rest)
            wanted = struct.unpack(f">{count}H", rest[2:])
        except (struct.error, ValueError) as error:
            self._refuse(option, c.REP_ERR_INVALID, f"{c.OPTION_NAMES[option]}: {_text(error)}")
            return None
        try:
            export = self._lookup(name)
            if option == c.OPT_GO:
                self._chosen(export)
        except (KeyError, Error) as error:
            self._refuse(option, c.REP_ERR_UNKNOWN, _text(error))
            return None
        flags = export_flags(export, self._structured)
        self._reply(option, c.REP_INFO, struct.pack(">HQH", c.INFO_EXPORT, export.length, flags))
        if c.INFO_NAME in wanted:
            self._reply(option, c.REP_INFO, struct.pack(">H", c.INFO_NAME) + export.name.encode())
        if c.INFO_DESCRIPTION in wanted and export.description:
            self._reply(option, c.REP_INFO, struct.pack(">H", c.INFO_DESCRIPTION) + export.description.encode())
        # Also to clients that do not ask: with a minimum of 1 no client can violate it.
        sizes = struct.pack(">HIII", c.INFO_BLOCK_SIZE, BLOCK_SIZE_MIN, BLOCK_SIZE_PREFERRED, c.PAYLOAD_LENGTH_MAX)
        self._reply(option, c.REP_INFO, sizes)
        self._reply(option, c.REP_ACK)
        return export if option == c.OPT_GO else None

    def _list(self, data: bytes) -> None:
        if data:
            self._refuse(c.OPT_LIST, c.REP_ERR_INVALID, "LIST carries no data")
            return
        for export in self._listing():
            name = export.name.encode()
            self._reply(c.OPT_LIST, c.REP_SERVER, struct.pack(">I", len(name)) + name + export.description.encode())
        self._reply(c.OPT_LIST, c.REP_ACK)

    def _meta_context(self, option: int, data: bytes) -> None:
        """LIST and SET: which contexts an export has, and which of them the client wants in BLOCK_STATUS."""
        if option == c.OPT_SET_META_CONTEXT:
            self._contexts = []         # each SET replaces the one before, also when it fails
            self._context_export = None
        if not self._structured:
            self._refuse(option, c.REP_ERR_INVALID, "STRUCTURED_REPLY comes first")
            return
        try:
            name, rest = _string(data)
            (count,) = struct.unpack_from(">I", rest)
            rest = rest[4:]
            queries = []
            for _ in range(count):
                query, rest = _string(rest)
                queries.append(query)
            if rest:
                raise ValueError(f"{len(rest)} bytes too many")
        except (struct.error, ValueError) as error:
            self._refuse(option, c.REP_ERR_INVALID, f"{c.OPTION_NAMES[option]}: {_text(error)}")
            return
        try:
            export = self._lookup(name)
        except KeyError as error:
            self._refuse(option, c.REP_ERR_UNKNOWN, _text(error))
            return
        listing = option == c.OPT_LIST_META_CONTEXT
        chosen = []
        for identifier, (context, source) in enumerate(export.contexts.items(), 1):
            if _asked_for(context, queries, listing) and (listing or len(chosen) < c.CONTEXTS_MAX):
                chosen.append((identifier, source))
                self._reply(option, c.REP_META_CONTEXT, struct.pack(">I", 0 if listing else identifier) + context.encode())
        if not listing:
            self._contexts = chosen
            self._context_export = export.name
        self._reply(option, c.REP_ACK)


def _string(data: bytes) -> tuple[str, bytes]:
    """Split a string (length, UTF-8) off the front of DATA. Raises ValueError or struct.error for what is none."""
    (length,) = struct.unpack_from(">I", data)
    if length > c.STRING_LENGTH_MAX or length > len(data) - 4:
        raise ValueError(f"a string of {length} bytes in an option of {len(data)}")
    return data[4 : 4 + length].decode(), data[4 + length :]


def _asked_for(context: str, queries: list[str], listing: bool) -> bool:
    """Whether CONTEXT answers one of QUERIES: its name; when listing also no query at all, or a prefix that ends in ':'."""
    if context in queries:
        return True
    return listing and (not queries or any(query.endswith(":") and context.startswith(query) for query in queries))


def _text(error: Exception) -> str:
    return str(error.args[0]) if error.args else type(error).__name__
