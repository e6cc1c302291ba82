"""`fastcbw bitmap`, `snapshot create --bitmap`, `backup --bitmap`: a full backup and increments of a served disk, by commands alone."""

from cli_process import lines

from fastcbw.export.nbd.client import Client

QMP = ("--qmp", "nbd.qmp")


def test_full_and_increments_by_commands(served, run, image, tmp_path):
    def ok(*arguments):
        done = run(*arguments, *QMP)
        assert done.returncode == 0, done.stderr
        return done.stdout

    ok("snapshot", "create", "vm", "--name", "monday", "--new-bitmap", "changes", "--new-bitmap-granularity", "4K")
    ok("backup", "vm@monday", "backup.img")
    ok("snapshot", "delete", "vm", "--name", "monday")
    with Client(str(tmp_path / "nbd"), "vm") as client:
        client.write(1 << 20, b"tuesday" * 1000)
    (row,) = lines(ok("bitmap", "list", "vm", "--json"))[0]
    assert row == {"disk": "vm", "name": "changes", "granularity": 4096, "count": 8192, "recording": True, "busy": False, "persistent": False}
    ok("backup", "vm", "backup.img", "--bitmap", "changes", "--force", "--verify")
    assert (tmp_path / "backup.img").read_bytes() == image.read_bytes()
    assert lines(ok("bitmap", "list", "--json"))[0][0]["count"] == 0
    refused = run("backup", "vm", "backup.img", "--bitmap", "changes", *QMP)
    assert refused.returncode == 1 and "--force" in refused.stderr


def test_bitmaps_by_the_verb(served, run):
    def ok(*arguments):
        done = run("bitmap", *arguments, *QMP)
        assert done.returncode == 0, done.stderr
        return done.stdout

    ok("add", "vm", "a", "--granularity", "512")
    ok("add", "vm", "b", "--disabled")
    ok("merge", "vm", "b", "a")
    ok("disable", "vm", "a")
    (shown,) = lines(ok("clear", "vm", "a", "--json"))
    assert shown == [{"name": "a", "granularity": 512, "count": 0, "recording": False, "busy": False, "persistent": False}]
    table = ok("list").splitlines()
    assert [row.split()[:2] for row in table] == [["DISK", "BITMAP"], ["vm", "a"], ["vm", "b"]]
    assert table[1].endswith("disabled") and table[2].endswith("disabled")
    ok("remove", "vm", "a")
    for arguments, status, text in (
        (("add", "vm", "b"), 1, "'b': exists already"),
        (("list", "nowhere"), 1, "'nowhere': not found"),
        (("add", "vm", "x", "--granularity", "1000"), 2, "no power of two"),
    ):
        done = run("bitmap", *arguments, *QMP)
        assert (done.returncode, text in done.stderr) == (status, True), done.stderr
