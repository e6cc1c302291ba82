"""Bad input: one line that names the thing, exit status 1 or 2, and nothing changed."""

import os
import shutil
import subprocess

import pytest
from cli_process import Served


def snapshot_of(folder):
    """Return what the files of a folder are: names, sizes, contents; sockets by name."""
    found = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        found[entry.name] = open(entry.path, "rb").read() if entry.is_file() else None
    return found


@pytest.fixture
def refused(run, tmp_path):
    """refused(status, text, *arguments): the command is refused with that text, and the folder is as it was."""

    def refused(status, text, *arguments, **environment):
        before = snapshot_of(tmp_path)
        done = run(*arguments, **environment)
        assert done.stdout == ""
        assert done.stderr.startswith("fastcbw: ") and done.stderr.count("\n") == 1, done.stderr
        assert text in done.stderr and "Traceback" not in done.stderr
        assert done.returncode == status, done.stderr
        assert snapshot_of(tmp_path) == before

    return refused


@pytest.mark.parametrize("command", [("serve", "gone.img", "--socket", "s"), ("backup", "./gone.img", "out.img")])
def test_a_missing_image(refused, command):
    refused(1, "gone.img: No such file", *command)


@pytest.mark.parametrize("format", ["qcow2", "vmdk", "vhdx", "vdi"])
def test_an_image_in_another_format(refused, tmp_path, format):
    subprocess.run(["qemu-img", "create", "-q", "-f", format, tmp_path / "vm.img", "16M"], check=True)
    refused(1, "vm.img", "serve", "vm.img", "--socket", "s")
    refused(1, format, "backup", "vm.img", "out.img")


def test_a_locked_image(refused, served, image):
    refused(1, "vm.img", "serve", "again=vm.img", "--socket", "s")
    refused(1, "vm.img", "backup", "./vm.img", "out.img")


