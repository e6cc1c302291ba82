"""`x-fastcbw-fault`: its child, failing or stalling where rules say so. For tests of what is above it."""

from __future__ import annotations

import errno
from typing import Any

from fastcbw.block.fault import OPERATION_NAMES, RULES_LIMIT, FaultDevice
from fastcbw.errors import Error
from fastcbw.graph.kinds.base import Kind
from fastcbw.graph.node import Node
from fastcbw.graph.options import NodeOption

#: Of one rule.
RULE = (
    NodeOption("operation", "str", "what it fails", required=True, choices=OPERATION_NAMES),
    NodeOption("errno", "str", "the error, as ENOSPC (default EIO); none: it only stalls"),
    NodeOption("offset", "int", "requests that touch the range from here on (default 0)", least=0),
    NodeOption("length", "int", "bytes of the range (default: to the end)", least=1),
    NodeOption("after", "int", "so many matching requests pass before (default 0)", least=0),
    NodeOption("after-bytes", "int", "so many bytes of matching requests pass before: a disk that fills up (default 0)", least=0),
    NodeOption("count", "int", "so many fail (default: all from then on)", least=1),
    NodeOption("stall-ms", "int", "milliseconds that a request waits before it fails or goes on (default 0)", least=0),
)


class Fault(Kind):
    driver = "x-fastcbw-fault"
    options = (NodeOption("rules", "dicts", "what fails: operation, errno, offset, length, after, after-bytes, count, stall-ms (default: nothing)"),)
    children = {"file": "filtered"}
    changeable = ("rules",)

    def open(self, node: Node) -> None:
        device = FaultDevice(node.joint("file"), name=node.name, io="threads")
        node.rules = _install(device, node.options)
        node.device = device

    def change(self, node: Node, options: dict[str, Any]) -> None:
        before = node.rules
        node.rules = _install(node.device, options)
        for rule in before:
            rule.remove()

    def let_go(self, node: Node) -> None:
        for rule in node.rules:
            rule.remove()

    def close(self, node: Node) -> None:
        """The child is not ours."""
        self.let_go(node)


def _install(device: FaultDevice, options: dict[str, Any]) -> list[Any]:
    rules = options.get("rules", [])
    if len(rules) > RULES_LIMIT // 2:         # half: change() has the old ones and the new ones at once
        raise Error(f"Parameter 'rules' has {len(rules)} rules (at most {RULES_LIMIT // 2})")
    made: list[Any] = []
    try:
        for number, rule in enumerate(rules):
            made.append(_rule(device, number, rule))
    except BaseException:
        for one in made:
            one.remove()
        raise
    return made


def _rule(device: FaultDevice, number: int, given: dict[str, Any]) -> Any:
    known = {option.name: option for option in RULE}
    for name, value in given.items():
        if name not in known:
            raise Error(f"Parameter 'rules[{number}].{name}' is unexpected (there is {', '.join(known)})")
        known[name].check(value)
    if "operation" not in given:
        raise Error(f"Parameter 'rules[{number}].operation' is missing")
    word = given.get("errno", "EIO")
    code = 0 if word == "none" else getattr(errno, word, None) if word.startswith("E") else None
    if code is None:
        raise Error(f"Parameter 'rules[{number}].errno' does not accept value '{word}' (a name as ENOSPC, or none)")
    try:
        return device.fail_on(given["operation"], given.get("offset", 0), given.get("length"), errno=code, count=given.get("count", -1),
                              after=given.get("after", 0), after_bytes=given.get("after-bytes", 0), stall_ms=given.get("stall-ms", 0))
    except ValueError as error:
        raise Error(f"Parameter 'rules[{number}]': {error}") from None
