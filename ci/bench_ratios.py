"""Print the ratios of two commits' benchmarks: here's time by base's, of each round, median and range. Used by ci/bench-compare.

    python ci/bench_ratios.py FOLDER ROUNDS          FOLDER: base-N.json and here-N.json, of pytest-benchmark, for N from 1 to ROUNDS
"""

import json
import statistics
import sys

#: Outside this the median is worth a look; within it is noise on most machines.
NOISE = 1.05


def medians(path):
    """Return name -> median seconds of the benchmarks in PATH."""
    with open(path) as file:
        return {found["fullname"]: found["stats"]["median"] for found in json.load(file)["benchmarks"]}


def ratios(rounds):
    """Return name -> sorted ratios of ROUNDS, pairs of medians of base and here; names that either side lacks are left out."""
    names = [name for name in rounds[0][1] if all(name in side for pair in rounds for side in pair)]
    return {name: sorted(here[name] / base[name] for base, here in rounds) for name in names}


def line(name, values):
    """Return a line for people; a mark where every round is on one side of 1 and the median beyond noise."""
    middle = statistics.median(values)
    sure = values[0] > 1 or values[-1] < 1
    word = "" if not sure or 1 / NOISE < middle < NOISE else "  slower" if middle > 1 else "  faster"
    return f"{middle:7.3f}  ({values[0]:.3f} to {values[-1]:.3f})  {name}{word}"


def main(folder, count):
    rounds = [tuple(medians(f"{folder}/{side}-{number}.json") for side in ("base", "here")) for number in range(1, int(count) + 1)]
    found = ratios(rounds)
    print("time here by time of the base, median and range of the rounds; below 1 is faster")
    for name, values in found.items():
        print(line(name, values))
    for word, side, other in (("only here", 1, 0), ("gone", 0, 1)):
        for name in rounds[0][side]:
            if name not in rounds[0][other]:
                print(f"{word}: {name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
