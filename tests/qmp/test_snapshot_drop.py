"""Dropping what reads left in RAM, over QMP."""

import re

import pytest

from fastcbw.errors import Error

K = 65536


def test_drop_frees_what_is_unchanged_and_says_how_much(daemon, remote):
    daemon.disks["a"].write(0, b"x" * 8 * K)
    (snapshot,) = daemon.create_snapshot("s", ["a"], ram="1M", cluster_size="64K", copy_on_read=True)
    snapshot.cache(0, 4 * K)
    assert remote.snapshots()[0]["status"]["kept_bytes"] == 4 * K
    daemon.disks["a"].write(0, b"n")
    assert remote.disks["a"].snapshots["s"].drop() == 3 * K
    assert remote.client.execute("fastcbw-snapshot-drop", name="s", disks=["a"]) == [{"disk": "a", "dropped": 0}]
    assert snapshot.read(0, 4 * K) == b"x" * 4 * K
    with pytest.raises(ValueError):
        snapshot.cache(0, 1 << 30)


@pytest.mark.parametrize("arguments, words", [
    ({"name": "t", "disks": ["a"]}, "a@t"),
    ({"name": "s", "disks": ["x"]}, "'x'"),
    ({"name": "s"}, "'disks' is missing"),
    ({"name": "s", "disks": ["a"], "offset": 0}, "'offset'"),
])
def test_drop_refuses_what_does_not_exist_by_name(daemon, remote, arguments, words):
    daemon.create_snapshot("s", ["a"], ram="1M")
    with pytest.raises(Error, match=re.escape(words)):
        remote.client.execute("fastcbw-snapshot-drop", **arguments)
