"""The example client of the copy order, as it stands in examples/: libnbd's Python binding against a served snapshot."""

import importlib.util
import pathlib
import subprocess
import sys

import fastcbw

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "copy_in_order.py"
# The binding is a package of the system; a virtual environment does not see it.
PYTHON = sys.executable if importlib.util.find_spec("nbd") else "/usr/bin/python3"
K = 4096


def test_the_example_pulls_a_snapshot_class_by_class(tmp_path):
    image = tmp_path / "vm.img"
    image.write_bytes(b"".join(bytes([i % 255 + 1]) * K for i in range(1000)) + bytes(24 * K) + b"end")
    before = image.read_bytes()
    with fastcbw.open(image) as disk:
        disk.serve(tmp_path / "nbd")
        disk.snapshot("s", ram="1M", cluster_size="4K")
        for cluster in (3, 500, 501, 900):
            disk.write(cluster * K, b"new" * 1000)
        done = subprocess.run([PYTHON, str(EXAMPLE), f"nbd+unix:///vm@s?socket={tmp_path / 'nbd'}", str(tmp_path / "copy.img")],
                              capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "copy.img").read_bytes() == before
        refused = subprocess.run([PYTHON, str(EXAMPLE), f"nbd+unix:///vm?socket={tmp_path / 'nbd'}", str(tmp_path / "no.img")],
                                 capture_output=True, text=True, timeout=60)
        assert refused.returncode == 1 and "offers no x-fastcbw:order" in refused.stderr
