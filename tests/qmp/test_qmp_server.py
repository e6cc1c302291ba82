"""The QMP server on the wire: sessions, negotiation, errors, events, limits."""

import json
import socket
import threading

import pytest

from fastcbw.errors import Error
from fastcbw.export.nbd.listen import listen_unix
from fastcbw.qmp.client import QmpClient
from fastcbw.qmp.schema import Argument, Command, Schema
from fastcbw.qmp.server import QmpServer


class Context:
    """What the commands of these tests work on."""

    def __init__(self):
        self.entered = threading.Event()
        self.go_on = threading.Event()

    def wait(self):
        self.entered.set()
        assert self.go_on.wait(30)
        return "waited"


def _fail(context, how):
    raise {"error": Error("refused"), "bug": ZeroDivisionError("oops"), "os": OSError(28, "no room", "/t")}[how]


SCHEMA = Schema([
    Command("qmp_capabilities", "", lambda context: None),
    Command("echo", "", lambda context, value=None: value, (Argument("value", "str", ""),)),
    Command("wait", "", Context.wait),
    Command("fail", "", _fail, (Argument("how", "str", "", required=True),)),
])


@pytest.fixture
def context():
    return Context()


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "qmp")


@pytest.fixture
def server(path, context):
    before = threading.active_count()
    server = QmpServer(listen_unix(path), SCHEMA, context, clients_limit=4, request_bytes_limit=4096)
    yield server
    context.go_on.set()
    server.close()
    assert threading.active_count() == before


class Raw:
    """A client that sends bytes and reads lines."""

    def __init__(self, path, negotiate=True):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(30)
        self.socket.connect(path)
        self.stream = self.socket.makefile("rb")
        self.greeting = self.line()
        if negotiate:
            assert self.ask(b'{"execute":"qmp_capabilities"}') == {"return": {}}

    def line(self):
        line = self.stream.readline()
        return json.loads(line) if line else None

    def ask(self, data):
        self.socket.sendall(data)
        return self.line()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.stream.close()
        self.socket.close()


def echo(value):
    return b'{"execute":"echo","arguments":{"value":"%s"}}' % value.encode()


def test_the_greeting_is_shaped_as_qemus(server, path):
    with Raw(path, negotiate=False) as client:
        version = client.greeting["QMP"]["version"]
        assert client.greeting["QMP"]["capabilities"] == []
        assert set(version["qemu"]) == {"major", "minor", "micro"} and version["package"].startswith("fastcbw")


def test_no_command_is_answered_before_the_negotiation_and_none_negotiates_twice(server, path):
    with Raw(path, negotiate=False) as client:
        early = client.ask(echo("x"))["error"]
        assert early["class"] == "CommandNotFound" and "qmp_capabilities" in early["desc"]
        assert client.ask(b'{"execute":"qmp_capabilities"}') == {"return": {}}
        assert client.ask(b'{"execute":"qmp_capabilities"}')["error"]["class"] == "CommandNotFound"
        assert client.ask(echo("x")) == {"return": "x"}


@pytest.mark.parametrize("number", ["1", '"a"', "null", '{"x":[1]}'])
def test_the_id_comes_back_as_it_was_in_replies_and_errors(server, path, number):
    with Raw(path) as client:
        assert client.ask(b'{"execute":"echo","id":%s}' % number.encode())["id"] == json.loads(number)
        assert client.ask(b'{"execute":"nothing","id":%s}' % number.encode())["id"] == json.loads(number)


def test_a_request_in_single_bytes_without_newline_is_answered(server, path):
    with Raw(path) as client:
        for byte in echo("}"):
            client.socket.sendall(bytes([byte]))
        assert client.line() == {"return": "}"}


def test_several_requests_in_one_piece_are_answered_in_order(server, path):
    with Raw(path) as client:
        client.socket.sendall(b"".join(b'{"execute":"echo","id":%d}' % number for number in range(50)))
        assert [client.line()["id"] for _ in range(50)] == list(range(50))


def test_a_bad_request_ends_no_session_not_even_its_own(server, path):
    with Raw(path) as other, Raw(path) as client:
        assert client.ask(b"rubbish\n")["error"]["class"] == "GenericError"
        assert "missing" in client.ask(b'{"execute":"fail"}')["error"]["desc"]
        assert client.ask(echo("x")) == {"return": "x"}
        assert other.ask(echo("y")) == {"return": "y"}


