"""The machine's memory, as a measurement finds it."""

import mmap


def touch_memory(length: int) -> None:
    """Touch LENGTH bytes of memory and give them back.

    A virtual machine gets its memory from the host when it touches a page for the first time, and gives back what has been free
    for some seconds; a page that comes from the host takes several times as long. Without this whoever runs first pays for the others.
    """
    mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()
