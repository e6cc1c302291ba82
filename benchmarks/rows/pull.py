"""A backup tool that pulls a snapshot over NBD: nbdcopy to nothing, alone and beside a guest that writes."""

from __future__ import annotations

from peers import Fio, Ours, Peer, Qemu, nbdcopy

from rows import Bench, Goal, Measured, Row

GUEST_RATE = 2000


def rows(bench: Bench) -> list[Row]:
    def ours():
        return Ours(bench.image(), bench.folder, bench.server_cpu, snapshot={"ram": "1G"})

    def qemu():
        return Qemu(bench.image(), bench.folder, bench.server_cpu, bench.fresh("target.img"))

    def pull(peer: Peer, connections: int, elsewhere: bool = False) -> float:
        return nbdcopy(peer.uri(peer.snapshot_export), cpu=bench.load_cpu, connections=connections, elsewhere=elsewhere)

    def alone(make, connections: int):
        def side() -> Measured:
            with make() as peer:
                pull(peer, connections)         # the first has cold caches on both sides
                return {"gb_per_s": bench.size["image"] / pull(peer, connections) / 1e9}, peer.settings | {"connections": connections}
        return side

    def beside_guest(make):
        def side() -> Measured:
            with make() as peer:
                load = Fio(peer.uri(), cpu=bench.load_cpu, rw="randwrite", bs="4k", depth=1, seconds=bench.size["seconds"], rate=GUEST_RATE)
                seconds = []
                while load.running():
                    seconds.append(pull(peer, 4, elsewhere=True))       # else fio waits for nbdcopy, which is not the server's doing
                return (load.finish() | {"gb_per_s": bench.size["image"] * len(seconds) / sum(seconds) / 1e9},
                        peer.settings | {"connections": 4, "guest": f"4k, {GUEST_RATE}/s"})
        return side

    speed = [Goal("gb_per_s", "qemu", at_least=1.2, pinned=True)]
    return [
        Row("pull to null, 1 connection", {"fastcbw": alone(ours, 1), "qemu": alone(qemu, 1)}, speed),
        Row("pull to null, 4 connections", {"fastcbw": alone(ours, 4), "qemu": alone(qemu, 4)},
            [*speed, Goal("gb_per_s", "qemu", at_least=2, pinned=False)]),
        Row("guest during a pull", {"fastcbw": beside_guest(ours), "qemu": beside_guest(qemu)},
            [Goal("p50_us", "qemu", at_most=1 / 15, pinned=False), Goal("p99_us", "qemu", at_most=1 / 4, pinned=False),
             Goal("p99_us", "qemu", at_most=1 / 2.5, pinned=True)]),
    ]
