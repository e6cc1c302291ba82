"""The two lists of protocol numbers are one."""

import pathlib
import re

from fastcbw.wire import constants


def test_the_numbers_of_the_loop_are_those_of_the_handshake():
    source = pathlib.Path(constants.__file__).with_suffix(".pxd").read_text()
    numbers = dict(re.findall(r"^    ([A-Z_]+) = (\w+)", source, re.MULTILINE))
    assert len(numbers) > 20
    assert {name: int(value, 0) for name, value in numbers.items()} == {name: getattr(constants, name) for name in numbers}
