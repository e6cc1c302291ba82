"""A backup job inside the server, raw to raw: its speed, its memory, and what a guest has of the disk meanwhile."""

from __future__ import annotations

import os
import time

from peers import Fio, Nbdkit, Ours, Peer, Qemu

from fastcbw.qmp.client import QmpClient

from rows import Bench, Goal, Measured, Row

GUEST_RATE = 2000
SLOW_GUEST_RATE = 1000
COPY_RANGE = {"use-copy-range": True, "max-workers": 2, "max-chunk": 1 << 20}


def finish(qmp: QmpClient) -> None:
    """Return when the job `b` has ended well; close QMP. By its event: a poll would disturb the faster side more often in its time."""
    with qmp:
        while True:
            event = qmp.next_event()
            if event["event"] == "JOB_STATUS_CHANGE" and event["data"] == {"id": "b", "status": "concluded"}:
                break
        job = [found for found in qmp.execute("query-jobs") if found["id"] == "b"][0]
        if job.get("error") or job.get("outcome", "completed") != "completed":
            raise RuntimeError(f"the backup failed: {job}")


def push(peer: Peer, target: str, perf: dict | None = None) -> QmpClient:
    """Begin the backup of PEER's disk to TARGET as the job `b`: of the snapshot s that is there, or by QEMU's blockdev-backup.

    Return the QMP client that it was begun with.
    """
    qmp = peer.qmp()
    try:
        if isinstance(peer, Ours):
            qmp.execute("fastcbw-backup", disk="disk", snapshot="s", target=target, job_id="b", force=True)
        else:
            uri = target.startswith("nbd")
            file = ({"driver": "nbd", "server": {"type": "unix", "path": target.split("socket=")[1]}, "export": ""} if uri else
                    {"driver": "file", "filename": target, "cache": {"direct": peer.direct}})
            qmp.execute("blockdev-add", driver="raw", node_name="backup", file=file)
            # A fleecing filter has the old data already: the job copies from what it shows.
            qmp.execute("blockdev-backup", job_id="b", device="snap0" if peer.layers else "disk", target="backup", sync="full",
                        auto_dismiss=False, **({"x_perf": perf} if perf else {}))
    except BaseException:
        qmp.close()
        raise
    return qmp


def rows(bench: Bench) -> list[Row]:
    length = bench.size["image"]

    def ours(on_disk=False, ram="256M"):
        return Ours(bench.image(on_disk), bench.folder, bench.server_cpu, snapshot={"ram": ram})

    def qemu(on_disk=False, fleecing=False):
        return Qemu(bench.image(on_disk), bench.folder, bench.server_cpu,
                    bench.fresh("fleece.img", on_disk) if fleecing else None)

    def speed(make, perf=None, on_disk=False):
        def side() -> Measured:
            target = bench.fresh("backup.img", on_disk, 0 if make is ours else None)
            with make(on_disk) as peer:
                before = peer.resident_bytes()
                began = time.perf_counter()
                finish(push(peer, target, perf))
                took = time.perf_counter() - began
                figures = {"gb_per_s": length / took / 1e9, "adds_mib": (peer.resident_bytes() - before) / 1048576}
                settings = peer.settings | {"perf": perf, "target": "a new raw file"}
            bench.forget(target)
            return figures, settings
        return side

    def bare(on_disk=False):
        """copy_file_range of the whole file by one thread, where the servers run: the least that any copy does."""
        def side() -> Measured:
            target = bench.fresh("backup.img", on_disk)
            ours = os.sched_getaffinity(0)
            if bench.server_cpu is not None:
                os.sched_setaffinity(0, {bench.server_cpu})
            began = time.perf_counter()
            with open(bench.image(on_disk), "rb") as source, open(target, "r+b") as out:
                left = length
                while left:
                    left -= os.copy_file_range(source.fileno(), out.fileno(), min(left, 1 << 20))
            took = time.perf_counter() - began
            os.sched_setaffinity(0, ours)
            bench.forget(target)
            return {"gb_per_s": length / took / 1e9}, {"piece": "1 MiB"}
        return side

    def under_load(make, on_disk=True):
        def side() -> Measured:
            target = bench.fresh("backup.img", on_disk, 0 if make is ours else None)
            seconds = bench.size["seconds"] * 2 if on_disk else 1.3     # in memory the job takes less than a second
            with make(on_disk) as peer:
                load = Fio(peer.uri(), cpu=bench.load_cpu, rw="randwrite", bs="4k", depth=1, seconds=seconds, rate=GUEST_RATE)
                time.sleep(0.3)
                began = time.perf_counter()
                finish(push(peer, target))
                took = time.perf_counter() - began
                figures = load.finish() | {"gb_per_s": length / took / 1e9}
                figures["of_rate"] = figures["iops"] / GUEST_RATE
                settings = peer.settings | {"guest": f"4k, {GUEST_RATE}/s", "image": "page cache, a disk below" if on_disk else "tmpfs"}
            bench.forget(target)
            return figures, settings
        return side

    def to_slow(make, filters, options):
        """The guest while a job writes to a slow target. make None: without a job."""
        def side() -> Measured:
            path = bench.fresh("slow.img")
            with Nbdkit(path, bench.folder, bench.load_cpu, name="slow", filters=filters, options=options, elsewhere=True) as slow, \
                    (make or ours)() as peer:
                if make is not None:
                    push(peer, slow.uri("")).close()
                    time.sleep(0.2)
                figures = Fio(peer.uri(), cpu=bench.load_cpu, rw="randwrite", bs="4k", depth=1, seconds=bench.size["seconds"],
                              rate=SLOW_GUEST_RATE).finish()
                return figures, peer.settings | {"guest": f"4k, {SLOW_GUEST_RATE}/s", "target": slow.settings}
        return side

    def slow(name, filters, options):
        def fleecing():
            return qemu(fleecing=True)
        return Row(f"push to a slow target, {name}", {
            "fastcbw": to_slow(ours, filters, options), "no backup": to_slow(None, filters, options),
            "qemu fleecing": to_slow(fleecing, filters, options)},
            [Goal("p99_us", "no backup", at_most=1.5)])

    return [
        Row("push, tmpfs", {"fastcbw": speed(ours), "qemu": speed(qemu), "qemu copy_file_range": speed(qemu, COPY_RANGE),
                            "bare copy_file_range": bare()},
            [Goal("gb_per_s", "qemu", at_least=1.7), Goal("gb_per_s", "qemu copy_file_range", at_least=1.15),
             Goal("gb_per_s", "bare copy_file_range", at_least=0.95), Goal("adds_mib", at_most=30)], memory=length + (1 << 29)),
        Row("push under guest load, disk", {"fastcbw": under_load(ours), "qemu": under_load(qemu)},
            [Goal("of_rate", at_least=0.9), Goal("p99_us", at_most=10000), Goal("gb_per_s", "qemu", at_least=1)]),
        Row("push under guest load, tmpfs", {"fastcbw": under_load(ours, False), "qemu": under_load(qemu, False)},
            [Goal("of_rate", at_least=0.9), Goal("p99_us", "qemu", at_most=1)], memory=length + (1 << 29)),
        slow("20 MB/s", ["rate"], ["rate=160M"]),
        slow("50 ms a write", ["delay"], ["wdelay=50ms"]),
    ]
