"""The NBD server: exports, connections, threads. Control plane; the bytes go through transmission.pyx.

Threads: one that accepts, and one per connection, named after the export. A connection's thread does the handshake in
Python, then Connection.run(), which does not come back to the interpreter before the connection ends.

Memory: at most connections_max x 1 MiB of fixed buffers (1 MiB + 4 KiB of addresses each, touched only as far as used: a
client that writes 4 KiB at depth 16 touches about 70 KiB) plus the pool's limit and the 2 MiB it keeps for reuse; a thread's
stack besides, and in the kernel up to 1 MiB of replies of a client that does not receive them. With the defaults 64 MiB + 66 MiB when all 64 clients use their buffers to the full, about 100 KiB
per client otherwise.

Lock order: Server._lock is the only lock here and is not held while a hook, a device or a socket is waited for.
"""

from __future__ import annotations

import atexit
import errno
import logging
import os
import select
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from urllib.parse import quote

from fastcbw.block.device import BlockDevice
from fastcbw.errors import Error
from fastcbw.export.nbd import listen
from fastcbw.export.nbd.answers import COUNTERS
from fastcbw.export.nbd.cache_contexts import contexts_of
from fastcbw.export.nbd.contexts import AllocationContext, MetaContext
from fastcbw.export.nbd.handshake import DEADLINE_SECONDS, Handshake, HandshakeEnded
from fastcbw.export.nbd.pool import BufferPool
from fastcbw.export.nbd.transmission import Connection
from fastcbw.wire import constants as c

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 64
#: What the kernel may hold of a client's replies on a unix socket (it doubles the figure for its own overhead). With less, the
#: thread that serves a large read stops in the middle of each 256 KiB until the client has received the half of it.
SEND_BUFFER_BYTES = 512 << 10
SPIN_ADAPTIVE_US = 50
SPIN_US_MAX = 1000
#: close() and remove_export(force=True): how long clients may take to receive their last replies, and how long the device
#: may take to finish requests after that.
GRACE_SECONDS = 2.0
DEVICE_SECONDS = 30.0
#: How long the accept thread rests when the process has no file descriptor left.
EXHAUSTED_SECONDS = 0.1


class Export:
    """A device under a name. Made by Server.add_export(); attributes are read-only to others."""

    def __init__(self, name, device, read_only, drops, description, background, contexts, on_connect, on_disconnect):
        self.name: str = name
        self.device: BlockDevice = device
        self.length: int = device.length
        self.read_only: bool = read_only
        self.drops: str | None = drops
        self.can_cache: bool = device.can_cache
        self.description: str = description
        self.background: bool = background
        self._contexts = contexts
        self._on_connect = on_connect
        self._on_disconnect = on_disconnect
        self._clients: list[_Client] = []       # those that have entered; the server's lock
        self._ended = dict.fromkeys(COUNTERS, 0)    # counters of those that have left; the server's lock
        self._connections_total = 0
        self._removed = False

    @property
    def contexts(self) -> dict[str, MetaContext]:
        """The meta contexts by name, as they are now; base:allocation first."""
        more = self._contexts() if callable(self._contexts) else self._contexts
        return {c.BASE_ALLOCATION: AllocationContext(self.device), **contexts_of(self.device), **(more or {})}

    @property
    def connections(self) -> int:
        """How many clients use the export now."""
        return len(self._clients)

    def status(self) -> dict:
        """Return name, sizes, connections and counters of this moment; json-able."""
        clients = list(self._clients)
        counters = dict(self._ended)
        for client in clients:
            for name, value in client.counts().items():
                counters[name] += value
        return {
            "name": self.name,
            "length": self.length,
            "read_only": self.read_only,
            "drops": self.drops,
            "description": self.description,
            "background": self.background,
            "connections": len(clients),
            "connections_total": self._connections_total,
            "counters": counters,
            "clients": [client.status() for client in clients],
        }


