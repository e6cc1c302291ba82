"""The examples of the README run as they stand."""

import pathlib
import re

import pytest

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.M | re.S)


def test_the_readme_has_two_examples():
    assert len(EXAMPLES) == 2


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs_as_it_stands(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("vm.img", "data.img", "log.img"):
        (tmp_path / name).write_bytes(b"sector 0" * 64 + bytes(4 << 20))
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    backups = sorted(path.name for path in tmp_path.glob("*.ba*")) + sorted(path.name for path in tmp_path.glob("backup*"))
    assert backups in (["backup.img"], ["data.bak", "log.bak"])
    for name in backups:
        assert (tmp_path / name).stat().st_size == 512 + (4 << 20)
    assert not list(tmp_path.glob("*.incomplete")) and "Traceback" not in capsys.readouterr().err
