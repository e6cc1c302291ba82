"""What snapshots themselves cost: several at once, a trim under one, the moment one is taken, and memory."""

from __future__ import annotations

import os
import statistics
import time

from fastcbw.export.nbd.client import Client
from peers import Fio, Ours, Peer, Qemu, fio

from rows import Bench, Goal, Measured, Row

RAM = "3G"
WINDOW_MS = 5


def preserved(peer: Peer) -> dict:
    """Our status of all snapshots of the disk, by name."""
    with peer.qmp() as qmp:
        return qmp.execute("fastcbw-status")["disks"]["disk"]["snapshots"]


def allocated_mib(*paths: str) -> float:
    return sum(os.stat(path).st_blocks * 512 for path in paths if os.path.exists(path)) / 1048576


def many(bench: Bench) -> Row:
    count = min(bench.size["touches"], bench.size["image"] // 65536)

    def touch(peer: Peer, count: int) -> Measured:
        return fio(peer.uri(), cpu=bench.load_cpu, rw="randwrite", bs="4k", depth=16, extra=["--blockalign=64k", f"--number_ios={count}"])

    def ours(snapshots: int):
        def side() -> Measured:
            with Ours(bench.image(), bench.folder, bench.server_cpu, snapshot={"ram": RAM}) as peer:
                with peer.qmp() as qmp:
                    for i in range(1, snapshots):
                        qmp.execute("fastcbw-snapshot-create", name=f"s{i}", disks=["disk"], ram=RAM)
                figures = touch(peer, count)
                figures["stored_mib"] = sum(one["ram_bytes"] for one in preserved(peer).values()) / 1048576
                return figures, peer.settings | {"snapshots": snapshots, "touches": count}
        return side

    def qemu() -> Measured:
        layers, fewer = 4, min(count, 4000)             # eight would store 2 GiB for 16 MiB of guest data
        targets = [bench.fresh("target.img" + (str(i) if i else "")) for i in range(layers)]
        with Qemu(bench.image(), bench.folder, bench.server_cpu, targets[0], layers=layers) as peer:
            figures = touch(peer, fewer) | {"stored_mib": allocated_mib(*targets)}
        for target in targets:
            bench.forget(target)
        return figures, peer.settings | {"snapshots": layers, "touches": fewer}

    return Row("8 snapshots, first touch 4k qd16", {"fastcbw": ours(8), "fastcbw, 1 snapshot": ours(1), "qemu, 4 snapshots": qemu},
               [Goal("iops", "fastcbw, 1 snapshot", at_least=0.9), Goal("stored_mib", "fastcbw, 1 snapshot", at_most=1.001)])


def trim(bench: Bench) -> Row:
    length = min(512 << 20, bench.size["image"])

    def image() -> str:
        path = bench.fresh("trim.img", length=length)
        piece = os.urandom(8 << 20)
        with open(path, "r+b") as file:
            for _ in range(length // len(piece)):
                file.write(piece)
        return path

    def side(make, copied):
        def measure() -> Measured:
            with make(image()) as peer, Client(peer.socket, "disk") as client:
                began = time.perf_counter()
                for offset in range(0, length, 32 << 20):
                    client.trim(offset, min(32 << 20, length - offset))
                took = time.perf_counter() - began
                figures = {"ms": took * 1000, "copied_mib": copied(peer)}
                return figures, peer.settings | {"request": "32 MiB"}
        return measure

    def ours_copied(peer):
        return sum(one["preserved_bytes"] for one in preserved(peer).values()) / 1048576

    return Row("trim 512 MiB under a snapshot", {
        "fastcbw": side(lambda path: Ours(path, bench.folder, bench.server_cpu, snapshot={"ram": "1G"}), ours_copied),
        "bare": side(lambda path: Ours(path, bench.folder, bench.server_cpu), lambda peer: 0.0),
        "qemu": side(lambda path: Qemu(path, bench.folder, bench.server_cpu, bench.fresh("target.img", length=length)),
                     lambda peer: allocated_mib(peer.target))},
        [Goal("copied_mib", at_most=0), Goal("ms", "bare", at_most=2)])


def taking(bench: Bench) -> Row:
    """The longest write of a guest in the milliseconds of a snapshot, less the longest in as many milliseconds of another QMP command.

    The other command, query-version, does nothing: what it costs the guest is the processor time of a QMP client and a QMP server beside it, which
    is shown for itself, less the longest write in as many milliseconds of quiet. The guest writes one block over and over, so that what it
    meets is the taking, not the first touch of the next cluster.
    """
    count = 4 if bench.size["seconds"] < 2 else 20

    def side() -> Measured:
        log = os.path.join(bench.folder, "lat")
        with Ours(bench.image(), bench.folder, bench.server_cpu) as peer, peer.qmp() as qmp:
            load = Fio(peer.uri(), cpu=bench.load_cpu, rw="randwrite", bs="4k", depth=1, seconds=1 + count * 0.08,
                       extra=["--size=4k", f"--write_lat_log={log}", "--log_unix_epoch=1"])
            time.sleep(0.6)
            moments, idle, quiet, took = [], [], [], []
            for _ in range(count):
                moments.append(time.time() * 1000)
                began = time.perf_counter()
                qmp.execute("fastcbw-snapshot-create", name="p", disks=["disk"], ram="16M")
                took.append(time.perf_counter() - began)
                time.sleep(0.02)
                idle.append(time.time() * 1000)
                qmp.execute("query-version")
                time.sleep(0.02)
                quiet.append(time.time() * 1000)
                time.sleep(0.02)
                qmp.execute("fastcbw-snapshot-delete", name="p", disks=["disk"])
            figures = load.finish()
            settings = peer.settings
        with open(log + "_clat.1.log") as file:
            writes = [(float(at), float(ns) / 1000) for at, ns, *_ in (line.split(",") for line in file)]
        for name in os.listdir(bench.folder):
            if name.startswith("lat_"):
                os.unlink(os.path.join(bench.folder, name))

        def longest(begin: float) -> float:
            return max((us for at, us in writes if begin - 1 <= at <= begin + WINDOW_MS), default=0.0)

        taking, idling, nothing = (statistics.median(map(longest, times)) for times in (moments, idle, quiet))
        return {"pause_us": taking - idling, "qmp_us": idling - nothing, "call_ms": statistics.median(took) * 1000, "p50_us": figures["p50_us"],
                "p99_us": figures["p99_us"]}, settings | {"snapshots": count}
    return Row("taking a snapshot: the guest's pause", {"fastcbw": side}, [Goal("pause_us", at_most=100)])


def touched(bench: Bench) -> Row:
    """Resident memory that a snapshot adds, of a disk of 1 GiB and of one of 64 TiB."""
    def side(length: int):
        def measure() -> Measured:
            with Ours(bench.fresh("sparse.img", length=length), bench.folder, bench.server_cpu) as peer, peer.qmp() as qmp:
                for name in ("first", "second"):        # the threads that come with the first are not a snapshot's
                    before = peer.resident_bytes()
                    began = time.perf_counter()
                    qmp.execute("fastcbw-snapshot-create", name=name, disks=["disk"])
                    took = time.perf_counter() - began
                return {"touched_kib": (peer.resident_bytes() - before) / 1024, "call_ms": took * 1000}, peer.settings | {"disk": length}
        return measure
    return Row("taking a snapshot: memory", {"64 TiB": side(64 << 40), "1 GiB": side(1 << 30)},
               [Goal("touched_kib", at_most=1024), Goal("touched_kib", of="1 GiB", at_most=1024)])


def resident(bench: Bench) -> Row:
    """The daemon's resident memory without a snapshot: as it starts, and after a guest with 16 requests of 64 KiB under way."""
    def side() -> Measured:
        with Ours(bench.image(), bench.folder, bench.server_cpu) as peer:
            idle = peer.resident_bytes()
            fio(peer.uri(), cpu=bench.load_cpu, rw="randwrite", bs="64k", depth=16, seconds=1)
            return {"idle_mib": idle / 1048576, "resident_mib": peer.resident_bytes() / 1048576}, peer.settings
    return Row("memory without a snapshot", {"fastcbw": side}, [Goal("resident_mib", at_most=60)])


def rows(bench: Bench) -> list[Row]:
    return [many(bench), trim(bench), taking(bench), touched(bench), resident(bench)]
