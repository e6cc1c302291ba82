"""Traces: their text, their recorder, and a guest that is replayed."""

import os
import resource
import signal
import threading

import pytest

from fastcbw.block.fault import FaultDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.block.trace import TraceDevice
from fastcbw.compare import cell
from fastcbw.errors import Error
from fastcbw.export.nbd.client import Client
from fastcbw.qmp.daemon import Daemon

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


def requests_in(path):
    with open(path) as file:
        return [request[1:] for request in parse(file, str(path))]


def test_the_recorder_writes_what_passes_and_keeps_the_data(tmp_path):
    memory = MemoryDevice(1 << 20)
    device = TraceDevice(memory, tmp_path / "t", requests=5)
    device.write(4096, b"x" * 512)
    assert device.read(4096, 512) == b"x" * 512
    device.write_zeroes(8192, 4096)
    device.discard(65536, 65536)
    device.flush()
    device.write(0, b"y")                       # beyond its limit: done, not recorded
    assert device.requests == 5 and memory.read(0, 1) == b"y"
    device.stop()
    device.stop()
    assert requests_in(tmp_path / "t") == [("write", 4096, 512), ("read", 4096, 512), ("zero", 8192, 4096), ("discard", 65536, 65536), ("flush", 0, 0)]
    device.close()
    with pytest.raises(FileExistsError):
        TraceDevice(memory, tmp_path / "t")


def test_requests_of_many_threads_are_all_there_and_in_order(tmp_path):
    device = TraceDevice(MemoryDevice(1 << 20), tmp_path / "t")
    threads = [threading.Thread(target=lambda: [device.write(4096, b"z" * 16) for _ in range(2000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    device.close()
    assert requests_in(tmp_path / "t") == [("write", 4096, 16)] * 8000


def test_a_trace_that_cannot_be_written_ends_and_the_guest_goes_on(tmp_path):
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    device = TraceDevice(MemoryDevice(1 << 20), tmp_path / "t")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        for _ in range(6000):
            device.write(0, b"abcd")
        assert device.error == "File too large" and device.requests < 6000 and device.read(0, 4) == b"abcd"
        device.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_a_request_that_fails_was_asked_for_all_the_same(tmp_path):
    faulty = FaultDevice(MemoryDevice(1 << 20))
    device = TraceDevice(faulty, tmp_path / "t")
    with faulty.fail_on("write"), pytest.raises(OSError, match="rror"):
        device.write(0, b"abcd")
    device.close()
    assert requests_in(tmp_path / "t") == [("write", 0, 4)]


def test_a_live_guest_is_recorded_and_replayed_under_a_backup(tmp_path, plan):
    image, trace = tmp_path / "vm.img", tmp_path / "guest.trace"
    image.write_bytes(os.urandom(4 << 20))
    with Daemon() as daemon:
        daemon.listen_nbd(str(tmp_path / "s"))
        nodes = [{"driver": "file", "node-name": "disk", "filename": str(image)},
                 {"driver": "x-fastcbw-trace", "node-name": "recorder", "file": "disk", "trace": str(trace)}]
        daemon.add_nodes(nodes=nodes, exports=[{"id": "guest", "node-name": "recorder", "name": "vm", "writable": True}])
        with Client(str(tmp_path / "s"), "vm") as guest:
            for number in range(40):
                guest.write(number * 8192, b"w" * 4096)
            assert guest.read(0, 512) == b"w" * 512
            guest.flush()
    assert image.read_bytes()[:512] == b"w" * 512
    assert requests_in(trace) == [*(("write", number * 8192, 4096) for number in range(40)), ("read", 0, 512), ("flush", 0, 0)]
    work = tmp_path / "work"
    work.mkdir()
    replayed = plan("filter-tiers", loads=("trace",), trace=str(trace))
    (record,) = [cell.measure(one, replayed, str(work)) for one in replayed.cells()]
    assert record["status"] == "measured", record
    assert record["backup"]["verified"] is True
    before = record["guest"]["before"]
    assert before["written_bytes"] > 0 and before["read_bytes"] > 0


def test_a_trace_node_does_not_write_over_a_file(tmp_path):
    image, trace = tmp_path / "vm.img", tmp_path / "guest.trace"
    image.write_bytes(bytes(1 << 20))
    trace.write_text("mine")
    with Daemon() as daemon:
        with pytest.raises(Error, match="File exists"):
            daemon.add_nodes(nodes=[{"driver": "file", "node-name": "disk", "filename": str(image)},
                                    {"driver": "x-fastcbw-trace", "node-name": "recorder", "file": "disk", "trace": str(trace)}], exports=[])
    assert trace.read_text() == "mine"
