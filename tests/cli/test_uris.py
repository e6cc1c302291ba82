"""NBD URIs on the command line: as source, as target, as a served disk, here and in a daemon."""

import json

import pytest

from fastcbw.block.file import FileDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.export.nbd.client import Client
from fastcbw.export.nbd.server import Server

LENGTH = 4 << 20


@pytest.fixture
def far(tmp_path, image):
    """A server of another house: the image as `disk`, room for a copy of it as `copy`. far.copy is that room."""
    with Server(tmp_path / "far.sock") as server, FileDevice(image, lock=False) as disk, MemoryDevice(LENGTH) as copy:
        server.add_export("disk", disk)
        server.add_export("copy", copy)
        server.copy = copy
        yield server


def test_a_uri_is_backed_up_to_a_file(run, far, image, tmp_path):
    done = run("backup", "nbd+unix:///disk?socket=far.sock", "out.img", "--verify")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out.img").read_bytes() == image.read_bytes()


def test_an_image_is_backed_up_to_a_uri(run, far, image):
    done = run("backup", "vm.img", "nbd+unix:///copy?socket=far.sock", "--verify", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout.splitlines()[-1]) == {"event": "end", "status": "completed", "error": None}
    assert far.copy.read(0, LENGTH) == image.read_bytes()


def test_a_uri_is_backed_up_to_a_uri_but_not_to_itself(run, far, image):
    disk, copy = (f"nbd+unix:///{name}?socket=far.sock" for name in ("disk", "copy"))
    assert run("backup", disk, copy).returncode == 0
    assert far.copy.read(0, LENGTH) == image.read_bytes()
    done = run("backup", disk, disk)
    assert done.returncode in (1, 2) and "is the source itself" in done.stderr


def test_a_disk_behind_a_uri_is_served_with_a_snapshot(serve, far, image, tmp_path):
    served = serve("nbd+unix:///disk?socket=far.sock", "--socket", "nbd", "--snapshot", "s")
    assert served.lines == [f"nbd+unix:///{name}?socket={tmp_path}/nbd" for name in ("disk", "disk@s")]
    before = image.read_bytes()
    with Client(tmp_path / "nbd", "disk") as guest, Client(tmp_path / "nbd", "disk@s") as snapshot:
        guest.write(0, b"\x44" * 100000)
        assert snapshot.read(0, LENGTH) == before
        guest.flush()
    assert image.read_bytes() == b"\x44" * 100000 + before[100000:]


def test_a_served_disk_behind_a_uri_takes_a_name(serve, far, tmp_path):
    assert serve("vm=nbd+unix:///disk?socket=far.sock", "--socket", "nbd").lines == [f"nbd+unix:///vm?socket={tmp_path}/nbd"]


def test_a_daemon_pushes_to_a_uri_named_from_the_folder_of_the_command(served, run, far, image):
    done = run("backup", "vm", "nbd+unix:///copy?socket=far.sock", "--verify", "--qmp", "nbd.qmp")
    assert (done.returncode, done.stderr) == (0, "")
    assert far.copy.read(0, LENGTH) == image.read_bytes()


def test_a_daemon_does_not_push_to_what_it_serves_itself(served, run, image):
    before = image.read_bytes()
    done = run("backup", "vm", served.lines[0], "--qmp", "nbd.qmp")
    assert done.returncode == 1 and "is served by this daemon" in done.stderr
    assert image.read_bytes() == before


def test_a_server_that_is_not_there_is_named_in_one_line(run, image):
    for arguments in (("backup", "nbd+unix:///x?socket=gone.sock", "o"), ("backup", "vm.img", "nbd+unix:///x?socket=gone.sock"),
                      ("serve", "nbd+unix:///x?socket=gone.sock", "--socket", "s")):
        done = run(*arguments)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1 and "nbd+unix:///x?socket=gone.sock: cannot connect: No such file" in done.stderr
