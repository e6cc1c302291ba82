"""Cutting a byte stream into requests."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcbw.qmp.decoder import Decoder, TooLong

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**15), 10**15) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def decode(*pieces, **options):
    decoder = Decoder(**options)
    return [found for piece in pieces for found in decoder.feed(piece)]


@given(st.lists(st.dictionaries(st.text(), JSON, max_size=3), max_size=4), st.data())
def test_requests_cut_anywhere_and_joined_without_newline_come_out_whole(requests, data):
    ascii_only = data.draw(st.booleans())
    try:
        stream = b"".join(json.dumps(request, ensure_ascii=ascii_only).encode() for request in requests)
    except UnicodeEncodeError:  # a lone surrogate has no UTF-8; escaped it has
        stream = b"".join(json.dumps(request).encode() for request in requests)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)])]
    assert decode(*pieces) == [(request, None) for request in requests]


@given(st.lists(st.binary(max_size=40), max_size=6))
def test_any_bytes_cost_errors_and_never_the_decoder(pieces):
    decoder = Decoder(limit=1000)
    for piece in pieces:
        list(decoder.feed(piece))
    # Whatever state that left: the end of a string, of brackets and of a line bring it back.
    list(decoder.feed(b'\n"\n' + b"}" * 300 + b"\n"))
    assert list(decoder.feed(b'{"execute":"x"}\n'))[-1] == ({"execute": "x"}, None)


@pytest.mark.parametrize("garbage", [b"nonsense\n", b"}\n", b"]]]\n", b"\xff\n", b"12 13\n", b"'a'\n"])
def test_garbage_costs_one_error_and_the_next_request_is_read(garbage):
    (none, reason), following = decode(garbage + b'{"a":1}')
    assert none is None and reason.startswith("JSON parse error")
    assert following == ({"a": 1}, None)


@pytest.mark.parametrize("bad", [b'{"a":}', b'{"a":1,"a":2}', b'{"a":NaN}', b'{"a":"\xff"}', b"{]",
                                 b"[" * 5000 + b"]" * 5000])
def test_a_balanced_but_wrong_object_costs_one_error(bad):
    (none, reason), following = decode(bad + b'\n{"a":1}')
    assert none is None and reason.startswith("JSON parse error")
    assert following == ({"a": 1}, None)


def test_a_string_that_a_newline_cuts_off_does_not_swallow_the_next_request():
    assert decode(b'{"a":"b\n{"a":1}')[-1] == ({"a": 1}, None)


def test_a_bracket_or_an_escaped_quote_in_a_string_ends_nothing():
    request = {"a": '}]{["\\', "b": '\\"'}
    assert decode(*(bytes([byte]) for byte in json.dumps(request).encode())) == [(request, None)]


def test_a_request_longer_than_the_limit_is_refused_before_it_ends():
    with pytest.raises(TooLong):
        decode(b'{"a":"' + b"x" * 100, limit=64)


def test_whitespace_between_requests_is_not_kept():
    decoder = Decoder(limit=8)
    assert list(decoder.feed(b" \r\n" * 100)) == []
    assert list(decoder.feed(b"{}")) == [({}, None)]
