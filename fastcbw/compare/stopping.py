"""Stopping a guest between two requests.

A process that is stopped in the middle of sending leaves its server half of a request. QEMU's begins no backup before it has the rest,
and the guest goes on only when the backup has begun. So it is stopped again and again until each of its threads is where it waits for
something, and not for room in a socket. What a thread is waiting in is what the kernel tells of it in /proc.
"""

from __future__ import annotations

import os
import platform
import random
import select
import signal
import struct
import time

from fastcbw.compare.process import Process, state_of, threads_of

#: Numbers of the system calls in which a thread waits for what is no room in a socket; and of those in which it may be either.
WAITS = {"x86_64": {0, 23, 35, 45, 47, 202, 230, 232, 270, 281}, "aarch64": {22, 63, 72, 98, 101, 115, 207, 212}}
POLLS = {"x86_64": {7, 271}, "aarch64": {73}}
#: What takes the place of a poll, of nanosleep or of futex that was stopped before: of these only poll has a small second argument.
RESTARTED = {"x86_64": 219, "aarch64": 128}
POLLED_MAX = 64
TRIES = 200
STOP_SECONDS_LIMIT = 1.0


def stop_between_requests(process: Process) -> bool:
    """Stop PROCESS and its children; tell whether it waits. Where that can't be told, or does not happen, it is stopped all the same."""
    machine = platform.machine()
    for _ in range(TRIES if machine in WAITS else 0):
        process.send_all(signal.SIGSTOP)
        if all(waits(process.pid, thread, machine) for thread in threads_of(process.pid)):
            return True
        process.send_all(signal.SIGCONT)
        time.sleep(random.uniform(0, 0.001))        # the same moment each time would not help
    process.send_all(signal.SIGSTOP)
    return False


def waits(pid: int, thread: int, machine: str) -> bool:
    """Tell whether THREAD of process PID, which is being stopped, was waiting for something other than room in a socket. One that has ended does."""
    end = time.monotonic() + STOP_SECONDS_LIMIT
    while (state := state_of(pid, thread)) not in ("T", "t", "Z", "X", None):
        if time.monotonic() > end:
            return False
        time.sleep(0)
    if state not in ("T", "t"):
        return True
    try:
        with open(f"/proc/{pid}/task/{thread}/syscall") as file:
            words = file.read().split()
        number, address, count = int(words[0]), int(words[1], 16), int(words[2], 16)
        if number in WAITS[machine] or (number == RESTARTED[machine] and count > POLLED_MAX):
            return True
        return (number in POLLS[machine] or number == RESTARTED[machine]) and not _polls_for_room(pid, address, count)
    except (OSError, ValueError, IndexError):       # "running": it was stopped on its way
        return False


def _polls_for_room(pid: int, address: int, count: int) -> bool:
    """Tell whether one of the COUNT pollfds at ADDRESS waits until something can be written."""
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        polled = os.pread(memory, 8 * count, address)
    finally:
        os.close(memory)
    return any(events & select.POLLOUT for _, events, _ in struct.iter_unpack("ihh", polled))
