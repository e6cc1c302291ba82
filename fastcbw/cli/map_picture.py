"""A map as a picture: the disk wound into rows, left to right, top to bottom, a colour for each state. Writes PNG by itself."""

from __future__ import annotations

import math
import struct
import zlib

import numpy as np

#: state -> (the colour's name, its red, green, blue). What the guest has changed since is drawn darker.
LEGEND: dict[str, tuple[str, tuple[int, int, int]]] = {
    "ram": ("orange", (242, 142, 43)),
    "disk": ("blue", (78, 121, 167)),
    "zero": ("white", (250, 250, 250)),
    "active": ("grey", (190, 190, 190)),
    "dropped": ("black", (20, 20, 20)),
    "changed": ("red", (225, 87, 89)),
    "unchanged": ("green", (140, 205, 125)),
    "plain": ("grey", (190, 190, 190)),
}
HOLE_RGB = (228, 228, 228)      # on the active disk, and there a hole
WIDTH = 512                     # pixels of a row of cells
CELLS_MAX = 512 * 512
CELL_BYTES_MIN = 4096


def draw(extents: list[dict], path: str) -> tuple[int, int]:
    """Draw EXTENTS, as fastcbw-map returns them, into the PNG file PATH; return width and height in pixels.

    A cell stands for as many bytes as make at most CELLS_MAX cells, and shows the rarest of the states it has: a single cluster in RAM
    must be seen on a disk of a terabyte.
    """
    pixels = paint(extents)
    with open(path, "wb") as file:
        file.write(png(pixels))
    return pixels.shape[1], pixels.shape[0]


def paint(extents: list[dict]) -> np.ndarray:
    """Return the picture as uint8 of shape (height, width, 3)."""
    length = extents[-1]["start"] + extents[-1]["length"] if extents else 0
    cell = CELL_BYTES_MIN
    while cell * CELLS_MAX < length:
        cell *= 2
    cells = max(1, -(-length // cell))
    columns = min(WIDTH, max(1, math.isqrt(cells)))
    columns = 1 << (columns - 1).bit_length() if columns > 1 else 1
    rows = -(-cells // columns)
    shown = np.full((rows * columns, 3), 255, np.uint8)
    # The most frequent first, so that the rare overwrite them where they share a cell.
    totals: dict[tuple[int, int, int], int] = {}
    for extent in extents:
        totals[_colour(extent)] = totals.get(_colour(extent), 0) + extent["length"]
    for colour in sorted(totals, key=totals.get, reverse=True):
        for extent in extents:
            if _colour(extent) == colour:
                shown[extent["start"] // cell : -(-(extent["start"] + extent["length"]) // cell)] = colour
    scale = max(1, WIDTH // columns)
    return shown.reshape(rows, columns, 3).repeat(scale, axis=0).repeat(scale, axis=1)


def _colour(extent: dict) -> tuple[int, int, int]:
    state = extent["state"]
    if state in ("active", "plain", "unchanged") and not extent["data"]:
        return HOLE_RGB
    red, green, blue = LEGEND[state][1]
    if extent.get("changed") and state != "zero":
        return red * 3 // 4, green * 3 // 4, blue * 3 // 4
    return red, green, blue


def png(pixels: np.ndarray) -> bytes:
    """Return PIXELS, uint8 of shape (height, width, 3), as a PNG file: eight bits a colour, no filter, one chunk of data."""
    height, width, _ = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = np.zeros((height, 1 + width * 3), np.uint8)
    lines[:, 1:] = pixels.reshape(height, width * 3)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(lines.tobytes(), 6)) + chunk(b"IEND", b""))
