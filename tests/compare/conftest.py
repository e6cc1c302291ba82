"""Fixtures: a small plan, and a folder to measure in."""

import pytest

from fastcbw.compare.plan import Part, Plan

LENGTH = 4 << 20


@pytest.fixture
def plan():
    """plan(*schemes, loads, targets, repetitions, other fields) -> Plan: a disk of 4 MiB, a load of a few tenths of a second."""

    def plan(*schemes, loads=("generator-4k",), targets=("file",), repetitions=1, **fields):
        common = {"length": LENGTH, "ram": 1 << 20, "warm_up_s": 0.4, "before_s": 0.2, "during_s_min": 0.3, "during_s_max": 5.0, "after_s": 0.1,
                  "backup_s_max": 20.0, "pinned": False}
        return Plan((Part(schemes, loads, targets, repetitions),), **common | fields)

    return plan
