"""A guest's requests never enter the interpreter in steady state."""

import ctypes
import subprocess
import sys

from fastcbw.block.python import Device, PythonDevice

#: The server's process. A thread of it takes the interpreter lock into a C call that keeps it for SECONDS, while a guest
#: process, which got its first replies before, goes on writing. What the guest completes in that time was served
#: without the interpreter: nobody in this process could run a single instruction of Python.
HOLD_SECONDS = 2.0

GUEST = """
import sys, time
from fastcbw.export.nbd.client import Client
client = Client(sys.argv[1], "disk")
client.write(0, b"x" * 4096)
print("begun", flush=True)
sys.stdin.readline()
end = time.monotonic() + float(sys.argv[2])
done, slowest = 0, 0.0
while time.monotonic() < end:
    begun = time.monotonic()
    client.write(done % 4096 * 4096, b"x" * 4096)
    client.read(0, 4096)
    client.zero(0, 4096)
    client.flush()
    slowest = max(slowest, time.monotonic() - begun)
    done += 4
print(done, slowest)
"""


def run_guest_while_the_lock_is_kept(path, export):
    """Return the requests served while the lock was kept, those the guest made in all, its slowest round in seconds."""
    usleep = ctypes.PyDLL(None).usleep      # PyDLL: unlike CDLL, does not give up the lock for the call
    guest = subprocess.Popen(
        [sys.executable, "-c", GUEST, path, str(HOLD_SECONDS * 0.7)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert guest.stdout.readline() == "begun\n"
    before = export.status()["counters"]["requests"]
    guest.stdin.write("\n")
    guest.stdin.flush()
    usleep(int(HOLD_SECONDS * 1e6))
    served = export.status()["counters"]["requests"] - before
    done, slowest = guest.stdout.readline().split()
    guest.stdin.close()
    guest.stdout.close()
    assert guest.wait(20) == 0
    return served, int(done), float(slowest)


def test_guest_requests_are_served_while_another_thread_keeps_the_interpreter_lock(path, export):
    served, done, slowest = run_guest_while_the_lock_is_kept(path, export)
    assert served == done > 4000        # all of them within the window
    assert slowest < HOLD_SECONDS / 2


def test_the_lock_is_really_kept_a_device_in_python_serves_nothing_meanwhile(path, server):
    class Zeroes(Device):
        length = 64 << 20

        def read(self, offset, length):
            return bytes(length)

        def write(self, offset, data):
            pass

    export = server.add_export("disk", PythonDevice(Zeroes()))
    served, done, slowest = run_guest_while_the_lock_is_kept(path, export)
    assert served < 1000        # on a busy machine the lock changes hands some times before it is kept; without it: thousands, as above
    assert slowest > HOLD_SECONDS / 2
