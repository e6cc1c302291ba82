"""Cells as they are measured: each backup is what it has to be, and what a cell leaves behind is nothing."""

import pytest

from fastcbw.compare import cell, steal
from fastcbw.compare.schemes import SCHEMES
from fastcbw.compare.schemes.base import Progress
from fastcbw.compare.schemes.overlay import Commit
from fastcbw.compare.targets import TARGETS


def measured(plan, folder):
    records = [cell.measure(one, plan, str(folder)) for one in plan.cells()]
    assert list(folder.iterdir()) == []
    return records


@pytest.mark.parametrize(("scheme", "load", "target"), [
    ("filter-tiers", "paced-4k", "file"), ("notifier", "generator-4k", "nbd"), ("pull", "generator-4k", "file"),
    ("store-target", "generator-4k", "nbd"), ("sync-none", "generator-4k", "nbd"), ("overlay", "generator-4k", "nbd"),
    ("qemu-direct", "paced-4k", "file"),
    ("qemu-fleecing-tuned", "generator-4k", "nbd"), ("qemu-overlay", "generator-4k", "file")])
def test_a_backup_under_load_is_the_disk_at_the_instant(plan, tmp_path, scheme, load, target):
    (record,) = measured(plan(scheme, loads=(load,), targets=(target,)), tmp_path)
    assert record["status"] == "measured", record["why"]
    backup = record["backup"]
    assert (backup["verified"], backup["error"], backup["done_bytes"]) == (True, None, 4 << 20), backup
    guest = record["guest"]
    assert guest["before"]["requests"] > 0 and guest["before"]["p99_us"] > 0 and guest["after"]["requests"] > 0
    assert record["use"]["written_bytes"] >= 4 << 20
    assert record["tiers"]["done"][-1] == 4 << 20


def test_a_guest_that_was_stopped_in_the_middle_of_a_request_is_stopped_anew(plan, tmp_path, monkeypatch):
    """QEMU 7.2 begins no backup while it has half of a request: it waits for the rest, which does not come from a guest that is stopped."""
    begin, begun = SCHEMES["filter-tiers"].begin, []

    def late(scheme):
        begun.append(scheme)
        if len(begun) <= late.times:
            raise TimeoutError("no reply within 20 seconds")
        begin(scheme)

    monkeypatch.setattr(SCHEMES["filter-tiers"], "begin", late)
    late.times = 2
    (record,) = measured(plan("filter-tiers"), tmp_path)
    assert (record["status"], record["attempts"], record["backup"]["verified"]) == ("measured", 3, True)
    begun.clear()
    late.times = 3
    (record,) = measured(plan("filter-tiers"), tmp_path)
    assert (record["status"], record["attempts"]) == ("failed", 3) and "while the guest was stopped: no reply within" in record["why"]


@pytest.fixture
def taking(monkeypatch):
    """taking(*shares) -> list that is emptied: the host takes these shares of the processors' time, one attempt after the other."""

    def taking(*shares):
        left = list(shares)
        monkeypatch.setattr(cell.Steal, "share", lambda steal, seconds: left.pop(0))
        return left

    return taking


@pytest.mark.parametrize(("shares", "kept"), [((0.01,), 0.01), ((0.3, 0.01), 0.01), ((0.2, 0.1, 0.3), 0.1)])
def test_a_cell_that_the_host_disturbed_is_measured_anew_and_the_quietest_is_kept(plan, tmp_path, taking, monkeypatch, shares, kept):
    monkeypatch.setattr(cell, "NOISY_MAX", 3)
    left = taking(*shares)
    (record,) = measured(plan("filter-tiers", steal_max=0.01), tmp_path)
    assert (record["status"], record["attempts"], record["steal"], left) == ("measured", len(shares), kept, [])


def test_a_disturbed_cell_is_kept_unless_it_is_asked_otherwise(plan, tmp_path, taking):
    left = taking(0.9)
    (record,) = measured(plan("filter-tiers"), tmp_path)
    assert (record["attempts"], record["steal"], left) == (1, 0.9, [])


