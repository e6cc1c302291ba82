"""Listening, exports, connections and the end of a server."""

import logging
import os
import socket
import struct
import subprocess
import sys
import threading

import pytest
from nbd_waiting import wait_for

from fastcbw.block.delay import DelayDevice
from fastcbw.block.fault import FaultDevice
from fastcbw.block.memory import MemoryDevice
from fastcbw.block.python import Device, PythonDevice
from fastcbw.errors import Error
from fastcbw.export.nbd.client import Client, NbdError
from fastcbw.export.nbd.server import Server, parse_spin
from fastcbw.wire import constants as c

MIB = 1 << 20


# -- listening


def test_a_stale_socket_is_replaced(path, disk):
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    stale.close()
    with Server(path) as server:
        server.add_export("disk", disk)
        with Client(path, "disk") as client:
            assert client.length == disk.length


def test_a_live_socket_is_an_error_with_its_path_and_goes_on_serving(path, export):
    with pytest.raises(Error, match=f"{path}: a server is already listening"):
        Server(path)
    with Client(path, "disk") as client:
        assert client.length == export.length


def test_a_file_that_is_no_socket_is_left_alone(folder):
    path = folder / "image.raw"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="image.raw"):
        Server(path)
    assert path.read_bytes() == b"precious"


@pytest.mark.parametrize("path", ["", "/tmp/" + "x" * 110, "/nonexistent-folder/nbd.sock"])
def test_a_path_that_cannot_be_is_an_error_that_names_it(path):
    with pytest.raises(OSError) as caught:
        Server(path)
    assert path in str(caught.value)


def test_the_socket_file_is_removed_at_close_but_not_another_servers(path, disk):
    server = Server(path)
    os.unlink(path)
    with Server(path):
        server.close()
        assert os.path.exists(path)
    assert not os.path.exists(path)


def test_a_server_listens_on_several_sockets_and_on_tcp(server, export, folder):
    other = server.listen_unix(folder / "other.sock")
    host, port = server.listen_tcp().split(":")
    for address in (other, (host, int(port))):
        with Client(address, "disk") as client:
            client.write(0, b"x" * 300_000)
            assert client.read(299_999, 2) == b"x\0"


def test_a_listener_can_be_closed_while_its_clients_stay(server, path, export, folder):
    address = server.listen_unix(folder / "second.sock")
    with Client(address, "disk") as client:
        server.stop_listening(address)
        assert server.addresses == [path]
        assert not os.path.exists(address)
        assert client.read(0, 1) == b"\0"
        with pytest.raises(FileNotFoundError):
            Client(address, "disk")
    with pytest.raises(KeyError):
        server.stop_listening(address)


def test_a_listening_socket_can_be_handed_over(path, disk):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    with Server(listener=listener) as server:
        server.add_export("disk", disk)
        with Client(path, "disk") as client:
            assert client.length == disk.length
    assert os.path.exists(path)
    os.unlink(path)


def test_a_socket_that_does_not_listen_is_refused():
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(ValueError, match="not listening"):
        Server(listener=sock)


def test_a_socket_passed_by_the_environment_is_used(path):
    code = (
        "import os, sys; os.environ['LISTEN_PID'] = str(os.getpid())\n"
        "from fastcbw.block.memory import MemoryDevice\n"
        "from fastcbw.export.nbd import listen\n"
        "from fastcbw.export.nbd.server import Server\n"
        "(listener,) = listen.inherited()\n"
        "assert listen.inherited() == [] and 'LISTEN_FDS' not in os.environ\n"
        "with Server(listener=listener) as server:\n"
        "    server.add_export('disk', MemoryDevice('1M'))\n"
        "    sys.stdin.read()\n")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        process = subprocess.Popen(
            [sys.executable, "-c", "import os, sys; os.dup2(int(sys.argv[2]), 3); exec(sys.argv[1])", code, str(listener.fileno())],
            pass_fds=[listener.fileno()], env=os.environ | {"LISTEN_FDS": "1"}, stdin=subprocess.PIPE)
        with Client(path, "disk") as client:
            assert client.length == MIB
        process.stdin.close()
        assert process.wait(20) == 0
    os.unlink(path)


# -- exports


@pytest.mark.parametrize("name", ["", "x" * 4097])
def test_a_name_that_cannot_be_is_refused(server, disk, name):
    with pytest.raises(ValueError):
        server.add_export(name, disk)


def test_a_name_that_is_taken_is_refused(server, export, disk):
    with pytest.raises(ValueError, match="taken"):
        server.add_export("disk", disk)


def test_a_read_only_device_cannot_be_exported_writable(server):
    device = MemoryDevice("1M", read_only=True)
    with pytest.raises(ValueError, match="read-only"):
        server.add_export("disk", device, read_only=False)
    assert server.add_export("disk", device).read_only


