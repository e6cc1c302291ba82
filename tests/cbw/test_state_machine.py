"""The engine beside a plain model, driven by Hypothesis: same calls, same bytes, same accounts, after every step.

One thread, so the model predicts everything: what the guest disk reads, what every snapshot reads, how many clusters were
preserved and found to be zeroes, how much the tiers hold, and exactly which write finds both tiers full, so that a snapshot
is given up or the write refused, as its policy says. The flusher works meanwhile; limits change. FASTCBW_EXAMPLES=N runs N random examples instead of the fixed ones.
"""

import contextlib
import errno
import os
import pathlib
import tempfile

import numpy as np
import pytest
from engine_disks import KINDS, guest_of, make_disk, wait_until
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from model.plain import GuestWriteRefused, PlainBitmap, PlainDisk

from fastcbw.block.fault import FaultDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.cbw.access import cluster_states
from fastcbw.cbw.engine import Engine
from fastcbw.errors import LimitReached, NotInSnapshot, SnapshotBroken
from fastcbw.jobs.backup import BackupJob

EXAMPLES = os.environ.get("FASTCBW_EXAMPLES")
CONFIG = settings(max_examples=int(EXAMPLES or 40), stateful_step_count=40, deadline=None, derandomize=EXAMPLES is None, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))

# No more than one round of the intercept (1 MiB), so that a write that finds no room preserved nothing at all.
LENGTHS = st.sampled_from([1, 4095, 4096, 4097, 65 * 4096, 65 * 4096 + 1, 200_001, 3 * 65536 + 777, 63 * 4096 + 511, (1 << 20) - 1])
LAZY = 64       # of cluster_states
ROOMS = st.sampled_from([0, 0, 1, 2, 3, 5, 16, 64])


