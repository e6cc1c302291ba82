"""The NBD servers that are compared: ours, qemu-storage-daemon, nbdkit. Each is started on an image, as its users would.

A peer's class says what it is (`name`, `version`) and with which settings it runs (`settings`), so that a row of figures
can state both sides in full. start() returns when the server answers; stop() ends the process it started, by pid.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time


class Missing(Exception):
    """A peer is not installed; the message names the package."""


class Peer:
    """One server process on one image. cpu: the core it is pinned to, or None."""

    name = "peer"
    program = ""
    package = ""

    def __init__(self, image: str, folder: str, cpu: int | None = None):
        self.image = image
        self.folder = folder
        self.cpu = cpu
        self.socket = os.path.join(folder, f"{self.name}.sock")
        self.export = "disk"
        self.process: subprocess.Popen | None = None
        self.settings: dict = {}

    @classmethod
    def find(cls) -> str:
        """Return the program's path; Missing when it is not installed."""
        path = shutil.which(cls.program)
        if path is None:
            raise Missing(f"{cls.name}: {cls.program} is not installed (apt install {cls.package})")
        return path

    @classmethod
    def version(cls) -> str:
        return subprocess.run([cls.find(), "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]

    def command(self) -> list[str]:
        raise NotImplementedError

    def uri(self, export: str | None = None) -> str:
        return f"nbd+unix:///{self.export if export is None else export}?socket={self.socket}"

    def start(self) -> None:
        if os.path.exists(self.socket):
            os.unlink(self.socket)
        pin = [] if self.cpu is None else ["taskset", "-c", str(self.cpu)]
        self.log = open(os.path.join(self.folder, f"{self.name}.log"), "w+b")
        self.process = subprocess.Popen(pin + self.command(), stdout=self.log, stderr=self.log)
        deadline = time.monotonic() + 20
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.log.seek(0)
                text = self.log.read().decode(errors="replace")
                self.stop()
                raise RuntimeError(f"{self.name}: did not start: {text}")
            time.sleep(0.02)
        self.prepare()

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(self.socket)
                return probe.recv(8) == b"NBDMAGIC"
            except OSError:
                return False

    def prepare(self) -> None:
        """What remains to be done once it answers."""

    def resident_bytes(self) -> int:
        """Resident memory of the server now."""
        with open(f"/proc/{self.pid()}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def pid(self) -> int:
        return self.process.pid

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None
            self.log.close()

    def __enter__(self) -> Peer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


class Ours(Peer):
    """fastcbw serve; with snapshot options, a snapshot named `s` is live from the start."""

    name = "fastcbw"
    program = "fastcbw"
    package = "fastcbw"

    def __init__(self, image: str, folder: str, cpu: int | None = None, snapshot: dict | None = None, extra: list[str] = ()):
        super().__init__(image, folder, cpu)
        self.snapshot = snapshot
        self.extra = list(extra)
        self.settings = {"cache": "buffered", "durability": "none", "snapshot": snapshot, "options": self.extra}

    @classmethod
    def find(cls) -> str:
        return sys.executable

    @classmethod
    def version(cls) -> str:
        from fastcbw import __version__

        return f"fastcbw {__version__}"

    def command(self) -> list[str]:
        words = [sys.executable, "-m", "fastcbw", "serve", f"disk={self.image}", "--socket", self.socket, "--format", "raw"]
        if self.snapshot is not None:
            words += ["--snapshot", "s"]
            for option, value in self.snapshot.items():
                words += ["--" + option.replace("_", "-"), str(value)]
        return words + self.extra


class Qemu(Peer):
    """qemu-storage-daemon; with a target, copy-before-write is on the disk and snapshot-access is the export `snap`."""

    name = "qemu"
    program = "qemu-storage-daemon"
    package = "qemu-system-common"

    def __init__(self, image: str, folder: str, cpu: int | None = None, target: str | None = None, cluster: int | None = None):
        super().__init__(image, folder, cpu)
        self.target = target
        self.cluster = cluster
        self.settings = {"cache": "writeback", "durability": "none", "aio": "threads", "target": bool(target),
                         "cluster_size": 65536 if target else None}

    def command(self) -> list[str]:
        words = [self.find(), "--blockdev", f"driver=file,node-name=file,filename={self.image}",
                 "--blockdev", "driver=raw,node-name=disk,file=file"]
        node = "disk"
        if self.target:
            words += ["--blockdev", f"driver=file,node-name=tfile,filename={self.target}",
                      "--blockdev", "driver=raw,node-name=target,file=tfile",
                      "--blockdev", "driver=copy-before-write,node-name=cbw,file=disk,target=target",
                      "--blockdev", "driver=snapshot-access,node-name=snap,file=cbw"]
            node = "cbw"
        words += ["--nbd-server", f"addr.type=unix,addr.path={self.socket},max-connections=16",
                  "--export", f"type=nbd,id=disk,node-name={node},name=disk,writable=on"]
        if self.target:
            words += ["--export", "type=nbd,id=snap,node-name=snap,name=snap"]
        return words


class Nbdkit(Peer):
    """nbdkit's file plugin."""

    name = "nbdkit"
    program = "nbdkit"
    package = "nbdkit"

    def __init__(self, image: str, folder: str, cpu: int | None = None):
        super().__init__(image, folder, cpu)
        self.settings = {"cache": "default", "durability": "none"}

    def command(self) -> list[str]:
        return [self.find(), "-f", "-U", self.socket, "file", self.image]


def fio(uri: str, *, cpu: int | None, rw: str, bs: str, depth: int, extra: list[str] = ()) -> dict:
    """Run fio's nbd engine against URI; return iops, p50_us, p99_us, p999_us of the only kind of request that RW makes."""
    path = shutil.which("fio")
    if path is None:
        raise Missing("fio is not installed (apt install fio)")
    pin = [] if cpu is None else ["taskset", "-c", str(cpu)]
    words = pin + [path, "--name=load", "--ioengine=nbd", f"--uri={uri}", f"--rw={rw}", f"--bs={bs}", f"--iodepth={depth}",
                   "--randseed=20240229", "--output-format=json", *extra]
    run = subprocess.run(words, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"fio failed: {run.stderr or run.stdout}")
    job = json.loads(run.stdout[run.stdout.index("{"):])["jobs"][0]
    side = job["write"] if "write" in rw else job["read"]
    percentile = side["clat_ns"]["percentile"]
    return {"iops": side["iops"], "p50_us": percentile["50.000000"] / 1000, "p99_us": percentile["99.000000"] / 1000,
            "p999_us": percentile["99.900000"] / 1000}
