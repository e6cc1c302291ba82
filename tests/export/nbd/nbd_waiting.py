"""Waiting for a state that no event announces."""

import threading


def wait_for(condition, seconds=20.0):
    """Return when CONDITION() is true; fail when it is not after SECONDS. Polls a state that no event announces."""
    pause = threading.Event()
    for _ in range(int(seconds / 0.005)):
        if condition():
            return
        pause.wait(0.005)
    raise AssertionError("the condition has not come true")
