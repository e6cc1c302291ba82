"""The ratios of two commits' benchmarks."""

import importlib.util
import json
import pathlib

CI = pathlib.Path(__file__).resolve().parents[2] / "ci"


def load():
    spec = importlib.util.spec_from_file_location("bench_ratios", CI / "bench_ratios.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ratios_are_of_the_same_round_and_certain_ones_are_marked(tmp_path, capsys):
    medians = {"base-1": {"a": 1.0, "b": 2.0, "old": 1.0}, "here-1": {"a": 2.0, "b": 2.02, "new": 1.0},
               "base-2": {"a": 2.0, "b": 2.0, "old": 1.0}, "here-2": {"a": 3.0, "b": 1.98, "new": 1.0}}
    for name, benchmarks in medians.items():
        found = [{"fullname": benchmark, "stats": {"median": median}} for benchmark, median in benchmarks.items()]
        (tmp_path / f"{name}.json").write_text(json.dumps({"benchmarks": found}))
    load().main(str(tmp_path), "2")
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  1.750  (1.500 to 2.000)  a  slower", "  1.000  (0.990 to 1.010)  b", "only here: new", "gone: old"]
