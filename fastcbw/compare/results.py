"""Results: a document of a run's cells, kept in a folder cell by cell; medians and spreads of repetitions."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from fastcbw.compare.plan import Plan
from fastcbw.compare.process import version_of
from fastcbw.errors import Error
from fastcbw.version import __version__

FORM = "fastcbw-compare-1"
_RUN = "run.json"


def host() -> dict[str, Any]:
    """Return what a figure means nothing without."""
    facts: dict[str, Any] = {"machine": platform.machine(), "system": platform.platform(), "python": platform.python_version(),
                             "cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 2), "fastcbw": __version__}
    with open("/proc/cpuinfo") as lines:
        facts["cpu"] = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    for program, package in (("qemu-storage-daemon", "qemu-system-common"), ("nbdkit", "nbdkit"), ("fio", "fio"), ("nbdcopy", "libnbd-bin")):
        facts[program] = version_of(program, package) or "not installed"
    return facts


class Kept:
    """The cells of a run in FOLDER, one file each, so that a run that was interrupted goes on where it was.

    Raises ValueError when the folder has cells of a run with other settings.
    """

    def __init__(self, folder: str, plan: Plan):
        self.folder = folder
        os.makedirs(os.path.join(folder, "cells"), exist_ok=True)
        path = os.path.join(folder, _RUN)
        if os.path.exists(path):
            kept = _read(path)
            if kept.get("settings") != plan.settings():
                raise ValueError(f"folder: {folder} holds a run with other settings (name another folder, or remove it)")
        else:
            _write(path, {"form": FORM, "host": host(), "settings": plan.settings()})

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, "cells", f"{name}.json")

    def has(self, name: str) -> bool:
        """Tell whether the cell NAME is there; one that failed is to be measured again."""
        return os.path.exists(self._path(name)) and _read(self._path(name))["status"] != "failed"

    def put(self, name: str, record: dict[str, Any]) -> None:
        """Keep RECORD: whole or not at all."""
        _write(self._path(name), record)

    def document(self) -> dict[str, Any]:
        return load(self.folder)


def load(path: str) -> dict[str, Any]:
    """Return the document at PATH: a file that --json printed, or the folder of a run. Error when it is neither."""
    if os.path.isdir(path):
        cells = os.path.join(path, "cells")
        document = _read(os.path.join(path, _RUN))
        if document.get("form") == FORM:
            document["cells"] = [_read(os.path.join(cells, name)) for name in sorted(os.listdir(cells)) if name.endswith(".json")]
    else:
        document = _read(path)
    if not isinstance(document, dict) or document.get("form") != FORM or not isinstance(document.get("cells"), list):
        raise Error(f"{path}: holds no results of compare (expected what compare --json printed, or its folder)")
    return document


def _read(path: str) -> Any:
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise Error(f"{path}: is no JSON: {error}") from None


def _write(path: str, value: Any) -> None:
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump(value, file)
    os.replace(f"{path}.new", path)


class Group:
    """The repetitions of one scheme under one load with one target."""

    def __init__(self, scheme: str, load: str, target: str, records: list[dict[str, Any]]):
        self.scheme, self.load, self.target, self.records = scheme, load, target, records
        self.measured = [record for record in records if record["status"] == "measured"]

    @property
    def why(self) -> str | None:
        """Why there is no figure, or None."""
        return None if self.measured else self.records[0]["why"]

    def values(self, of: Callable[[dict[str, Any]], float | None]) -> list[float]:
        """Return what OF finds in each measured repetition, sorted."""
        return sorted(value for value in map(of, self.measured) if value is not None)

    def median(self, of: Callable[[dict[str, Any]], float | None]) -> float | None:
        values = self.values(of)
        return statistics.median(values) if values else None

    def middle(self, of: Callable[[dict[str, Any]], float | None]) -> dict[str, Any] | None:
        """Return the repetition whose figure is the median, or nearest to it: the one to draw."""
        found = [(value, record) for record in self.measured if (value := of(record)) is not None]
        if not found:
            return self.measured[0] if self.measured else None
        return sorted(found, key=lambda pair: pair[0])[(len(found) - 1) // 2][1]

    def verdict(self) -> str:
        """Return in a word whether the backups were right."""
        backups = [record["backup"] for record in self.measured]
        if not backups or backups[0] is None:
            return ""
        if any(backup["verified"] is False for backup in backups):
            return "WRONG"
        failed = sum(backup["error"] is not None for backup in backups)
        return "verified" if not failed else "failed" if failed == len(backups) else f"{failed} of {len(backups)} failed"


def groups(document: dict[str, Any], order: Iterable[str] = ()) -> list[Group]:
    """Return the groups of DOCUMENT, by target, load and scheme; schemes in ORDER, others after."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in document["cells"]:
        found.setdefault((record["target"], record["load"], record["scheme"]), []).append(record)
    rank = {name: number for number, name in enumerate(order)}
    keys = sorted(found, key=lambda key: (key[0], key[1], rank.get(key[2], len(rank)), key[2]))
    return [Group(key[2], key[1], key[0], sorted(found[key], key=lambda record: record["repetition"])) for key in keys]


def during_p99(record: dict[str, Any]) -> float | None:
    return record["guest"]["during"]["p99_us"]


def guest_p99(record: dict[str, Any]) -> float | None:
    """Return p99 with the requests that were due while one was under way, of a load of one after the other; else p99."""
    during = record["guest"]["during"]
    return during["p99_us"] if during["p99_paced_us"] is None else during["p99_paced_us"]


def steal(record: dict[str, Any]) -> float | None:
    """Return the share of the processors' time that the host took while the backup ran; None where nothing was measured, or by an older version."""
    return record.get("steal")


def ratios(group: Group, base: Group, of: Callable[[dict[str, Any]], float | None]) -> list[float]:
    """Return GROUP's figures by BASE's of the same repetition, sorted."""
    by_repetition = {record["repetition"]: of(record) for record in base.measured}
    pairs = ((of(record), by_repetition.get(record["repetition"])) for record in group.measured)
    return sorted(value / other for value, other in pairs if value is not None and other)