def test_what_was_measured_in_a_disturbed_attempt_is_kept_when_the_next_one_fails(plan, tmp_path, taking, monkeypatch):
    taking(0.9)
    fill, filled = cell.fill, []

    def once(path, length):
        filled.append(path)
        if len(filled) > 1:
            raise OSError("the second disk")
        fill(path, length)

    monkeypatch.setattr(cell, "fill", once)
    (record,) = measured(plan("filter-tiers", steal_max=0.01), tmp_path)
    assert (record["status"], record["attempts"], record["steal"]) == ("measured", 2, 0.9)


def test_steal_is_the_share_of_the_named_processors(monkeypatch, tmp_path):
    def stat(*ticks):
        lines = ["cpu  1 2 3 4 5 6 7 999 0 0", *(f"cpu{cpu} 1 2 3 4 5 6 7 {tick} 0 0" for cpu, tick in enumerate(ticks)), "intr 1 2"]
        (tmp_path / "stat").write_text("\n".join(lines))

    whole = open
    monkeypatch.setattr(steal, "open", lambda path: whole({"/proc/stat": tmp_path / "stat"}[path]), raising=False)
    monkeypatch.setattr("os.sysconf", {"SC_CLK_TCK": 100}.__getitem__)
    stat(*[1000] * 11)
    taken = steal.Steal({1, 10})
    stat(1000, 1030, *[2000] * 8, 1010)
    assert taken.share(2.0) == 0.1


def test_fleecing_by_qemu_is_measured_and_compared(plan, tmp_path):
    """Whether QEMU's is right is its own matter: 7.2 sometimes reads what the guest wrote later (docs/comparison.md)."""
    (record,) = measured(plan("qemu-fleecing", targets=("nbd",)), tmp_path)
    assert record["status"] == "measured", record["why"]
    assert record["backup"]["verified"] in (True, False) and record["backup"]["done_bytes"] == 4 << 20
    assert record["use"]["disk_tier_bytes_max"] > 0


def test_a_commit_is_completed_once_however_long_it_says_that_it_is_ready():
    class Daemon:
        name, JOB = "a scheme", "backup"
        asked, states = [], ["running", "ready", "ready", "ready", "concluded"]

        @property
        def qmp(self):
            return self

        def execute(self, command, **arguments):
            self.asked.append(command)
            return [{"id": "commit", "status": self.states.pop(0)}] if command == "query-jobs" else {}

    daemon = Daemon()
    commit = Commit(daemon)
    ended = [commit.progress(lambda: Progress(7, 7, True, None)).ended for _ in range(5)]
    assert ended == [False] * 4 + [True] and daemon.asked.count("job-complete") == 1


def test_without_a_backup_the_load_runs_as_long_as_one_would_take(plan, tmp_path):
    (record,) = measured(plan("none"), tmp_path)
    assert record["status"] == "measured" and record["backup"] is None
    during = record["guest"]["during"]
    assert during["seconds"] > 0.9 * TARGETS["file"].seconds(4 << 20) > 0.8     # as long as a backup is expected to take, from the instant on
    assert during["requests"] > 10 and during["written_bytes"] == during["requests"] * 4096


def test_a_target_without_room_fails_the_backup_and_not_the_guest(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(TARGETS["full"], "options", {"full_after_bytes": 1 << 20})
    (record,) = measured(plan("filter-tiers", targets=("full",)), tmp_path)
    assert "No space left" in record["backup"]["error"] and record["backup"]["verified"] is None
    assert record["guest"]["after"]["requests"] > 0


def test_a_backup_that_is_not_the_instant_is_found_out(plan, tmp_path, monkeypatch):
    whole = cell.first_difference

    def spoiled(path, other):
        with open(other, "r+b") as file:
            file.seek(70001)
            byte = file.read(1)
            file.seek(70001)
            file.write(bytes([byte[0] ^ 1]))
        return whole(path, other)

    monkeypatch.setattr(cell, "first_difference", spoiled)
    (record,) = measured(plan("filter-tiers"), tmp_path)
    assert record["backup"]["verified"] is False and "first at byte 70001" in record["backup"]["error"]


def test_what_is_not_installed_is_said_and_nothing_runs(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    records = measured(plan("none", "qemu-fleecing", loads=("paced-4k", "generator-4k"), targets=("nbdkit-20mbs",)), tmp_path)
    assert {record["status"] for record in records} == {"not installed"}
    assert {record["why"].split(" (")[0] for record in records} == {
        f"not installed: {program}" for program in ("fio", "qemu-storage-daemon", "nbdkit")}
