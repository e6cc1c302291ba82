"""Listening sockets of the NBD server: made, taken over from a starter, replaced when stale, removed at the end."""

from __future__ import annotations

import errno
import os
import socket
import stat

from fastcbw.errors import Error

BACKLOG = 64
#: How long a connect to a socket file may take that tells a live server from a stale file.
PROBE_SECONDS = 2.0
#: sizeof(sockaddr_un.sun_path) less the final zero byte.
UNIX_PATH_MAX = 107


class Listener:
    """A listening socket with the address for people, and what is to be removed at the end."""

    def __init__(self, sock: socket.socket, address: str, path: str | None = None):
        self.sock = sock
        self.address = address
        self._path = path
        self._identity = _identity(path) if path else None

    def fileno(self) -> int:
        return self.sock.fileno()

    def close(self) -> None:
        """Close the socket and remove its file, if it is still the one that was made here."""
        self.sock.close()
        if self._path and _identity(self._path) == self._identity:
            try:
                os.unlink(self._path)
            except FileNotFoundError:
                pass


def listen_unix(path: str | os.PathLike) -> Listener:
    """Listen on a unix socket at PATH.

    A socket file that nobody listens on any more is replaced. Raises Error naming the path when a server lives there;
    OSError when PATH is something else, too long, or not writable; nothing is changed then.
    """
    path = os.fspath(path)
    if not path or len(os.fsencode(path)) > UNIX_PATH_MAX:
        raise OSError(errno.ENAMETOOLONG, f"{path}: a socket path has 1 to {UNIX_PATH_MAX} bytes")
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise Error(f"{path}: another server has just begun to listen there") from None
            raise OSError(error.errno, f"{path}: cannot listen there: {os.strerror(error.errno)}") from None
        sock.listen(BACKLOG)
        return Listener(sock, path, path)
    except BaseException:
        sock.close()
        raise


def listen_tcp(port: int, host: str = "127.0.0.1") -> Listener:
    """Listen on a TCP port of HOST; port 0 takes a free one. There is no encryption and no authentication."""
    sock = socket.create_server((host, port), backlog=BACKLOG)
    host, port = sock.getsockname()[:2]
    return Listener(sock, f"{host}:{port}")


def inherited() -> list[Listener]:
    """Return the sockets that a starter passed by LISTEN_FDS and LISTEN_PID, once; empty when there are none.

    The variables are removed from the environment, so that children don't take the sockets for theirs.
    """
    count, pid = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if not count.isdigit() or pid != str(os.getpid()):
        return []
    listeners = []
    for descriptor in range(3, 3 + int(count)):
        os.set_inheritable(descriptor, False)
        listeners.append(adopt(socket.socket(fileno=descriptor)))
    return listeners


def adopt(sock: socket.socket) -> Listener:
    """Take over a listening socket that somebody else made; its file stays when it is closed."""
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ValueError("the socket passed to the server is not listening")
    name = sock.getsockname()
    if isinstance(name, tuple):
        return Listener(sock, f"{name[0]}:{name[1]}")
    return Listener(sock, os.fsdecode(name) or "a passed socket")


def _identity(path: str):
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _remove_stale(path: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, f"{path}: is there and is no socket (remove it or choose another path)")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_SECONDS)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except (TimeoutError, BlockingIOError):
            pass        # a server too busy to accept lives
    raise Error(f"{path}: a server is already listening there (end it or choose another path)")
