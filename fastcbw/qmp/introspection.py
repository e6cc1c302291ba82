"""query-qmp-schema: the table of commands in the form of QEMU's introspection.

Types of arguments are named by numbers, as QEMU does it, so that nobody relies on them; what a command returns is `any`.
"""

from __future__ import annotations

from fastcbw.qmp.schema import Schema

#: Our types of arguments -> entries of QEMU's built-in types.
_BUILTIN = {"str": "str", "int": "int", "bool": "bool", "size": "any", "strings": "[str]", "object": "any", "objects": "[any]"}
_TYPES = [
    {"name": "str", "meta-type": "builtin", "json-type": "string"},
    {"name": "int", "meta-type": "builtin", "json-type": "int"},
    {"name": "bool", "meta-type": "builtin", "json-type": "boolean"},
    {"name": "any", "meta-type": "builtin", "json-type": "value"},
    {"name": "[str]", "meta-type": "array", "element-type": "str"},
    {"name": "[any]", "meta-type": "array", "element-type": "any"},
    {"name": "0", "meta-type": "object", "members": []},
]


def describe_schema(schema: Schema) -> list[dict]:
    """Return the entries of SCHEMA's commands and of the types that they name."""
    entries = list(_TYPES)
    for number, command in enumerate(schema.commands.values(), 1):
        members = [{"name": argument.name, "type": _BUILTIN[argument.type], **({} if argument.required else {"default": None})}
                   for argument in command.arguments]
        entries.append({"name": str(number), "meta-type": "object", "members": members})
        entries.append({"name": command.name, "meta-type": "command", "arg-type": str(number), "ret-type": "any",
                        "allow-oob": False, "features": []})
    return entries
