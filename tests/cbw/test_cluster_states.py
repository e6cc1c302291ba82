"""Every state of a cluster, and every transition between two, that docs/cluster-states.md lists is reached, and no other.

A seeded run drives one disk with up to three snapshots through guest writes, zeroes, discards, errors of the disk and of
the disk tier, tiers too small and the begin and end of snapshots; before and after each step an observer takes the state of each cluster as the newest snapshot
sees it. One thread, so each difference is one transition.
"""

import pathlib
import random

import numpy as np
from engine_disks import wait_until

from fastcbw.block.fault import FaultDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.cbw.access import cluster_states
from fastcbw.cbw.engine import Engine
from fastcbw.errors import Error

K = 4096
CLUSTERS = 96
STEPS = 1500
STEPS_MAX = 30000
PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "cluster-states.md"


def word(state):
    """The name of a state, as the page has it: where, then what else."""
    name = "ram" if state & 2 else "disk" if state & 4 else "zero" if state & 8 else "none"
    return name + (" changed" if state & 16 else "") + (" settled" if state & 32 else "") + (" lazy" if state & 64 else "")


class Run:
    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.bare = MemoryDevice(CLUSTERS * K)
        self.disk = FaultDevice(self.bare)
        self.bare.write(0, b"x" * (CLUSTERS // 2 * K))
        self.engine = Engine(self.disk)
        self.views = {}
        self.number = 0
        self.tier = None        # of the newest snapshot that has one
        self.reached = {}       # (step, before, after): how often
        self.states = set()

    def look(self):
        """The newest snapshot's name and its states, once the keeper has ended what broke."""
        name = next((name for name in reversed(self.views) if not self.views[name].broken), None)
        if name is None:
            return None
        wait_until(lambda: all(view.retired or not view.broken for view in self.views.values()))
        seen = []

        def at_rest():
            seen.append(cluster_states(self.views[name]))
            return not (seen[-1] & 128).any() and len(seen) > 1 and (seen[-1] == seen[-2]).all()

        wait_until(at_rest)
        return name, seen[-1]

    def step(self):
        before = self.look()
        what = self.rng.choices(["write", "zeroes", "discard", "begin", "end", "disk error", "tier error"], [24, 6, 14, 7, 7, 1, 1])[0]
        try:
            getattr(self, what.replace(" ", "_"))()
        except (OSError, Error):
            pass
        after = self.look()
        for seen in (before, after):
            if seen is not None:
                self.states |= {word(state) for state in np.unique(seen[1]).tolist()}
        if before is None or after is None or before[0] != after[0]:
            return
        for a, b in set(zip(before[1].tolist(), after[1].tolist())):
            if a != b:
                kind = "discard" if what == "discard" else "write"      # zeroes, and writes that meet an error, are writes
                self.reached[(kind, word(a), word(b))] = self.reached.get((kind, word(a), word(b)), 0) + 1

    def span(self):
        first = self.rng.randrange(CLUSTERS)
        return first * K, min(self.rng.choice([1, 1, 2, 8]), CLUSTERS - first) * K

    def write(self):
        offset, length = self.span()
        self.engine.device.write(offset, bytes([self.rng.randrange(1, 255)]) * length)

    def zeroes(self):
        self.engine.device.write_zeroes(*self.span())

    def discard(self):
        self.engine.device.discard(*self.span())

    def begin(self):
        if len(self.views) < 3:
            self.number += 1
            # One tier each, so that no flusher moves anything by itself; small ones, which break.
            self.tier = FaultDevice(MemoryDevice(4 << 20))
            tier = self.rng.choice([{"ram": 12 * K}, {"ram": "1M"}, {"ram": 0, "spill": self.tier, "spill_limit": "64K"},
                                    {"ram": 0, "spill": self.tier, "spill_limit": "1M"}])
            self.views[f"s{self.number}"] = self.engine.snapshot(f"s{self.number}", cluster_size=K, **tier)

    def end(self):
        if self.views:
            name = self.rng.choice(list(self.views))
            self.views.pop(name)
            self.engine.delete(name)

    def disk_error(self):
        offset, length = self.span()
        with self.disk.fail_on("read", offset, length):
            self.engine.device.write(offset, b"e" * length)

    def tier_error(self):
        if self.views:
            offset, length = self.span()
            with self.tier.fail_on("write", 0, 4 << 20):
                self.engine.device.write(offset, b"t" * length)


def test_every_state_and_transition_of_the_page_is_reached_and_no_other():
    rows = [tuple(cell.strip(" `") for cell in line.strip("|").split("|")) for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    listed = {(step, before, after) for step, before, after, *_ in rows}
    run = Run(1)
    for step in range(STEPS_MAX):       # the keeper has its own pace, so the number of steps is not the same in every run
        run.step()
        if step >= STEPS and listed <= set(run.reached):
            break
    run.engine.close()
    assert set(run.reached) - listed == set(), "reached and not on the page"
    assert listed - set(run.reached) == set(), "on the page and not reached"
    assert {state for _, *pair in listed for state in pair} == run.states
