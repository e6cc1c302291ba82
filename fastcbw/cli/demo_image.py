"""The demo's disk: an ext4 image with real files, made by e2fsprogs, and the blocks that a guest may write.

Only blocks of file content and free blocks are written, so that the file system stays clean and e2fsck can tell.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess

from fastcbw.errors import Error

BLOCK = 4096
#: Share of the disk that is file content.
FILL_PERCENT = 40
DATA_FILES = 8
SMALL_FILES = 200
FREE_BLOCKS = 4096

_EXTENT = re.compile(r"^\s*(\d+)/\s*(\d+)\s+\d+/\s*\d+\s+\d+\s*-\s*\d+\s+(\d+)\s*-\s*(\d+)\s", re.MULTILINE)


def find_tool(name: str) -> str:
    """Return the path of a tool of e2fsprogs; fastcbw.Error naming the package when it is missing."""
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if found is None:
        raise Error(f"{name}: not found (install e2fsprogs)")
    return found


def run_tool(name: str, *arguments: str) -> str:
    """Run a tool of e2fsprogs and return its output; fastcbw.Error with its words when it fails."""
    done = subprocess.run([find_tool(name), *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise Error(f"{name}: {(done.stderr or done.stdout).strip()[-300:]} (exit status {done.returncode})")
    return done.stdout


def make_image(path: str, size: int, folder: str) -> None:
    """Make an ext4 image of SIZE bytes at PATH from a tree of files that is built in FOLDER and removed again."""
    tree = os.path.join(folder, "tree")
    try:
        _make_tree(tree, size * FILL_PERCENT // 100)
        with open(path, "xb") as image:
            image.truncate(size)
        run_tool("mkfs.ext4", "-q", "-F", "-b", str(BLOCK), "-m", "0", "-E", "nodiscard", "-d", tree, path)
    finally:
        shutil.rmtree(tree, ignore_errors=True)


def _make_tree(tree: str, content_bytes: int) -> None:
    """A few large files of content without a single zero block, and many small ones."""
    source = random.Random(1)
    os.makedirs(os.path.join(tree, "data"))
    for number in range(DATA_FILES):
        with open(os.path.join(tree, "data", f"file{number}"), "xb") as file:
            left = content_bytes // DATA_FILES
            while left > 0:
                file.write(source.randbytes(min(left, 1 << 20)))
                left -= 1 << 20
    for number in range(SMALL_FILES):
        folder = os.path.join(tree, "small", str(number % 10))
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, f"note{number}"), "x") as file:
            file.write(f"note {number}\n" * source.randrange(1, 500))


def content_blocks(path: str) -> list[int]:
    """Return the numbers of the blocks that hold the large files' content."""
    blocks: list[int] = []
    for number in range(DATA_FILES):
        for level, depth, first, last in _EXTENT.findall(run_tool("debugfs", "-R", f"dump_extents -l /data/file{number}", path)):
            if level == depth:  # a leaf: content, not a block of the extent tree
                blocks.extend(range(int(first), int(last) + 1))
    if not blocks:
        raise Error(f"{path}: debugfs names no block of the demo's files")
    return blocks


def free_blocks(path: str) -> list[int]:
    """Return numbers of some blocks that no file uses; they read as zeroes."""
    words = run_tool("debugfs", "-R", f"ffb {FREE_BLOCKS}", path).split()
    return [int(word) for word in words if word.isdigit()]


def is_clean(path: str) -> bool:
    """Tell whether e2fsck finds nothing to complain of in the file system at PATH, which is not touched."""
    done = subprocess.run([find_tool("e2fsck"), "-fn", path], capture_output=True, stdin=subprocess.DEVNULL)
    return done.returncode == 0
