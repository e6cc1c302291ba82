"""The handshake, option by option."""

import socket
import struct
import threading

import pytest

from fastcbw.block.memory import MemoryDevice
from fastcbw.errors import Error
from fastcbw.export.nbd.client import Client, NbdError, meta_query
from fastcbw.export.nbd.contexts import AllocationContext
from fastcbw.export.nbd.server import Server
from fastcbw.wire import constants as c


@pytest.fixture
def greeted(path, export):
    """A client after the greeting, before any option."""
    client = Client(path, begin=False)
    yield client
    client.sock.close()


def go_data(name, *wanted):
    name = name.encode()
    return struct.pack(f">I{len(name)}sH{len(wanted)}H", len(name), name, len(wanted), *wanted)


def still_negotiates(client):
    client.go("disk")
    return client.length


def test_go_announces_length_flags_name_description_and_block_sizes(path, server, disk):
    server.add_export("disk", disk, description="the guest's disk")
    with Client(path, "disk") as client:
        assert client.length == disk.length
        assert client.info[c.INFO_NAME] == b"disk"
        assert client.info[c.INFO_DESCRIPTION] == b"the guest's disk"
        assert struct.unpack(">III", client.info[c.INFO_BLOCK_SIZE]) == (1, 4096, 32 << 20)
        assert client.flags == (
            c.FLAG_HAS_FLAGS | c.FLAG_SEND_FLUSH | c.FLAG_SEND_FUA | c.FLAG_SEND_TRIM | c.FLAG_SEND_WRITE_ZEROES
            | c.FLAG_SEND_DF | c.FLAG_CAN_MULTI_CONN | c.FLAG_SEND_FAST_ZERO)


def test_a_read_only_export_offers_nothing_that_writes(path, server, disk):
    server.add_export("disk", disk, read_only=True)
    with Client(path, "disk") as client:
        assert client.flags & c.FLAG_READ_ONLY
        assert not client.flags & (c.FLAG_SEND_TRIM | c.FLAG_SEND_WRITE_ZEROES | c.FLAG_SEND_FAST_ZERO)


def test_unfragmented_reads_are_offered_only_with_structured_replies(path, export):
    with Client(path, "disk", structured=False) as client:
        assert not client.flags & c.FLAG_SEND_DF


def test_info_answers_like_go_and_goes_on_negotiating(greeted):
    greeted.go("disk", option=c.OPT_INFO)
    assert greeted.exports() == [("disk", "")]


def test_list_names_every_export(path, server, disk):
    server.add_export("a", disk, description="first")
    server.add_export("b@snap", disk, read_only=True)
    client = Client(path, begin=False)
    assert client.exports() == [("a", "first"), ("b@snap", "")]
    client.sock.close()


def test_the_empty_name_is_the_only_export(path, export):
    with Client(path, "") as client:
        assert client.info[c.INFO_NAME] == b"disk"


def test_the_empty_name_is_refused_when_there_are_two(path, server, disk):
    server.add_export("a", disk)
    server.add_export("b", disk)
    with pytest.raises(NbdError, match="no default export"):
        Client(path, "")


def test_an_unknown_export_is_refused_with_its_name_and_the_client_may_choose_again(greeted):
    kind, text = greeted.option(c.OPT_GO, go_data("other"))[-1]
    assert kind == c.REP_ERR_UNKNOWN
    assert b"other" in text
    assert still_negotiates(greeted)


@pytest.mark.parametrize("zeroes", [0, 124])
def test_export_name_begins_at_once_with_and_without_the_padding(path, export, zeroes):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        sock.settimeout(10)
        sock.recv(18, socket.MSG_WAITALL)
        flags = c.FLAG_FIXED_NEWSTYLE | (0 if zeroes else c.FLAG_NO_ZEROES)
        sock.sendall(struct.pack(">IQII", flags, c.OPTION_MAGIC, c.OPT_EXPORT_NAME, 4) + b"disk")
        length, flags = struct.unpack(">QH", sock.recv(10, socket.MSG_WAITALL))
        assert length == export.length
        assert sock.recv(zeroes, socket.MSG_WAITALL) == bytes(zeroes)
        sock.sendall(struct.pack(">IHHQQI", c.REQUEST_MAGIC, 0, c.CMD_FLUSH, 7, 0, 0))
        assert sock.recv(16, socket.MSG_WAITALL) == struct.pack(">IIQ", c.SIMPLE_REPLY_MAGIC, 0, 7)


def test_export_name_of_an_unknown_export_ends_the_connection(greeted):
    greeted.sock.sendall(struct.pack(">QII", c.OPTION_MAGIC, c.OPT_EXPORT_NAME, 5) + b"other")
    assert greeted.sock.recv(1) == b""


def test_abort_is_acknowledged(greeted):
    assert greeted.option(c.OPT_ABORT) == [(c.REP_ACK, b"")]
    assert greeted.sock.recv(1) == b""


@pytest.mark.parametrize("option", [c.OPT_STARTTLS, 4, 11, 77, 0xFFFFFFFF])
def test_an_unknown_option_is_unsupported_and_harmless(greeted, option):
    assert greeted.option(option, b"anything")[-1][0] == c.REP_ERR_UNSUP
    assert still_negotiates(greeted)


