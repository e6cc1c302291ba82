"""What the verbs share: the parser, options made from the tables, the way to the daemon, output."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys

from fastcbw.qmp.options import SNAPSHOT_OPTIONS, Option, refusals
from fastcbw.units import parse_size


class UsageError(Exception):
    """Wrong usage: exit status 2."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, to be treated as Ctrl-C is, with another exit status."""


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line and without abbreviations, which would break when options are added."""

    def __init__(self, **keywords):
        super().__init__(allow_abbrev=False, **keywords)

    def error(self, message: str):
        raise UsageError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


def one_line(error: BaseException) -> str:
    """Return what ERROR says as ``what: why`` on one line."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
        if error.filename2 is not None:
            text = f"{error.filename} -> {error.filename2}: {error.strerror}"
    return " ".join(text.split()) or type(error).__name__


def size(text: str) -> int:
    """Argument type: bytes, with a suffix or without."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("size: ")) from None


def positive(text: str) -> int:
    """Argument type: a whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def percent(text: str) -> float:
    """Argument type: a number from 0 to 100."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:       # false for a NaN, too
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 100")
    return value


_TYPES = {"size": (size, "SIZE"), "int": (positive, "N"), "str": (str, "VALUE")}


def add_options(parser: argparse.ArgumentParser, options: tuple[Option, ...], title: str) -> None:
    """Add the options of a table. What is not built is accepted here and refused by check_options, by its name."""
    group = parser.add_argument_group(title)
    for option in options:
        doc = option.doc + (" (not built yet)" if option.built == () else "")
        if option.type == "bool":
            group.add_argument(f"--{option.name}", action="store_const", const=True, help=doc)
        else:
            kind, metavar = _TYPES[option.type]
            metavar = option.metavar or ("|".join(option.built or option.choices) if option.choices else metavar)
            group.add_argument(f"--{option.name}", type=kind, metavar=metavar, help=doc)


def check_options(options: tuple[Option, ...], arguments: argparse.Namespace) -> dict:
    """Return the given options as keywords; UsageError for the first that can't be had."""
    given = {option.keyword: getattr(arguments, option.keyword) for option in options}
    given = {keyword: value for keyword, value in given.items() if value is not None}
    reason = refusals(options, given, "--")
    if reason is not None:
        raise UsageError(reason)
    if options is SNAPSHOT_OPTIONS:
        _check_snapshot(given)
    return given


def _check_snapshot(given: dict) -> None:
    """Let the engine's own rules refuse what no daemon can accept; what depends on its machine is left to it."""
    from fastcbw.cbw.options import SnapshotOptions

    alone = {keyword: given[keyword] for keyword in ("cluster_size", "cbw_timeout", "bitmap", "new_bitmap", "new_bitmap_granularity") if keyword in given}
    try:
        SnapshotOptions.parse(**alone)
    except (ValueError, TypeError) as error:
        option, colon, text = str(error).partition(":")
        raise UsageError(f"--{option.replace('_', '-')}{colon}{text}") from None
    if "spill" in given:
        given["spill"] = os.path.abspath(given["spill"])  # a daemon's folder is another


def refuse_unbuilt(**values) -> None:
    """Refuse each option (keyword) whose value is given: it is in the interface and does not exist yet."""
    for keyword, value in values.items():
        if value not in (None, False):
            raise UsageError(f"--{keyword.replace('_', '-')}: not built yet (leave the option out)")


def check_nbd_uri(text: str) -> bool:
    """Tell whether TEXT is an NBD URI; UsageError for one that makes no sense or is of a kind that is not built."""
    from fastcbw.block.nbd_uri import is_nbd_uri, parse_nbd_uri

    if not is_nbd_uri(text):
        return False
    try:
        parse_nbd_uri(text)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return True


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_qmp(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--qmp", metavar="PATH", help="QMP socket of the daemon (default: the environment's FASTCBW_QMP)")


def qmp_path(arguments: argparse.Namespace) -> str | None:
    """Return where the daemon is, or None when nobody said."""
    return arguments.qmp or os.environ.get("FASTCBW_QMP") or None


def connect(arguments: argparse.Namespace):
    """Return the daemon that the options name."""
    path = qmp_path(arguments)
    if path is None:
        raise UsageError("--qmp: which daemon? (give --qmp PATH, or set FASTCBW_QMP)")
    from fastcbw.qmp.remote import connect as connect_to

    return connect_to(path)


def print_json(value) -> None:
    """Print VALUE as one line of JSON, at once."""
    print(json.dumps(value), flush=True)


def print_table(heads: tuple[str, ...], rows: list[tuple]) -> None:
    """Print ROWS under HEADS, as table_lines gives them."""
    for line in table_lines(heads, rows):
        print(line)


def table_lines(heads: tuple[str, ...], rows: list[tuple]) -> list[str]:
    """Return ROWS under HEADS as lines, columns as wide as needed; numbers to the right."""
    cells = [tuple(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *cells)]
    right = [bool(rows) and all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(heads))]
    lines = []
    for line in (heads, *cells):
        padded = [cell.rjust(width) if number else cell.ljust(width) for cell, width, number in zip(line, widths, right)]
        lines.append("  ".join(padded).rstrip())
    return lines


def until(seconds: float | None) -> str:
    """A forecast for people: in the unit that leaves two or three digits; - for None."""
    if seconds is None:
        return "-"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def terminate_as_interrupt() -> None:
    """From here on SIGTERM interrupts as Ctrl-C does, so that what has begun is cleaned up."""

    def interrupt(number, frame):
        raise Terminated

    signal.signal(signal.SIGTERM, interrupt)


def warn(text: str) -> None:
    """Say TEXT on stderr, in the form of all messages."""
    print(f"fastcbw: {text}", file=sys.stderr)
