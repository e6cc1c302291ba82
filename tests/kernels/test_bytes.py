"""The zero test and CRC-32C, on every instruction set of this machine."""

import random

import pytest

from fastcbw.kernels import door

LENGTHS = [0, 1, 7, 8, 9, 63, 64, 65, 127, 128, 129, 255, 256, 257, 767, 768, 769, 4095, 4096, 4097, 65537]


@pytest.fixture(params=door.instruction_sets(), autouse=True)
def instruction_set(request):
    before = door.use_instruction_set(request.param)
    yield request.param
    door.use_instruction_set(before)


def plain_crc32c(data, seed=0):
    """The definition: one bit at a time, lowest first, polynomial 0x82f63b78."""
    crc = ~seed & 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return ~crc & 0xFFFFFFFF


@pytest.mark.parametrize(
    "data, crc",
    [  # the first from the catalogue of parametrised CRC algorithms, the others from RFC 3720, appendix B.4
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"", 0),
    ],
)
def test_crc32c_gives_the_published_answers(data, crc):
    assert door.crc32c(data) == crc


@pytest.mark.parametrize("length", [n for n in LENGTHS if n <= 4097])
def test_crc32c_is_the_definition_at_every_length_and_alignment(length):
    data = random.Random(length).randbytes(length + 8)
    for shift in (0, 1, 7):
        piece = memoryview(data)[shift:shift + length]
        assert door.crc32c(piece) == plain_crc32c(piece)


def test_crc32c_chains_over_any_cut():
    data = random.Random(5).randbytes(2000)
    whole = door.crc32c(data)
    for cut in (0, 1, 8, 255, 768, 1536, 1999, 2000):
        assert door.crc32c(data[cut:], door.crc32c(data[:cut])) == whole


def test_every_instruction_set_gives_the_same_checksum():
    data = random.Random(6).randbytes(1 << 20)
    mine = door.crc32c(data)
    door.use_instruction_set("generic")
    assert door.crc32c(data) == mine


@pytest.mark.parametrize("length", LENGTHS)
def test_zeroes_are_zero_and_one_bit_anywhere_is_found(length):
    buffer = bytearray(b"\xff" * 8 + bytes(length) + b"\xff" * 8)      # what is beside the range is not looked at
    inside = memoryview(buffer)[8:8 + length]
    assert door.is_zero(inside)
    places = range(length) if length <= 300 else {0, 1, 127, 128, 255, 256, length // 2, length - 129, length - 128, length - 1}
    for place in places:
        inside[place] = 0x80 if place & 1 else 1
        assert not door.is_zero(inside), place
        inside[place] = 0


@pytest.mark.parametrize("shift", range(8))
def test_the_zero_test_takes_any_alignment(shift):
    buffer = bytearray(4096 + 16)
    inside = memoryview(buffer)[shift:shift + 4096]
    assert door.is_zero(inside)
    inside[4095] = 1
    assert not door.is_zero(inside)


def test_what_is_no_buffer_is_refused():
    with pytest.raises(TypeError):
        door.is_zero("text")
    with pytest.raises(TypeError):
        door.crc32c(12)


def test_an_instruction_set_that_is_not_there_is_an_error_and_changes_nothing(instruction_set):
    with pytest.raises(ValueError, match="instruction set: 'sve9' is not one of this machine's .*generic"):
        door.use_instruction_set("sve9")
    assert door.instruction_set() == instruction_set
