"""NBD servers for the conformance suite of devices, ours and other people's, each behind the client device."""

import contextlib
import socket
import subprocess
import time

from fastcbw.block.direct import DirectDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.block.nbd import NbdDevice
from fastcbw.export.nbd.server import Server


def listening(path):
    """Tell whether a connection to the unix socket PATH is accepted."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@contextlib.contextmanager
def process(*command, answers):
    """Run a server until the end of the block, from when somebody listens on the unix socket ANSWERS."""
    with subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        try:
            deadline = time.monotonic() + 20
            while not listening(answers):
                assert server.poll() is None and time.monotonic() < deadline, (command, server.poll(), server.stderr.read())
                time.sleep(0.002)
            yield server
        finally:
            server.kill()


class Served:
    """One NBD server for many devices in turn, each of another length: served(length) -> (URI, keywords of NbdDevice)."""

    def __init__(self, folder):
        self.path = folder / "nbd.sock"
        self.uri = f"nbd+unix:///vm?socket={self.path}"
        self.stack = contextlib.ExitStack()

    def serve(self, length):
        raise NotImplementedError

    def close(self):
        self.stack.close()
        self.path.unlink(missing_ok=True)


class OurServer(Served):
    """connections: None for what the server promises, or how many."""

    connections = None

    def serve(self, length):
        server = self.stack.enter_context(Server(self.path))
        server.add_export("vm", MemoryDevice(length))
        return NbdDevice(self.uri, connections=self.connections, in_flight="64K")


class OurServerOneConnection(OurServer):
    connections = 1


class OurServerThreads(OurServer):
    """A disk whose requests wait: they are done by the threads of the connections' queues."""

    io = "threads"

    def serve(self, length):
        image = self.path.with_name("served")
        image.unlink(missing_ok=True)
        server = self.stack.enter_context(Server(self.path))
        server.add_export("vm", self.stack.enter_context(DirectDevice(image, create_length=length, io=self.io)))
        self.stack.callback(server.close)       # before the device
        return NbdDevice(self.uri, in_flight="64K")


class OurServerUring(OurServerThreads):
    io = "uring"


class Nbdkit(Served):
    """nbdkit, which has structured replies for reads and block status, and many plugins without this or that."""

    plugin = "memory"

    def arguments(self, length):
        return [str(length)]

    def serve(self, length):
        self.stack.enter_context(process(
            "nbdkit", "-f", "-U", self.path, "-e", "vm", self.plugin, *self.arguments(length), answers=self.path))
        return NbdDevice(self.uri)


class NbdkitFile(Nbdkit):
    plugin = "file"

    def arguments(self, length):
        image = self.path.with_name("image")
        image.unlink(missing_ok=True)
        with open(image, "wb") as file:
            file.truncate(length)
        return [str(image)]


class NbdkitPlain(Nbdkit):
    """Nothing but reads and writes: no structured replies, FUA, zeroes, trim, several connections."""

    def serve(self, length):
        self.stack.enter_context(process(
            "nbdkit", "-f", "-U", self.path, "-e", "vm", "--no-sr", "--filter=nozero", "--filter=fua", "--filter=noextents",
            "--filter=multi-conn", "memory", str(length), "multi-conn-mode=disable", answers=self.path))
        return NbdDevice(self.uri, connections=3)


# QEMU's servers are in test_nbd_client_peers.py: their exports are multiples of 512 bytes.
SERVERS = {"nbd": OurServer, "nbd, one connection": OurServerOneConnection, "nbd, threads": OurServerThreads,
           "nbd, uring": OurServerUring, "nbdkit": Nbdkit, "nbdkit file": NbdkitFile,
           "nbdkit plain": NbdkitPlain}


class ServedDevices:
    """A device behind a server, both replaced at each turn."""

    def __init__(self, kind, folder):
        self.kind, self.folder = kind, folder

    def __call__(self, length):
        self.served = SERVERS[self.kind](self.folder)
        try:
            self.device = self.served.serve(length)
        except BaseException:
            self.served.close()
            raise
        return self

    def close(self):
        self.device.close()
        self.served.close()