class _Client:
    """One accepted socket and its thread."""

    def __init__(self, sock: socket.socket, number: int, peer: str):
        self.sock = sock
        self.number = number
        self.peer = peer
        self.thread: threading.Thread | None = None
        self.export: Export | None = None
        self.connection: Connection | None = None
        self.stopping = False

    def counts(self) -> dict[str, int]:
        return self.connection.counts() if self.connection is not None else {}

    def status(self) -> dict:
        return {"number": self.number, "peer": self.peer, "counters": self.counts()}

    def hung_up(self) -> bool:
        """Whether the client has closed its side. Under the server's lock, as the socket is closed under it."""
        poll = select.poll()
        poll.register(self.sock, select.POLLRDHUP)
        return bool(poll.poll(0))

    def stop(self, kill: bool = False) -> None:
        """Ask it to end: what was received is still served and answered; with KILL replies are not waited for either."""
        self.stopping = True
        if self.connection is not None:
            self.connection.stop(kill=kill)
        # Before the transmission phase there is nothing to finish.
        half = socket.SHUT_RD if self.connection is not None and not kill else socket.SHUT_RDWR
        try:
            self.sock.shutdown(half)
        except OSError:
            pass        # the client was faster


class Server:
    """Serve devices over NBD, from the moment of its making to close().

    socket_path: a unix socket to listen on (a stale file is replaced, a live one refused with Error); None for none.
    listener: an already listening socket to take over (a socket.socket or a Listener), as passed by LISTEN_FDS.
    pool: the BufferPool of all connections; default 64 MiB with 32 MiB of it for guests only.
    connections_max: clients at one time; one more is closed at once, with a warning in the log.
    spin: busy-polling of a guest's socket before its thread sleeps: "off", a number of microseconds (1 to 1000), or
        "adaptive" (up to 50 us, where it has paid lately). A waiting connection burns a core for that long after every batch.
    Methods are safe from any thread. Devices belong to the caller, who closes them after the server.
    """

    def __init__(
        self,
        socket_path: str | os.PathLike | None = None,
        *,
        listener=None,
        pool: BufferPool | None = None,
        connections_max: int = CONNECTIONS_MAX,
        handshake_seconds: float = DEADLINE_SECONDS,
        spin: str | int = "off",
    ):
        if connections_max < 1:
            raise ValueError(f"connections_max: {connections_max} is less than 1")
        self.pool = pool or BufferPool()
        self.connections_max = connections_max
        self._handshake_seconds = handshake_seconds
        self._spin_us, self._spin_adaptive = parse_spin(spin)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)     # a client has left
        self._exports: dict[str, Export] = {}
        self._ending: dict[str, Export] = {}        # removed, but requests of theirs had not ended in time
        self._clients: dict[int, _Client] = {}
        self._listeners: list[listen.Listener] = []
        self._number = 0
        self._refused = 0
        self._closing = False
        self._closed = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._acceptor = threading.Thread(target=self._accept_loop, name="nbd-accept", daemon=True)
        self._acceptor.start()
        atexit.register(self.close)
        try:
            if socket_path is not None:
                self.listen_unix(socket_path)
            if listener is not None:
                self.listen(listener if isinstance(listener, listen.Listener) else listen.adopt(listener))
        except BaseException:
            self.close()
            raise

    # -- listening

    def listen_unix(self, path: str | os.PathLike) -> str:
        """Listen on one more unix socket; return its path."""
        return self.listen(listen.listen_unix(path))

    def listen_tcp(self, port: int = 0, host: str = "127.0.0.1") -> str:
        """Listen on a TCP port (0: a free one); return host:port. Whoever can connect can read and write."""
        return self.listen(listen.listen_tcp(port, host))

    def listen(self, listener: listen.Listener) -> str:
        """Accept clients on LISTENER, which is the server's from now on; return its address."""
        listener.sock.setblocking(False)
        with self._lock:
            if self._closing:
                listener.close()
                raise Error(f"{listener.address}: the server is closed")
            self._listeners.append(listener)
            self._selector.register(listener, selectors.EVENT_READ, listener)
        self._wake()
        return listener.address

    def stop_listening(self, address: str) -> None:
        """Close the listener at ADDRESS, as listed in `addresses`; its clients stay. Raises KeyError for an unknown one."""
        with self._lock:
            for listener in self._listeners:
                if listener.address == address:
                    break
            else:
                raise KeyError(f"{address}: the server does not listen there")
            self._listeners.remove(listener)
            self._selector.unregister(listener)
            listener.close()

    @property
    def addresses(self) -> list[str]:
        """Where the server listens: socket paths and host:port."""
        return [listener.address for listener in self._listeners]

    def uris(self, name: str) -> list[str]:
        """NBD URIs of an export NAME of this server, one for each address and common name of it: to tell whether others mean it."""
        found = []
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            if listener.sock.family == socket.AF_UNIX:
                found.append(f"nbd+unix:///{quote(name, safe='')}?socket={quote(listener.address)}")
                continue
            host, _, port = listener.address.rpartition(":")
            hosts = [host] if host not in ("0.0.0.0", "::", "127.0.0.1", "::1") else ["127.0.0.1", "::1", "localhost", socket.gethostname()]
            found += [f"nbd://{f'[{one}]' if ':' in one else one}:{port}/{quote(name, safe='')}" for one in hosts]
        return found

    # -- exports

    def add_export(
        self,
        name: str,
        device: BlockDevice,
        *,
        read_only: bool | None = None,
        drops: str | None = None,
        description: str = "",
        background: bool = False,
        contexts: Mapping[str, MetaContext] | Callable[[], Mapping[str, MetaContext]] | None = None,
        on_connect: Callable[[], None] | None = None,
        on_disconnect: Callable[[], None] | None = None,
    ) -> Export:
        """Serve DEVICE as NAME; return the Export.

        read_only: None takes the device's; a read-only device can't be exported writable.
        drops: of a device that nobody writes and that can drop what its readers have done with: "discard", clients say so by
            trims; "read-once", so does every read, when its whole reply was handed to the socket.
        background: its clients use only the part of the pool above the guests' reserve.
        contexts: meta contexts beside base:allocation and those of contexts_of, by name; or what returns them, asked anew in each handshake.
        on_connect: called before a client gets the export, in the connection's thread; an Error it raises refuses the
            client with that text. on_disconnect: called once after each successful on_connect, when the client has left.
        Raises ValueError for a name that is taken, empty or longer than 4096 bytes, and for read_only=False of a
        read-only device; Error when the server is closed.
        """
        if not isinstance(device, BlockDevice):
            raise TypeError(f"export {name!r}: expected a BlockDevice, got {type(device).__name__}")
        for what, text in (("name", name), ("description", description)):
            if len(text.encode()) > c.STRING_LENGTH_MAX:
                raise ValueError(f"export {name[:40]!r}: the {what} is longer than {c.STRING_LENGTH_MAX} bytes")
        if not name:
            raise ValueError("export name: must not be empty (a single export answers to the empty name anyway)")
        if drops not in (None, "discard", "read-once"):
            raise ValueError(f"export {name!r}: drops: {drops!r} is unknown (there is discard, read-once)")
        if drops is not None:
            read_only = False
        elif read_only is None:
            read_only = bool(device.read_only)
        elif not read_only and device.read_only:
            raise ValueError(f"export {name!r}: {device.name} is read-only, it cannot be exported writable")
        export = Export(name, device, read_only, drops, description, background, contexts, on_connect, on_disconnect)
        with self._lock:
            if self._closing:
                raise Error(f"export {name!r}: the server is closed")
            if name in self._exports:
                raise ValueError(f"export {name!r}: the name is taken")
            self._exports[name] = export
        return export

    def remove_export(self, name: str, *, force: bool = False) -> None:
        """Stop serving NAME. New clients are refused from the first moment on.

        Raises KeyError for an unknown name; Error naming how many connections use it, and nothing has changed, unless
        FORCE: then its clients are disconnected after what they have in flight, and waited for. Clients that have closed
        their socket and are about to be noticed don't count: they are waited for, so that a script may remove an
        export as soon as the tool that used it has ended. Error, too, when requests under way do not end: nobody gets the export
        any more, and another call waits on.
        """
        if not force:
            self._wait_for_departed(name)
        with self._lock:
            export = self._exports.get(name) or self._ending.get(name)
            if export is None:
                raise KeyError(f"export {name!r}: there is none")
            users = export.connections
            if users and not force and not export._removed:
                raise Error(f"export {name!r}: {users} connection{'s' if users > 1 else ''} use it (disconnect them, or force)")
            export._removed = True
            self._exports.pop(name, None)
            self._ending[name] = export
            clients = list(export._clients)
        if not self._end(clients):
            raise Error(f"export {name!r}: requests of its connections have not ended after {DEVICE_SECONDS:.0f} s (remove it again to wait on)")
        with self._lock:
            if self._ending.get(name) is export:
                del self._ending[name]

    def _wait_for_departed(self, name: str) -> None:
        """Wait for those clients of NAME that have hung up; bounded."""
        with self._lock:
            export = self._exports.get(name)
            clients = [client for client in export._clients if client.hung_up()] if export else []
        self._wait_for(clients, GRACE_SECONDS)

    @property
    def exports(self) -> dict[str, Export]:
        """The exports by name, as of now."""
        with self._lock:
            return dict(self._exports)

    def status(self) -> dict:
        """Return addresses, exports with counters, connections and the pool; json-able."""
        with self._lock:
            exports = list(self._exports.values())
            connections, refused = len(self._clients), self._refused
        return {
            "addresses": self.addresses,
            "connections": connections,
            "connections_max": self.connections_max,
            "connections_refused": refused,
            "pool": self.pool.status(),
            "exports": [export.status() for export in exports],
        }

    # -- what the handshake asks

    def _lookup(self, name: str) -> Export:
        with self._lock:
            if name in self._exports:
                return self._exports[name]
            if not name and len(self._exports) == 1:
                return next(iter(self._exports.values()))
        if not name:
            raise KeyError("there is no default export, name one of those listed")
        raise KeyError(f"export {name!r} is not known")

    def _enter(self, client: _Client, export: Export) -> None:
        if export._on_connect is not None:
            export._on_connect()
        with self._lock:
            if not export._removed and not self._closing:
                export._clients.append(client)
                export._connections_total += 1
                client.export = export
                return
        self._call_on_disconnect(export)
        raise Error(f"export {export.name!r} is being removed")

    def _leave(self, client: _Client) -> None:
        export = client.export
        if export is not None:
            self._call_on_disconnect(export)
        with self._changed:
            client.sock.close()
            if export is not None:
                export._clients.remove(client)
                for name, value in client.counts().items():
                    export._ended[name] += value
            del self._clients[client.number]
            self._changed.notify_all()

    def _call_on_disconnect(self, export: Export) -> None:
        if export._on_disconnect is not None:
            try:
                export._on_disconnect()
            except Exception:
                log.exception("export %s: the hook of a disconnection failed", export.name)

    # -- threads

    def _accept_loop(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    try:
                        self._wake_read.recv(4096)
                    except BlockingIOError:
                        pass
                elif not self._closing:
                    self._accept(key.data)
            if self._closing:
                return

    def _accept(self, listener: listen.Listener) -> None:
        try:
            sock, address = listener.sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                if listener in self._listeners:
                    log.warning("%s: accepting a client failed: %s", listener.address, error)
                return
            log.warning("%s: a client waits: %s", listener.address, os.strerror(error.errno))
            self._closed.wait(EXHAUSTED_SECONDS)
            return
        sock.setblocking(True)
        if sock.family == socket.AF_UNIX:       # TCP finds its own
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        peer = _peer(sock, address)
        with self._lock:
            full = len(self._clients) >= self.connections_max
            if full:
                self._refused += 1
            else:
                self._number += 1
                client = _Client(sock, self._number, peer)
                self._clients[client.number] = client
        if full:
            log.warning("%s: client %s refused: %d connections are the limit", listener.address, peer, self.connections_max)
            sock.close()
            return
        client.thread = threading.Thread(target=self._serve, args=(client,), name="nbd-handshake", daemon=True)
        try:
            client.thread.start()
        except RuntimeError as error:       # no more threads
            log.warning("%s: client %s refused: %s", listener.address, peer, error)
            self._leave(client)

    def _serve(self, client: _Client) -> None:
        """Life of one connection, in its own thread."""
        why = "an error of the server"
        try:
            if client.sock.family != socket.AF_UNIX:
                client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            agreed = Handshake(
                client.sock, self._lookup, lambda: list(self.exports.values()),
                lambda export: self._enter(client, export), self._handshake_seconds).run()
            export = client.export
            threading.current_thread().name = f"nbd-{export.name}"
            connection = Connection(
                client.sock.fileno(), export.device, self.pool, export.name, structured=agreed.structured,
                contexts=agreed.contexts, read_only=export.read_only, drops=export.drops,
                background=export.background, spin_us=self._spin_us,
                spin_adaptive=self._spin_adaptive)
            with self._lock:
                client.connection = connection
                stopping = client.stopping
            log.debug("export %s: client %s connected", export.name, client.peer)
            why = "ended by the server" if stopping else connection.run()
        except HandshakeEnded as error:
            why = str(error)
        except OSError as error:
            why = f"the socket failed: {error}"
        except Exception:
            log.exception("client %s: the connection failed", client.peer)
        finally:
            log.debug("export %s: client %s: %s", client.export.name if client.export else "-", client.peer, why)
            self._leave(client)

    # -- the end

    def _wake(self) -> None:
        try:
            self._wake_write.send(b"\0")
        except OSError:
            pass

    def _end(self, clients: list[_Client]) -> bool:
        """Disconnect CLIENTS and wait for them; False when some are still there, held by a device that does not return."""
        for kill, seconds in ((False, GRACE_SECONDS), (True, DEVICE_SECONDS)):
            with self._lock:
                for client in clients:
                    if self._clients.get(client.number) is client:
                        client.stop(kill)
            if self._wait_for(clients, seconds):
                return True
        return False

    def _wait_for(self, clients: list[_Client], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        with self._changed:
            while any(self._clients.get(client.number) is client for client in clients):
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
        for client in clients:
            if client.thread is not None and client.thread is not threading.current_thread():
                client.thread.join(1.0)
        return True

    def close(self) -> None:
        """End: stop listening, disconnect clients after what they have in flight, join every thread. Again is no error.

        Bounded: a client that does not take its replies is cut after 2 s, a device that does not return is given 30 s more and
        then left alone with a warning.
        """
        with self._lock:
            first = not self._closing
            self._closing = True
        if not first:
            self._closed.wait(GRACE_SECONDS + DEVICE_SECONDS + 5)
            return
        atexit.unregister(self.close)
        self._wake()
        self._acceptor.join()
        for listener in self._listeners:
            listener.close()
        with self._lock:
            clients = list(self._clients.values())
        if not self._end(clients):
            with self._lock:
                left = [client.peer for client in clients if self._clients.get(client.number) is client]
            log.warning("closing: requests of %s have not ended after %.0f s", ", ".join(left), DEVICE_SECONDS)
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()
        self._closed.set()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def parse_spin(spin: str | int) -> tuple[int, bool]:
    """Return (microseconds, adaptive) of "off", "adaptive" or a number; ValueError names what is neither."""
    if spin == "off":
        return 0, False
    if spin == "adaptive":
        return SPIN_ADAPTIVE_US, True
    if not str(spin).isascii() or not str(spin).isdigit() or not 0 <= int(spin) <= SPIN_US_MAX:
        raise ValueError(f"spin: {spin!r} is neither off nor adaptive nor microseconds from 1 to {SPIN_US_MAX}")
    return int(spin), False


def _peer(sock: socket.socket, address) -> str:
    """Who has connected, for the log."""
    if sock.family == socket.AF_UNIX:
        pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return f"pid {pid} uid {uid}"
    return f"{address[0]}:{address[1]}"


