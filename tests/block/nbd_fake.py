"""An NBD server in Python that answers as a test tells it to: late, out of order, in pieces, wrong."""

import contextlib
import socket
import struct
import threading
from dataclasses import dataclass

from fastcbw.wire import constants as c

LENGTH = 1 << 20
ALL_FLAGS = (c.FLAG_HAS_FLAGS | c.FLAG_SEND_FLUSH | c.FLAG_SEND_FUA | c.FLAG_SEND_TRIM | c.FLAG_SEND_WRITE_ZEROES
             | c.FLAG_SEND_FAST_ZERO)
CONTEXT = 7         # the id that base:allocation gets


@dataclass
class Request:
    kind: int
    flags: int
    cookie: int
    offset: int
    length: int
    payload: bytes = b""


class Peer:
    """The server's end of one connection, past its handshake."""

    def __init__(self, sock):
        self.sock = sock

    def receive(self, length):
        data = bytearray()
        while len(data) < length:
            part = self.sock.recv(length - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def request(self):
        """Return the next Request; EOFError at the end, and at DISC."""
        magic, flags, kind, cookie, offset, length = struct.unpack(">IHHQQI", self.receive(28))
        assert magic == c.REQUEST_MAGIC
        if kind == c.CMD_DISC:
            raise EOFError
        return Request(kind, flags, cookie, offset, length, self.receive(length) if kind == c.CMD_WRITE else b"")

    def idle(self, seconds=0.05):
        """Tell whether no request comes for so long."""
        self.sock.settimeout(seconds)
        try:
            return not self.sock.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return True
        finally:
            self.sock.settimeout(20)

    def simple(self, cookie, error=0, data=b""):
        self.sock.sendall(struct.pack(">IIQ", c.SIMPLE_REPLY_MAGIC, error, cookie) + data)

    def chunk(self, cookie, kind, body=b"", done=True):
        self.sock.sendall(chunk(cookie, kind, body, done))

    def data(self, cookie, offset, data, done=True):
        self.chunk(cookie, c.REPLY_TYPE_OFFSET_DATA, struct.pack(">Q", offset) + data, done)

    def hole(self, cookie, offset, length, done=True):
        self.chunk(cookie, c.REPLY_TYPE_OFFSET_HOLE, struct.pack(">QI", offset, length), done)

    def status(self, cookie, *extents, context=CONTEXT):
        body = b"".join(struct.pack(">II", *extent) for extent in extents)
        self.chunk(cookie, c.REPLY_TYPE_BLOCK_STATUS, struct.pack(">I", context) + body)

    def error(self, cookie, error, text="", done=True):
        self.chunk(cookie, c.REPLY_TYPE_ERROR, struct.pack(">IH", error, len(text.encode())) + text.encode(), done)


def chunk(cookie, kind, body=b"", done=True):
    """The bytes of a chunk."""
    return struct.pack(">IHHQI", c.STRUCTURED_REPLY_MAGIC, c.REPLY_FLAG_DONE if done else 0, kind, cookie, len(body)) + body


def contents(offset, length):
    """What the disk of these servers holds."""
    return bytes((at * 7 + (at >> 8)) & 0xFF for at in range(offset, offset + length))


@contextlib.contextmanager
def fake_server(path, serve, *, flags=ALL_FLAGS, structured=True, context=True, length=LENGTH, block_sizes=None, go_error=None):
    """Run SERVE(peer) for each connection, in a thread of its own; it ends with EOFError, ConnectionError or by returning.

    go_error: (kind, text) that OPT_GO is answered with. Yields the URI. At the end every thread is joined, and what a
    thread raised otherwise is raised.
    """
    threads, sockets, failures = [], [], []
    info = [struct.pack(">HQH", c.INFO_EXPORT, length, flags)]
    if block_sizes is not None:
        info.append(struct.pack(">HIII", c.INFO_BLOCK_SIZE, *block_sizes))

    def shake_hands(peer):
        def reply(option, kind, body=b""):
            peer.sock.sendall(struct.pack(">QIII", c.OPTION_REPLY_MAGIC, option, kind, len(body)) + body)

        peer.sock.sendall(struct.pack(">QQH", c.MAGIC, c.OPTION_MAGIC, c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES))
        peer.receive(4)
        while True:
            _, option, size = struct.unpack(">QII", peer.receive(16))
            peer.receive(size)
            if option == c.OPT_STRUCTURED_REPLY and structured:
                reply(option, c.REP_ACK)
            elif option == c.OPT_SET_META_CONTEXT and context:
                reply(option, c.REP_META_CONTEXT, struct.pack(">I", CONTEXT) + c.BASE_ALLOCATION.encode())
                reply(option, c.REP_ACK)
            elif option == c.OPT_GO and go_error is not None:
                reply(option, go_error[0], go_error[1].encode())
            elif option == c.OPT_GO:
                for part in info:
                    reply(option, c.REP_INFO, part)
                reply(option, c.REP_ACK)
                return
            else:
                reply(option, c.REP_ERR_UNSUP, b"not here")

    def connection(sock):
        with sock:
            try:
                peer = Peer(sock)
                shake_hands(peer)
                serve(peer)
            except (EOFError, ConnectionError):
                pass
            except BaseException as error:
                failures.append(error)

    def accept(listener):
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            sock.settimeout(20)
            sockets.append(sock)
            threads.append(threading.Thread(target=connection, args=(sock,)))
            threads[-1].start()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        acceptor = threading.Thread(target=accept, args=(listener,))
        acceptor.start()
        try:
            yield f"nbd+unix:///vm?socket={path}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            acceptor.join()
            for sock in sockets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()
            path.unlink()
    assert failures == []


def serve_well(peer, log=None):
    """Answer everything as a good server does; requests go to the list LOG."""
    while True:
        request = peer.request()
        if log is not None:
            log.append(request)
        if request.kind == c.CMD_READ:
            peer.data(request.cookie, request.offset, contents(request.offset, request.length))
        elif request.kind == c.CMD_BLOCK_STATUS:
            peer.status(request.cookie, (request.length, 0))
        else:
            peer.simple(request.cookie)


def together(*calls):
    """Make each call in a thread of its own; return what they returned, or the exception they raised."""
    results = [None] * len(calls)

    def work(i):
        try:
            results[i] = calls[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
