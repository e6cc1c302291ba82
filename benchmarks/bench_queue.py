"""Queues beside fio's own io_uring engine: random 4 KiB, O_DIRECT, on a disk, at depth 1 and 16, turn by turn.

The file is in FASTCBW_BENCH_FOLDER, default /var/tmp: a disk, since memory file systems have no queue. The disk is the
machine's, with whatever else uses it: look at the range, not only at the median.
"""

import json
import os
import statistics
import subprocess
import tempfile

import numpy as np
import pytest

from fastcbw.block.direct import DirectDevice
from fastcbw.block.queue import IoQueue
from fastcbw.block.queued import drive

BLOCK = 4096
GOAL = 0.9      # of fio's requests per second, for engine uring


@pytest.fixture(scope="module")
def image(request):
    length = (1 << 30) if request.config.getoption("--bench-size") == "full" else (32 << 20)
    with tempfile.TemporaryDirectory(dir=os.environ.get("FASTCBW_BENCH_FOLDER", "/var/tmp"), prefix="fastcbw-bench-") as folder:
        piece = np.random.default_rng(1).bytes(8 << 20)
        with open(f"{folder}/image", "wb") as file:
            for _ in range(length // len(piece)):
                file.write(piece)
            os.fsync(file.fileno())
        yield f"{folder}/image"


def fio_per_second(image, write, depth, seconds):
    words = ["fio", "--name=floor", f"--filename={image}", "--direct=1", "--ioengine=io_uring", f"--bs={BLOCK}", f"--iodepth={depth}",
             "--rw=" + ("randwrite" if write else "randread"), "--time_based", f"--runtime={seconds}", "--norandommap",
             "--randrepeat=0", "--output-format=json"]
    done = subprocess.run(words, check=True, capture_output=True, timeout=60)
    return json.loads(done.stdout)["jobs"][0]["write" if write else "read"]["iops"]


def ours_per_second(device, engine, write, depth, seconds, expected):
    """Drive for about SECONDS, given that about EXPECTED requests are done in one."""
    count = max(64, int(expected * seconds))
    offsets = np.random.default_rng().integers(0, device.length // BLOCK, count) * BLOCK
    room = np.full(depth * BLOCK + BLOCK, 0x5A, np.uint8)
    start = -room.ctypes.data % BLOCK
    memory = room[start:start + depth * BLOCK]
    with IoQueue(engine, depth) as queue:
        taken = drive(queue, device, offsets, memory, BLOCK, write=write)
    assert device.read(int(offsets[-1]), BLOCK) == (b"\x5a" * BLOCK if write else device.read(int(offsets[-1]), BLOCK))
    return count / taken


@pytest.mark.parametrize("depth", [1, 16])
@pytest.mark.parametrize("write", [False, True], ids=["randread", "randwrite"])
def test_random_4k_direct(request, benchmark, full, note, host, image, write, depth):
    seconds, rounds = (2, 5) if full else (1, 1)
    engines, figures = ("sync", "threads", "uring"), {name: [] for name in ("fio", "sync", "threads", "uring")}
    with DirectDevice(image) as device:
        for turn in range(rounds):
            order = ["fio", *engines]
            for name in order[turn % 4:] + order[:turn % 4] if turn else order:
                expected = figures[name][-1] if figures[name] else figures["fio"][0] if figures["fio"] else 1000
                if name == "fio":
                    figures[name].append(fio_per_second(image, write, depth, seconds))
                else:
                    figures[name].append(ours_per_second(device, name, write, depth, seconds, min(expected, 1e6)))
        benchmark.pedantic(lambda: ours_per_second(device, "uring", write, depth, 0.1, figures["uring"][-1]), rounds=1)
    benchmark.extra_info.update(host, size="full" if full else "smoke", depth=depth)
    note(f"{request.node.name}: requests per second, fio {statistics.median(figures['fio']):.0f}")
    for name in engines:
        ratios = sorted(ours / fio for ours, fio in zip(figures[name], figures["fio"]))
        ratio = statistics.median(ratios)
        benchmark.extra_info[f"{name} by fio"] = {"median": ratio, "least": ratios[0], "most": ratios[-1]}
        note(f"    {ratio:8.2f} x fio, {name} ({ratios[0]:.2f} to {ratios[-1]:.2f}), {statistics.median(figures[name]):.0f}")
    if request.config.getoption("--bench-goals"):
        assert benchmark.extra_info["uring by fio"]["median"] >= GOAL
