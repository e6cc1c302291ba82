"""Live editing where other bytes would come to be under something that keeps some of those that were there."""

import pytest
from test_live import LENGTH, act, execute, to, vm  # noqa: F401 - fixtures

from fastcbw.errors import Error
from fastcbw.export.nbd.client import Client

CACHE = {"driver": "x-fastcbw-cache", "node_name": "cache", "size": 1 << 20}
THROTTLE = {"driver": "throttle", "node_name": "slow", "limits": {}}


@pytest.fixture
def other(execute, tmp_path):  # noqa: F811
    """A node `other` over another file of the same length."""
    (tmp_path / "other.img").write_bytes(b"o" * LENGTH)
    execute("blockdev-add", driver="raw", node_name="other", file={"driver": "file", "filename": str(tmp_path / "other.img")})
    return tmp_path / "other.img"


@pytest.mark.parametrize("place", ["cache", "slow"])
def test_other_bytes_do_not_come_under_a_cache_that_has_some_of_those_before(daemon, vm, other, execute, tmp_path, place):  # noqa: F811
    """It would show a mixture of two images, and write to the second what was written to the first."""
    execute("blockdev-add", **THROTTLE, file="disk")
    execute("transaction", actions=[act("blockdev-add", **CACHE, file="slow"), to("cache")])
    with Client(tmp_path / "nbd", "vm") as guest:
        guest.write(0, b"data" * 1024)
        before = execute("fastcbw-graph")
        with pytest.raises(Error, match="node 'other': shows other bytes than node '(slow|disk)', and node 'cache' has some of them in RAM"):
            execute("fastcbw-replace", parent=place, child="file", node="other")
        assert execute("fastcbw-graph") == before
        execute("fastcbw-replace", parent="cache", child="file", node="disk")       # the same bytes: that goes
        guest.flush()
    assert vm.read_bytes()[:4096] == b"data" * 1024 and other.read_bytes() == b"o" * LENGTH


@pytest.mark.parametrize("what, words", [("snapshot", "has the snapshot cbw of them"), ("bitmap", "has the bitmap b of what has changed in them")])
def test_other_bytes_do_not_come_under_a_disk_with_a_snapshot_or_a_bitmap(daemon, vm, other, execute, tmp_path, what, words):  # noqa: F811
    """The snapshot would show the other image where nothing was preserved; the bitmap knows of no difference."""
    execute("transaction", actions=[act("blockdev-add", **THROTTLE, file="disk"), to("slow")])
    if what == "snapshot":
        execute("transaction", actions=[
            act("blockdev-add", driver="copy-before-write", node_name="cbw", file="slow", target={"driver": "x-fastcbw-memory", "size": LENGTH}),
            to("cbw"), act("blockdev-add", driver="snapshot-access", node_name="snap", file="cbw")])
    else:
        execute("block-dirty-bitmap-add", node="slow", name="b")
    with pytest.raises(Error, match=f"node 'slow' {words}"):
        execute("fastcbw-replace", parent="slow", child="file", node="other")
    if what == "snapshot":
        execute("transaction", actions=[to("slow"), act("blockdev-del", node_name="snap"), act("blockdev-del", node_name="cbw")])
    else:
        execute("block-dirty-bitmap-remove", node="slow", name="b")
    execute("fastcbw-replace", parent="slow", child="file", node="other")
    with Client(tmp_path / "nbd", "vm") as guest:
        assert guest.read(0, 4096) == b"o" * 4096
