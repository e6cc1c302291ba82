"""Every state of a cluster, and every transition between two, that docs/cluster-states.md lists is reached, and no other.

A seeded run drives one disk with up to three snapshots through what guests, readers, the flusher and operators do, with tiers too
small and errors of the disk and of the disk tier; before and after each step an observer takes the state of each cluster as each
snapshot sees it. One step at a time, and nothing goes on between them, so each difference is one transition.
"""

import collections
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
TIER = 4 << 20
STEPS = 6000
SEEDS_MAX = 20
CLAIMED = 128
REFUSE = {"on_full": "break-guest-write", "on_cbw_error": "break-guest-write"}
PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "cluster-states.md"

#: What is done, and how often. A name on the page is the last word of these.
STEPS_OF = {"write": 12, "zero write": 3, "failing write": 1, "unpreserved write": 1, "discard": 12, "failing discard": 1, "read": 16, "failing read": 1,
            "drop": 5, "flush": 4, "failing flush": 1, "take": 8, "begin": 7, "end": 5, "break end": 2}


def word(state):
    """The name of a state, as the page has it: where, then what else."""
    name = "outside" if not state & 1 else "ram" if state & 2 else "disk" if state & 4 else "zero" if state & 8 else "none"
    return name + (" changed" if state & 16 else "") + (" settled" if state & 32 else "") + (" lazy" if state & 64 else "")


