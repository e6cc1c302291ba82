"""The public objects: open, Disk, Snapshot, group; what they refuse, and how they end."""

import gc
import json
import os
import subprocess
import sys
import textwrap
import threading

import pytest
from leaks import nothing_left_behind  # noqa: F401 - autouse

import fastcbw
from fastcbw.block.delay import DelayDevice
from fastcbw.block.memory import MemoryDevice

K = 4096


@pytest.fixture
def path(tmp_path):
    """An image of 64 clusters and a bit."""
    image = tmp_path / "vm.img"
    image.write_bytes(b"o" * (64 * K + 99))
    return image


@pytest.fixture
def disk(path):
    with fastcbw.open(path) as disk:
        yield disk


def python(text, *arguments, timeout=60):
    """Run TEXT in a fresh interpreter; return what it printed. It must end with 0."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


# -- what the README shows


def test_the_api_as_documented(path, tmp_path):
    with fastcbw.open(str(path)) as disk:
        assert (disk.name, disk.length, disk.read_only) == ("vm", 64 * K + 99, False)
        disk.write(0, b"hello")
        disk.write(5, memoryview(b" world"))
        buffer = bytearray(11)
        assert disk.readinto(0, buffer) == 11 and buffer == b"hello world"
        snap = disk.snapshot("s1", ram="256M", spill=tmp_path)
        assert disk.snapshots == {"s1": snap} and snap.disk is disk and snap.length == disk.length
        disk.write_zeroes(0, K)
        disk.discard(K, K)
        disk.flush()
        assert snap.read(0, 11) == b"hello world" and disk.read(0, 11) == bytes(11)
        extents = snap.extents(0, disk.length)
        assert extents.dtype.names == ("offset", "length", "flags") and extents["length"].sum() == disk.length
        job = snap.backup(tmp_path / "backup.img", order="ram-first")
        assert job.wait(timeout=60)["bytes"] == disk.length
        snap.close()
        snap.close()
        assert disk.snapshots == {}
        disk.serve(tmp_path / "s")
    assert (tmp_path / "backup.img").read_bytes()[:11] == b"hello world"
    assert not (tmp_path / "s").exists()


def test_status_is_json_and_complete(disk):
    disk.snapshot("s", ram="1M")
    disk.write(0, b"n" * K)
    facts = json.loads(json.dumps(disk.status()))
    assert facts["name"] == "vm" and facts["guest"]["writes"] == 1 and facts["guest"]["bytes"] == K
    snapshot = facts["snapshots"]["s"]
    assert snapshot["state"] == "live" and snapshot["reason"] is None and snapshot["holds"] == 0
    assert (snapshot["preserved_clusters"], snapshot["ram_bytes"], snapshot["ram_limit"]) == (1, K, 1 << 20)
    assert json.loads(json.dumps(disk.snapshots["s"].status())) == snapshot


def test_group_takes_all_or_none(disk, tmp_path):
    with fastcbw.open(MemoryDevice("1M"), name="b") as other:
        with fastcbw.group([disk, other]).snapshot("g") as (a, b):
            assert (a.disk, b.disk) == (disk, other) and a.name == b.name == "g"
        assert disk.snapshots == other.snapshots == {}
        other.snapshot("taken")
        with pytest.raises(fastcbw.Error, match="'taken' exists already"):
            fastcbw.group([disk, other]).snapshot("taken")
        assert list(disk.snapshots) == [] and list(other.snapshots) == ["taken"]
        log = MemoryDevice("1M")
        with pytest.raises(fastcbw.Error, match="spill"):
            fastcbw.group([disk, other]).snapshot("g", spill=log)       # one log for two disks
        assert list(disk.snapshots) == [] and list(other.snapshots) == ["taken"]
        disk.snapshot("g", ram=0, spill=log)        # what the failed group had taken is free again


def test_closing_a_group_tries_every_snapshot(disk):
    with fastcbw.open(MemoryDevice("1M"), name="b") as other:
        both = fastcbw.group([disk, other]).snapshot("g")
        both[0].hold()
        with pytest.raises(fastcbw.Error, match="in use"):
            both.close()
        assert list(disk.snapshots) == ["g"] and other.snapshots == {}
        both[0].release()


# -- bad input: one line that names the thing, the value and what is expected; nothing changed


@pytest.mark.parametrize("options, error, words", [
    ({"cluster_size": 5000}, ValueError, "cluster_size: 5000 is not a power of two from 4K to 1M"),
    ({"cluster_size": "2K"}, ValueError, "cluster_size: '2K'"),
    ({"cluster_size": "2M"}, ValueError, "cluster_size: '2M'"),
    ({"cluster_size": "4Q"}, ValueError, "cluster_size"),
    ({"cluster_size": 4096.0}, TypeError, "cluster_size"),
    ({"cluster_size": 0}, ValueError, "cluster_size"),
    ({"cluster_size": -4096}, ValueError, "cluster_size"),
    ({"ram": "12X"}, ValueError, "ram"),
    ({"ram": -1}, ValueError, "ram"),
    ({"ram": 100}, ValueError, "ram: 100 is less than one cluster"),
    ({"ram": 0}, ValueError, "ram: 0 and no spill"),
    ({"ram": "1024T"}, ValueError, "ram"),
    ({"ram": None}, TypeError, "ram"),
    ({"spill": "/nowhere/at/all"}, OSError, "/nowhere/at/all"),
    ({"spill": "/nowhere/at/all", "spill_limit": "1M"}, OSError, "/nowhere/at/all"),
    ({"spill": "/etc/passwd", "spill_limit": "1M"}, OSError, "/etc/passwd"),
    ({"spill": "/dev/shm", "spill_limit": 100}, ValueError, "spill_limit: 100"),
    ({"spill": 7}, TypeError, None),
    ({"spill_limit": "1M"}, ValueError, "spill_limit: '1M' without spill"),
    ({"cbw_timeout": 0}, ValueError, "cbw_timeout: 0"),
    ({"cbw_timeout": "5s"}, TypeError, "cbw_timeout"),
    ({"cbw_timeout": True}, TypeError, "cbw_timeout"),
    ({"cbw_timeout": 10**12}, ValueError, "cbw_timeout"),
    ({"on_full": "explode"}, ValueError, "on_full: 'explode' is unknown"),
    ({"on_cbw_error": "wait"}, ValueError, "on_cbw_error: 'wait' is unknown"),
    ({"export": "rw"}, ValueError, "export: 'rw'"),
    ({"durability": "power"}, ValueError, "durability: 'power'"),
    ({"bitmap": "b"}, fastcbw.Error, "bitmap 'b': not found"),
    ({"new_bitmap": "b/"}, ValueError, "new_bitmap: 'b/' is no name"),
    ({"copy_on_read": 1}, TypeError, "copy_on_read"), ({"copy_on_read": True, "ram": 0, "spill": "."}, ValueError, "copy_on_read"),
    ({"colour": "red"}, TypeError, "colour"),
])
def test_bad_snapshot_options_name_themselves_and_change_nothing(disk, options, error, words):
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(error, match=words) as caught:
        disk.snapshot("s", **options)
    assert "\n" not in str(caught.value)
    assert disk.snapshots == {} and disk.status()["snapshots"] == {}
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, descriptors)
    disk.snapshot("s")      # the name is still free


@pytest.mark.parametrize("name, error", [("", ValueError), ("a b", ValueError), ("a@b", ValueError), ("a/b", ValueError), ("a=b", ValueError),
                                         ("a\n", ValueError), ("ä", ValueError), (7, TypeError), (None, TypeError), (b"s", TypeError)])
def test_bad_names_are_refused(disk, path, name, error):
    with pytest.raises(error, match="snapshot name"):
        disk.snapshot(name)
    assert disk.snapshots == {}
    if name is not None:
        with pytest.raises(error, match="disk name"):
            fastcbw.open(MemoryDevice(K), name=name)


def test_a_name_is_used_once_and_free_after_the_end(disk):
    disk.snapshot("s")
    with pytest.raises(fastcbw.Error, match="snapshot 's' exists already"):
        disk.snapshot("s")
    disk.snapshots["s"].close()
    disk.snapshot("s")


def test_another_cluster_size_is_refused_while_snapshots_live(disk):
    disk.snapshot("s", cluster_size="64K")
    with pytest.raises(fastcbw.Error, match="cluster_size 4096 differs from the 65536"):
        disk.snapshot("t", cluster_size="4K")
    assert disk.snapshot("t").status()["cluster_size"] == 65536
    disk.snapshots["s"].close()
    disk.snapshots["t"].close()
    assert disk.snapshot("u", cluster_size="4K").status()["cluster_size"] == 4096


def test_no_more_than_the_limit_of_snapshots(disk):
    for i in range(62):
        disk.snapshot(f"s{i}", ram="4K")
    with pytest.raises(fastcbw.LimitReached, match="62"):
        disk.snapshot("one-more")
    disk.write(0, b"n" * K)
    assert all(snapshot.read(0, K) == b"o" * K for snapshot in disk.snapshots.values())
    disk.snapshots["s61"].close()
    assert disk.snapshot("one-more").read(0, K) == b"n" * K
    assert disk.snapshots["s0"].read(0, K) == b"o" * K


@pytest.mark.parametrize("image, error, words", [
    ("missing.img", FileNotFoundError, "missing.img"), (".", IsADirectoryError, "director"), ("", OSError, None), ("empty.img", OSError, "empty"),
    (7.5, TypeError, None), (None, TypeError, None), ("qcow2.img", fastcbw.FormatRefused, "qcow2"), ("nbds://host/export", ValueError, "nbds://host/export: TLS"),
])
def test_bad_images_are_refused(tmp_path, monkeypatch, image, error, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.img").touch()
    (tmp_path / "qcow2.img").write_bytes(b"QFI\xfb\x00\x00\x00\x03" + bytes(100_000))
    with pytest.raises(error, match=words):
        fastcbw.open(image)


def test_a_locked_image_is_refused_by_name(disk, path):
    with pytest.raises(fastcbw.ImageLocked, match="vm.img"):
        fastcbw.open(path)


@pytest.mark.parametrize("call", [
    lambda disk: disk.read(-1, 1), lambda disk: disk.read(0, disk.length + 1), lambda disk: disk.read(disk.length, 1), lambda disk: disk.read(0, -1),
    lambda disk: disk.write(disk.length - 1, b"xx"), lambda disk: disk.write_zeroes(-5, 1), lambda disk: disk.discard(1 << 62, 1 << 62),
    lambda disk: disk.extents(disk.length + 1),
])
def test_ranges_outside_the_disk_are_refused(disk, path, call):
    for device in (disk, disk.snapshot("s", ram="1M")):
        if hasattr(device, "write") or call.__code__.co_names[0] in ("read", "extents"):
            with pytest.raises(ValueError, match="not within the device's"):
                call(device)
    assert path.read_bytes() == b"o" * disk.length


def test_what_is_no_buffer_is_refused(disk):
    with pytest.raises(TypeError):
        disk.write(0, "text")
    with pytest.raises((TypeError, BufferError)):
        disk.readinto(0, b"read-only")
    assert disk.read(0, 4) == b"oooo"


def test_nothing_at_all_can_be_read_and_written(disk):
    snapshot = disk.snapshot("s")
    disk.write(disk.length, b"")
    assert disk.read(disk.length, 0) == snapshot.read(0, 0) == b""
    assert disk.status()["guest"]["writes"] == 0


def test_a_snapshot_is_read_only(disk):
    snapshot = disk.snapshot("s")
    assert not hasattr(snapshot, "write")
    for call in (lambda d: d.write(0, b"x"), lambda d: d.write_zeroes(0, 1)):       # its discard drops from the snapshot, not the disk
        with pytest.raises(PermissionError, match="read-only"):
            call(snapshot.device)


# -- ends


def test_close_ends_snapshots_jobs_and_clients(path, tmp_path):
    from fastcbw.export.nbd.client import Client

    source = DelayDevice(MemoryDevice("1M"))
    source.write(0, b"x" * (1 << 20))
    disk = fastcbw.open(source, name="d")
    disk.serve(tmp_path / "s")
    snapshot, held = disk.snapshot("s"), disk.snapshot("held")
    client = Client(tmp_path / "s", "d@held")
    target = DelayDevice(MemoryDevice("1M"))
    with target.hold("write") as gate:
        job = snapshot.backup(target)
        gate.wait_arrived()
        for snap in (snapshot, held):
            with pytest.raises(fastcbw.Error, match="in use by 1"):
                snap.close()
        closing = threading.Thread(target=disk.close)
        closing.start()
    closing.join(20)
    assert not closing.is_alive()
    with pytest.raises(fastcbw.JobCancelled):
        job.wait(1)
    with pytest.raises((OSError, fastcbw.Error, Exception)):
        client.read(0, 1)
    client.close()
    for call in (lambda: disk.read(0, 1), lambda: snapshot.read(0, 1), lambda: disk.snapshot("t"), lambda: disk.write(0, b"x")):
        with pytest.raises(ValueError, match="closed"):
            call()
    disk.close()
    snapshot.close()
    assert source.read(0, 1) == b"x"        # a device is the caller's: not closed


def test_a_deleted_snapshot_can_no_longer_be_used(disk, tmp_path):
    snapshot = disk.snapshot("s")
    snapshot.close()
    with pytest.raises(ValueError, match="closed"):
        snapshot.read(0, 1)
    with pytest.raises(fastcbw.Error, match="deleted"):
        snapshot.backup(tmp_path / "b.img")
    assert snapshot.status()["state"] == "deleted"
    assert list(tmp_path.iterdir()) == [tmp_path / "vm.img"]


def test_a_snapshot_taken_while_serving_is_exported_and_unexported_at_its_end(disk, tmp_path):
    from fastcbw.export.nbd.client import Client, NbdError

    disk.serve(tmp_path / "s")
    with pytest.raises(fastcbw.Error, match="served already"):
        disk.serve(tmp_path / "t")
    snapshot = disk.snapshot("s")
    with Client(tmp_path / "s", "vm@s") as client:
        assert client.read(0, 4) == b"oooo"
    while disk.snapshots:
        try:
            snapshot.close()
        except fastcbw.Error as error:      # the server has not noticed yet that the client went
            assert "in use" in str(error)
    with pytest.raises(NbdError):
        Client(tmp_path / "s", "vm@s")


def test_a_busy_socket_is_refused_and_the_disk_goes_on(disk, tmp_path):
    with fastcbw.open(MemoryDevice(K), name="other") as other:
        other.serve(tmp_path / "s")
        with pytest.raises(fastcbw.Error, match="already listening"):
            disk.serve(tmp_path / "s")
    disk.serve(tmp_path / "s")


def test_import_starts_no_thread_and_installs_no_signal_handler():
    assert python("""
        import signal, threading
        before = [signal.getsignal(s) for s in signal.valid_signals()]
        import fastcbw, fastcbw.disk, fastcbw.export.nbd.server
        print(threading.active_count(), [signal.getsignal(s) for s in signal.valid_signals()] == before)
    """) == "1 True\n"


def test_the_end_of_the_interpreter_ends_everything(tmp_path):
    """Disk, snapshot, spill, server, a client and a job that runs: nobody closed anything."""
    assert python("""
        import sys, fastcbw
        from fastcbw.block.delay import DelayDevice
        from fastcbw.block.memory import MemoryDevice
        from fastcbw.export.nbd.client import Client
        folder = sys.argv[1]
        device = DelayDevice(MemoryDevice("64M"), read_ms=20)
        device.child.write(0, b"x" * (64 << 20))
        disk = fastcbw.open(device, name="d")
        disk.serve(folder + "/s")
        snapshot = disk.snapshot("s", ram="1M", spill=folder)
        disk.write(0, b"y" * (4 << 20))
        client = Client(folder + "/s", "d@s")
        job = snapshot.backup(folder + "/b.img", workers=2)
        print(job.status)
    """, tmp_path) == "running\n"
    assert list(tmp_path.iterdir()) == []       # no socket, no half target, no log


def test_a_fork_refuses_in_the_child_and_leaves_the_parent_alone(tmp_path):
    assert python("""
        import atexit, os, sys, fastcbw
        from fastcbw.block.delay import DelayDevice
        from fastcbw.block.memory import MemoryDevice
        from fastcbw.export.nbd.client import Client
        device, target = DelayDevice(MemoryDevice("1M")), DelayDevice(MemoryDevice("1M"))
        device.write(0, b"x" * (1 << 20))
        disk = fastcbw.open(device, name="d")
        path = sys.argv[1] + "/s"
        disk.serve(path)
        snapshot = disk.snapshot("s")
        client = Client(path, "d")
        gate = target.hold("write")
        job = snapshot.backup(target)
        gate.wait_arrived()
        child = os.fork()
        if child == 0:
            refused = 0
            for call in (lambda: disk.read(0, 1), lambda: disk.write(0, b"y"), lambda: snapshot.read(0, 1), lambda: disk.snapshot("t"),
                         lambda: disk.flush(), lambda: snapshot.backup(MemoryDevice("1M"))):
                try:
                    call()
                except RuntimeError as error:
                    refused += "fork" in str(error)
            with disk, snapshot:
                pass
            atexit._run_exitfuncs()         # what sys.exit would run, but not the end of the test's own gate
            os._exit(10 + refused)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status))
        gate.open()
        job.wait(20)
        client.write(0, b"z")
        print(os.path.exists(path), disk.read(0, 1), snapshot.read(0, 1), target.read(0, 1))
        client.close()
    """, tmp_path) == "16\nTrue b'z' b'x' b'x'\n"


def test_many_opens_and_snapshots_leave_nothing(path, tmp_path):
    """The autouse check sees threads and descriptors; this one sees memory."""
    def once():
        with fastcbw.open(path) as disk:
            for i in range(3):
                disk.snapshot(f"s{i}", ram="64M", spill=tmp_path)
                disk.write(0, b"n" * disk.length)

    def maps():
        gc.collect()
        with open("/proc/self/maps") as lines:
            return sum(1 for _ in lines)

    once()
    before = maps()
    for _ in range(20):
        once()
    assert maps() <= before + 10
