"""`qcow2` and the other formats that are not raw: the machine's qemu-nbd reads and writes them, started and ended here.

It is our child on a socket in a folder of its own, and ends when its last client does: also when we are killed. The image
is described in place, since qemu-nbd opens it, with its own locks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from urllib.parse import quote

from fastcbw.block.nbd import NbdDevice
from fastcbw.errors import Error
from fastcbw.graph.kinds.base import Kind
from fastcbw.graph.node import Node
from fastcbw.graph.options import NodeOption

FORMATS = ("qcow2", "qcow", "qed", "vmdk", "vdi", "vhdx", "vpc", "parallels")
START_SECONDS = 20.0
END_SECONDS = 10.0
CLIENTS = 16        # more than a device has connections


class QemuNbd:
    """One qemu-nbd and the device that is its client. Error when it is not installed or does not like the image."""

    def __init__(self, path: str, format: str, *, read_only: bool, name: str) -> None:
        program = shutil.which("qemu-nbd")
        if program is None:
            raise Error(f"{path}: format {format} needs qemu-nbd, which is not installed (Debian's package is qemu-utils)")
        with open(path, "rb"):
            pass                # a name that is wrong is ours to say
        self._folder = tempfile.mkdtemp(prefix="fastcbw-qemu-nbd-")
        self.path, self.format = path, format
        self.socket = socket = os.path.join(self._folder, "s")
        words = [program, "--socket", socket, "--format", format, "--shared", str(CLIENTS), "--discard", "unmap", "--aio", "threads",
                 "--allocation-depth"]
        words += ["--read-only"] if read_only else []
        try:
            self._process = subprocess.Popen([*words, "--", path], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                             stderr=subprocess.PIPE, text=True)
            try:
                self.device = self._connect(path, socket, read_only, name)
            except BaseException:
                if self._process.poll() is None:
                    self._process.kill()
                    self._process.communicate()
                raise
        except BaseException:
            shutil.rmtree(self._folder)
            raise

    def _connect(self, path: str, socket: str, read_only: bool, name: str) -> NbdDevice:
        until = time.monotonic() + START_SECONDS
        while True:
            ended = self._process.poll() is not None
            try:
                return NbdDevice(f"nbd+unix:///?socket={quote(socket)}", read_only=read_only, name=name)
            except OSError:
                pass            # not listening yet, or ending just now
            if ended:
                words = " ".join(self._process.communicate()[1].split()).removeprefix("qemu-nbd: ")
                raise Error(f"{path}: qemu-nbd: {words or 'ended without a word'}")
            if time.monotonic() > until:
                raise Error(f"{path}: qemu-nbd does not answer after {START_SECONDS:.0f} s")
            time.sleep(0.005)

    def close(self) -> None:
        """End the client, and qemu-nbd with it. What was flushed is in the image."""
        self.device.close()
        try:
            self._process.communicate(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            try:
                self._process.communicate(timeout=END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()        # it is stopped, or its disk does not answer
                self._process.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)


class Foreign(Kind):
    """One format; the instances are made from FORMATS."""

    options = (NodeOption("file", "dict", 'the image, in place: {"driver": "file", "filename": …}', required=True),)

    def __init__(self, format: str) -> None:
        self.driver = format

    def open(self, node: Node) -> None:
        file = node.options["file"]
        if set(file) - {"driver", "filename", "read-only"} or file.get("driver") != "file" or not isinstance(file.get("filename"), str):
            raise Error(f"Parameter 'file' of driver '{self.driver}' expects {{'driver': 'file', 'filename': …}} (qemu-nbd opens it)")
        read_only = node.options.get("read-only", False) or file.get("read-only") is True
        node.server = QemuNbd(file["filename"], self.driver, read_only=read_only, name=node.name)
        node.device = node.server.device

    def give_up(self, node: Node) -> None:
        node.server.device.close()

    def close(self, node: Node) -> None:
        if node.server is not None:
            node.server.close()
