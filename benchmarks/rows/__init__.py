"""The rows of versus.py: what is measured, on which servers, and the goal. One module for each group.

A row has sides. A side is a function that starts what it measures afresh, measures once, and returns figures and settings. The first
side is ours; the goals compare it with the others, within one round.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

#: What a side returns: figures by name, and the settings it was measured with.
Measured = tuple[dict[str, float], dict]


@dataclass(frozen=True)
class Goal:
    """figure of ours, divided by that of the side BESIDE (None: as it is), at least or at most so much.

    pinned: only when measured so (None: both). of: the side whose figure it is (default: the first). beside_figure: another figure there.
    """

    figure: str
    beside: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    pinned: bool | None = None
    of: str | None = None
    beside_figure: str | None = None

    def value(self, runs: dict[str, dict[str, float]], first: str) -> float:
        """Of one round: the figures of each side."""
        value = runs[self.of or first][self.figure]
        if self.beside is None:
            return value
        other = runs[self.beside][self.beside_figure or self.figure]
        return value / other if other else float("inf")

    def met(self, value: float) -> bool:
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    def text(self) -> str:
        bound = f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:.3g}"
        return f"{self.of + ' ' if self.of else ''}{self.figure}{' / ' + self.beside if self.beside else ''} {bound}"


@dataclass
class Row:
    name: str
    sides: dict[str, Callable[[], Measured]]
    goals: list[Goal] = field(default_factory=list)
    memory: int = 0         # bytes that a side takes from the system: touched before each, see touch_memory of versus.py


class Bench:
    """What the rows share: the sizes, the pins, the folder with the image."""

    def __init__(self, size: dict, pinned: bool, folder: str, disk_folder: str):
        self.size = size
        self.pinned = pinned
        self.server_cpu, self.load_cpu = (0, 1) if pinned else (None, None)
        self.temporary = [tempfile.TemporaryDirectory(prefix="fastcbw-versus-", dir=path) for path in (folder, disk_folder)]
        self.folder, self.disk_folder = (one.name for one in self.temporary)
        self._images: set[str] = set()

    def image(self, on_disk: bool = False) -> str:
        """The image, filled when first asked for: neither zero nor compressible, so that nothing is skipped for being a hole."""
        path = os.path.join(self.disk_folder if on_disk else self.folder, "disk.img")
        if path not in self._images:
            piece = os.urandom(8 << 20)
            with open(path, "wb") as file:
                for i in range(self.size["image"] // len(piece)):
                    file.write(i.to_bytes(8, "little") + piece[8:])
                file.flush()
                os.fsync(file.fileno())
            self._images.add(path)
        return path

    def fresh(self, name: str, on_disk: bool = False, length: int | None = None) -> str:
        """An empty (sparse) file of the image's length, or LENGTH; 0: no file, only the path."""
        path = os.path.join(self.disk_folder if on_disk else self.folder, name)
        if os.path.exists(path):
            os.unlink(path)
        if length != 0:
            with open(path, "wb") as file:
                file.truncate(length or self.size["image"])
        return path

    def forget(self, path: str) -> None:
        if os.path.exists(path):
            os.unlink(path)

    def close(self) -> None:
        for one in self.temporary:
            one.cleanup()


def middle(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}
