"""Two runs beside each other: what is apart, what is turned round, what has moved."""

import json

import pytest

from fastcbw.cli.main import main
from fastcbw.compare.output import agreement
from fastcbw.compare.results import FORM

REPETITIONS = (0.95, 1.0, 1.05)


def document(load="paced-4k", **medians):
    """A run in which each scheme's figure scatters by 5 % about its median, and not as that of none does."""
    cells = [{"scheme": scheme.replace("_", "-"), "load": load, "target": "file", "repetition": number, "status": "measured", "backup": None,
              "guest": {"during": {"p99_us": 1.0, "p99_paced_us": median * factor}}}
             for scheme, median in medians.items() for number, factor in enumerate(REPETITIONS[::-1] if scheme == "none" else REPETITIONS)]
    return {"form": FORM, "host": {}, "settings": {}, "cells": cells}


def test_runs_that_scatter_agree():
    said, same = agreement.lines(document(none=100, filter_tiers=150, notifier=90000), document(none=120, filter_tiers=185, notifier=104000))
    assert same and said[-1] == "in all: of 3 pairs of schemes 3 are apart in both runs, 0 of these in another order; of 2 ratios 0 are outside each other's spread"
    assert said[1].endswith("; p99 paced by none:")


def test_schemes_that_are_tied_are_in_no_order():
    said, same = agreement.lines(document(none=100, filter_ram=150, filter_tiers=156), document(none=100, filter_ram=157, filter_tiers=151))
    assert same and "of 3 pairs 2 are apart in both runs, all in the same order" in "\n".join(said)


def test_schemes_that_change_places_are_named():
    said, same = agreement.lines(document(none=100, filter_ram=150, filter_tiers=400), document(none=100, filter_ram=400, filter_tiers=150))
    assert not same
    assert "not in the same order: filter-ram and filter-tiers" in "\n".join(said)
    assert "of 2 ratios 2 are outside each other's spread" in said[-1]


def test_a_ratio_that_moves_is_told_though_the_order_is_the_same():
    said, same = agreement.lines(document(none=100, notifier=1000), document(none=100, notifier=3000))
    assert not same and [line for line in said if line.endswith("APART")] and "0 of these in another order" in said[-1]


def test_what_was_measured_once_is_not_judged():
    one = document(none=100, notifier=1000)
    one["cells"] = [cell for cell in one["cells"] if cell["repetition"] == 0]
    assert agreement.lines(one, one) == (["nothing to compare: no load and target with two repetitions of the same schemes in both runs"], False)


def test_loads_without_a_pace_are_compared_by_p99():
    said, _ = agreement.lines(document(load="random-4k", none=1, notifier=5), document(load="random-4k", none=1, notifier=9))
    assert said[1].endswith("; p99 by none:")


def test_the_command_compares_two_kept_runs(tmp_path, capsys):
    for name, median in (("a", 150), ("b", 152), ("c", 900)):
        (tmp_path / name).write_text(json.dumps(document(none=100, filter_tiers=median)))
    assert main(["compare", "--from", str(tmp_path / "a"), "--against", str(tmp_path / "b")]) == 0
    assert main(["compare", "--from", str(tmp_path / "a"), "--against", str(tmp_path / "c")]) == 1
    assert "APART" in capsys.readouterr().out
    assert main(["compare", "--against", str(tmp_path / "c")]) == 2
    assert "--against: names the second of two kept runs" in capsys.readouterr().err


@pytest.mark.parametrize(("count", "student"), [(2, 63.66), (3, 9.925)])
def test_the_spread_is_students(count, student):
    values = [1.0, 1.1] if count == 2 else [1.0, 1.1, 1.21]
    figure = agreement.figures({"a": values})["a"]
    assert figure.least < min(values) and figure.most > max(values)
    assert agreement.figures({"a": [1.0]}) == {}
