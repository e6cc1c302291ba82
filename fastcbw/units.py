"""Sizes as people write them: ``64K``, ``1.5G``, ``4096``."""

from __future__ import annotations

_FACTORS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}


def parse_size(value: int | str, what: str = "size") -> int:
    """Return the bytes that VALUE stands for.

    value: a non-negative int (bytes), or a string: digits, at most one point, one suffix of B K M G T P
        (powers of 1024; lower case accepted).
    what: the name of the thing, for the message.
    Raises ValueError naming the thing and the value when it is neither, negative, or no whole number of bytes;
    TypeError for any other type.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"{what}: expected an int or a string like 64K, got {type(value).__name__}")
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"{what}: {value} is negative")
        return value
    text = value.strip()
    suffix = text[-1:].upper() if text[-1:].isalpha() else ""
    digits = text[: len(text) - len(suffix)]
    whole, point, fraction = digits.partition(".")
    if suffix not in _FACTORS or not (whole + fraction).isascii() or not (whole + fraction).isdigit() or (point and not (whole and fraction)):
        raise ValueError(f"{what}: {value!r} is no size (digits and one of B K M G T P, powers of 1024, as in 64K)")
    factor = _FACTORS[suffix]
    scaled, rest = divmod(int(whole + fraction) * factor, 10 ** len(fraction))
    if rest:
        raise ValueError(f"{what}: {value!r} is no whole number of bytes")
    if scaled >= 1 << 63:
        raise ValueError(f"{what}: {value!r} is more than 2^63 - 1 bytes")
    return scaled


def format_size(size: int) -> str:
    """Return SIZE (bytes) for people: exact where a suffix divides it, else with one decimal."""
    for suffix in "PTGMK":
        factor = _FACTORS[suffix]
        if size >= factor:
            return f"{size // factor}{suffix}" if size % factor == 0 else f"{size / factor:.1f}{suffix}"
    return f"{size}B"
