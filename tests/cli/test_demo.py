"""`fastcbw demo` itself, small; and what it leaves behind."""

import json
import os
import signal
import subprocess

from cli_process import COMMAND, clean_environment


def test_it_verifies_a_backup_made_under_load_and_leaves_nothing(run, tmp_path):
    done = run("demo", "--size", "128M", "--seconds", "3", "--json", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["verified"] is True and report["problem"] is None
    assert report["backup_bytes"] == 128 << 20 and report["backup_seconds"] > 0
    assert report["guest_p99_us_idle"] > 0 and report["guest_p99_us_backup"] > 0
    assert report["guest_writes"] > report["guest_writes_at_instant"] > 0
    assert report["preserved_bytes"] > report["preserved_zero_bytes"] > 0
    assert os.listdir(tmp_path) == []


def test_ctrl_c_ends_it_with_nothing_left(tmp_path):
    process = subprocess.Popen([*COMMAND, "demo", "--size", "64M", "--seconds", "60"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, cwd=tmp_path, env=clean_environment(TMPDIR=str(tmp_path)))
    while not process.stdout.readline().startswith("guest"):
        assert process.poll() is None
    guests = subprocess.run(["pgrep", "-f", f"demo_guest {tmp_path}"], capture_output=True, text=True).stdout.split()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    assert os.listdir(tmp_path) == []
    assert len(guests) == 3 and not any(os.path.exists(f"/proc/{guest}") for guest in guests)


def test_without_e2fsprogs_it_names_the_package(tmp_path):
    code = ("import fastcbw.cli.demo_image as image, shutil, sys\n"
            "image.shutil.which = lambda *_, **__: None\n"
            "from fastcbw.cli.main import main; sys.exit(main(['demo', '--size', '64M']))")
    done = subprocess.run([COMMAND[0], "-c", code], capture_output=True, text=True, cwd=tmp_path, env=clean_environment(TMPDIR=str(tmp_path)))
    assert (done.returncode, done.stderr) == (1, "fastcbw: mkfs.ext4: not found (install e2fsprogs)\n")
    assert os.listdir(tmp_path) == []
