"""Fixtures of the jobs' tests."""

from leaks import nothing_left_behind  # noqa: F401 - autouse
