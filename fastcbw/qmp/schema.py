"""Commands described as data: what is validated, what query-commands lists and what the documentation says is one table.

The texts of the errors are QEMU's, since tools match them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from fastcbw.qmp.errors import COMMAND_NOT_FOUND, QmpError
from fastcbw.units import parse_size


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63


#: type name -> (accepts a decoded JSON value, how QEMU calls what it expected)
TYPES: dict[str, tuple[Callable[[object], bool], str]] = {
    "str": (lambda value: isinstance(value, str), "string"),
    "int": (_is_int, "integer"),
    "bool": (lambda value: isinstance(value, bool), "boolean"),
    "size": (lambda value: _is_int(value) or isinstance(value, str), "size: an integer, or a string like 64K"),
    "strings": (lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
                "array of strings"),
    "object": (lambda value: isinstance(value, dict), "object"),
    "objects": (lambda value: isinstance(value, list) and all(isinstance(item, dict) for item in value), "array of objects"),
}


@dataclass(frozen=True)
class Argument:
    """One argument of a command.

    name: as on the wire, with ``-``. type: a key of TYPES; a ``size`` reaches the command as bytes.
    """

    name: str
    type: str
    doc: str
    required: bool = False

    def check(self, value):
        """Return VALUE as the command gets it; QmpError naming the argument when it is of another type."""
        accepts, expected = TYPES[self.type]
        if not accepts(value):
            raise QmpError(f"Invalid parameter type for '{self.name}', expected: {expected}")
        if self.type == "size":
            try:
                return parse_size(value, self.name)
            except ValueError as error:
                raise QmpError(str(error)) from None
        return value


@dataclass(frozen=True)
class Command:
    """One command: ``run(daemon, **arguments)`` gets what was given, names with ``_``, and returns what goes back.

    open_ended: other members are the command's to check, and reach it under the names they have on the wire.
    paged: it returns a list, of which a part may be asked for (see replies.py): the server does that, run() does not hear of it.
    narrowed: the argument that makes a long reply of it shorter.
    """

    name: str
    doc: str
    run: Callable
    arguments: tuple[Argument, ...] = ()
    open_ended: bool = False
    paged: bool = False
    narrowed: str | None = None
    by_name: Mapping[str, Argument] = field(init=False, repr=False, compare=False)

    @property
    def page_arguments(self) -> tuple[str, ...]:
        """Where a page begins, and how much it holds: names on the wire, with our prefix where the command is QEMU's."""
        prefix = "" if self.name.startswith("fastcbw-") else "fastcbw-"
        return (f"{prefix}start", f"{prefix}limit") if self.paged else ()

    @property
    def page_hint(self) -> str:
        """By which arguments a reply gets shorter, or nothing."""
        return " and ".join(f"'{name}'" for name in self.page_arguments) if self.paged else f"'{self.narrowed}'" if self.narrowed else ""

    def __post_init__(self):
        if self.paged:
            docs = ("index of the first to return", "how many at most; as many as fit in a reply come, none after the last")
            more = tuple(Argument(name, "int", doc) for name, doc in zip(self.page_arguments, docs))
            object.__setattr__(self, "arguments", (*self.arguments, *more))
        object.__setattr__(self, "by_name", {argument.name: argument for argument in self.arguments})

    def check(self, given: object) -> dict:
        """Return the checked arguments as keywords. Raises QmpError for the first that is wrong; nothing has run."""
        if not isinstance(given, dict):
            raise QmpError("QMP input member 'arguments' must be an object")
        for argument in self.arguments:
            if argument.required and argument.name not in given:
                raise QmpError(f"Parameter '{argument.name}' is missing")
        if self.open_ended:
            for argument in self.arguments:
                if argument.name in given:
                    argument.check(given[argument.name])
            return dict(given)
        for name in given:
            if name not in self.by_name:
                raise QmpError(f"Parameter '{name}' is unexpected")
        return {name.replace("-", "_"): self.by_name[name].check(value) for name, value in given.items()}


class Schema:
    """All commands of a server, by name."""

    def __init__(self, commands: Iterable[Command]):
        self.commands: dict[str, Command] = {}
        for command in commands:
            assert command.name not in self.commands, command.name
            self.commands[command.name] = command

    def find(self, name: str) -> Command:
        """Return the command NAME; QmpError of class CommandNotFound when there is none."""
        try:
            return self.commands[name]
        except KeyError:
            raise QmpError(f"The command {name} has not been found", COMMAND_NOT_FOUND) from None


def split_request(request: object) -> tuple[str, object]:
    """Return (command name, arguments) of a decoded request; QmpError when it is no request at all."""
    if not isinstance(request, dict):
        raise QmpError("QMP input must be a JSON object")
    if "execute" not in request:
        raise QmpError("QMP input lacks member 'execute'")
    for member in request:
        if member not in ("execute", "arguments", "id"):
            raise QmpError(f"QMP input member '{member}' is unexpected")
    if not isinstance(request["execute"], str):
        raise QmpError("QMP input member 'execute' must be a string")
    return request["execute"], request.get("arguments", {})
