"""Throttled devices: limits in bytes and requests a second, bursts, changes while somebody waits."""

import threading
import time

import pytest

from fastcbw.block.delay import DelayDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.block.throttle import ThrottleDevice
from fastcbw.export.nbd.client import Client
from fastcbw.export.nbd.server import Server

LENGTH = 1 << 20


def test_a_limit_takes_the_time_that_it_says_and_not_more_requests(monkeypatch):
    """A lower bound of the time: a busy machine may take longer, never less."""
    device = ThrottleDevice(MemoryDevice(LENGTH), bps_total=1 << 20)
    began = time.monotonic()
    for i in range(4):
        device.write(i * 65536, b"x" * 65536)       # the burst is a tenth of a second's: two of them
    took = time.monotonic() - began
    assert took >= (4 - 1) * 65536 / (1 << 20) - 0.1
    assert device.counters()["delayed"] >= 1 and device.counters()["delayed_ns"] > 0
    assert device.read(0, 4 * 65536) == b"x" * 4 * 65536


def test_requests_are_limited_by_number(monkeypatch):
    device = ThrottleDevice(MemoryDevice(LENGTH), iops_read=100)
    began = time.monotonic()
    for _ in range(31):
        device.read(0, 1)
    assert time.monotonic() - began >= 30 / 100 - 0.1
    before = device.counters()
    for _ in range(100):
        device.write(0, b"x")
    assert device.counters() == before                  # reads are limited, writes are not


def test_a_large_request_counts_as_several_by_its_size():
    device = ThrottleDevice(MemoryDevice(LENGTH), iops_write=100, iops_size=4096)
    began = time.monotonic()
    device.write(0, bytes(31 * 4096))       # passes, and whoever comes next pays
    device.write(0, b"x")
    assert time.monotonic() - began >= 31 / 100 - 0.1


def test_a_burst_passes_at_once():
    device = ThrottleDevice(MemoryDevice(LENGTH), bps_total=1, bps_total_max=1 << 20)
    for i in range(16):
        device.write(i * 65536, b"x" * 65536)
    assert device.counters()["delayed"] == 0


def test_a_long_burst_has_a_rate_of_its_own():
    device = ThrottleDevice(MemoryDevice(LENGTH), iops_total=1, iops_total_max=100, iops_total_max_length=10)
    began = time.monotonic()
    for _ in range(31):
        device.read(0, 1)
    assert time.monotonic() - began >= 30 / 100 - 0.11
    assert device.counters()["delayed"] > 0


@pytest.mark.parametrize("how", ["set", "close"])
def test_who_waits_goes_on_when_the_limit_goes(how):
    device = ThrottleDevice(MemoryDevice(LENGTH), bps_write=1)
    device.write(0, b"x" * 4096)            # an hour and more for the next
    threads = [threading.Thread(target=device.write, args=(0, b"y" * 4096)), threading.Thread(target=device.discard, args=(0, 4096)),
               threading.Thread(target=device.write_zeroes, args=(0, 4096))]
    for thread in threads:
        thread.start()
    device.flush()                          # flushes are never held
    device.read(0, 4096)                    # nor what has no limit
    if how == "set":
        device.set(bps_write=1, bps_write_max=1 << 30)
        assert device.limits == {"bps_write": 1, "bps_write_max": 1 << 30}
    else:
        device.close()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_waiting_writes_hold_up_no_reads_of_the_same_connection(tmp_path):
    device = ThrottleDevice(MemoryDevice(LENGTH), bps_write=1)
    with Server(tmp_path / "sock") as server:
        server.add_export("vm", device)
        with Client(tmp_path / "sock", "vm") as client:
            client.write(0, b"x" * 4096)
            late = client.send(1, 8192, 4096, payload=b"y" * 4096)      # NBD_CMD_WRITE
            assert client.read(0, 4096) == b"x" * 4096
            assert device.child.read(8192, 1) == b"\0"
            device.set()
            assert client.receive_reply().cookie == late
            assert client.read(8192, 4096) == b"y" * 4096


@pytest.mark.parametrize("limits, error, words", [
    ({"bps_totl": 1}, TypeError, "bps_totl: there is no such limit"),
    ({"bps_total": -1}, ValueError, "bps_total: -1 is not within"),
    ({"bps_total": 10**16}, ValueError, "is not within"),
    ({"bps_total": 1.5}, TypeError, "expected an int, got float"),
    ({"bps_total": 1, "bps_read": 1}, ValueError, "a total and one of its parts"),
    ({"iops_total": 1, "iops_write": 1}, ValueError, "a total and one of its parts"),
    ({"bps_read_max": 1}, ValueError, "bps_read_max: needs bps_read"),
    ({"bps_read": 10, "bps_read_max": 9}, ValueError, "9 is below bps_read, 10"),
    ({"bps_read": 10, "bps_read_max_length": 2}, ValueError, "needs bps_read_max"),
    ({"bps_read": 1, "bps_read_max": 10**14, "bps_read_max_length": 11}, ValueError, "is more than"),
    ({"bps_read": 1, "bps_read_max": 10, "bps_read_max_length": 3601}, ValueError, "is not within 0 to 3600"),
    ({"iops_size": 4096}, ValueError, "needs a limit of requests"),
])
def test_limits_that_make_no_sense_change_nothing(limits, error, words):
    device = ThrottleDevice(MemoryDevice(LENGTH), iops_total=7)
    with pytest.raises(error, match=words):
        device.set(**limits)
    assert device.limits == {"iops_total": 7}
    with pytest.raises(error, match=words):
        ThrottleDevice(MemoryDevice(LENGTH), **limits)
