"""Checking arguments against the table."""

import re

import pytest

from fastcbw.qmp.errors import QmpError
from fastcbw.qmp.options import BACKUP_OPTIONS, SNAPSHOT_OPTIONS, refusals
from fastcbw.qmp.schema import Argument, Command, Schema, split_request

COMMAND = Command("c", "a command", lambda context: None, (
    Argument("name", "str", "", required=True), Argument("cluster-size", "size", ""), Argument("count", "int", ""),
    Argument("force", "bool", ""), Argument("disks", "strings", "")))


def test_arguments_reach_the_command_with_underscores_and_sizes_in_bytes():
    given = {"name": "s", "cluster-size": "64K", "count": -1, "force": True, "disks": ["a", "b"]}
    assert COMMAND.check(given) == {"name": "s", "cluster_size": 65536, "count": -1, "force": True, "disks": ["a", "b"]}


@pytest.mark.parametrize("given, text", [
    ({}, "Parameter 'name' is missing"),
    ({"name": "s", "nmae": 1}, "Parameter 'nmae' is unexpected"),
    ({"name": 1}, "Invalid parameter type for 'name', expected: string"),
    ({"name": "s", "count": True}, "Invalid parameter type for 'count', expected: integer"),
    ({"name": "s", "count": 1.0}, "Invalid parameter type for 'count', expected: integer"),
    ({"name": "s", "force": 1}, "Invalid parameter type for 'force', expected: boolean"),
    ({"name": "s", "disks": "a"}, "Invalid parameter type for 'disks', expected: array of strings"),
    ({"name": "s", "disks": [1]}, "Invalid parameter type for 'disks', expected: array of strings"),
    ({"name": "s", "cluster-size": "64Q"}, "cluster-size: '64Q' is no size"),
    ({"name": "s", "cluster-size": -1}, "cluster-size: -1 is negative"),
    ([], "QMP input member 'arguments' must be an object"),
])
def test_the_first_wrong_argument_is_named(given, text):
    with pytest.raises(QmpError, match=text):
        COMMAND.check(given)


@pytest.mark.parametrize("given, text", [
    ([], "QMP input must be a JSON object"),
    ({}, "QMP input lacks member 'execute'"),
    ({"execute": "c", "args": {}}, "QMP input member 'args' is unexpected"),
    ({"execute": 1}, "QMP input member 'execute' must be a string"),
])
def test_what_is_no_request_is_told_what_it_lacks(given, text):
    with pytest.raises(QmpError, match=text):
        split_request(given)


def test_an_unknown_command_has_the_error_class_of_qemu():
    with pytest.raises(QmpError) as caught:
        Schema([COMMAND]).find("d")
    assert caught.value.wire() == {"class": "CommandNotFound", "desc": "The command d has not been found"}


@pytest.mark.parametrize("options, given, text", [
    (SNAPSHOT_OPTIONS, {"durability": "power"}, r"durability: 'power' is not built yet \(what exists: none\)"),
    (SNAPSHOT_OPTIONS, {"on_full": "burn"}, r"on-full: 'burn' is unknown \(one of wait, break-snapshot"),
    (SNAPSHOT_OPTIONS, {"durability": "power"}, "durability: 'power' is not built yet"),
    (BACKUP_OPTIONS, {"order": "hot-first,up"}, r"order: 'up' is unknown \(there is sequential, ram-first"),
    (SNAPSHOT_OPTIONS, {"export": "rw"}, r"export: 'rw' is unknown \(one of ro, discard, read-once"),
    (BACKUP_OPTIONS, {"resume": True}, "resume: not built yet"),
])
def test_an_option_that_is_not_built_is_refused_by_name(options, given, text):
    assert re.match(text, refusals(options, given))


def test_the_defaults_and_what_is_switched_off_are_accepted():
    assert refusals(SNAPSHOT_OPTIONS, {"on_full": "break-snapshot", "copy_on_read": False, "bitmap": None}) is None
    assert refusals(BACKUP_OPTIONS, {"order": "ram-first", "consume": False, "verify": True}) is None
