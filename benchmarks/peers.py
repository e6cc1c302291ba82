"""The NBD servers that are compared: ours, qemu-storage-daemon, nbdkit; and fio and nbdcopy, which load them.

Each server is started on an image, as its users would.

A peer's class says what it is (`name`, `version`) and with which settings it runs (`settings`), so that a row of figures
can state both sides in full. start() returns when the server answers; stop() ends the process it started, by pid.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

from fastcbw.compare.process import Process, find, nbd_answers, socket_uri
from fastcbw.qmp.client import QmpClient


class Peer:
    """One server process on one image. cpu: the core it is pinned to, or None.

    elsewhere: it stands for another machine, and runs on a processor of this one when nobody else wants it.
    """

    name = "peer"
    program = ""
    package = ""
    elsewhere = False

    def __init__(self, image: str, folder: str, cpu: int | None = None):
        self.image = image
        self.folder = folder
        self.cpu = cpu
        self.socket = os.path.join(folder, f"{self.name}.sock")
        self.export = "disk"
        self.process: Process | None = None
        self.settings: dict = {}

    @classmethod
    def find(cls) -> str:
        """Return the program's path; Missing when it is not installed."""
        return find(cls.program, cls.package)

    @classmethod
    def version(cls) -> str:
        return subprocess.run([cls.find(), "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]

    def command(self) -> list[str]:
        raise NotImplementedError

    def uri(self, export: str | None = None) -> str:
        return socket_uri(self.socket, self.export if export is None else export)

    def start(self) -> None:
        if os.path.exists(self.socket):
            os.unlink(self.socket)
        self.process = Process(self.name, self.command(), self.folder, self.cpu, elsewhere=self.elsewhere)
        self.process.start(lambda: nbd_answers(self.socket))
        self.prepare()

    def prepare(self) -> None:
        """What remains to be done once it answers."""

    def resident_bytes(self) -> int:
        """Resident memory of the server now."""
        return self.process.usage().resident_bytes

    def pid(self) -> int:
        return self.process.pid

    def qmp(self) -> QmpClient:
        """A QMP client of the server, whose QMP socket may come a moment after the NBD one; the caller closes it."""
        deadline = time.monotonic() + 20
        while True:
            try:
                return QmpClient(self.socket + ".qmp", timeout=120)
            except OSError:
                if time.monotonic() > deadline or not self.process.running():
                    raise
                time.sleep(0.01)

    def stop(self) -> None:
        if self.process is not None:
            self.process.stop()
            self.process = None

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
    snapshot_export = "disk@s"

    def __init__(self, image: str, folder: str, cpu: int | None = None, snapshot: dict | None = None, *, direct: bool = False,
                 spin: str | None = None):
        super().__init__(image, folder, cpu)
        self.snapshot = snapshot
        self.extra = ["--direct"] * direct + (["--spin", spin] if spin else [])
        cluster = None if snapshot is None else snapshot.get("cluster_size", "4K (default)")
        self.settings = {"cache": "direct" if direct else "buffered", "durability": "none", "cluster": cluster,
                         "ram": None if snapshot is None else snapshot.get("ram"), "spin": spin or "off"}

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
    """qemu-storage-daemon; with a target, copy-before-write is on the disk and snapshot-access is the export `snap`.

    layers: that many copy-before-write filters, one on the other, the target's name with a number.
    """

    name = "qemu"
    program = "qemu-storage-daemon"
    package = "qemu-system-common"
    snapshot_export = "snap"

    def __init__(self, image: str, folder: str, cpu: int | None = None, target: str | None = None, *, direct: bool = False,
                 layers: int = 1):
        super().__init__(image, folder, cpu)
        self.target = target
        self.layers = layers if target else 0
        self.direct = direct
        self.settings = {"cache": "direct, io_uring" if direct else "writeback, threads", "durability": "none",
                         "cluster": "64K" if target else None}

    def file(self, name: str, path: str) -> list[str]:
        options = f"driver=file,node-name={name},filename={path},discard=unmap"
        return ["--blockdev", options + (",cache.direct=on,aio=io_uring" if self.direct else "")]

    def command(self) -> list[str]:
        words = [self.find(), "--chardev", f"socket,id=qmp,path={self.socket}.qmp,server=on,wait=off", "--monitor", "chardev=qmp"]
        words += [*self.file("file", self.image), "--blockdev", "driver=raw,node-name=disk,file=file,discard=unmap"]
        node = "disk"
        for i in range(self.layers):
            words += [*self.file(f"tfile{i}", self.target + (str(i) if i else "")),
                      "--blockdev", f"driver=raw,node-name=target{i},file=tfile{i}",
                      "--blockdev", f"driver=copy-before-write,node-name=cbw{i},file={node},target=target{i},discard=unmap",
                      "--blockdev", f"driver=snapshot-access,node-name=snap{i},file=cbw{i}"]
            node = f"cbw{i}"
        words += ["--nbd-server", f"addr.type=unix,addr.path={self.socket},max-connections=16",
                  "--export", f"type=nbd,id=disk,node-name={node},name=disk,writable=on"]
        if self.layers:
            words += ["--export", "type=nbd,id=snap,node-name=snap0,name=snap"]
        return words


class Nbdkit(Peer):
    """nbdkit's file plugin. filters: words before the plugin's, options after it: a slow target is made so."""

    name = "nbdkit"
    program = "nbdkit"
    package = "nbdkit"

    def __init__(self, image: str, folder: str, cpu: int | None = None, *, name: str | None = None, filters: list[str] = (),
                 options: list[str] = (), elsewhere: bool = False):
        self.name = name or self.name
        self.elsewhere = elsewhere
        super().__init__(image, folder, cpu)
        self.filters = [f"--filter={word}" for word in filters]
        self.options = list(options)
        self.settings = {"cache": "default", "durability": "none", "filters": list(filters), "options": self.options}

    def command(self) -> list[str]:
        return [self.find(), "-f", "-U", self.socket, *self.filters, "file", self.image, *self.options]


class Fio:
    """fio's nbd engine against URI, begun now; without URI its io_uring engine, on a file that EXTRA names.

    finish() waits for it and returns iops, p50_us, p99_us, p999_us.

    seconds: how long; None: as many requests as EXTRA says. rate: requests a second to ask for, None: all it can.
    """

    def __init__(self, uri: str | None, *, cpu: int | None, rw: str, bs: str, depth: int, seconds: float | None = None,
                 rate: int | None = None, extra: list[str] = ()):
        words = [] if cpu is None else ["taskset", "-c", str(cpu)]
        engine = ["--ioengine=io_uring"] if uri is None else ["--ioengine=nbd", f"--uri={uri}"]
        words += [find("fio", "fio"), "--name=load", *engine, f"--rw={rw}", f"--bs={bs}", f"--iodepth={depth}",
                  "--randseed=20240229", "--output-format=json", *extra]
        if seconds is not None:
            words += ["--time_based", f"--runtime={seconds}"]
        if rate is not None:
            words += [f"--rate_iops={rate}"]
        self.side = "write" if "write" in rw else "read"
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def running(self) -> bool:
        return self.process.poll() is None

    def finish(self) -> dict:
        output, errors = self.process.communicate()
        if self.process.returncode != 0:
            raise RuntimeError(f"fio failed: {errors or output}")
        side = json.loads(output[output.index("{"):])["jobs"][0][self.side]
        percentile = side["clat_ns"]["percentile"]
        return {"iops": side["iops"], "p50_us": percentile["50.000000"] / 1000, "p99_us": percentile["99.000000"] / 1000,
                "p999_us": percentile["99.900000"] / 1000}


def fio(uri: str | None, **words) -> dict:
    """Run Fio to its end."""
    return Fio(uri, **words).finish()


def nbdcopy(uri: str, *, cpu: int | None, connections: int, to: str = "null:", elsewhere: bool = False) -> float:
    """Copy all of URI; return seconds. elsewhere: as in Peer."""
    words = [] if cpu is None else ["taskset", "-c", str(cpu)]
    words += ["chrt", "--idle", "0"] if elsewhere else []
    words += [find("nbdcopy", "libnbd-bin"), f"--connections={connections}", uri, to]
    began = time.perf_counter()
    run = subprocess.run(words, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"nbdcopy failed: {run.stderr}")
    return time.perf_counter() - began
