"""Measure the server beside qemu-storage-daemon and nbdkit, in one interleaved run, with fio.

    python benchmarks/versus.py                          every row, 5 rounds, pinned (server on core 0, fio on core 1)
    python benchmarks/versus.py --rows write first --rounds 3 --unpinned
    python benchmarks/versus.py --size smoke             seconds instead of minutes; shows that it runs, not how fast

Each round runs every server once, in an order that turns from round to round; a ratio is taken within a round, and the
median of the ratios is printed with their range. docs/benchmarking.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from peers import Missing, Nbdkit, Ours, Qemu, fio  # noqa: E402

SIZES = {"full": {"image": 2 << 30, "seconds": 4, "touches": 30000}, "smoke": {"image": 64 << 20, "seconds": 1, "touches": 500}}


class Bench:
    """One run: the folder, the image, the rows."""

    def __init__(self, arguments: argparse.Namespace):
        self.size = SIZES[arguments.size]
        self.pins = (None, None) if arguments.unpinned else (0, 1)
        self.folder = tempfile.mkdtemp(prefix="fastcbw-versus-", dir=arguments.folder)
        self.image = os.path.join(self.folder, "disk.img")
        self.target = os.path.join(self.folder, "target.img")
        self.rounds = arguments.rounds
        self.results: list[dict] = []

    def fill_image(self) -> None:
        """Data that is neither zero nor compressible, so that nothing is skipped for being a hole."""
        piece = os.urandom(8 << 20)
        with open(self.image, "wb") as file:
            for i in range(self.size["image"] // len(piece)):
                file.write(i.to_bytes(8, "little") + piece[8:])

    def fresh_target(self) -> str:
        with open(self.target, "wb") as file:
            file.truncate(self.size["image"])
        return self.target

    # -- rows: each returns {server: () -> Peer} and how to load one

    def timed(self, rw: str, bs: str, depth: int):
        def load(peer):
            return fio(peer.uri(), cpu=self.pins[1], rw=rw, bs=bs, depth=depth, extra=["--time_based", f"--runtime={self.size['seconds']}"])
        return load

    def touching(self, bs: str, depth: int, settled: bool = False):
        """Every write the first in its 64 KiB; with SETTLED the same again, measured the second time."""
        count = min(self.size["touches"], self.size["image"] // 65536)
        words = ["--blockalign=64k", f"--number_ios={count}"]

        def load(peer):
            figures = fio(peer.uri(), cpu=self.pins[1], rw="randwrite", bs=bs, depth=depth, extra=words)
            return fio(peer.uri(), cpu=self.pins[1], rw="randwrite", bs=bs, depth=depth, extra=words) if settled else figures
        return load

    def plain(self):
        cpu = self.pins[0]
        return {
            "fastcbw": lambda: Ours(self.image, self.folder, cpu),
            "qemu": lambda: Qemu(self.image, self.folder, cpu),
            "nbdkit": lambda: Nbdkit(self.image, self.folder, cpu),
        }

    def snapshot(self, clusters: str | None = None):
        cpu = self.pins[0]
        options = {"ram": "3G"} | ({"cluster_size": clusters} if clusters else {})
        return {
            "fastcbw": lambda: Ours(self.image, self.folder, cpu, snapshot=options),
            "qemu": lambda: Qemu(self.image, self.folder, cpu, target=self.fresh_target()),
        }

    def settled(self):
        cpu = self.pins[0]
        return {
            "settled": lambda: Ours(self.image, self.folder, cpu, snapshot={"ram": "3G"}),
            "no snapshot": lambda: Ours(self.image, self.folder, cpu),
        }

    def rows(self) -> dict[str, tuple]:
        return {
            "write 4k qd16": (self.plain(), self.timed("randwrite", "4k", 16)),
            "write 4k qd1": (self.plain(), self.timed("randwrite", "4k", 1)),
            "read 4k qd16": (self.plain(), self.timed("randread", "4k", 16)),
            "write 64k qd16": (self.plain(), self.timed("randwrite", "64k", 16)),
            "settled 4k qd16": (self.settled(), self.touching("4k", 16, settled=True)),
            "first touch 4k qd16": (self.snapshot(), self.touching("4k", 16)),
            "first touch 4k qd1": (self.snapshot(), self.touching("4k", 1)),
            "first touch 64k qd16": (self.snapshot(), self.touching("64k", 16)),
            "first touch 4k qd16, both 64K clusters": (self.snapshot("64K"), self.touching("4k", 16)),
        }

    def run_row(self, name: str, servers: dict, load) -> None:
        figures: dict[str, list[dict]] = {server: [] for server in servers}
        settings = {}
        order = list(servers)
        for round_number in range(self.rounds):
            turned = order[round_number % len(order):] + order[:round_number % len(order)]
            for server in turned:
                with servers[server]() as peer:
                    settings[server] = peer.settings
                    figures[server].append(load(peer) | {"resident": peer.resident_bytes()})
        self.results.append({"row": name, "figures": figures, "settings": settings})
        print_row(name, figures)

    def close(self) -> None:
        shutil.rmtree(self.folder)


def print_row(name: str, figures: dict[str, list[dict]]) -> None:
    print(f"\n{name}")
    ours = next(iter(figures))
    for server, runs in figures.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        text = (f"  {server:12} {middle['iops']:9.0f} IOPS   p50 {middle['p50_us']:7.0f} us   p99 {middle['p99_us']:7.0f} us"
                f"   {middle['resident'] / 1048576:6.0f} MiB")
        if server != ours:
            ratios = sorted(a["iops"] / b["iops"] for a, b in zip(figures[ours], runs))
            text += f"   {ours} x {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(text, flush=True)


def versions() -> dict[str, str]:
    found = {}
    for peer in (Ours, Qemu, Nbdkit):
        try:
            found[peer.name] = peer.version()
        except Missing as error:
            sys.exit(f"versus: {error}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=[], help="only rows whose name contains one of these")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--unpinned", action="store_true")
    parser.add_argument("--folder", default="/dev/shm", help="where the images are (default: tmpfs)")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    arguments = parser.parse_args()
    peers = versions()
    bench = Bench(arguments)
    try:
        bench.fill_image()
        where = "unpinned" if arguments.unpinned else "pinned, server on core 0, load on core 1"
        print(f"{', '.join(peers.values())}; {where}; image of {bench.size['image'] >> 20} MiB in {arguments.folder}; {arguments.rounds} rounds")
        for name, (servers, load) in bench.rows().items():
            if not arguments.rows or any(word in name for word in arguments.rows):
                bench.run_row(name, servers, load)
    finally:
        bench.close()
    if arguments.json:
        host = {"machine": platform.machine(), "kernel": platform.release(), "cpus": os.cpu_count(), "python": platform.python_version()}
        with open(arguments.json, "w") as file:
            json.dump({"when": time.strftime("%FT%TZ", time.gmtime()), "host": host, "versions": peers, "rounds": arguments.rounds,
                       "size": arguments.size, "pinned": not arguments.unpinned, "folder": arguments.folder, "rows": bench.results}, file, indent=1)


if __name__ == "__main__":
    main()
