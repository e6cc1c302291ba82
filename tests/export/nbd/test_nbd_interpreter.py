"""A guest's requests never enter the interpreter in steady state."""

import ctypes
import subprocess
import sys
import threading

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


def test_guest_requests_are_served_while_another_thread_keeps_the_interpreter_lock(path, export):
    usleep = ctypes.PyDLL(None).usleep      # PyDLL: unlike CDLL, does not give up the lock for the call
    guest = subprocess.Popen(
        [sys.executable, "-c", GUEST, path, str(HOLD_SECONDS * 0.7)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert guest.stdout.readline() == "begun\n"
    before = export.status()["counters"]["requests"]
    ticks = []
    stop = threading.Event()
    witness = threading.Thread(target=lambda: [ticks.append(1) for _ in iter(lambda: stop.wait(0.001), True)])
    witness.start()
    guest.stdin.write("\n")
    ticks_before = len(ticks)
    guest.stdin.flush()
    usleep(int(HOLD_SECONDS * 1e6))
    after, ticks_after = export.status()["counters"]["requests"], len(ticks)
    stop.set()
    witness.join()
    done, slowest = guest.stdout.readline().split()
    guest.stdin.close()
    guest.stdout.close()
    assert guest.wait(20) == 0
    # The guest ran wholly within the window; the interpreter's other thread could not tick in it.
    assert ticks_after - ticks_before <= 5
    assert after - before == int(done) > 4000
    assert float(slowest) < HOLD_SECONDS / 2