@pytest.mark.parametrize(
    ("option", "data"),
    [
        (c.OPT_LIST, b"x"),
        (c.OPT_STRUCTURED_REPLY, b"x"),
        (c.OPT_GO, b""),
        (c.OPT_GO, struct.pack(">I", 400) + b"disk"),
        (c.OPT_GO, struct.pack(">I4sH", 4, b"disk", 1)),
        (c.OPT_GO, go_data("disk") + b"x"),
        (c.OPT_INFO, struct.pack(">I4s", 4, b"disk")),
        (c.OPT_GO, struct.pack(">I2sH", 2, b"\xff\xfe", 0)),
        (c.OPT_SET_META_CONTEXT, b""),
        (c.OPT_SET_META_CONTEXT, meta_query("disk", ["base:allocation"])[:-1]),
        (c.OPT_SET_META_CONTEXT, meta_query("disk", ["base:allocation"]) + b"x"),
        (c.OPT_LIST_META_CONTEXT, struct.pack(">I4sI", 4, b"disk", 0xFFFFFFFF)),
    ],
)
def test_an_option_with_a_wrong_length_is_invalid_and_harmless(greeted, option, data):
    if option in (c.OPT_SET_META_CONTEXT, c.OPT_LIST_META_CONTEXT):
        greeted.structured_replies()
    assert greeted.option(option, data)[-1][0] == c.REP_ERR_INVALID
    assert still_negotiates(greeted)


def test_an_option_that_is_too_big_is_skipped(greeted):
    assert greeted.option(c.OPT_GO, bytes(1 << 20))[-1][0] == c.REP_ERR_TOO_BIG
    assert still_negotiates(greeted)


def test_an_option_that_is_absurd_ends_the_connection(greeted):
    greeted.sock.sendall(struct.pack(">QII", c.OPTION_MAGIC, c.OPT_GO, 0xFFFFFFFF))
    assert greeted.sock.recv(1) == b""


@pytest.mark.parametrize("answer", [struct.pack(">I", 0), struct.pack(">I", 0xFF), b"GET / HTTP/1.0\r\n\r\n"])
def test_a_client_that_speaks_something_else_is_dropped(path, export, answer):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        sock.settimeout(10)
        sock.recv(18, socket.MSG_WAITALL)
        sock.sendall(answer)
        try:
            rest = sock.recv(1)
        except ConnectionResetError:
            rest = b""
        assert rest == b""
    with Client(path, "disk") as client:
        assert client.length == export.length


def test_a_wrong_option_magic_ends_the_connection(greeted):
    greeted.sock.sendall(bytes(16))
    assert greeted.sock.recv(1) == b""


def test_a_client_that_negotiates_for_ever_is_dropped(greeted):
    with pytest.raises((EOFError, OSError)):
        for _ in range(300):
            greeted.exports()


def test_a_client_that_says_nothing_is_dropped_at_the_deadline(path, disk):
    with Server(path, handshake_seconds=0.2) as server:
        server.add_export("disk", disk)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            sock.settimeout(10)
            assert len(sock.recv(18, socket.MSG_WAITALL)) == 18
            assert sock.recv(1) == b""


def test_meta_contexts_need_structured_replies(greeted):
    assert greeted.option(c.OPT_SET_META_CONTEXT, meta_query("disk", ["base:allocation"]))[-1][0] == c.REP_ERR_INVALID


def test_meta_contexts_of_an_unknown_export_are_refused(greeted):
    greeted.structured_replies()
    assert greeted.option(c.OPT_SET_META_CONTEXT, meta_query("other", []))[-1][0] == c.REP_ERR_UNKNOWN


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        ([], {b"base:allocation", b"qemu:allocation-depth", b"x-test:more"}),
        (["base:"], {b"base:allocation"}),
        (["x-test:more"], {b"x-test:more"}),
        (["base:other", "unknown:"], set()),
    ],
)
def test_list_meta_context_answers_names_and_prefixes(path, server, disk, queries, expected):
    server.add_export("disk", disk, contexts={"x-test:more": AllocationContext(disk)})
    client = Client(path, begin=False)
    client.structured_replies()
    replies = client.option(c.OPT_LIST_META_CONTEXT, meta_query("disk", queries))
    assert {data[4:] for kind, data in replies if kind == c.REP_META_CONTEXT} == expected
    assert replies[-1] == (c.REP_ACK, b"")
    client.sock.close()


def test_set_meta_context_takes_what_exists_and_replaces_what_was_set(greeted):
    greeted.structured_replies()
    greeted.set_meta_contexts("disk", ["base:allocation", "qemu:dirty-bitmap:none"])
    assert list(greeted.contexts) == ["base:allocation"]
    greeted.set_meta_contexts("disk", [])
    greeted.go("disk")
    with pytest.raises(NbdError, match="no meta context"):
        greeted.block_status(0, 4096)


def test_contexts_set_for_another_export_do_not_count(path, server, disk):
    server.add_export("disk", disk)
    server.add_export("other", MemoryDevice("1M"))
    client = Client(path, begin=False)
    client.structured_replies()
    client.set_meta_contexts("other", ["base:allocation"])
    client.go("disk")
    with pytest.raises(NbdError, match="no meta context"):
        client.block_status(0, 4096)
    client.close()


def test_a_hook_may_refuse_a_client_with_its_reason(path, server, disk):
    def refuse():
        raise Error("the snapshot is broken")

    left = threading.Event()
    server.add_export("disk", disk, on_connect=refuse, on_disconnect=left.set)
    with pytest.raises(NbdError, match="the snapshot is broken"):
        Client(path, "disk")
    assert not left.is_set()
