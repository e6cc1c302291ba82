"""map, top and status: what a person sees, what a script gets, and refusals."""

import json
import os
import pty
import select
import signal
import struct
import subprocess
import time
import zlib

import pytest
from cli_process import COMMAND, clean_environment, lines

from fastcbw.cbw.latency import LIMITS_NS
from fastcbw.cli import status, top
from fastcbw.cli.map_picture import LEGEND, paint, png
from fastcbw.export.nbd.client import Client
from fastcbw.qmp.remote import connect

K = 4096


@pytest.fixture
def daemon(served, run, tmp_path):
    """The image, with a snapshot, of which the guest has changed two clusters: one of data, one of zeroes."""
    with connect(tmp_path / "nbd.qmp") as remote:
        remote.snapshot("s", ["vm"], ram="1M", cluster_size="4K")
        with Client(str(tmp_path / "nbd"), "vm") as guest:
            guest.write(8 * K, b"n" * K)
            guest.write(512 * K, b"n" * K)
        yield remote


def test_map_prints_a_table_and_the_keys_of_qemu_img(daemon, run):
    done = run("map", "vm@s", "--qmp", "nbd.qmp")
    assert done.returncode == 0 and done.stderr == ""
    text = [line.split() for line in done.stdout.splitlines()]
    assert text[0] == ["OFFSET", "LENGTH", "STATE", "DATA", "CHANGED"]
    assert ["0x8000", "4K", "ram", "data", "changed"] in text and ["0x200000", "4K", "zero", "zero", "changed"] in text
    done = run("map", "vm@s", "--json", "--qmp", "nbd.qmp")
    rows = json.loads(done.stdout)
    assert sum(row["length"] for row in rows) == 4 << 20
    reference = subprocess.run(["qemu-img", "map", "--output", "json", "-f", "raw", "nbd+unix:///vm@s?socket=nbd"], cwd=os.path.dirname(daemon.client.path),
                               capture_output=True, text=True, timeout=60)
    theirs = json.loads(reference.stdout)
    assert set(theirs[0]) - {"offset"} - set(rows[0]) <= {"compressed"}

    def zeroes(found):
        return {unit for row in found if row["zero"] for unit in range(row["start"] // K, (row["start"] + row["length"]) // K)}

    assert zeroes(rows) == zeroes(theirs)


def unpack(data):
    """Decode a PNG of ours into rows of bytes."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length]) == (zlib.crc32(kind + body),)
        chunks[kind] = body
        at += 12 + length
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, colour) == (8, 2)
    raw = zlib.decompress(chunks[b"IDAT"])
    assert len(raw) == height * (1 + width * 3)
    return width, height, [raw[y * (1 + width * 3) + 1 : (y + 1) * (1 + width * 3)] for y in range(height)]


def test_map_draws_a_png_in_which_every_state_is_seen(daemon, run, tmp_path):
    done = run("map", "vm@s", "--png", "map.png", "--qmp", "nbd.qmp")
    assert (done.returncode, done.stdout) == (0, "map.png\n")
    width, height, rows = unpack((tmp_path / "map.png").read_bytes())
    assert width == height == 512
    seen = {row[i : i + 3] for row in rows for i in range(0, len(row), 3)}
    assert bytes(c * 3 // 4 for c in LEGEND["ram"][1]) in seen and bytes(LEGEND["zero"][1]) in seen and bytes(LEGEND["active"][1]) in seen


def test_a_picture_shows_one_cluster_on_a_terabyte():
    extents = [{"start": 0, "length": 1 << 39, "state": "active", "data": True}, {"start": 1 << 39, "length": K, "state": "ram", "data": True},
               {"start": (1 << 39) + K, "length": (1 << 39) - K, "state": "active", "data": False}]
    pixels = paint(extents)
    assert (pixels == LEGEND["ram"][1]).all(axis=2).sum() == 1
    assert unpack(png(pixels))[:2] == (512, 512)


def test_map_refuses_what_is_not_there(daemon, run, tmp_path):
    assert "no snapshot is named" in run("map", "vm@", "--qmp", "nbd.qmp").stderr
    done = run("map", "vm@no", "--qmp", "nbd.qmp")
    assert done.returncode == 1 and "snapshot vm@no: not found" in done.stderr
    done = run("map", "vm", "--png", "no/such/folder.png", "--qmp", "nbd.qmp")
    assert done.returncode == 1 and "no/such/folder.png: No such file" in done.stderr


def test_top_once_reports_rates_tiers_and_latencies(daemon, run):
    done = run("top", "--once", "--json", "--interval", "0.1", "--qmp", "nbd.qmp")
    assert done.returncode == 0, done.stderr
    (report,) = lines(done.stdout)
    assert report["disks"]["vm"]["latency_us"].keys() == {"settled", "preserving"}
    assert report["snapshots"]["vm@s"]["ram_limit"] == 1 << 20 and report["snapshots"]["vm@s"]["ram_bytes"] == K
    assert report["disks"]["vm"]["writes_per_s"] == 0 and set(report["exports"]) == {"vm", "vm@s"}
    done = run("top", "--once", "--interval", "0.05", "--qmp", "nbd.qmp")
    assert done.stdout.startswith("fastcbw ") and "vm@s" in done.stdout and "\x1b" not in done.stdout
    for bad in ("0", "x", "-1", "nan"):
        done = run("top", "--interval", bad, "--qmp", "nbd.qmp")
        assert done.returncode == 2 and "--interval" in done.stderr


def test_top_splits_the_latencies_of_guest_writes_by_whether_they_preserved(daemon, tmp_path):
    before = top.look(daemon)
    with Client(str(tmp_path / "nbd"), "vm") as guest:
        for cluster in (8, 9, 8, 10, 8, 8):         # the fixture has written 8
            guest.write(cluster * K, b"m" * K)
    now = top.look(daemon)
    disk = top.compare(before, now)["disks"]["vm"]
    assert {kind: of["count"] for kind, of in disk["latency_us"].items()} == {"settled": 4, "preserving": 2}
    for of in disk["latency_us"].values():
        assert 0 < of["p50"] <= of["p99"] <= of["p99.9"]
    assert disk["preserving_per_s"] > 0

    # The figures are those of the interval alone, each kind's own.
    ns = [int(limit) for limit in LIMITS_NS]
    before["latencies"]["vm"] = {"since": 1.0, "settled": [[ns[40], 1000], [ns[200], 50]], "preserving": []}
    now["latencies"]["vm"] = {"since": 1.0, "settled": [[ns[40], 1900], [ns[100], 95], [ns[200], 55]], "preserving": [[ns[150], 7]]}
    report = top.compare(before, now)
    latency = report["disks"]["vm"]["latency_us"]
    assert latency["settled"] == {"count": 1000, "p50": ns[40] / 1000, "p99": ns[100] / 1000, "p99.9": ns[200] / 1000}
    assert latency["preserving"] == {"count": 7, **dict.fromkeys(("p50", "p99", "p99.9"), ns[150] / 1000)}
    rows = [line.split() for line in top.lines(report)]
    assert any(row[:1] == ["vm"] and "settled" in row for row in rows) and any(row[:1] == ["preserving"] for row in rows)
    before["latencies"]["vm"]["since"] = 0.5        # measuring began anew in between: all that was measured since
    assert top.compare(before, now)["disks"]["vm"]["latency_us"]["settled"]["count"] == 2050


def test_top_paints_a_terminal_until_ctrl_c(daemon, tmp_path):
    """On a pseudo-terminal: it repaints in place, and Ctrl-C ends it with the cursor shown again."""
    leader, follower = pty.openpty()
    process = subprocess.Popen([*COMMAND, "top", "--interval", "0.1", "--qmp", "nbd.qmp"], cwd=tmp_path, stdin=follower, stdout=follower,
                               stderr=follower, env=clean_environment(TERM="xterm"), start_new_session=True)
    os.close(follower)
    seen = b""
    end = time.monotonic() + 60
    while seen.count(b"\x1b[H") < 3:
        assert select.select([leader], [], [], end - time.monotonic())[0], seen
        seen += os.read(leader, 65536)
    process.send_signal(signal.SIGINT)
    while True:
        try:
            more = os.read(leader, 65536)
        except OSError:
            break
        if not more:
            break
        seen += more
    assert process.wait(60) == 130
    os.close(leader)
    assert seen.startswith(b"\x1b[2J") and b"vm@s" in seen and seen.rstrip().endswith(b"\x1b[?25h")


def test_status_and_top_say_when_the_tiers_are_full(daemon):
    facts = daemon.status()["disks"]["vm"]["snapshots"]["s"]
    assert "full in 75 s at the present rate" in status._remarks(facts | {"seconds_to_full": 75.2})
    assert not any("full in" in remark for remark in status._remarks(facts | {"seconds_to_full": None}))
    seen = top.look(daemon)
    for seconds, words in ((75.2, "75 s"), (600, "10 min"), (None, "-")):
        seen["status"]["disks"]["vm"]["snapshots"]["s"]["seconds_to_full"] = seconds
        assert [line for line in top.lines(top.compare(seen, seen | {"at": seen["at"] + 1})) if line.startswith("vm@s ")][0].endswith(words)


def test_status_prints_prometheus_text(daemon, run):
    done = run("status", "--prometheus", "--qmp", "nbd.qmp")
    assert done.returncode == 0
    assert 'fastcbw_snapshot_ram_bytes{disk="vm",snapshot="s"} 4096\n' in done.stdout
    assert 'fastcbw_nbd_writes_total{export="vm"} 2\n' in done.stdout
    done = run("status", "--prometheus", "--json", "--qmp", "nbd.qmp")
    assert done.returncode == 2 and "--prometheus" in done.stderr