def test_what_is_no_device_is_refused(server):
    with pytest.raises(TypeError, match="BlockDevice"):
        server.add_export("disk", b"bytes")


def test_an_export_in_use_is_not_removed_and_the_error_counts_its_users(path, server, export):
    with Client(path, "disk") as one, Client(path, "disk") as two:
        with pytest.raises(Error, match="2 connections"):
            server.remove_export("disk")
        assert server.exports["disk"].connections == 2
        assert one.read(0, 1) == two.read(0, 1)


def test_an_export_can_be_removed_as_soon_as_its_last_client_has_closed_its_socket(path, server, disk):
    for _ in range(100):
        server.add_export("disk", disk)
        client = Client(path, "disk")
        client.send(c.CMD_READ, 0, 1000)
        client.close()
        server.remove_export("disk")
    assert server.exports == {}


def test_a_removed_export_is_unknown_to_new_clients(path, server, export):
    server.remove_export("disk")
    with pytest.raises(NbdError, match="disk"):
        Client(path, "disk")
    with pytest.raises(KeyError):
        server.remove_export("disk")


def test_removal_by_force_disconnects_its_clients_and_no_others(path, server, export):
    server.add_export("other", MemoryDevice("1M"))
    with Client(path, "other") as other, Client(path, "disk") as client:
        server.remove_export("disk", force=True)
        assert export.connections == 0
        with pytest.raises((EOFError, OSError)):
            client.read(0, 1)
        assert other.read(0, 1) == b"\0"


def test_hooks_are_called_once_around_each_connection(path, server, disk):
    calls = []
    left = threading.Semaphore(0)
    server.add_export(
        "disk", disk, on_connect=lambda: calls.append("connect"), on_disconnect=lambda: (calls.append("leave"), left.release()))
    for _ in range(2):
        with Client(path, "disk") as client:
            client.read(0, 1)
        assert left.acquire(timeout=10)
    assert calls == ["connect", "leave"] * 2
    assert server.exports["disk"].status()["connections_total"] == 2


def test_a_hook_is_undone_when_the_client_dies_in_the_handshake(path, server, disk):
    left = threading.Event()
    entered = threading.Event()
    go_on = threading.Event()

    def connect():
        entered.set()
        assert go_on.wait(10)

    server.add_export("disk", disk, on_connect=connect, on_disconnect=left.set)
    client = Client(path, begin=False)
    client.sock.sendall(struct.pack(">QIII4sH", c.OPTION_MAGIC, c.OPT_GO, 10, 4, b"disk", 0))
    assert entered.wait(10)
    client.sock.close()
    go_on.set()
    assert left.wait(10)


def test_a_hook_that_fails_at_the_end_harms_nobody(path, server, disk, caplog):
    def fail():
        raise RuntimeError("broken hook")

    server.add_export("disk", disk, on_disconnect=fail)
    with caplog.at_level(logging.ERROR):
        Client(path, "disk").close()
        wait_for(lambda: server.status()["connections"] == 0)
    assert "broken hook" in caplog.text


def test_counters_outlive_the_connections_that_made_them(path, server, export):
    for _ in range(3):
        with Client(path, "disk") as client:
            client.write(0, b"x" * 100)
    wait_for(lambda: export.connections == 0)
    assert export.status()["counters"]["bytes_written"] == 300


def test_threads_bear_the_name_of_the_export(client):
    client.flush()      # answered, so the transmission phase has begun
    assert "nbd-disk" in {thread.name for thread in threading.enumerate()}
    comms = set()
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/comm") as file:
            comms.add(file.read().strip())
    assert "nbd-disk" in comms


# -- connections


def test_connections_are_bounded_and_a_refused_one_is_logged(path, disk, caplog):
    with Server(path, connections_max=2) as server:
        server.add_export("disk", disk)
        with Client(path, "disk") as one, Client(path, "disk"):
            with caplog.at_level(logging.WARNING), pytest.raises((EOFError, ConnectionError)):
                Client(path, "disk")
            assert "2 connections are the limit" in caplog.text
            assert one.read(0, 1) == b"\0"
        wait_for(lambda: server.status()["connections"] == 0)
        assert server.status()["connections_refused"] == 1
        with Client(path, "disk") as again:
            assert again.read(0, 1) == b"\0"


