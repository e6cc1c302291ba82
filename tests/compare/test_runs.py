"""Runs: kept cell by cell, gone on with, and the command as users run it."""

import json
import os
import subprocess
import sys

import pytest

from fastcbw.compare import results, run as runs

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("FASTCBW_")}


def test_a_run_goes_on_with_the_cells_that_are_missing(plan, tmp_path, monkeypatch):
    small = plan("none", "filter-tiers", repetitions=2)
    measured = []

    def measure(cell, plan, folder):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(cell.name)
        return {"scheme": cell.scheme, "load": cell.load, "target": cell.target, "repetition": cell.repetition, "status": "not installed", "why": "a test"}

    monkeypatch.setattr(runs, "measure", measure)
    folder, work = tmp_path / "kept", tmp_path / "work"
    work.mkdir()
    with pytest.raises(KeyboardInterrupt):
        runs.run(small, str(folder), str(work), lambda line: None)
    assert len(results.load(str(folder))["cells"]) == 3 and list(work.iterdir()) == []
    monkeypatch.setattr(runs, "measure", lambda cell, plan, folder: measure(cell, plan, folder) if measured.clear() is None else None)
    said = []
    document = runs.run(small, str(folder), str(work), said.append)
    assert len(document["cells"]) == 4 and len(said) == 2 and said[1].startswith("[4/4] none")
    with pytest.raises(ValueError, match="other settings"):
        runs.run(plan("none", length=8 << 20), str(folder), str(work), said.append)


def test_the_command_without_peers_measures_ours_and_names_what_is_missing(tmp_path):
    words = [sys.executable, "-m", "fastcbw", "compare", "--schemes", "none,filter-tiers,qemu-fleecing", "--targets", "file", "--size", "4M",
             "--json"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=ENVIRONMENT | {"PATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    found = {(cell["scheme"], cell["load"]): cell for cell in json.loads(done.stdout)["cells"]}
    assert found["filter-tiers", "generator-4k"]["backup"]["verified"] is True
    assert found["none", "generator-4k"]["status"] == "measured"
    assert found["filter-tiers", "paced-4k"]["why"].startswith("not installed: fio")
    assert found["qemu-fleecing", "generator-4k"]["why"].startswith("not installed: qemu-storage-daemon")
    kept = tmp_path / "kept.json"
    kept.write_text(done.stdout)
    table = subprocess.run([*words[:4], "--from", kept], capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert table.returncode == 0 and "verified" in table.stdout and "not installed: fio" in table.stdout


def test_results_that_are_none_are_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{}")
    done = subprocess.run([sys.executable, "-m", "fastcbw", "compare", "--from", path], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 1 and "holds no results of compare" in done.stderr