class Run:
    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.bare = MemoryDevice(CLUSTERS * K)
        self.disk = FaultDevice(self.bare)
        self.bare.write(0, b"x" * (CLUSTERS // 2 * K))
        self.engine = Engine(self.disk)
        self.views, self.tiers = {}, {}
        self.number = 0
        self.marks = self.engine.bitmaps.add("marks", granularity=K)
        self.touched = range(0)         # clusters that the step was about
        self.chosen = {}
        self.what, self.seen = "", {}   # the step, and what was seen before it
        self.tried = collections.Counter()      # (step, state as each snapshot sees it): how often it was about such a cluster
        self.reached = {}       # (step, before, after): how often
        self.states = set()

    def look(self):
        """What each live snapshot sees, once keeper and flusher have done."""
        wait_until(lambda: all(view.retired or not view.broken for view in self.views.values()) and self.engine.flusher_idle)
        self.engine.finish_discards()
        seen = {}

        def at_rest():
            seen.update({name: cluster_states(view) for name, view in self.views.items() if not view.broken})
            return not any((states & CLAIMED).any() for states in seen.values())

        wait_until(at_rest)         # the keeper may be about to settle what it has carried out
        return seen

    def step(self, what=None, **chosen):
        """One step, at random unless WHAT it is, and on what, is CHOSEN: first and count of clusters, name and options of a snapshot."""
        before = self.look()
        what = what or self.rng.choices(list(STEPS_OF), list(STEPS_OF.values()))[0]
        self.what, self.seen, self.touched, self.chosen = what, before, range(0), chosen
        try:
            getattr(self, what.replace(" ", "_"))()
        except (OSError, Error):
            pass
        after = self.look()
        self.states |= {word(state) for seen in (*before.values(), *after.values()) for state in np.unique(seen).tolist()}
        kind = what.split()[-1]
        if kind not in ("begin", "end") and set(before) != set(after):
            return              # something broke of it: two things happened
        names = set(before) & set(after)
        for cluster in np.flatnonzero(np.any([before[name] != after[name] for name in names], axis=0)).tolist() if names else ():
            of_cluster = kind
            if kind not in ("drop", "flush") and any(before[name][cluster] & 2 and after[name][cluster] & 15 == 1 for name in names):
                # What reads had left in RAM went for the room that a write needed, then or a little later.
                if cluster in self.touched:
                    continue
                of_cluster = "drop"
            for name in names:
                pair = word(int(before[name][cluster])), word(int(after[name][cluster]))
                if pair[0] != pair[1]:
                    self.reached[(of_cluster, *pair)] = self.reached.get((of_cluster, *pair), 0) + 1

    def span(self):
        """Every second time it begins where this step was tried least, so that what is rare is reached soon."""
        first = self.rng.randrange(CLUSTERS)
        if "first" in self.chosen:
            first, count = self.chosen["first"], self.chosen["count"]
            self.touched = range(first, first + count)
            return first * K, count * K
        if self.seen and self.rng.random() < 0.5:
            states = list(zip(*(seen.tolist() for seen in self.seen.values())))
            order = [*range(first, CLUSTERS), *range(first)]
            first = min(order, key=lambda cluster: self.tried[self.what, states[cluster]])
            self.tried[self.what, states[first]] += 1
        count = min(self.rng.choice([1, 2, 8, 32]), CLUSTERS - first)
        self.touched = range(first, first + count)
        return first * K, count * K

    def view(self):
        """Any snapshot, with its name."""
        name = self.chosen.get("name") or self.rng.choice(list(self.views))
        return name, self.views[name]

    # -- the guest

    def write(self):
        offset, length = self.span()
        self.engine.device.write(offset, bytes([self.rng.randrange(1, 255)]) * length)

    def zero_write(self):
        self.engine.device.write_zeroes(*self.span())

    def failing_write(self):
        """What is to be preserved can't be read."""
        offset, length = self.span()
        with self.disk.fail_on("read", offset, K):
            self.engine.device.write(offset, b"e" * length)

    def unpreserved_write(self):
        """What is to be preserved can't be written to the disk tier."""
        offset, length = self.span()
        failing = [tier.fail_on("write", 0, TIER) for tier in self.tiers.values()]
        try:
            self.engine.device.write(offset, b"t" * length)
        finally:
            for fault in failing:
                fault.__exit__(None, None, None)

    def discard(self):
        self.engine.device.discard(*self.span())

    def failing_discard(self):
        offset, length = self.span()
        with self.disk.fail_on("discard", offset, length):
            self.engine.device.discard(offset, length)

    # -- readers

    def read(self):
        """CACHE: what copy-on-read does."""
        if self.views:
            self.view()[1].cache(*self.span())

    def failing_read(self):
        offset, length = self.span()
        if self.views:
            with self.disk.fail_on("read", offset, length):
                self.view()[1].cache(offset, length)

    def take(self):
        if self.views:
            self.view()[1].discard(*self.span())

    # -- room

    def drop(self):
        if self.views:
            self.engine.drop(self.view()[0], *self.span())

    def flush(self):
        """A smaller limit makes the flusher move what is above it, for a moment."""
        for name in self.tiers:
            if name in self.views and not self.views[name].broken:
                self.engine.set_limits(name, ram=4 * K)
        wait_until(lambda: self.engine.flusher_idle)
        for name in self.tiers:
            if name in self.views and not self.views[name].broken:
                self.engine.set_limits(name, ram="1M")

    def failing_flush(self):
        failing = [tier.fail_on("write", 0, TIER) for tier in self.tiers.values()]
        try:
            self.flush()
        finally:
            for fault in failing:
                fault.__exit__(None, None, None)

    # -- snapshots

    def begin(self):
        if len(self.views) < 3:
            self.number += 1
            name, tier = f"s{self.number}", FaultDevice(MemoryDevice(TIER))
            both = {"ram": "1M", "spill": tier, "spill_limit": "1M"}        # never so full that the flusher begins by itself
            options = self.rng.choice([{"ram": 16 * K}, {"ram": "1M"}, both, both, {"ram": 0, "spill": tier, "spill_limit": "64K"},
                                       {"ram": 0, "spill": tier, "spill_limit": "1M"}])
            if self.rng.random() < 0.3:
                options = options | {"bitmap": "marks"}
            if self.rng.random() < 0.3:
                options = options | REFUSE
            if "options" in self.chosen:
                options = self.chosen["options"] | ({"spill": tier, "spill_limit": "1M"} if self.chosen["tier"] else {})
            self.views[name] = self.engine.snapshot(name, cluster_size=K, **options)
            if options.get("spill") is not None and options["ram"]:
                self.tiers[name] = tier
            if self.rng.random() < 0.5:
                self.marks.clear()

    def end(self):
        if self.views:
            name, _ = self.view()
            self.views.pop(name)
            self.tiers.pop(name, None)
            self.engine.delete(name)

    def break_end(self):
        if self.views:
            self.engine.break_snapshot(self.view()[0])


    # -- what comes together seldom

    def older_keeps_what_a_newer_one_lets_go(self, how, tier):
        """Whatever the older snapshot has of a cluster: the newer one has left it in RAM, and it goes again."""
        self.step("begin", options={"ram": 0 if tier else "1M"} | REFUSE, tier=tier)
        self.step("write", first=0, count=2)
        self.step("zero write", first=60, count=2)
        self.step("failing write", first=4, count=1)
        self.step("read", first=5, count=1)
        self.step("begin", options={"ram": "1M"}, tier=True)
        for first, count in ((0, 2), (4, 2), (60, 2)):
            self.step("read", first=first, count=count)
        self.step(how, first=0, count=CLUSTERS, name=list(self.views)[-1])

    def refused_write_where_a_discard_is_recorded(self, cluster):
        """And reads have left it to the snapshot in between: the newest needs it still, and fails."""
        for step in ("discard", "read", "failing write"):
            self.step("begin", options={"ram": "1M"} | REFUSE, tier=False)
            self.step(step, first=cluster, count=1)

    def end_all(self):
        for name in list(self.views):
            self.step("end", name=name)


def test_every_state_and_transition_of_the_page_is_reached_and_no_other():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    listed = {(step.strip("`"), before.strip("`"), after.strip(" `")) for step, before, afters in rows for after in afters.split(",")}
    reached, states = collections.Counter(), set()
    for seed in range(SEEDS_MAX):
        run = Run(seed)
        for how in ("drop", "flush"):
            for tier in (True, False):
                run.older_keeps_what_a_newer_one_lets_go(how, tier)
                run.end_all()
        for cluster in (5, 70):
            run.refused_write_where_a_discard_is_recorded(cluster)
            run.end_all()
        for _ in range(STEPS):
            run.step()
        run.engine.close()
        reached.update(run.reached)
        states |= run.states
        if listed <= set(reached):
            break
    assert set(reached) - listed == set(), "reached and not on the page"
    assert listed - set(reached) == set(), "on the page and not reached"
    assert {state for _, *pair in listed for state in pair} == states
