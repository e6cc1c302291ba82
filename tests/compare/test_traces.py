"""The text of traces."""

import pytest

from fastcbw.compare.loads.trace import HEAD, Request, line_of, parse


def test_a_trace_reads_as_it_was_written():
    requests = [Request(0, "write", 4096, 512), Request(7, "flush", 0, 0), Request(7, "discard", 0, 65536)]
    assert list(parse([HEAD, "", "# a remark", *map(line_of, requests)], "t")) == requests


@pytest.mark.parametrize(("lines", "text"), [
    (["0 write 0 512"], "t: is no trace"), ([HEAD, "0 write 0"], "t: line 2: '0 write 0' is no request"),
    ([HEAD, "0 append 0 1"], "line 2: 'append' is unknown"), ([HEAD, "5 read 0 1", "4 read 0 1"], "line 3: '4 read 0 1' goes back in time"),
    ([HEAD, "0 read -1 1"], "negative")])
def test_what_is_no_trace_is_refused_with_its_line(lines, text):
    with pytest.raises(ValueError, match="t") as refused:
        list(parse(lines, "t"))
    assert text in str(refused.value)
