"""A QMP client: one connection, requests one at a time, events kept for who asks."""

from __future__ import annotations

import collections
import json
import os
import select
import socket
import threading

from fastcbw.errors import Error
from fastcbw.qmp.replies import LONG_REPLIES

EVENTS_LIMIT = 1024
REPLY_BYTES_LIMIT = 64 << 20


class QmpClient:
    """Connect to the QMP socket at PATH and negotiate.

    timeout: seconds that a reply may take; None waits for ever. Thread-safe: requests take turns.
    Raises OSError naming PATH when nobody listens there, fastcbw.Error when who listens speaks no QMP.
    """

    def __init__(self, path: str | os.PathLike, timeout: float | None = 60.0):
        self.path = os.fspath(path)
        self.events: collections.deque[dict] = collections.deque(maxlen=EVENTS_LIMIT)
        self._lock = threading.Lock()
        self._next_id = 1
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        self._stream = None
        try:
            try:
                self._socket.connect(self.path)
            except OSError as error:
                reason = error.strerror or str(error)
                raise OSError(error.errno or 0, f"no daemon answers: {reason}", self.path) from None
            self._stream = self._socket.makefile("rb")
            greeting = self._receive(first=True)
            if "QMP" not in greeting:
                raise Error(f"{self.path}: {greeting.get('error', {}).get('desc', 'no QMP greeting (is this the QMP socket?)')}")
            self.version = greeting["QMP"]["version"]
            ours = str(self.version.get("package", "")).startswith("fastcbw")     # QEMU refuses what it does not know
            self.execute("qmp_capabilities", enable=[LONG_REPLIES] if ours else None)
        except BaseException:
            self.close()
            raise

    def execute(self, command: str, **arguments):
        """Run COMMAND and return what it returns. Arguments: with ``_`` for ``-``; those that are None are left out.

        Raises fastcbw.Error with the daemon's message when it refuses; OSError when the connection breaks.
        """
        given = {name.replace("_", "-"): value for name, value in arguments.items() if value is not None}
        with self._lock:
            number = self._next_id
            self._next_id += 1
            self._send({"execute": command, "arguments": given, "id": number})
            while True:
                reply = self._receive()
                if "event" in reply:
                    self.events.append(reply)
                elif reply.get("id") == number or ("id" not in reply and "error" in reply):
                    break
        if "error" in reply:
            raise Error(reply["error"]["desc"])
        return reply["return"]

    def has_event(self, seconds: float = 0.0) -> bool:
        """Tell whether there is an event that nobody has taken yet; wait up to SECONDS for one to come."""
        with self._lock:
            if not self.events and (self._has_read_ahead() or select.select([self._socket], [], [], seconds)[0]):
                self.events.append(self._receive())         # between a reply and the next request there is nothing else
            return bool(self.events)

    def _has_read_ahead(self) -> bool:
        """Whether bytes were received that nobody has looked at; with the lock held."""
        limit = self._socket.gettimeout()
        self._socket.settimeout(0)
        try:
            return bool(self._stream.peek(1))
        finally:
            self._socket.settimeout(limit)

    def next_event(self) -> dict:
        """Return the oldest event that nobody has taken yet; wait for one if there is none."""
        with self._lock:
            while not self.events:
                message = self._receive()
                if "event" in message:
                    self.events.append(message)
            return self.events.popleft()

    def _send(self, message: dict) -> None:
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise OSError(error.errno or 0, f"the daemon is gone: {error.strerror or error}", self.path) from None

    def _receive(self, first: bool = False) -> dict:
        try:
            if first and self._stream.peek(1)[:1] not in (b"{", b""):  # another protocol may never send a newline
                raise Error(f"{self.path}: does not speak QMP (is this the QMP socket?)")
            line = self._stream.readline(REPLY_BYTES_LIMIT)
        except TimeoutError:
            raise TimeoutError(f"{self.path}: no reply within {self._socket.gettimeout():g} seconds") from None
        except OSError as error:
            raise OSError(error.errno or 0, f"the daemon is gone: {error.strerror or error}", self.path) from None
        if not line.endswith(b"\n"):
            raise ConnectionError(f"{self.path}: the daemon closed the connection")
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise Error(f"{self.path}: no QMP but {line[:80]!r} (is this the QMP socket?)")
        return message

    def close(self) -> None:
        """Close the connection. Closing twice is no error."""
        if self._stream is not None:
            self._stream.close()
        self._socket.close()

    def __enter__(self) -> QmpClient:
        return self

    def __exit__(self, *exc) -> None:
        self.close()