def test_many_connections_write_and_read_at_once(path, server, disk):
    server.add_export("disk", disk)
    failures = []

    def work(number):
        try:
            with Client(path, "disk") as client:
                for i in range(50):
                    data = bytes([number * 16 + i % 16]) * 5000
                    client.write(number * MIB + i * 5000, data)
                    assert client.read(number * MIB + i * 5000, 5000) == data
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_flush_on_one_connection_covers_what_another_had_acknowledged(path, server, disk):
    """What CAN_MULTI_CONN promises: the flush of B returns only after a sync that began after A's acknowledged writes."""
    fault = FaultDevice(disk)
    gate = DelayDevice(fault)
    server.add_export("disk", gate)
    with Client(path, "disk") as a, Client(path, "disk") as b:
        assert a.flags & b.flags & c.FLAG_CAN_MULTI_CONN
        for i in range(10):
            a.write(i * 4096, b"x" * 4096)
        assert (fault.requests["write"], fault.requests["flush"]) == (10, 0)
        with gate.hold("flush") as held:
            b.send(c.CMD_FLUSH)
            held.wait_arrived(1)        # the device was asked to sync after the writes, and nobody else did it for B
            assert fault.requests["flush"] == 0
            b.sock.settimeout(0.05)
            with pytest.raises(TimeoutError):
                b.receive(1)            # not answered before the sync is done
            a.write(0, b"y" * 512)      # A is not held up by it
        b.sock.settimeout(10)
        assert b.receive_reply().error == 0
        assert fault.requests["flush"] == 1


def test_fua_is_answered_after_the_device_has_flushed(path, server):
    class Recorder(Device):
        length = MIB
        calls = []

        def read(self, offset, length):
            return bytes(length)

        def write(self, offset, data):
            self.calls.append(("write", offset, len(data)))

        def flush(self):
            self.calls.append("flush")

    server.add_export("disk", PythonDevice(Recorder()))
    with Client(path, "disk") as client:
        client.write(0, b"x" * 512)
        assert Recorder.calls == [("write", 0, 512)]
        client.write(512, b"x" * 512, fua=True)
        assert Recorder.calls[1:] == [("write", 512, 512), "flush"]


# -- the end


def test_close_answers_what_is_in_flight_and_then_disconnects(path, disk):
    delay = DelayDevice(disk)
    server = Server(path)
    server.add_export("disk", delay)
    client = Client(path, "disk")
    with delay.hold("write") as gate:
        client.send(c.CMD_WRITE, 0, 4096, payload=b"x" * 4096)
        gate.wait_arrived(1)
        closer = threading.Thread(target=server.close)
        closer.start()
        wait_for(lambda: not os.path.exists(path))
    assert client.receive_reply().error == 0
    closer.join(10)
    with pytest.raises(EOFError):
        client.receive(1)
    assert disk.read(0, 1) == b"x"
    client.sock.close()


def test_close_cuts_a_client_that_does_not_take_its_replies(path, export, server):
    client = Client(path, "disk")
    client.send(c.CMD_READ, 0, 32 * MIB)
    wait_for(lambda: server.pool.status()["used_bytes"] > 0)
    server.close()
    assert server.pool.status()["used_bytes"] == 0
    client.sock.close()


def test_close_twice_and_from_several_threads_is_no_error(path, export, server, client):
    threads = [threading.Thread(target=server.close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    server.close()
    with pytest.raises(Error, match="closed"):
        server.add_export("late", MemoryDevice("1M"))


def test_close_during_a_handshake_ends_it(path, export, server):
    client = Client(path, begin=False)
    server.close()
    assert client.sock.recv(1) == b""
    client.sock.close()


def test_a_server_that_nobody_closed_is_closed_at_exit(path):
    code = (
        "import sys\n"
        "from fastcbw.block.memory import MemoryDevice\n"
        "from fastcbw.export.nbd.client import Client\n"
        "from fastcbw.export.nbd.server import Server\n"
        "Server(sys.argv[1]).add_export('disk', MemoryDevice('1M'))\n"
        "client = Client(sys.argv[1], 'disk')\n"
        "print(len(client.read(0, 10)))\n")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "10\n", "")
    assert not os.path.exists(path)


def test_importing_starts_no_thread():
    code = "import threading, fastcbw.export.nbd.server, fastcbw.export.nbd.client; print(threading.active_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout == "1\n"


@pytest.mark.parametrize("spin, expected", [("off", (0, False)), (20, (20, False)), ("20", (20, False)), ("adaptive", (50, True))])
def test_spin_is_off_adaptive_or_microseconds(spin, expected):
    assert parse_spin(spin) == expected


@pytest.mark.parametrize("spin", ["on", -1, 1001, "1.5", ""])
def test_a_spin_that_is_none_of_these_is_refused_by_name(spin):
    with pytest.raises(ValueError, match="spin: .* is neither off nor adaptive nor microseconds"):
        parse_spin(spin)


@pytest.mark.parametrize("spin", [50, "adaptive"])
def test_a_server_that_polls_answers_like_one_that_does_not(tmp_path, spin):
    with Server(tmp_path / "s", spin=spin) as server, MemoryDevice("1M") as disk:
        server.add_export("disk", disk)
        with Client(tmp_path / "s", "disk") as client:
            for i in range(200):
                client.write(i * 512, bytes([i]) * 512)
            assert client.read(0, 200 * 512) == b"".join(bytes([i]) * 512 for i in range(200))