def test_an_image_that_qemu_holds(refused, image, tmp_path):
    holder = subprocess.Popen(["qemu-io", "-f", "raw", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        holder.stdin.write(b"read 0 512\n")
        holder.stdin.flush()
        holder.stdout.readline()  # it has the image open by now
        refused(1, "vm.img", "serve", "vm.img", "--socket", "s")
    finally:
        holder.communicate(b"quit\n")


def test_an_image_shorter_than_announced(refused, image, tmp_path):
    """A file cut after it was opened: the read that meets its end is an error, in a backup too."""
    served = Served(tmp_path, image, "--socket", "nbd")
    try:
        os.truncate(image, 1 << 20)
        refused(1, "read", "backup", "vm", "/dev/shm/fastcbw-test-never", "--qmp", "nbd.qmp")
    finally:
        served.process.kill()
        served.wait()
        for left in ("/dev/shm/fastcbw-test-never", "/dev/shm/fastcbw-test-never.incomplete"):
            if os.path.exists(left):
                os.unlink(left)


def test_a_busy_socket(refused, served, image, tmp_path):
    shutil.copy(image, tmp_path / "b.img")
    refused(1, "nbd: a server is already listening", "serve", "b.img", "--socket", "nbd")
    refused(1, "nbd.qmp: a server is already listening", "serve", "b.img", "--socket", "s", "--qmp", "nbd.qmp")


def test_a_socket_path_that_is_a_file(refused, image):
    refused(1, "vm.img", "serve", "vm.img", "--socket", "vm.img")


@pytest.mark.parametrize("verb", [("serve", "vm.img"), ("snapshot", "create", "--name", "s", "vm"), ("backup", "a", "b")])
def test_a_mistyped_option_sends_to_the_help_of_its_verb(refused, verb):
    words = " ".join(verb[:2] if verb[0] == "snapshot" else verb[:1])
    refused(2, f"unrecognized arguments: --cluster-sise 4K (see fastcbw {words} --help)", *verb, "--cluster-sise", "4K")


@pytest.mark.parametrize("size", ["5Q", "-1", "1.5", "", "0x10", "1.3K", "9999999P"])
def test_a_wrong_size(refused, image, size):
    refused(2, "--ram", "serve", "vm.img", "--socket", "s", "--snapshot", "s", f"--ram={size}")


@pytest.mark.parametrize("size", ["3000", "12K", "0", "2K", "2M"])
def test_a_cluster_size_that_is_no_power_of_two_or_out_of_bounds(refused, served, image, size):
    refused(2, "cluster-size", "serve", "b.img", "--socket", "s", "--snapshot", "s", "--cluster-size", size)
    refused(2, "cluster-size", "snapshot", "create", "--qmp", "nbd.qmp", "--name", "s", "--cluster-size", size, "vm")


def test_a_cluster_size_other_than_the_living_snapshots(refused, run, served):
    assert run("snapshot", "create", "--qmp", "nbd.qmp", "--name", "s", "--cluster-size", "64K", "vm").returncode == 0
    refused(1, "cluster", "snapshot", "create", "--qmp", "nbd.qmp", "--name", "t", "--cluster-size", "4K", "vm")


def test_an_unknown_disk_and_an_unknown_snapshot(refused, served):
    refused(1, "snapshot vm@no: not found", "backup", "vm@no", "out.img", "--qmp", "nbd.qmp")
    refused(1, "snapshot vm@no: not found", "snapshot", "delete", "--qmp", "nbd.qmp", "--name", "no", "vm")
    refused(1, "disk 'no': not found", "snapshot", "create", "--qmp", "nbd.qmp", "--name", "s", "no")
    refused(1, "disk 'no': not found", "backup", "no@s", "out.img", "--qmp", "nbd.qmp")


def test_a_snapshot_that_exists(refused, run, served):
    assert run("snapshot", "create", "--qmp", "nbd.qmp", "--name", "s", "vm").returncode == 0
    refused(1, "vm@s: exists", "snapshot", "create", "--qmp", "nbd.qmp", "--name", "s", "vm")


@pytest.mark.parametrize("name", ["a@b", "a/b", "a=b", ""])
def test_a_snapshot_name_that_is_none(refused, served, image, name):
    refused(2, "snapshot name", "snapshot", "create", "--qmp", "nbd.qmp", "--name", name, "vm")


def test_a_target_that_is_the_source(refused, served, image, tmp_path):
    os.symlink("vm.img", tmp_path / "link.img")
    os.link(tmp_path / "vm.img", tmp_path / "hard.img")
    for target in ("vm.img", "link.img", "hard.img"):
        refused(1, "source itself", "backup", "vm", target, "--force", "--qmp", "nbd.qmp")


def test_a_target_that_is_the_source_image(refused, image):
    refused(2, "source itself", "backup", "./vm.img", "vm.img", "--force")


def test_a_target_that_exists(refused, image, tmp_path):
    (tmp_path / "out.img").write_text("precious")
    refused(1, "out.img: exists (--force", "backup", "./vm.img", "out.img")


def test_a_target_that_somebody_uses(refused, serve, image, tmp_path):
    shutil.copy(image, tmp_path / "b.img")
    serve("b.img", "--socket", "nbd")
    refused(1, "b.img", "backup", "./vm.img", "b.img", "--force")


def test_a_target_in_a_folder_that_is_not_there(refused, image):
    refused(1, "gone/out.img", "backup", "./vm.img", "gone/out.img")


@pytest.mark.parametrize("arguments, text", [
    (("serve", "vm.img"), "--socket"),
    (("serve", "--socket", "s"), "no image"),
    (("serve", "vm.img", "--socket", "s", "--ram", "1M"), "--ram: an option of --snapshot"),
    (("serve", "vm.img", "--socket", "s", "--format", "qcow2"), "--format: 'qcow2' is not built yet"),
    (("serve", "vm.img", "--socket", "s", "--io", "aio"), "--io: 'aio' is no engine (there are sync, threads, uring)"),
    (("serve", "nbds://localhost", "--socket", "s"), "nbds://localhost: TLS is not built yet"),
    (("serve", "vm=nbd+unix:///vm", "--socket", "s"), "nbd+unix:///vm: names no socket"),
    (("serve", "vm.img", "--socket", "s", "--snapshot", "s", "--on-full", "burn"), "--on-full: 'burn' is unknown"),
    (("snapshot", "create", "vm", "--name", "s", "--qmp", "q", "--on-cbw-error", "wait"), "--on-cbw-error: 'wait' is unknown"),
    (("snapshot", "set", "vm", "--name", "s", "--qmp", "q"), "nothing to change"),
    (("snapshot", "set", "vm", "--name", "s", "--qmp", "q", "--ram", "x"), "--ram: 'x' is no size"),
    (("snapshot", "set", "vm", "--name", "s", "--qmp", "q", "--cluster-size", "64K"), "--cluster-size"),
    (("serve", "vm.img", "--socket", "s", "--snapshot", "s", "--durability", "power"), "--durability: 'power' is not built"),
    (("serve", "vm.img", "--socket", "s", "--snapshot", "s", "--export", "rw"), "--export: 'rw' is unknown"),
    (("serve", "vm.img", "--socket", "s", "--snapshot", "s", "--bitmap", "b"), "--bitmap: no bitmap exists before"),
    (("serve", "vm.img", "--socket", "s", "--snapshot", "s", "--new-bitmap", "a/b"), "--new-bitmap: 'a/b' is no name"),
    (("serve", "vm.img", "--socket", "s", "--snapshot", "s", "--new-bitmap-granularity", "4K"), "--new-bitmap-granularity: 4096 without new_bitmap"),
    (("backup", "./vm.img", "o", "--bitmap", "b"), "--bitmap: is of a disk that a daemon serves"),
    (("bitmap", "add", "vm", "b", "--granularity", "100", "--qmp", "q"), "--granularity: 100 is no power of two"),
    (("bitmap", "merge", "vm", "b", "--qmp", "q"), "SOURCE"),
    (("bitmap", "list"), "FASTCBW_QMP"),
    (("backup", "./vm.img", "o", "--rate", "0"), "--rate: 0 bytes a second"),
    (("backup", "./vm.img", "o", "--rate", "-1"), "--rate"),
    (("backup", "./vm.img", "o", "--rate", "1X"), "--rate: '1X' is no size"),
    (("backup", "./vm.img", "o", "--guest-p99", "0"), "--guest-p99: '0' is no whole number of at least 1"),
    (("backup", "./vm.img", "o", "--guest-p99", "5"), "--guest-p99: ./vm.img: nobody writes"),
    (("backup", "./vm.img", "o", "--consume", "--verify"), "--consume: not with --verify"),
    (("backup", "./vm.img", "o", "--resume"), "--resume: not built yet"),
    (("backup", "./vm.img", "o", "--order", "sequential,hot-first"), "--order: 'hot-first' comes after 'sequential'"),
    (("backup", "./vm.img", "o", "--order", "ram-first,ram-first"), "--order: 'ram-first' is named twice"),
    (("backup", "./vm.img", "o", "--order", "up"), "--order: 'up' is unknown"),
    (("backup", "./vm.img", "o", "--workers", "0"), "--workers"),
    (("backup", "./vm.img", "o.qcow2"), "qcow2 targets are not built yet"),
    (("backup", "./vm.img", "o", "--format", "qcow2"), "--format: 'qcow2' is not built yet"),
    (("backup", "./vm.img", "o", "--backing", "b"), "--backing: not built yet"),
    (("backup", "./vm.img", "nbd:unix:s"), "nbd:unix:s: is no NBD URI"),
    (("backup", "nbd://localhost/?tls=1", "o"), "the parameter 'tls' is not built yet"),
    (("backup", "vm@s", "o"), "--qmp"),
    (("status",), "FASTCBW_QMP"),
    (("snapshot", "create", "--name", "s", "--qmp", "q"), "DISK"),
    (("snapshot", "create", "vm", "--qmp", "q"), "--name"),
    (("demo", "--size", "1M"), "--size"),
    (("demo", "--seconds", "0"), "--seconds"),
    (("compare", "--schemes", "none,magic"), "--schemes: 'magic' is unknown (there is none, "),
    (("compare", "--loads", "gentle"), "--loads: 'gentle' is unknown (there is paced-4k, "),
    (("compare", "--targets", ","), "--targets: names nothing (there is file, "),
    (("compare", "--quick", "--full"), "contradict"),
    (("compare", "--from", "kept", "--schemes", "none", "--unpinned"), "--schemes, --unpinned: of a measurement, and with --from"),
    (("compare", "--from", "kept", "--steal-max", "0"), "--steal-max: of a measurement"),
    (("compare", "--size", "100K"), "--size"),
    (("compare", "--steal-max", "101"), "--steal-max: '101' is no number from 0 to 100"),
    (("compare", "--steal-max", "nan"), "--steal-max: 'nan' is no number from 0 to 100"),
    (("compare", "--trace", "./vm.img"), "vm.img: is no trace"),
    (("bogus",), "bogus"), ((), "VERB"), (("status", "--bogus"), "--bogus"), (("serve", "--sock", "s"), "--sock"),
])
def test_wrong_usage_is_named(refused, image, arguments, text):
    refused(2, text, *arguments)


@pytest.mark.parametrize("verb", ["restore"])
def test_a_verb_that_is_not_built(refused, verb):
    refused(2, f"{verb}: not built yet", verb, "--json", "x")


def test_a_daemon_that_is_not_there(refused):
    refused(1, "nothing.qmp: no daemon answers", "status", "--qmp", "nothing.qmp")


def test_a_qmp_socket_that_is_an_nbd_socket(refused, served):
    refused(1, "nbd: does not speak QMP", "status", "--qmp", "nbd")


@pytest.mark.parametrize("options, text", [(("--cluster-size", "3K"), "--cluster-size: 3072 is not a power of two"), (("--spill-limit", "1M"), "--spill-limit: 1048576 without"),
                                           (("--ram", "0"), "--ram: 0 and no spill"), (("--ram", "0", "--copy-on-read", "--spill", "d"), "--copy-on-read: True without")])
def test_a_value_that_no_daemon_takes_is_wrong_usage_and_no_daemon_is_asked(refused, options, text):
    refused(2, text, "snapshot", "create", "--qmp", "gone.qmp", "--name", "s", *options, "vm")


def test_help_names_the_values_and_only_what_can_be_had(run):
    create, change = (run("snapshot", verb, "--help").stdout for verb in ("create", "set"))
    for shown in ("--spill DIR", "--spill-limit SIZE", "--bitmap NAME", "--new-bitmap NAME", "--cbw-timeout MS", "--durability none "):
        assert shown in create, shown
    assert "default 256M" in create and "default 256M" not in change and "(default break" not in change
