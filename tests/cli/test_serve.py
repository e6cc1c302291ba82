"""`fastcbw serve`: what it prints, what it serves, how it ends."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
from cli_process import clean_environment

from fastcbw.cli.serve import split_image
from fastcbw.export.nbd.client import Client


@pytest.mark.parametrize("text, name, path", [
    ("vm.img", None, "vm.img"), ("a=vm.img", "a", "vm.img"), ("a.b-c_1=d=e.img", "a.b-c_1", "d=e.img"),
    ("/x/a=b.img", None, "/x/a=b.img"), ("a b=c.img", None, "a b=c.img"), ("./a=b", None, "./a=b")])
def test_a_name_is_recognised_only_where_it_can_be_one(text, name, path):
    assert split_image(text) == (name, path)


def test_it_prints_a_uri_for_each_export_and_then_ready(serve, image, tmp_path):
    shutil.copy(image, tmp_path / "b.img")
    served = serve(image, "--socket", "nbd", "other=b.img", "--snapshot", "s", "--ram", "1M")
    assert served.lines == [f"nbd+unix:///{name}?socket={tmp_path}/nbd" for name in ("vm", "vm@s", "other", "other@s")]
    for uri in served.lines:
        described = json.loads(subprocess.run(["nbdinfo", "--json", uri], check=True, capture_output=True).stdout)
        assert described["exports"][0]["export-size"] == 4 << 20
        assert described["exports"][0]["is_read_only"] == ("@" in uri)


def test_a_socket_path_with_odd_characters_is_encoded_in_the_uri(serve, image, tmp_path):
    uri = serve(image, "--socket", "a b&c%").lines[0]
    assert uri == f"nbd+unix:///vm?socket={tmp_path}/a%20b%26c%25"
    assert subprocess.run(["nbdinfo", "--size", uri], check=True, capture_output=True).stdout == b"4194304\n"


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_it_cleanly_and_its_sockets_are_gone(served, tmp_path, number, status):
    with Client(tmp_path / "nbd", "vm") as guest:
        guest.write(0, b"x" * 4096)
        assert served.end(number) == (status, "")
    assert sorted(os.listdir(tmp_path)) == ["vm.img"]
    assert (tmp_path / "vm.img").read_bytes()[:4096] == b"x" * 4096


def test_quit_over_qmp_ends_it_with_success(served, tmp_path):
    with socket.socket(socket.AF_UNIX) as qmp:
        qmp.connect(str(tmp_path / "nbd.qmp"))
        qmp.sendall(b'{"execute":"qmp_capabilities"}{"execute":"quit"}')
        assert served.wait() == (0, "")
        assert qmp.makefile().read().count('"return"') == 2


def test_the_sockets_of_a_killed_daemon_are_replaced(serve, served, image, tmp_path):
    served.end(signal.SIGKILL)
    assert (tmp_path / "nbd").exists() and (tmp_path / "nbd.qmp").exists()
    serve(image, "--socket", "nbd")
    with Client(tmp_path / "nbd", "vm") as guest:
        assert guest.length == 4 << 20


def test_with_qmp_no_image_is_needed(serve, run, tmp_path):
    assert serve("--socket", "nbd", "--qmp", "q").lines == []
    status = json.loads(run("status", "--json", "--qmp", "q").stdout)
    assert status["disks"] == {} and status["nbd"]["exports"] == []


def test_a_passed_socket_is_used_and_stdout_stays_the_starters(image, tmp_path):
    command = ["nbdcopy", "--", "[", sys.executable, "-m", "fastcbw", "serve", str(image), "]", "-"]
    done = subprocess.run(command, check=True, capture_output=True, timeout=60, cwd=tmp_path, env=clean_environment())
    assert done.stdout == image.read_bytes()
    assert done.stderr.endswith(b"ready\n")
    assert os.listdir(tmp_path) == ["vm.img"]


def test_the_image_is_locked_for_qemu_and_free_afterwards(served, image):
    probe = ["qemu-io", "-f", "raw", "-c", "write 0 4k", str(image)]
    refused = subprocess.run(probe, capture_output=True, text=True)
    assert refused.returncode != 0 and "lock" in refused.stderr
    served.end(signal.SIGTERM)
    subprocess.run(probe, check=True, capture_output=True)


@pytest.mark.parametrize("mode", ["off", "20", "adaptive"])
def test_it_serves_with_every_kind_of_polling(serve, image, tmp_path, mode):
    serve(image, "--socket", "nbd", "--spin", mode)
    with Client(tmp_path / "nbd", "vm") as guest:
        guest.write(512, b"x" * 512)
        assert guest.read(512, 512) == b"x" * 512


def test_direct_serves_past_the_page_cache(serve, image, tmp_path):
    served = serve(image, "--socket", "nbd", "--direct", "--snapshot", "s")
    with Client(tmp_path / "nbd", "vm") as guest, Client(tmp_path / "nbd", "vm@s") as snapshot:
        before = guest.read(100, 5000)
        guest.write(100, b"x" * 5000)       # a head, a body, a tail
        assert guest.read(100, 5000) == b"x" * 5000 and snapshot.read(100, 5000) == before
    flags = [int(line.split()[1], 8) for fd in os.listdir(f"/proc/{served.process.pid}/fd")
             if os.path.realpath(f"/proc/{served.process.pid}/fd/{fd}") == str(image)
             for line in open(f"/proc/{served.process.pid}/fdinfo/{fd}") if line.startswith("flags:")]
    assert any(flag & os.O_DIRECT for flag in flags)


@pytest.mark.parametrize("engine", ["sync", "threads", "uring"])
@pytest.mark.parametrize("direct", [[], ["--direct"]])
def test_it_serves_with_every_engine(serve, image, tmp_path, engine, direct):
    before = image.read_bytes()
    serve(image, "--socket", "nbd", "--io", engine, "--snapshot", "s", *direct)
    with Client(tmp_path / "nbd", "vm") as guest, Client(tmp_path / "nbd", "vm@s") as snapshot:
        guest.write(4096, b"x" * 300_000, fua=True)
        assert guest.read(4095, 300_002) == before[4095:4096] + b"x" * 300_000 + before[304_096:304_097]
        assert snapshot.read(0, len(before)) == before
