#!/usr/bin/python3
"""Pull a snapshot over NBD in its copy order: what frees memory, or is about to cost the guest a copy, comes first.

    copy_in_order.py 'nbd+unix:///vm@monday?socket=/run/vm.sock' monday.img

Needs libnbd's Python binding (Debian: python3-libnbd). The order comes from the meta context x-fastcbw:order, whose flags are the class of
an extent, 0 to be copied first. It is asked anew after each class, since clusters change their class while the guest writes; a bitmap of
what was copied keeps anything from being copied twice, and the last pass takes whatever is left.
"""

import sys

import nbd

ORDER = "x-fastcbw:order"
ALLOCATION = "base:allocation"
UNIT = 4096                     # the finest cluster there is
CHUNK = 1 << 20                 # bytes of a read
ASK = 1 << 30                   # bytes of a BLOCK_STATUS request
ZERO = 2                        # of base:allocation


def extents(handle, context, size):
    """Yield (offset, length, flags) of the whole export in CONTEXT."""
    offset = 0
    while offset < size:
        found = []

        def note(name, begin, entries, error):
            if name == context:
                at = begin
                for length, flags in zip(entries[::2], entries[1::2]):
                    found.append((at, length, flags))
                    at += length

        handle.block_status(min(ASK, size - offset), offset, note)
        for at, length, flags in found:
            length = min(length, size - at)     # an extent may reach beyond what was asked
            yield at, length, flags
            offset = at + length


def copy(uri, path):
    """Copy the export at URI into the file PATH, class by class; return the bytes of each class, in the order of copying."""
    handle = nbd.NBD()
    for context in (ALLOCATION, ORDER):
        handle.add_meta_context(context)
    handle.connect_uri(uri)
    if not handle.can_meta_context(ORDER):
        raise SystemExit(f"{uri}: offers no {ORDER} (is it a snapshot of fastcbw?)")
    size = handle.get_size()
    done = bytearray(-(-size // UNIT))          # a byte per unit; a bitmap in anything serious
    zeroes = [(offset, length) for offset, length, flags in extents(handle, ALLOCATION, size) if flags & ZERO]
    copied = []
    with open(path, "wb") as target:
        target.truncate(size)
        for offset, length in zeroes:           # known without reading; the file has them already
            for unit in range(-(-offset // UNIT), (offset + length) // UNIT):
                done[unit] = 1
        wanted = 0
        while not all(done):
            classes = list(extents(handle, ORDER, size))
            last = wanted >= max(of_class for _, _, of_class in classes)
            bytes_of_class = 0
            for offset, length, of_class in classes:
                if of_class == wanted or last:
                    bytes_of_class += copy_range(handle, target, done, offset, length)
            copied.append(bytes_of_class)
            wanted += 1
    handle.shutdown()
    return copied


def copy_range(handle, target, done, offset, length):
    """Copy what is not done of a range, in runs of at most CHUNK bytes; return how many bytes that were."""
    unit, end = offset // UNIT, -(-(offset + length) // UNIT)
    total = 0
    while unit < end:
        if done[unit]:
            unit += 1
            continue
        first = unit
        while unit < end and not done[unit] and (unit - first) * UNIT < CHUNK:
            done[unit] = 1
            unit += 1
        begin = first * UNIT
        data = handle.pread(min(unit * UNIT, handle.get_size()) - begin, begin)
        target.seek(begin)
        target.write(data)
        total += len(data)
    return total


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} URI FILE")
    for number, length in enumerate(copy(sys.argv[1], sys.argv[2])):
        print(f"class {number}: {length} bytes")