def test_a_request_without_end_is_refused_and_ends_only_its_own_session(server, path):
    with Raw(path) as other, Raw(path) as client:
        assert "longer than 4096 bytes" in client.ask(b'{"a":"' + b"x" * 5000)["error"]["desc"]
        assert client.line() is None
        assert other.ask(echo("y")) == {"return": "y"}


@pytest.mark.parametrize("how, text", [("error", "refused"), ("bug", "internal error: oops"), ("os", "/t: no room")])
def test_a_failing_command_is_answered_with_its_reason(server, path, how, text):
    with Raw(path) as client:
        reply = client.ask(b'{"execute":"fail","arguments":{"how":"%s"},"id":7}' % how.encode())
        assert reply == {"error": {"class": "GenericError", "desc": text}, "id": 7}


def test_a_command_that_waits_holds_up_its_own_client_only(server, path, context):
    with Raw(path) as slow, Raw(path) as client:
        slow.socket.sendall(b'{"execute":"wait"}')
        assert context.entered.wait(30)
        assert client.ask(echo("x")) == {"return": "x"}
        context.go_on.set()
        assert slow.line() == {"return": "waited"}


def test_events_reach_all_who_negotiated_and_nobody_else(server, path):
    with Raw(path) as first, Raw(path) as second, Raw(path, negotiate=False) as third:
        server.emit("THING", {"a": 1})
        for client in (first, second):
            event = client.line()
            assert (event["event"], event["data"]) == ("THING", {"a": 1})
            assert set(event["timestamp"]) == {"seconds", "microseconds"}
        assert third.ask(b'{"execute":"qmp_capabilities"}') == {"return": {}}


def test_a_client_that_never_reads_is_dropped_and_the_others_hear_every_event(server, path):
    with Raw(path) as deaf, Raw(path) as client:
        for number in range(400):
            server.emit("THING", {"number": number, "padding": "x" * 20000})
            assert client.line()["data"]["number"] == number
        assert server.clients == 1
        assert deaf.socket.fileno() >= 0


def test_one_client_too_many_is_told_so(server, path):
    clients = [Raw(path) for _ in range(4)]
    with Raw(path, negotiate=False) as late:
        assert "too many clients" in late.greeting["error"]["desc"]
    for client in clients:
        client.__exit__()


def test_closing_lets_the_running_command_answer(server, path, context):
    with Raw(path) as idle, Raw(path) as client:
        client.socket.sendall(b'{"execute":"wait","id":1}{"execute":"wait","id":2}')
        assert context.entered.wait(30)
        closer = threading.Thread(target=server.close)
        closer.start()
        assert idle.line() is None  # so close has begun
        context.go_on.set()
        assert client.line() == {"return": "waited", "id": 1}
        assert client.line() is None
        closer.join(30)


def test_the_client_of_ours_raises_the_daemons_words_and_keeps_events(server, path):
    with QmpClient(path) as client:
        server.emit("THING", {})
        assert client.execute("echo", value="x") == "x"
        with pytest.raises(Error, match="^refused$"):
            client.execute("fail", how="error")
        assert [event["event"] for event in client.events] == ["THING"]


def test_a_client_is_told_of_events_that_came_together_and_of_none(server, path):
    with QmpClient(path) as client:
        assert not client.has_event() and not client.has_event(0.01)
        server.emit("ONE", {})
        server.emit("TWO", {})
        assert client.execute("echo", value="both are there before this") == "both are there before this"
        assert [client.has_event() and client.next_event()["event"] for _ in range(3)] == ["ONE", "TWO", False]
        server._loop.call_soon_threadsafe(lambda: [server._broadcast(b'{"event": "%d"}\n' % number) for number in range(3)])
        assert [client.has_event(30) and client.next_event()["event"] for _ in range(3)] == ["0", "1", "2"]
        assert not client.has_event()
        assert client.execute("echo", value="x") == "x"
        server.close()
        with pytest.raises(OSError, match="closed the connection"):
            client.has_event(30)


def test_the_client_of_ours_names_the_socket_where_nobody_listens(tmp_path):
    with pytest.raises(OSError, match="no daemon answers"):
        QmpClient(tmp_path / "nothing")
