"""snapshot, backup and status, against a running daemon and without one."""

import json
import os
import signal
import subprocess

import pytest
from cli_process import COMMAND, clean_environment, lines

from fastcbw.export.nbd.client import Client


def test_a_snapshot_is_created_listed_backed_up_and_deleted(served, run, image, tmp_path):
    before = image.read_bytes()
    qmp = {"FASTCBW_QMP": "nbd.qmp"}
    assert run("snapshot", "create", "--name", "s", "--ram", "4M", "vm", **qmp).stdout == f"nbd+unix:///vm@s?socket={tmp_path}/nbd\n"
    with Client(tmp_path / "nbd", "vm") as guest:
        guest.write(4096, b"n" * 8192)
    (listed,) = json.loads(run("snapshot", "list", "--json", **qmp).stdout)
    assert (listed["disk"], listed["name"], listed["status"]["preserved_bytes"]) == ("vm", "s", 8192)
    assert run("backup", "vm@s", "out.img", "--qmp", "nbd.qmp", "--verify").returncode == 0
    assert (tmp_path / "out.img").read_bytes() == before
    assert run("snapshot", "delete", "--name", "s", "vm", **qmp).returncode == 0
    assert run("snapshot", "list", **qmp).stdout == "DISK  SNAPSHOT  LENGTH  STATE\n"


def test_limits_and_policies_of_a_snapshot_are_changed_while_it_lives(served, run, tmp_path):
    qmp = {"FASTCBW_QMP": "nbd.qmp"}
    run("snapshot", "create", "--name", "s", "--ram", "8K", "--on-full", "break-guest-write", "vm", **qmp)
    with Client(tmp_path / "nbd", "vm") as guest:
        with pytest.raises(OSError, match="both tiers at their limits"):
            guest.write(0, b"n" * 12288)
        (changed,) = json.loads(run("snapshot", "set", "--name", "s", "--ram", "1M", "--on-full", "break-snapshot", "vm", "--json", **qmp).stdout)
        assert (changed["status"]["ram_limit"], changed["status"]["on_full"], changed["status"]["refused_writes"]) == (1 << 20, "break-snapshot", 1)
        guest.write(0, b"n" * 12288)
    assert "1 guest writes failed for its sake" in run("status", **qmp).stdout
    assert "1M" in run("snapshot", "set", "--name", "s", "--ram", "1M", "vm", **qmp).stdout
    done = run("snapshot", "set", "--name", "s", "--spill-limit", "1M", "vm", **qmp)
    assert (done.returncode, "has no disk tier" in done.stderr) == (1, True)


def test_what_reads_left_in_ram_is_dropped_by_command(served, run, tmp_path):
    qmp = {"FASTCBW_QMP": "nbd.qmp"}
    run("snapshot", "create", "--name", "s", "--ram", "4M", "--copy-on-read", "--cluster-size", "4K", "vm", **qmp)
    with Client(tmp_path / "nbd", "vm") as guest, Client(tmp_path / "nbd", "vm@s") as reader:
        guest.write(0, b"o" * 8192)
        reader.read(0, 65536)
        (status,) = json.loads(run("snapshot", "list", "--json", **qmp).stdout)
        kept = status["status"]["kept_bytes"]
        assert json.loads(run("snapshot", "drop", "--name", "s", "--json", "vm", **qmp).stdout) == [{"disk": "vm", "dropped": kept}]
    assert run("snapshot", "drop", "--name", "s", "vm", **qmp).stdout == "vm@s: 0B dropped\n"
    done = run("snapshot", "drop", "--name", "t", "vm", **qmp)
    assert (done.returncode, "vm@t" in done.stderr) == (1, True)


def test_a_backup_of_a_disk_of_a_daemon_leaves_no_snapshot_behind(served, run, image, tmp_path):
    assert run("backup", "vm", "out.img", FASTCBW_QMP="nbd.qmp").returncode == 0
    assert (tmp_path / "out.img").read_bytes() == image.read_bytes()
    status = json.loads(run("status", "--json", "--qmp", "nbd.qmp").stdout)
    assert status["disks"]["vm"]["snapshots"] == {} and status["jobs"] == []


def test_a_backup_of_an_image_is_the_image_and_sparse_where_it_is(run, image, tmp_path):
    done = run("backup", image, "out.img", "--order", "sequential", "--workers", "2", "--in-flight", "1M")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out.img").read_bytes() == image.read_bytes()
    assert os.stat(tmp_path / "out.img").st_blocks * 512 < 2 << 20


def test_json_lines_of_a_backup_end_with_the_end(served, run, tmp_path):
    *progress, end = lines(run("backup", "vm", "out.img", "--json", "--qmp", "nbd.qmp").stdout)
    assert end == {"event": "end", "status": "completed", "error": None}
    assert progress[-1]["done"] == progress[-1]["total"] == 4 << 20
    assert all(set(line) == {"event", "job", "done", "total", "bytes_per_s"} for line in progress)


def test_ctrl_c_cancels_a_backup_and_removes_the_target(tmp_path):
    with open(tmp_path / "big.img", "wb") as file:
        for _ in range(512):
            file.write(os.urandom(1 << 20))
    process = subprocess.Popen([*COMMAND, "backup", "big.img", "out.img", "--json", "--workers", "1", "--in-flight", "4K"],
                               cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment())
    assert json.loads(process.stdout.readline())["event"] == "progress"
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert json.loads(out.splitlines()[-1])["status"] == "cancelled"
    assert errors.count("\n") == 1
    assert os.listdir(tmp_path) == ["big.img"]


def test_ctrl_c_cancels_the_job_of_a_daemon(serve, run, tmp_path):
    with open(tmp_path / "big.img", "wb") as file:
        for _ in range(512):
            file.write(os.urandom(1 << 20))
    serve("big.img", "--socket", "nbd")
    process = subprocess.Popen([*COMMAND, "backup", "big", "out.img", "--json", "--workers", "1", "--in-flight", "4K", "--qmp", "nbd.qmp"],
                               cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment())
    assert json.loads(process.stdout.readline())["event"] == "progress"
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert json.loads(out.splitlines()[-1])["status"] == "cancelled"
    assert process.returncode == 130 and errors.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["big.img", "nbd", "nbd.qmp"]
    status = json.loads(run("status", "--json", "--qmp", "nbd.qmp").stdout)
    assert status["jobs"] == [] and status["disks"]["big"]["snapshots"] == {}


def test_status_is_told_to_people_too(served, run, tmp_path):
    run("snapshot", "create", "--name", "s", "--qmp", "nbd.qmp", "vm")
    told = run("status", "--qmp", "nbd.qmp").stdout
    assert f"nbd+unix:///vm@s?socket={tmp_path}/nbd" in told and "live" in told


@pytest.mark.parametrize("arguments", [(), ("serve",), ("snapshot",), ("snapshot", "create"), ("backup",), ("status",), ("demo",)])
def test_every_command_has_help(run, arguments):
    done = run(*arguments, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: fastcbw") and done.stderr == ""


def test_output_that_nobody_reads_ends_without_a_traceback(tmp_path):
    done = subprocess.run(f"{COMMAND[0]} -m fastcbw --help | true", shell=True, capture_output=True, text=True, cwd=tmp_path,
                          env=clean_environment())
    assert done.stderr == ""
