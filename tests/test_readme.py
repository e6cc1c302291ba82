"""The examples of the README, and of the pages about what a snapshot can do, run as they stand."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = ("copy-on-read", "discard", "incremental", "snapshots", "tiers")


def examples_of(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S)


EXAMPLES = examples_of(ROOT / "README.md")


def test_the_readme_has_two_examples():
    assert len(EXAMPLES) == 2


@pytest.fixture(autouse=True)
def images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("vm.img", "data.img", "log.img"):
        (tmp_path / name).write_bytes(b"sector 0" * 64 + bytes(4 << 20))


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page_run_as_they_stand(page, capsys):
    examples = examples_of(ROOT / "docs" / f"{page}.md")
    assert examples
    for example in examples:
        exec(compile(example, f"{page}.md", "exec"), {"__name__": "__main__"})
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs_as_it_stands(example, tmp_path, capsys):
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    backups = sorted(path.name for path in tmp_path.glob("*.ba*")) + sorted(path.name for path in tmp_path.glob("backup*"))
    assert backups in (["backup.img"], ["data.bak", "log.bak"])
    for name in backups:
        assert (tmp_path / name).stat().st_size == 512 + (4 << 20)
    assert not list(tmp_path.glob("*.incomplete")) and "Traceback" not in capsys.readouterr().err
