"""A guest is stopped where it waits, not while it sends."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fastcbw.compare import stopping
from fastcbw.compare.process import state_of, threads_of

MACHINE = os.uname().machine
PROGRAM = """
import select, socket, sys, threading, time
def full():
    ends = socket.socketpair()
    ends[0].setblocking(False)
    try:
        while True:
            ends[0].send(bytes(65536))
    except BlockingIOError:
        pass
    return ends
def busy():
    while True:
        pass
ends = socket.socketpair()
wait = {"read": lambda: ends[0].recv(1), "poll": lambda: select.poll().poll(), "sleep": lambda: time.sleep(100),
        "lock": lambda: threading.Event().wait(), "busy": busy}
def room():
    poll, both = select.poll(), full()
    poll.register(both[0], select.POLLOUT | select.POLLIN)
    poll.poll()
def sending():
    both = full()
    both[0].setblocking(True)
    both[0].sendall(bytes(1000))
wait |= {"room": room, "sending": sending}
threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
time.sleep(0.1)
print("ready", flush=True)
wait[sys.argv[1]]()
"""


class Guest:
    """As much of a Process as is needed to stop it."""

    def __init__(self, what):
        self.running = subprocess.Popen([sys.executable, "-c", PROGRAM, what], stdout=subprocess.PIPE, start_new_session=True)
        assert self.running.stdout.readline() == b"ready\n"
        self.pid = self.running.pid

    def send_all(self, number):
        os.killpg(self.pid, number)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.running.kill()
        self.running.wait()
        self.running.stdout.close()


@pytest.mark.skipif(MACHINE not in stopping.WAITS, reason="numbers of system calls are known of other machines only")
@pytest.mark.parametrize(("what", "well"), [("read", True), ("poll", True), ("sleep", True), ("lock", True), ("busy", False), ("room", False),
                                            ("sending", False)])
def test_a_process_is_stopped_where_it_waits_for_no_room(monkeypatch, what, well):
    monkeypatch.setattr(stopping, "TRIES", 200 if well else 5)
    with Guest(what) as guest:
        assert stopping.stop_between_requests(guest) == well
        deadline = time.monotonic() + 10
        while {state_of(guest.pid, thread) for thread in threads_of(guest.pid)} != {"T"}:
            assert time.monotonic() < deadline
        guest.send_all(signal.SIGCONT)


def test_on_an_unknown_machine_it_is_stopped_at_once(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "other")
    with Guest("busy") as guest:
        assert not stopping.stop_between_requests(guest)
        deadline = time.monotonic() + 10
        while {state_of(guest.pid, thread) for thread in threads_of(guest.pid)} != {"T"}:
            assert time.monotonic() < deadline
