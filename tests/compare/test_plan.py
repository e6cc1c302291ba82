"""What a run consists of, how long it is said to take, and what becomes of a cell that takes too long."""

import os
import time

import pytest

from fastcbw.compare import cell, plan as plans, run as runs
from fastcbw.compare.loads import LOADS
from fastcbw.compare.schemes import SCHEMES
from fastcbw.compare.targets import TARGETS


def full(**options):
    return plans.Plan(**plans.full(**{"trace": False} | options), pinned=True)


def test_schemes_take_turns():
    order = plans.Plan((plans.Part(("a", "b", "c"), ("l",), ("t",), 2),), 1, 1, 0, 0, 0, 0, 0, 0, False)
    assert [(one.scheme, one.repetition) for one in order.cells()] == [("a", 0), ("b", 0), ("c", 0), ("b", 1), ("c", 1), ("a", 1)]


def test_a_cell_of_two_parts_is_measured_as_often_as_the_larger_has_it_and_beside_the_others():
    parts = (plans.Part(("a", "b"), ("l",), ("t",), 2), plans.Part(("c", "a"), ("l",), ("t", "u"), 1))
    order = plans.Plan(parts, 1, 1, 0, 0, 0, 0, 0, 0, False)
    assert [(one.target, one.scheme, one.repetition) for one in order.cells()] == [
        ("t", "a", 0), ("t", "b", 0), ("t", "c", 0), ("u", "c", 0), ("u", "a", 0), ("t", "b", 1), ("t", "a", 1)]


def test_a_full_run_has_every_scheme_load_and_target_and_no_backup_beside_each():
    cells = list(full().cells())
    assert len({one.name for one in cells}) == len(cells)
    assert ({one.scheme for one in cells}, {one.load for one in cells}, {one.target for one in cells}) == (
        set(SCHEMES), set(LOADS) - {"trace"}, set(TARGETS))
    bases = {(one.load, one.target, one.repetition) for one in cells if one.scheme == "none"}
    assert {(one.load, one.target, one.repetition) for one in cells} == bases
    assert "trace" in {one.load for one in full(trace=True).cells()}
    assert len(list(full(cross=True).cells())) == 3 * len(SCHEMES) * (len(LOADS) - 1) * len(TARGETS)


def test_no_backup_is_measured_for_as_long_as_a_backup_takes():
    whole = full()
    lasts = {(scheme, target): whole.during_s(plans.Cell(scheme, "paced-4k", target, 0)) for scheme in ("none", "filter-tiers") for target in TARGETS}
    assert {lasts["filter-tiers", target] for target in TARGETS} == {whole.during_s_min}
    assert lasts["none", "20mbs"] == TARGETS["20mbs"].seconds(whole.length) > 5 and lasts["none", "file"] == whole.during_s_min
    assert max(lasts.values()) <= whole.during_s_max


def test_a_full_run_takes_about_half_an_hour():
    whole = full()
    assert 20 * 60 < sum(map(whole.seconds, whole.cells())) < 38 * 60


def test_parts_are_narrowed_to_what_is_named():
    parts = plans.full(False)["parts"]
    narrowed = plans.Plan(plans.narrowed(parts, ("none", "pull"), None, ("50ms", "nbd"), 1), 1, 1, 0, 0, 0, 0, 0, 0, False)
    assert {one.name for one in narrowed.cells()} == {"none@paced-4k@50ms@0", "pull@paced-4k@50ms@0", "none@paced-4k@nbd@0"}
    assert plans.narrowed((plans.Part(("a",), ("l",), ("t",), 1),), ("x", "a"), None, ("u",), None) == (plans.Part(("x", "a"), ("l",), ("u",), 1),)


def test_how_long_it_takes_is_said_before_and_meanwhile(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "measure", lambda one, plan, folder: {"status": "failed", "why": "a test"})
    said = []
    small = plan("none", "filter-tiers", loads=("generator-4k",))
    runs.run(small, str(tmp_path / "kept"), str(tmp_path), said.append)
    assert said[0] == f"2 of 2 cells to measure, about {sum(map(small.seconds, small.cells())):.0f} s" and said[0] != "2 of 2 cells to measure, about 0 s"
    assert said[1].startswith("[1/2] none, generator-4k, file: FAILED: a test (") and said[2].endswith("(0 s left)")


def test_a_cell_that_takes_too_long_is_given_up_and_says_where_everybody_was(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "GRACE_S", -15.7)        # of 20.7 s
    monkeypatch.setattr(cell, "SILENCE_S", 1000.0)
    (one,) = plan("filter-tiers", targets=("nbd",)).cells()
    began = time.monotonic()
    record = cell.measure(one, plan("filter-tiers"), str(tmp_path))
    assert record["status"] == "failed" and record["why"].startswith("given up after 5 s: harness: ") and "_wait_for_silence" in record["why"]
    where = "\n".join(record["where"])
    assert "filter-tiers: thread " in where and "nbd-disk" in where and "Current thread" in where and "target: thread " in where
    assert list(tmp_path.iterdir()) == [] and time.monotonic() - began < 60


def test_whatever_goes_wrong_in_a_cell_is_in_its_record(plan, tmp_path, monkeypatch):
    def broken(path, length):
        raise KeyError("odd")

    monkeypatch.setattr(cell, "fill", broken)
    (one,) = plan("none").cells()
    record = cell.measure(one, plan("none"), str(tmp_path))
    assert (record["status"], record["why"]) == ("failed", "KeyError: 'odd'") and "broken" in "".join(record["where"])


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_has_a_duration(target):
    assert 0 < TARGETS[target].seconds(96 << 20) < 12
    assert os.path.basename(TARGETS[target].name) == target
