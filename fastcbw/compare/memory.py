"""The machine's memory, as a measurement finds it."""

import mmap
import os


def touch_memory(length: int) -> None:
    """Touch LENGTH bytes of memory, half of what is free at most, and give them back.

    A virtual machine gets its memory from the host when it touches a page for the first time, and gives back what has been free
    for some seconds; a page that comes from the host takes several times as long. Without this whoever runs first pays for the others.
    """
    half = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    mmap.mmap(-1, max(min(length, half), mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()