class EngineMachine(RuleBasedStateMachine):
    """One disk, many snapshots, caches from too small to large."""

    kind = "memory"

    @initialize(length=LENGTHS)
    def begin(self, length):
        self.marked = []        # ranges that are marked changed although nothing is written there: discarded, or refused
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm", prefix="fastcbw-test-")
        self.length = length
        self.model = PlainDisk(length)
        self.child = FaultDevice(make_disk(self.kind, length, pathlib.Path(self.folder.name)))
        self.engine = Engine(self.child)
        self.disk = guest_of(self.kind, self.engine)
        self.views = {}
        self.number = 0

    def span(self, data):
        """A range of the disk: a few bytes, some clusters, or nearly all, with ends at and beside boundaries."""
        unit = data.draw(st.sampled_from([1, 512, 4096, 65536]))
        offset = min(data.draw(st.integers(0, self.length // unit)) * unit + data.draw(st.sampled_from([0, 0, 1, 511])), self.length - 1)
        most = self.length - offset
        length = data.draw(st.one_of(st.integers(1, min(most, 5000)), st.sampled_from([4096, 8192, 65536]), st.just(most)))
        return offset, min(length, most)

    # -- the guest

    def refused_alike(self, ours, models, offset, length):
        """Both change the disk, or both refuse to."""
        try:
            ours()
            refused = None
        except OSError as error:
            refused = error
        try:
            models()
            assert refused is None
        except GuestWriteRefused as why:
            assert refused is not None and str(why) in str(refused)
            assert refused.errno == (errno.EIO if "read" in str(why) else errno.ENOSPC)
            self.marked.append((offset, offset + length))
            if self.model.recorded:         # what it came by before it was refused is settled, and cancelled there
                states = cluster_states(self.views[self.model.live[0].name])
                size = self.model.cluster_size
                self.model.recorded -= {c for c in range(offset // size, (offset + length - 1) // size + 1) if not states[c] & LAZY}

    @rule(data=st.data(), byte=st.integers(0, 255))
    def write(self, data, byte):
        offset, length = self.span(data)
        # No two neighbouring sectors alike, so that data of a wrong place shows.
        content = bytes((byte + i // 512) % 256 for i in range(0, length, 512))
        content = (b"".join(bytes([b]) * 512 for b in content))[:length] if byte else bytes(length)
        for begin, end in self.pieces(offset, length):
            part = content[begin - offset : end - offset]
            self.change(lambda: self.disk.write(begin, part), lambda: self.model.write(begin, part), begin, end - begin)

    @rule(data=st.data())
    def write_zeroes(self, data):
        offset, length = self.span(data)
        for begin, end in self.pieces(offset, length):
            self.change(lambda: self.disk.write_zeroes(begin, end - begin), lambda: self.model.write_zeroes(begin, end - begin), begin, end - begin)

    @precondition(lambda self: self.model.live)
    @rule(data=st.data(), byte=st.integers(1, 255))
    def write_where_the_disk_fails(self, data, byte):
        """What is to be preserved of one cluster can't be read: on_cbw_error decides."""
        size = self.model.cluster_size
        offset = data.draw(st.integers(0, (self.length - 1) // size)) * size
        content = bytes([byte]) * min(size, self.length - offset)
        with self.child.fail_on("read", offset, len(content)):
            self.change(lambda: self.disk.write(offset, content), lambda: self.model.write(offset, content, unreadable=True), offset, len(content))

    @precondition(lambda self: self.model.live)
    @rule(data=st.data(), byte=st.integers(1, 255))
    def write_much(self, data, byte):
        """More than small tiers have room for."""
        offset = data.draw(st.integers(0, self.length // 4))
        for begin, end in self.pieces(offset, self.length - offset):
            content = bytes([byte]) * (end - begin)
            self.change(lambda: self.disk.write(begin, content), lambda: self.model.write(begin, content), begin, end - begin)

    def pieces(self, offset, length):
        """Cluster by cluster where a snapshot may wait for room: of more at once some are preserved before there is none, and the model does not know which."""
        size = self.model.cluster_size
        if all(snapshot.on_full != "wait" for snapshot in self.model.live):
            return [(offset, offset + length)]
        return [(max(offset, c * size), min(offset + length, (c + 1) * size)) for c in range(offset // size, (offset + length - 1) // size + 1)]

    def change(self, ours, models, offset, length):
        """A write may give up snapshots, and meet the keeper, which carries discards out: of recorded clusters that it
        overwrites in part the other part is as before or zeroes, and marked or not."""
        live, size = len(self.model.live), self.model.recorded_size
        ends = {offset // size, (offset + length - 1) // size} & self.model.recorded if size else set()
        self.refused_alike(ours, models, offset, length)
        self.finish_discards()
        if len(self.model.live) < live:
            for cluster in ends:
                for begin, end in ((cluster * size, offset), (offset + length, min((cluster + 1) * size, self.length))):
                    if begin < end:
                        self.model.learn(begin, self.disk.read(begin, end - begin))
                for name, plain in self.model.bitmaps.items():
                    units = range(cluster * size // plain.granularity, (min((cluster + 1) * size, self.length) - 1) // plain.granularity + 1)
                    plain.marked |= set(units) & set(np.flatnonzero(self.engine.bitmaps.named[name].view().to_bools()).tolist())

    @precondition(lambda self: "direct" not in self.kind)     # there a discard of a part of a block leaves it as it is
    @rule(data=st.data())
    def discard(self, data):
        offset, length = self.span(data)
        self.disk.discard(offset, length)
        self.marked.append((offset, offset + length))
        for begin, end in self.model.discard(offset, length):
            self.model.learn(begin, self.disk.read(begin, end - begin))

    def finish_discards(self):
        """After whatever ends a snapshot, so that the model knows what is on the disk; the keeper is at the same work."""
        self.engine.finish_discards()
        self.model.finish_discards()

    # -- snapshots

    @precondition(lambda self: len(self.views) < 5)
    @rule(size=st.sampled_from([4096, 65536]), ram=ROOMS, log=ROOMS, on_full=st.sampled_from(["break-snapshot", "break-guest-write", "wait"]),
          on_cbw_error=st.sampled_from(["break-snapshot", "break-guest-write"]), data=st.data())
    def snapshot(self, size, ram, log, on_full, on_cbw_error, data):
        if not self.model.live:     # the keeper may still be ending what is broken; afterwards the size is free again
            wait_until(lambda: self.engine.cluster_size is None)
        size = self.model.cluster_size or size
        if ram == log == 0:
            ram = 1
        self.number += 1
        name = f"s{self.number}"
        options = {"cluster_size": size, "ram": ram * size, "on_full": on_full, "on_cbw_error": on_cbw_error}
        if log:
            options |= {"spill": self.folder.name, "spill_limit": 4096 + log * size}
        bitmaps = {}
        if self.model.bitmaps and data.draw(st.booleans()):
            bitmaps["bitmap"] = data.draw(st.sampled_from(sorted(self.model.bitmaps)))
        if len(self.model.bitmaps) < 4 and data.draw(st.booleans()):
            bitmaps |= {"new_bitmap": f"n{self.number}", "new_bitmap_granularity": data.draw(st.sampled_from([None, 512, 65536]))}
        self.views[name] = self.engine.snapshot(name, **options, **bitmaps)
        facts = self.engine.report(name)
        capacity = (facts["ram_limit"] + facts["disk_limit"]) // size
        assert ram <= capacity <= ram + log
        self.model.snapshot(name, cluster_size=size, capacity=capacity, on_full=on_full, on_cbw_error=on_cbw_error, **bitmaps)

    @precondition(lambda self: self.model.live)
    @rule(data=st.data(), ram=ROOMS, log_more=st.sampled_from([0, 1, 5]))
    def set_limits(self, data, ram, log_more):
        """RAM up and down, the disk tier up: what is in it above a smaller limit stays, and the model has no words for that."""
        plain = data.draw(st.sampled_from(self.model.live))
        facts = self.engine.report(plain.name)
        size = facts["cluster_size"]
        limits = {"ram": ram * size}
        if facts["disk_limit"]:
            limits["spill_limit"] = facts["disk_limit"] // size * (4096 + size) + log_more * (4096 + 20 * size)
        if ram == 0 and not facts["disk_limit"]:
            return
        with contextlib.suppress(LimitReached):         # a small log can't grow for ever; then nothing changes
            self.engine.set_limits(plain.name, **limits)
        wait_until(lambda: self.engine.flusher_idle)
        now = self.engine.report(plain.name)
        assert now["ram_limit"] in (ram * size, facts["ram_limit"]) and now["disk_limit"] >= facts["disk_limit"]
        plain.capacity = (now["ram_limit"] + now["disk_limit"]) // size

    # -- dirty bitmaps

    @precondition(lambda self: len(self.model.bitmaps) < 4)
    @rule(granularity=st.sampled_from([512, 4096, 32768, 1 << 20]), enabled=st.booleans())
    def add_bitmap(self, granularity, enabled):
        self.number += 1
        self.engine.bitmaps.add(f"b{self.number}", granularity=granularity, enabled=enabled)
        self.model.bitmaps[f"b{self.number}"] = PlainBitmap(granularity, enabled)

    @precondition(lambda self: self.model.bitmaps)
    @rule(data=st.data(), change=st.sampled_from(["remove", "clear", "enable", "disable", "merge", "hand over"]), success=st.booleans())
    def change_bitmap(self, data, change, success):
        name = data.draw(st.sampled_from(sorted(self.model.bitmaps)))
        bitmap, plain = self.engine.bitmaps.named[name], self.model.bitmaps[name]
        match change:
            case "remove":
                bitmap.remove()
                del self.model.bitmaps[name]
            case "clear":
                bitmap.clear()
                plain.marked.clear()
            case "enable" | "disable":
                getattr(bitmap, change)()
                plain.enabled = change == "enable"
            case "merge":
                source = data.draw(st.sampled_from(sorted(self.model.bitmaps)))
                bitmap.merge(source)
                self.model.merge(name, source)
            case "hand over" if self.model.live and len(self.views) < 5:
                self.engine.snapshot("job", bitmap=name, bitmap_for="a job", ram="4M")
                self.model.snapshot("job", cluster_size=self.model.cluster_size, capacity=1024, bitmap=name)
                if success:
                    plain.marked.clear()
                self.write(data, 7)
                self.engine.bitmaps.give_back(name, success)
                self.engine.delete("job")
                self.model.delete("job")

    @precondition(lambda self: self.views)
    @rule(data=st.data())
    def delete(self, data):
        name = data.draw(st.sampled_from(sorted(self.views)))
        view = self.views.pop(name)
        self.engine.delete(name)
        self.model.delete(name)
        self.finish_discards()
        with pytest.raises(ValueError, match="closed"):
            view.read(0, 1)

    @precondition(lambda self: self.model.live)
    @rule(data=st.data())
    def break_snapshot(self, data):
        name = data.draw(st.sampled_from([snapshot.name for snapshot in self.model.live]))
        self.engine.break_snapshot(name)
        self.model.break_snapshot(name)
        self.finish_discards()

    @precondition(lambda self: self.views)
    @rule(data=st.data())
    def read(self, data):
        name = data.draw(st.sampled_from(sorted(self.views)))
        offset, length = self.span(data)
        plain = self.model.snapshots[name]
        if plain.broken:
            with pytest.raises(SnapshotBroken, match=f"@{name}"):
                self.views[name].read(offset, length)
        else:
            if not self.in_copy(plain, offset, length):
                with pytest.raises(NotInSnapshot, match=f"@{name}"):
                    self.views[name].read(offset, length)
                return
            buffer = bytearray(length)
            assert self.views[name].readinto(offset, buffer) == length
            assert buffer == plain.read(offset, length)

    @precondition(lambda self: self.model.live)
    @rule(data=st.data(), taking=st.booleans())
    def discard_of_a_snapshot(self, data, taking):
        """Of whole clusters, by command or as they are read."""
        plain, size = data.draw(st.sampled_from(self.model.live)), self.model.cluster_size
        first = data.draw(st.integers(0, (self.length - 1) // size))
        count = data.draw(st.integers(1, 70))
        offset, length = first * size, min(count * size, self.length - first * size)
        view = self.views[plain.name]
        if not taking:
            view.discard(offset, length)
        elif self.in_copy(plain, offset, length):
            assert view.take(offset, length) == plain.read(offset, length)
        else:
            with pytest.raises(NotInSnapshot):
                view.take(offset, length)
            return
        self.model.discard_of(plain.name, range(first, first + count))
        self.finish_discards()

    @precondition(lambda self: self.model.live)
    @rule(data=st.data())
    def keep_and_drop(self, data):
        """What CACHE leaves in RAM serves the guest, and goes again; zeroes would stay, and cost the guest nothing later."""
        plain, size = data.draw(st.sampled_from(self.model.live)), self.model.cluster_size
        offset, length = self.span(data)
        clusters = range(offset // size, (offset + length - 1) // size + 1)
        # What is marked changed is not dropped from RAM again: a discard may be carried out, and what was refused counts as written.
        if any(begin < clusters.stop * size and end > clusters.start * size for begin, end in self.marked):
            return
        if not self.in_copy(plain, offset, length) or not all(any(plain.data[c * size : (c + 1) * size]) for c in clusters):
            return
        self.views[plain.name].cache(offset, length)
        assert self.views[plain.name].read(offset, length) == plain.read(offset, length)
        self.guest_reads_what_it_wrote()
        for snapshot in self.model.live:
            self.engine.drop(snapshot.name)
            assert self.engine.report(snapshot.name)["kept_clusters"] == 0

    @precondition(lambda self: self.model.live)
    @rule(data=st.data(), order=st.sampled_from(["sequential", "ram-first", "disk-last,zero-last", "hot-first,disk-early"]), workers=st.integers(1, 3),
          chunk=st.sampled_from([4096, 12288, 65536]), verify=st.booleans())
    def backup(self, data, order, workers, chunk, verify):
        snapshot = data.draw(st.sampled_from(self.model.live))
        target = MemoryDevice(self.length)
        target.write(0, b"\xee" * self.length)
        left = self.masked(snapshot, b"\xee")
        if snapshot.discarded or data.draw(st.integers(0, 3)) == 0:
            if snapshot.discarded:
                with pytest.raises(ValueError, match="discarded"):
                    BackupJob(self.views[snapshot.name], target)
            BackupJob(self.views[snapshot.name], target, order=order, workers=workers, in_flight=chunk * workers, consume=True).start().wait(60)
            assert target.read(0, self.length) == left
            self.model.discard_of(snapshot.name, range(-(-self.length // self.model.cluster_size)))
            self.finish_discards()
            return
        job = BackupJob(self.views[snapshot.name], target, order=order, workers=workers, in_flight=chunk * workers, verify=verify)
        job.start().wait(60)
        assert target.read(0, self.length) == left
        total = self.length * (2 if verify else 1)
        assert (job.progress["done"], job.progress["total"]) == (total, total)

    def in_copy(self, plain, offset, length):
        size = self.model.cluster_size
        return all(plain.has(cluster) for cluster in range(offset // size, (offset + length - 1) // size + 1))

    def masked(self, plain, filler):
        """The snapshot's data, FILLER where it has none."""
        size = self.model.cluster_size
        pieces = (plain.data[i : i + size] if plain.has(i // size) else filler * len(plain.data[i : i + size])
                  for i in range(0, self.length, size))
        return b"".join(pieces)

    # -- what must hold

    @invariant()
    def every_bitmap_marks_what_was_written_since_it_began(self):
        assert sorted(self.engine.bitmaps.named) == sorted(self.model.bitmaps)
        for name, plain in self.model.bitmaps.items():
            bitmap = self.engine.bitmaps.named[name]
            assert set(np.flatnonzero(bitmap.view().to_bools()).tolist()) == plain.marked
            assert (bitmap.granularity, bitmap.enabled) == (plain.granularity, plain.enabled)

    @invariant()
    def guest_reads_what_it_wrote(self):
        assert self.engine.counters()["lazy_bytes"] == len(self.model.recorded) * (self.model.cluster_size or 0)
        assert self.disk.read(0, self.length) == self.model.data

    @invariant()
    def every_snapshot_is_its_instant_or_broken(self):
        for name, plain in self.model.snapshots.items():
            facts = self.engine.report(name)
            assert (facts["state"] == "broken") == plain.broken, facts
            if plain.broken:
                assert facts["reason"] and facts["reason"] in str(self.views[name].broken)
                with pytest.raises(SnapshotBroken):
                    self.views[name].read(0, self.length)
            elif plain.copy is None:
                assert self.views[name].read(0, self.length) == plain.data
            else:
                for offset, length, flags in self.views[name].extents():
                    if flags != 4:
                        assert self.views[name].read(offset, length) == plain.data[offset : offset + length]

    @invariant()
    def the_accounts_agree(self):
        broken = [self.views[name] for name, plain in self.model.snapshots.items() if plain.broken]
        wait_until(lambda: all(view.retired for view in broken))        # the keeper frees what they kept, also in stores of others
        for plain in self.model.live:
            wait_until(lambda: self.engine.flusher_idle)
            facts = self.engine.report(plain.name)
            plain.dead = facts["disk_dead_bytes"] // facts["cluster_size"]
            assert facts["preserved_clusters"] == plain.preserved
            assert facts["zero_clusters"] == plain.preserved_zero
            assert facts["ram_bytes"] + facts["disk_bytes"] == self.model.held(plain) * facts["cluster_size"]
            assert facts["disk_bytes"] <= facts["disk_limit"]
            if facts["disk_bytes"] + facts["disk_dead_bytes"] < facts["disk_limit"]:        # the flusher has made room, or had no need to
                assert facts["ram_bytes"] <= facts["ram_limit"] * 3 // 4
            elif not facts["disk_limit"] and self.model.held(plain) <= plain.capacity:
                assert facts["ram_bytes"] <= facts["ram_limit"]

    @invariant()
    def extents_tell_the_truth(self):
        for plain in self.model.live:
            rows = self.views[plain.name].extents(0, self.length)
            assert rows["offset"][0] == 0 and rows["length"].sum() == self.length
            for offset, length, flags in rows:
                size = self.model.cluster_size
                assert all(plain.has(c) == (flags != 4) for c in range(offset // size, (offset + length - 1) // size + 1))
                if flags & 2:
                    assert not any(plain.data[offset : offset + length])

    def differences(self, data):
        """(offset, what is there, what the model has) of each sector that differs: pytest's own diff of it all would take minutes."""
        return [(i, data[i : i + 8].hex(), bytes(self.model.data[i : i + 8]).hex())
                for i in range(0, self.length, 512) if data[i : i + 512] != self.model.data[i : i + 512]]

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        for name in list(self.views):
            self.engine.delete(name)
        assert self.engine.cluster_size is None
        for name in list(self.model.snapshots):
            self.model.delete(name)
        self.finish_discards()
        # Nothing is left of any of them: a snapshot starts empty, and the disk is what it was.
        view = self.engine.snapshot("last", ram="4M")
        assert self.engine.report("last")["ram_bytes"] == 0
        assert self.differences(view.read(0, self.length)) == []
        self.disk.close()
        self.engine.close()
        self.child.close()
        self.folder.cleanup()


@pytest.mark.parametrize("kind", [*KINDS, "queue threads file", "queue uring direct"])
def test_engine_agrees_with_the_plain_model(kind):
    machine = type(f"Machine on {kind}", (EngineMachine,), {"kind": kind})
    run_state_machine_as_test(machine, settings=CONFIG)
