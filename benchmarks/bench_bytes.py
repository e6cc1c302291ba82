"""Zero test and CRC-32C of buffers, beside memcmp, memcpy, NumPy and zlib."""

import zlib

import numpy as np
import pytest

from fastcbw.kernels import door


@pytest.fixture(params=[4 << 10, 64 << 10, 1 << 20, 64 << 20], ids=["4K", "64K", "1M", "64M"])
def length(request, full):
    return request.param if full else min(request.param, 1 << 20)


def test_zero_test_of_zeroes(beside, length):
    buffer = np.full(length, 1, np.uint8)
    buffer[:] = 0                       # pages of its own: an untouched array is one page of zeroes many times
    view, other = memoryview(buffer), memoryview(buffer.copy())
    spare = np.ones(length, np.uint8)
    assert door.is_zero(buffer)
    as_bytes, zeroes = bytes(view), bytes(other)
    beside(lambda: door.is_zero(buffer), {
        "memcmp with a second buffer": lambda: as_bytes == zeroes,
        "numpy": lambda: buffer.any(),
        "memcpy": lambda: np.copyto(spare, buffer),
    }, bytes=length)


def test_zero_test_of_data_ends_early(beside, length):
    buffer = np.random.default_rng(1).integers(1, 256, length, dtype=np.uint8)
    empty = b""
    assert not door.is_zero(buffer)
    beside(lambda: door.is_zero(buffer), {"the call alone": lambda: door.is_zero(empty)})


def test_crc32c(beside, length):
    buffer = np.random.default_rng(2).integers(0, 256, length, dtype=np.uint8)
    spare = np.ones(length, np.uint8)
    ours = door.crc32c(buffer)
    before = door.use_instruction_set("generic")
    assert door.crc32c(buffer) == ours
    door.use_instruction_set(before)
    beside(lambda: door.crc32c(buffer), {
        "zlib.crc32": lambda: zlib.crc32(buffer),
        "memcpy": lambda: np.copyto(spare, buffer),
    }, bytes=length)
