"""Measure the server beside qemu-storage-daemon and nbdkit, in one interleaved run, with fio and nbdcopy.

    python benchmarks/versus.py                          every row, 5 rounds, pinned (server on core 0, load on core 1)
    python benchmarks/versus.py --rows write first --rounds 3 --unpinned
    python benchmarks/versus.py --repeat 3               each row three times; a goal is met when it is met each time
    python benchmarks/versus.py --size smoke             seconds instead of minutes; shows that it runs, not how fast

Each round measures every side once, in an order that turns from round to round; a ratio is taken within a round, and the
median of the ratios is printed with their range, and the goal beside it. docs/benchmarking.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from peers import Nbdkit, Ours, Qemu  # noqa: E402
from rows import Bench, Row, guest, middle, pull, push, snapshots  # noqa: E402

from fastcbw.compare.memory import touch_memory  # noqa: E402
from fastcbw.compare.process import Missing  # noqa: E402

SIZES = {"full": {"image": 2 << 30, "seconds": 4, "touches": 30000}, "smoke": {"image": 32 << 20, "seconds": 0.2, "touches": 200}}
GROUPS = (guest, pull, push, snapshots)


def measure(row: Row, rounds: int, full: bool) -> dict:
    """Run ROUNDS rounds; return figures and settings by side, and the goals with their value in each round."""
    first = next(iter(row.sides))
    figures: dict[str, list[dict]] = {side: [] for side in row.sides}
    settings = {}
    order = list(row.sides)
    for number in range(rounds):
        for side in order[number % len(order):] + order[:number % len(order)]:
            if full and row.memory:
                touch_memory(row.memory)
            measured, settings[side] = row.sides[side]()
            figures[side].append(measured)
    values = []
    for number in range(rounds):
        runs = {side: taken[number] for side, taken in figures.items()}
        values.append([goal.value(runs, first) for goal in row.goals])
    return {"figures": figures, "settings": settings, "values": [sorted(column) for column in zip(*values)]}


def ours_beside(figures: dict[str, list[dict]]) -> list[str]:
    """Ratios of the first figure of the first side to those of the others."""
    first, *others = figures
    lines = []
    for side in others:
        key = next((key for key in figures[first][0] if key in figures[side][0]), None)
        if key:
            ratios = sorted(a[key] / b[key] for a, b in zip(figures[first], figures[side]) if b[key])
            if ratios:
                lines.append(f"    {key} / {side}: {ratios[len(ratios) // 2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    return lines


def print_row(row: Row, measured: dict, pinned: bool) -> None:
    print(f"\n{row.name}")
    for side, runs in measured["figures"].items():
        print(f"  {side:22} " + "   ".join(f"{key} {value:.4g}" for key, value in middle(runs).items()))
        print("    " + ", ".join(f"{key} {value}" for key, value in measured["settings"][side].items() if value is not None))
    print("\n".join(ours_beside(measured["figures"])))
    for goal, values in zip(row.goals, measured["values"]):
        if goal.pinned in (None, pinned):
            value = values[len(values) // 2]
            print(f"  goal {goal.text()}: {value:.3g} ({values[0]:.3g} to {values[-1]:.3g}) {'met' if goal.met(value) else 'NOT MET'}")
    sys.stdout.flush()


def verdicts(row: Row, repetitions: list[dict], pinned: bool) -> list[dict]:
    """Each goal with the median of each repetition; met when it is met in every one."""
    found = []
    for i, goal in enumerate(row.goals):
        if goal.pinned in (None, pinned):
            medians = [one["values"][i][len(one["values"][i]) // 2] for one in repetitions]
            found.append({"row": row.name, "goal": goal.text(), "medians": medians, "met": all(map(goal.met, medians))})
    return found


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
    parser.add_argument("--list", action="store_true", help="print the names of the rows and end")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="measure each row N times in a row; a goal is met when it is each time")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--seconds", type=float, metavar="S", help="how long a timed load runs (default: 4, smoke 0.2)")
    parser.add_argument("--unpinned", action="store_true")
    parser.add_argument("--folder", default="/dev/shm", help="where the images are (default: tmpfs)")
    parser.add_argument("--disk-folder", default="/var/tmp", help="where the images of the rows named 'disk' are (default: /var/tmp)")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    arguments = parser.parse_args()
    peers = versions()
    pinned = not arguments.unpinned
    size = SIZES[arguments.size] | ({"seconds": arguments.seconds} if arguments.seconds else {})
    bench = Bench(size, pinned, arguments.folder, arguments.disk_folder)
    taken, goals = [], []
    try:
        rows = [row for group in GROUPS for row in group.rows(bench) if not arguments.rows or any(word in row.name for word in arguments.rows)]
        if arguments.list:
            print("\n".join(row.name for row in rows))
            return
        if not rows:
            sys.exit(f"versus: --rows: no row has one of {arguments.rows} in its name (--list prints them)")
        if arguments.size == "full":
            touch_memory(4 * bench.size["image"])
        where = "pinned, server on core 0, load on core 1" if pinned else "unpinned"
        print(f"{', '.join(peers.values())}; {where}; image of {bench.size['image'] >> 20} MiB in {arguments.folder}; {arguments.rounds} rounds")
        for row in rows:
            repetitions = []
            for _ in range(arguments.repeat):
                repetitions.append(measure(row, arguments.rounds, arguments.size == "full"))
                print_row(row, repetitions[-1], pinned)
            taken.append({"row": row.name, "repetitions": repetitions})
            goals += verdicts(row, repetitions, pinned)
    finally:
        bench.close()
    if arguments.repeat > 1:
        print("\n" + "\n".join(f"{'met    ' if goal['met'] else 'NOT MET'} {goal['row']}: {goal['goal']}: "
                               + ", ".join(f"{value:.3g}" for value in goal["medians"]) for goal in goals))
    if arguments.json:
        host = {"machine": platform.machine(), "kernel": platform.release(), "cpus": os.cpu_count(), "python": platform.python_version()}
        with open(arguments.json, "w") as file:
            json.dump({"when": time.strftime("%FT%TZ", time.gmtime()), "host": host, "versions": peers, "rounds": arguments.rounds,
                       "size": arguments.size, "pinned": pinned, "folder": arguments.folder, "disk_folder": arguments.disk_folder,
                       "rows": taken, "goals": goals}, file, indent=1)


if __name__ == "__main__":
    main()
