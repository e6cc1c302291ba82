"""Copy orders compared: what the cache must hold, and how often the guest pays a copy, while a backup goes to a slow target.

    python benchmarks/orders.py                 the table of docs/copy-order.md
    python benchmarks/orders.py --size smoke    seconds, for the tests
    python benchmarks/orders.py --order disk-early,hot-first        the row of one, beside sequential; may be repeated

The engine is the real one, on memory; time is not. A tick is what the target needs for 16 KiB, and in each tick the guest makes a number of
writes from a seeded pattern; a request to the target costs some ticks by itself. What has arrived at the target is discarded from the
snapshot, as a job does that consumes it. So every run gives the same figures on every machine.
"""

import argparse
import random
import sys

import numpy as np

from fastcbw.block.memory import MemoryDevice
from fastcbw.cbw.engine import Engine
from fastcbw.cbw.order import Order
from fastcbw.cbw.policies import ORDER_DEFAULT

K = 4096
ORDERS = ["sequential", "ram-first", "disk-early", "disk-last", "zero-last", "hot-first", "ram-first,hot-first", "hot-first,ram-first",
          "disk-early,hot-first", "ram-first,hot-first,disk-last", "ram-first,hot-first,disk-last,zero-last"]
TICK_BYTES = 16 << 10       # what the target takes in a tick
REQUEST_TICKS = 1           # what a request costs it beside
CHUNK = 256 << 10
SIZES = {"smoke": 8 << 20, "full": 64 << 20}


def random_writes(rng, clusters):
    """4 KiB anywhere, each place as likely as any other."""
    while True:
        yield rng.randrange(clusters)


def sequential_writes(rng, clusters):
    """A log: ascending from the middle of the disk, around its end."""
    at = clusters // 2
    while True:
        yield at
        at = (at + 1) % clusters


def hot_spot(rng, clusters):
    """Nine of ten writes into the hottest eighth of the disk, which lies in its last third; the rest anywhere."""
    first, count = clusters * 3 // 4, clusters // 8
    while True:
        yield first + rng.randrange(count) if rng.random() < 0.9 else rng.randrange(clusters)


PATTERNS = {"random": random_writes, "sequential": sequential_writes, "hot spot": hot_spot}


def run(order, pattern, length, ram_bytes, writes_per_tick=0.5, seed=1):
    """Return peak bytes of both tiers, copies that guest writes paid for, and whether the copy was right."""
    rng = random.Random(seed)
    clusters = length // K
    disk = MemoryDevice(length)
    content = np.random.default_rng(seed).integers(1, 256, length, dtype=np.uint8)
    content.reshape(clusters, K)[rng.sample(range(clusters), clusters // 10)] = 0      # a tenth of it is zeroes
    disk.write(0, content.tobytes())
    engine = Engine(disk)
    view = engine.snapshot("s", ram=ram_bytes, spill=MemoryDevice(2 * length + (16 << 20)), spill_limit=2 * length, cluster_size=K, export="discard")
    guest = PATTERNS[pattern](rng, clusters)
    due, peak, target = 0.0, 0, bytearray(length)

    def write(times):
        nonlocal due, peak
        due += times
        while due >= 1:
            due -= 1
            engine.device.write(next(guest) * K, b"guest")
        facts = engine.report("s")
        peak = max(peak, facts["ram_bytes"] + facts["disk_bytes"])

    write(64)       # what the guest does before the job begins
    for offset, length_ in pieces(view, order):
        # Read into the job's buffer; while it is under way to the target the guest goes on; then it is the target's alone.
        target[offset : offset + length_] = view.read(offset, length_)
        for _ in range(REQUEST_TICKS + length_ // TICK_BYTES):
            write(writes_per_tick)
        view.discard(offset, length_)
    copies = engine.report("s")["preserved_clusters"] - engine.report("s")["zero_clusters"]
    right = bytes(target) == content.tobytes()
    engine.close()
    return peak, copies, right


def pieces(view, order):
    """Pieces of at most CHUNK in copy order, each chosen when it is asked for."""
    chosen = Order(view, order, chunk=CHUNK)
    while (piece := chosen.next_piece()) is not None:
        yield piece


def table(size, chosen=ORDERS):
    """Yield the lines of the table, of CHOSEN orders and sequential; AssertionError when a copy differs."""
    length = SIZES[size]
    yield "| order | " + " | ".join(f"{name}: peak | copies" for name in PATTERNS) + " |"
    yield "|---|" + "---|" * (2 * len(PATTERNS))
    base = {}
    for order in dict.fromkeys([ORDERS[0], *chosen]):
        cells = []
        for pattern in PATTERNS:
            peak, copies, right = run(order, pattern, length, length // 128)
            assert right, f"{order}, {pattern}: the target is not the snapshot"
            first = base.setdefault(pattern, (peak, copies))
            cells += [f"{peak / first[0]:.2f}" if order != ORDERS[0] else f"{peak / (1 << 20):.1f} MiB",
                      f"{copies / first[1]:.2f}" if order != ORDERS[0] else f"{copies}"]
        yield f"| `{order}`{' (default)' if order == ORDER_DEFAULT else ''} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--order", choices=ORDERS, action="append", help="only this one, beside sequential; may be repeated")
    arguments = parser.parse_args()
    for line in table(arguments.size, arguments.order or ORDERS):
        print(line, flush=True)
    sys.exit(0)
