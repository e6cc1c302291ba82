"""The QMP server: many clients on one unix socket, one thread for all of their I/O.

Per client: greeting, capabilities negotiation, then requests in order, each answered with its id. Commands run in a
small pool of threads, so one that waits holds up its own client only. What a client does wrong ends with an error
reply or with that client's session; nobody else's. Bounded: clients, bytes of a request, bytes queued to a client
that does not read.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from fastcbw.errors import Error
from fastcbw.export.nbd.listen import Listener
from fastcbw.qmp.clients import Client, client_of, running_for
from fastcbw.qmp.decoder import REQUEST_BYTES_LIMIT, Decoder, TooLong
from fastcbw.qmp.errors import COMMAND_NOT_FOUND, QmpError
from fastcbw.qmp.replies import LONG_REPLIES, cut, encode, encode_reply, take_page
from fastcbw.qmp.schema import Command, Schema, split_request
from fastcbw.version import __version__

log = logging.getLogger("fastcbw.qmp")

CLIENTS_LIMIT = 16
#: A client that leaves more than this unread is dropped: events may not pile up in memory.
UNREAD_BYTES_LIMIT = 1 << 20
#: How long close() waits for a client to take its last reply.
CLOSE_SECONDS_LIMIT = 2.0
#: The QEMU whose commands, arguments and texts this follows; tools compare it with what they need.
QEMU_VERSION = {"major": 7, "minor": 2, "micro": 0}

VERSION = {"qemu": QEMU_VERSION, "package": f"fastcbw {__version__}"}
GREETING = {"QMP": {"version": VERSION, "capabilities": []}}


class QmpServer:
    """Serve SCHEMA's commands on a listening unix socket until close().

    listener: what listen_unix() returned; the server owns it from here on.
    schema: the commands; each runs as ``run(context, **arguments)`` in a thread of the pool.
    context: what the commands work on; current_client() in them tells who asks.
    on_leave: called in a thread of the pool when the session of a client that had negotiated has ended, but not by close().

    emit() and close() may be called from any thread except the server's own.
    """

    def __init__(self, listener: Listener, schema: Schema, context, *, clients_limit: int = CLIENTS_LIMIT,
                 request_bytes_limit: int = REQUEST_BYTES_LIMIT, on_leave: Callable[[Client], None] | None = None):
        self.schema = schema
        self.context = context
        self.clients_limit = clients_limit
        self.request_bytes_limit = request_bytes_limit
        self._on_leave = on_leave
        self._numbers = itertools.count(1)
        self._listener = listener
        self._sessions: set[_Session] = set()
        self._closed = False
        self._pool = ThreadPoolExecutor(clients_limit, thread_name_prefix="fastcbw-qmp-command")
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="fastcbw-qmp", daemon=True)
        self._thread.start()
        ready.wait()

    @property
    def clients(self) -> int:
        """How many clients are connected."""
        return len(self._sessions)

    def emit(self, event: str, data: dict) -> None:
        """Send an event to every client that has negotiated. Never waits for a client."""
        now = time.time_ns()
        stamp = {"seconds": now // 10**9, "microseconds": now // 1000 % 10**6}
        line = encode({"event": event, "data": data, "timestamp": stamp})
        if not self._closed:
            try:
                self._loop.call_soon_threadsafe(self._broadcast, line)
            except RuntimeError:  # closed in between: nobody is left to hear it
                pass

    def close(self, let_go: Callable[[], None] = lambda: None) -> None:
        """Let running commands end and their replies go out, then close every session and join the threads.

        let_go: called when the sessions are closed; it ends what commands that still run wait for.
        """
        if self._closed:
            return
        self._closed = True
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._listener.close()
        try:
            let_go()
        finally:
            self._pool.shutdown()

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve(ready))
        finally:
            self._loop.close()

    async def _serve(self, ready: threading.Event) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_unix_server(self._client, sock=self._listener.sock)
        ready.set()
        await self._stop.wait()
        server.close()
        sessions = list(self._sessions)
        for session in sessions:
            session.stop()
        if sessions:
            await asyncio.wait([session.task for session in sessions], timeout=CLOSE_SECONDS_LIMIT)
        for session in list(self._sessions):
            session.writer.transport.abort()
            session.task.cancel()
        await asyncio.gather(*(session.task for session in sessions), return_exceptions=True)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._sessions) >= self.clients_limit:
            error = QmpError(f"too many clients: {self.clients_limit} are connected")
            writer.write(encode({"error": error.wire()}))
            writer.close()
            return
        session = _Session(self, reader, writer)
        self._sessions.add(session)
        try:
            await session.run()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._sessions.discard(session)
            writer.close()
            if self._on_leave is not None and session.negotiated and not self._closed:
                self._pool.submit(self._leave, session.client)

    def _leave(self, client: Client) -> None:
        try:
            self._on_leave(client)
        except Exception:
            log.exception("qmp: undoing what client %d left failed", client.number)

    def _broadcast(self, line: bytes) -> None:
        for session in list(self._sessions):
            if session.negotiated:
                session.send(line)


class _Session:
    """One client: its negotiation state, its requests in order."""

    def __init__(self, server: QmpServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.server = server
        self.reader = reader
        self.writer = writer
        self.negotiated = False
        self.long_replies = False
        self.stopping = False
        self.reading = False
        self.task = asyncio.current_task()
        self.client = client_of(next(server._numbers), writer.get_extra_info("socket"))

    def stop(self) -> None:
        """End the session; after the reply to the request that runs, when one does."""
        self.stopping = True
        if self.reading:
            self.reader.feed_eof()

    def send(self, line: bytes) -> None:
        """Queue LINE, or drop the client when it has stopped reading."""
        self.writer.write(line)
        if self.writer.transport.get_write_buffer_size() > UNREAD_BYTES_LIMIT:
            log.warning("qmp: dropped a client that left %d bytes unread", UNREAD_BYTES_LIMIT)
            self.writer.transport.abort()

    async def run(self) -> None:
        self.send(encode(GREETING))
        decoder = Decoder(self.server.request_bytes_limit)
        while not self.stopping:
            self.reading = True
            data = await self.reader.read(1 << 16)
            self.reading = False
            if not data:
                break
            try:
                for request, reason in decoder.feed(data):
                    self.send(encode({"error": QmpError(reason).wire()}) if reason is not None else await self.answer(request))
                    await self.writer.drain()
                    if self.stopping:
                        break
            except TooLong as error:
                self.send(encode({"error": QmpError(str(error)).wire()}))
                break
        self.writer.close()
        await self.writer.wait_closed()

    async def answer(self, request: object) -> bytes:
        """Return the line that answers one decoded request."""
        command = None
        try:
            result, command = await self.execute(request)
            reply = {"return": result}
        except QmpError as error:
            reply = {"error": error.wire()}
        except (Error, ValueError, TypeError, OSError) as error:
            reply = {"error": QmpError(_one_line(error)).wire()}
        except Exception as error:  # a defect of ours: the client learns of it, the daemon goes on
            log.exception("qmp: command failed")
            reply = {"error": QmpError(f"internal error: {_one_line(error)}").wire()}
        if isinstance(request, dict) and "id" in request:
            reply["id"] = request["id"]
        return encode_reply(reply, command, self.long_replies)

    async def execute(self, request: object) -> tuple[object, Command]:
        """Run the command of one request; return what it returned, and the command."""
        name, given = split_request(request)
        if not self.negotiated and name != "qmp_capabilities":
            raise QmpError("Expecting capabilities negotiation with 'qmp_capabilities'", COMMAND_NOT_FOUND)
        if self.negotiated and name == "qmp_capabilities":
            raise QmpError("Capabilities negotiation is already complete, command ignored", COMMAND_NOT_FOUND)
        command = self.server.schema.find(name)
        long = name == "qmp_capabilities" and _takes_long_replies(given)
        arguments = command.check(_without_long_replies(given) if long else given)
        page = take_page(command, arguments)
        loop = asyncio.get_running_loop()
        result = await loop.run_in_executor(self.server._pool, self.run_command, command, arguments)
        if name == "qmp_capabilities":
            self.negotiated, self.long_replies = True, long
        if page is not None:
            result = cut(result, page, request.get("id"), self.long_replies)
        return {} if result is None else result, command

    def run_command(self, command: Command, arguments: dict):
        with running_for(self.client):
            return command.run(self.server.context, **arguments)


def _takes_long_replies(given: object) -> bool:
    return isinstance(given, dict) and isinstance(given.get("enable"), list) and LONG_REPLIES in given["enable"]


def _without_long_replies(given: dict) -> dict:
    """What the command is to see: it knows nothing of the wire."""
    others = [name for name in given["enable"] if name != LONG_REPLIES]
    return {name: value for name, value in given.items() if name != "enable"} | ({"enable": others} if others else {})


def _one_line(error: Exception) -> str:
    """The message of ERROR on one line; an OSError without its number in brackets."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return " ".join(text.split()) or type(error).__name__
