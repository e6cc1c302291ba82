"""The options of a node kind as data: what is checked, what query-qmp-schema may show and what the pages say is one table.

Texts of errors are QEMU's, since tools match them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastcbw.errors import Error


@dataclass(frozen=True)
class NodeOption:
    """One option of a kind. type: "str", "int", "bool", "dict", "dicts" or "strings"; choices: all values of a "str"; ignored: why it may be
    given and changes nothing here (QEMU has it, and every value of it means the same to us)."""

    name: str
    type: str
    doc: str
    required: bool = False
    choices: tuple[str, ...] = ()
    least: int | None = None

    def check(self, value: Any) -> Any:
        """Return VALUE; Error naming the option when it is of another type or none of the choices."""
        accepts, expected = _TYPES[self.type]
        if not accepts(value):
            raise Error(f"Invalid parameter type for '{self.name}', expected: {expected}")
        if self.choices and value not in self.choices:
            raise Error(f"Parameter '{self.name}' does not accept value '{value}' (there is {', '.join(self.choices)})")
        if self.least is not None and value < self.least:
            raise Error(f"Parameter '{self.name}' expects a value of at least {self.least}, not {value}")
        return value


_TYPES: dict[str, tuple[Any, str]] = {
    "str": (lambda value: isinstance(value, str), "string"),
    "int": (lambda value: isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63, "integer"),
    "bool": (lambda value: isinstance(value, bool), "boolean"),
    "dict": (lambda value: isinstance(value, dict), "object"),
    "dicts": (lambda value: isinstance(value, list) and all(isinstance(item, dict) for item in value), "array of objects"),
    "strings": (lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value), "array of strings"),
}

#: What every kind takes. The cache and discard options are accepted with the values that are true here.
COMMON = (
    NodeOption("driver", "str", "the kind of the node", required=True),
    NodeOption("node-name", "str", "its name; a child written in place may go without"),
    NodeOption("read-only", "bool", "nobody may write it (default false)"),
    NodeOption("auto-read-only", "bool", "read-only where it can't be opened for writing (default false)"),
    NodeOption("discard", "str", "whether trims reach the image (default unmap)", choices=("unmap", "on")),
    NodeOption("detect-zeroes", "str", "whether writes of zeroes become holes (default off)", choices=("off",)),
    NodeOption("force-share", "bool", "open without locks that keep others out (default false)"),
)


def check_options(driver: str, table: Sequence[NodeOption], children: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of GIVEN that are no children, checked; Error for the first that is wrong."""
    known = {option.name: option for option in (*COMMON, *table)}
    for name in given:
        if name not in known and name not in children:
            raise Error(f"Parameter '{name}' is unexpected (driver '{driver}' does not have it)")
    for option in known.values():
        if option.required and option.name not in given:
            raise Error(f"Parameter '{option.name}' is missing")
    for name in children:
        if name not in given:
            raise Error(f"Parameter '{name}' is missing")
    return {name: known[name].check(value) for name, value in given.items() if name in known}
