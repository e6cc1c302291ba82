"""What a guest gets: requests a second and latencies, without a snapshot, settled, and at first touch; on tmpfs and on the disk."""

from __future__ import annotations

import shutil

from fastcbw.export.nbd.client import Client
from peers import Nbdkit, Ours, Peer, Qemu, fio

from rows import Bench, Goal, Measured, Row

RAM = {"ram": "3G"}


def measure(peer: Peer, load) -> Measured:
    with peer:
        return load(peer) | {"resident_mib": peer.resident_bytes() / 1048576}, peer.settings


def timed(bench: Bench, rw: str, bs: str, depth: int):
    return lambda peer: fio(peer.uri(), cpu=bench.load_cpu, rw=rw, bs=bs, depth=depth, seconds=bench.size["seconds"])


def touching(bench: Bench, bs: str, depth: int, settled: bool = False):
    """Every write the first in its 64 KiB, so that clusters of 4 and of 64 KiB are touched equally often.

    SETTLED: the same once more, and that is measured.
    """
    words = ["--blockalign=64k", f"--number_ios={min(bench.size['touches'], bench.size['image'] // 65536)}"]

    def load(peer):
        for _ in range(1 + settled):
            figures = fio(peer.uri(), cpu=bench.load_cpu, rw="randwrite", bs=bs, depth=depth, extra=words)
        return figures
    return load


def warm(bench: Bench) -> Row:
    """First touch where the memory of old data is populated already.

    Ours: the first half of the disk was touched and discarded on the snapshot, so that its slots are free; the second half is measured. QEMU: the
    target is a file whose pages are there.
    """
    half = bench.size["image"] // 2
    count = min(bench.size["touches"], half // 65536)

    def touch(peer: Peer, offset: int) -> Measured:
        words = [f"--number_ios={count}", f"--offset={offset}", f"--size={half}"]
        return fio(peer.uri(), cpu=bench.load_cpu, rw="randwrite", bs="64k", depth=16, extra=words)

    def ours() -> Measured:
        with Ours(bench.image(), bench.folder, bench.server_cpu, snapshot=RAM | {"export": "discard"}) as peer:
            touch(peer, 0)
            with Client(peer.socket, peer.snapshot_export) as client:
                for offset in range(0, half, 32 << 20):
                    client.trim(offset, min(32 << 20, half - offset))
            return touch(peer, half), peer.settings

    def qemu() -> Measured:
        target = bench.fresh("target.img", length=0)
        shutil.copyfile(bench.image(), target)
        with Qemu(bench.image(), bench.folder, bench.server_cpu, target) as peer:
            touch(peer, 0)
            return touch(peer, half), peer.settings
    return Row("first touch 64k qd16, warm", {"fastcbw": ours, "qemu": qemu}, [Goal("iops", "qemu", at_least=2.3)],
               memory=bench.size["image"] + (1 << 29))


def rows(bench: Bench) -> list[Row]:
    def ours(load, on_disk=False, **words):
        return lambda: measure(Ours(bench.image(on_disk), bench.folder, bench.server_cpu, direct=on_disk, **words), load)

    def qemu(load, on_disk=False, cbw=True):
        return lambda: measure(Qemu(bench.image(on_disk), bench.folder, bench.server_cpu,
                                    bench.fresh("target.img", on_disk) if cbw else None, direct=on_disk), load)

    def nbdkit(load):
        return lambda: measure(Nbdkit(bench.image(), bench.folder, bench.server_cpu), load)

    def bare(rw):
        """fio's own io_uring engine on the file: what the device does, on the server's processor."""
        def side() -> Measured:
            figures = fio(None, cpu=bench.server_cpu, rw=rw, bs="4k", depth=16, seconds=bench.size["seconds"],
                          extra=[f"--filename={bench.image(True)}", "--direct=1"])
            return figures, {"cache": "direct, io_uring"}
        return side

    def plain(rw, bs, depth, goals=(), spin=None):
        load = timed(bench, rw, bs, depth)
        return Row(f"{rw[4:]} {bs} qd{depth}" + (", polling" if spin else ""),
                   {"fastcbw": ours(load, spin=spin), "qemu": qemu(load, cbw=False), "nbdkit": nbdkit(load)}, list(goals))

    def touch(bs, depth, goals=(), cluster=None, spin=None):
        load = touching(bench, bs, depth)
        snapshot = RAM | ({"cluster_size": cluster} if cluster else {})
        return Row(f"first touch {bs} qd{depth}" + (f", both {cluster} clusters" if cluster else "") + (", polling" if spin else ""),
                   {"fastcbw": ours(load, snapshot=snapshot, spin=spin), "qemu": qemu(load), "qemu plain": qemu(load, cbw=False)}, list(goals),
                   memory=bench.size["image"] + (1 << 29))

    again = touching(bench, "4k", 16, settled=True)
    once = touching(bench, "4k", 16)
    return [
        plain("randwrite", "4k", 16, [Goal("iops", "qemu", at_least=1.9, pinned=True), Goal("iops", "qemu", at_least=3, pinned=False),
                                      Goal("iops", "nbdkit", at_least=1)]),
        plain("randwrite", "4k", 16, [Goal("iops", "qemu", at_least=2.3, pinned=True)], spin="20"),
        plain("randwrite", "4k", 1),
        plain("randread", "4k", 16),
        plain("randwrite", "64k", 16),
        Row("settled 4k qd16", {"settled": ours(again, snapshot=RAM), "no snapshot": ours(again)},
            [Goal("iops", "no snapshot", at_least=0.97)]),
        touch("4k", 16, [Goal("iops", "qemu", at_least=7), Goal("p99_us", "qemu plain", at_most=1)]),
        touch("4k", 1, [Goal("iops", "qemu", at_least=2, pinned=True)]),
        touch("4k", 1, [Goal("iops", "qemu", at_least=4, pinned=True)], spin="20"),
        touch("64k", 16, [Goal("iops", "qemu", at_least=1.8)]),
        warm(bench),
        touch("64k", 1),
        Row("first touch 4k qd16, by our cluster size",
            {f"fastcbw {size}": ours(once, snapshot=RAM | {"cluster_size": size}) for size in ("4K", "16K", "64K")}, [],
            memory=bench.size["image"] + (1 << 29)),
        touch("4k", 16, cluster="64K"),
        touch("4k", 1, cluster="64K"),
        touch("64k", 16, cluster="64K"),
        Row("disk, direct: first touch 4k qd16",
            {"fastcbw": ours(once, True, snapshot=RAM), "qemu": qemu(once, True), "fastcbw plain": ours(once, True),
             "qemu plain": qemu(once, True, cbw=False), "fastcbw settled": ours(again, True, snapshot=RAM),
             "bare writes": bare("randwrite"), "bare reads and writes": bare("randrw")},
            [Goal("iops", "qemu", at_least=2.7), Goal("iops", "fastcbw plain", at_least=0.55),
             Goal("iops", "qemu plain", at_least=1.2, of="fastcbw plain")]),
        Row("disk, direct: first touch 4k qd1", {"fastcbw": ours(touching(bench, "4k", 1), True, snapshot=RAM),
                                                 "qemu": qemu(touching(bench, "4k", 1), True)}),
    ]
