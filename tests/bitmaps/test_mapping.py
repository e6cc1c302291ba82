"""Mapping: memory of our own that costs nothing until it is written."""

import numpy as np
import pytest

from fastcbw.bitmaps.mapping import Mapping


def test_two_gibibytes_with_scattered_writes_have_under_a_mebibyte_resident():
    mapping = Mapping("2G")
    array = np.frombuffer(mapping, np.uint64)
    assert mapping.resident() == 0
    for place in np.random.default_rng(1).choice(len(array), 64, replace=False):
        array[place] = place + 1
    assert 0 < mapping.resident() <= 64 * 4096 < 1 << 20


def test_a_mapping_is_zero_and_keeps_what_is_written():
    mapping = Mapping(10_000)
    array = np.frombuffer(mapping, np.uint8)
    assert len(mapping) == mapping.length == len(array) == 10_000
    assert not array.any()
    array[9_999] = 7
    assert memoryview(mapping)[9_999] == 7


def test_the_memory_lives_as_long_as_a_buffer_taken_of_it():
    mapping = Mapping(4096)
    array = np.frombuffer(mapping, np.uint8)
    array[:] = 5
    del mapping
    assert (array == 5).all()


@pytest.mark.parametrize("length, error", [(0, ValueError), (-1, ValueError), ("12Q", ValueError), (1.5, TypeError), (1 << 62, MemoryError)])
def test_a_length_that_makes_no_sense_is_refused(length, error):
    with pytest.raises(error):
        Mapping(length)
