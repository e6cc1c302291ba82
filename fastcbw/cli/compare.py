"""``fastcbw compare``: what each backup scheme does to a guest, measured on this machine."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from typing import IO

from fastcbw.cli.common import UsageError, add_json, percent, positive, print_json, size, terminate_as_interrupt
from fastcbw.units import format_size

SIZE_MIN = 1 << 20
#: Where a whole run keeps its cells, unless --folder names another place.
FOLDER = "fastcbw-compare"
SHM = "/dev/shm"
#: Options that say what is measured, and how.
MEASURING = ("quick", "full", "cross", "schemes", "loads", "targets", "repetitions", "size", "ram", "seconds", "trace", "steal_max",
             "unpinned", "folder", "work")


def add_parser(verbs) -> None:
    parser = verbs.add_parser(
        "compare", help="what each backup scheme does to a guest, on this machine",
        description="The same disk, guest load and target for each scheme: latencies of the guest before, during and after the backup, the "
                    "backup's time, bytes moved, memory. Every backup is compared with the disk at its instant. What is not installed is "
                    "said so in its row. docs/comparison.md tells how to read it.")
    parser.add_argument("--quick", action="store_true", help="a few schemes, within a minute (default)")
    parser.add_argument("--full", action="store_true",
                        help="every scheme, load and target, not each with each: about 35 minutes; "
                             f"kept in ./{FOLDER}, and goes on there when it is begun again")
    parser.add_argument("--cross", action="store_true", help="with --full: each with each, for hours")
    for what in ("schemes", "loads", "targets"):
        parser.add_argument(f"--{what}", metavar="NAME[,NAME...]", help=f"only these {what} (--list names all)")
    parser.add_argument("--list", action="store_true", help="name schemes, loads and targets, and end")
    parser.add_argument("--repetitions", type=positive, metavar="N", help="how often each is measured, in turns (default: quick 1, full 2 to 4)")
    parser.add_argument("--size", type=size, metavar="SIZE", help="length of the disk (default: quick 48M, full 96M)")
    parser.add_argument("--ram", type=size, metavar="SIZE", help="RAM tier of our schemes (default: 8M)")
    parser.add_argument("--seconds", type=positive, metavar="N", help="longest load beside a backup (default: quick 6, full 15)")
    parser.add_argument("--trace", metavar="FILE", help="what the load `trace` replays: recorded by a node x-fastcbw-trace, or written by hand")
    parser.add_argument("--steal-max", type=percent, metavar="PERCENT",
                        help="measure a cell anew, several times if need be, while the host took more than PERCENT of the processors' time "
                             "(of a virtual machine; default: keep it)")
    parser.add_argument("--unpinned", action="store_true", help="without it the server runs on core 0, load and target on core 1")
    parser.add_argument("--folder", metavar="DIR", help="keep the results there, cell by cell; go on with those that are there")
    parser.add_argument("--work", metavar="DIR", help=f"where the disks are meanwhile (default: {SHM}, where it has room, else TMPDIR)")
    parser.add_argument("--from", dest="results", metavar="FILE", help="measure nothing: kept results, a folder or what --json printed")
    parser.add_argument("--against", metavar="FILE", help="with --from: another run; does it say the same?")
    parser.add_argument("--html", metavar="FILE", help="write the report, one page with plots")
    parser.add_argument("--plots", metavar="DIR", help="write the plots of latency as SVG files")
    parser.add_argument("--csv", metavar="FILE", help="write a line for each measurement")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from fastcbw.compare.output import table

    if arguments.list:
        return _list()
    if arguments.results is not None:
        from fastcbw.compare.results import load

        given = [f"--{option.replace('_', '-')}" for option in MEASURING if (value := getattr(arguments, option)) is not None and value is not False]
        if given:
            raise UsageError(f"{', '.join(given)}: of a measurement, and with --from nothing is measured (leave one out)")
        document = load(arguments.results)
        if arguments.against is not None:
            return _agree(document, load(arguments.against))
    elif arguments.against is not None:
        raise UsageError("--against: names the second of two kept runs (give --from with the first)")
    else:
        document = _measure(arguments)
    if arguments.html:
        from fastcbw.compare.output import report

        _write(arguments.html, lambda file: file.write(report.page(document)))
    if arguments.plots:
        from fastcbw.compare.output import report

        os.makedirs(arguments.plots, exist_ok=True)
        for name, content in report.plots(document).items():
            _write(os.path.join(arguments.plots, name), lambda file, content=content: file.write(content))
    if arguments.csv:
        from fastcbw.compare.output import sheet

        _write(arguments.csv, lambda file: sheet.write(document, file))
    if arguments.json:
        print_json(document)
    else:
        print("\n".join(table.lines(document)))
    return 1 if any(_is_failure(cell) for cell in document["cells"]) else 0


def _agree(document: dict, other: dict) -> int:
    """Print whether two runs say the same; 1 when they don't."""
    from fastcbw.compare.output import agreement

    lines, same = agreement.lines(document, other)
    print("\n".join(lines))
    return 0 if same else 1


def _is_failure(cell: dict) -> bool:
    """Tell whether CELL could not be measured, or a backup of ours was wrong. One of QEMU's is a result, and stands in the table."""
    from fastcbw.compare.schemes import SCHEMES

    ours = cell["scheme"] not in SCHEMES or SCHEMES[cell["scheme"]].ours
    return cell["status"] == "failed" or (ours and bool(cell.get("backup")) and cell["backup"]["verified"] is False)


def _write(path: str, write: Callable[[IO[str]], object]) -> None:
    """Have WRITE fill the file at PATH; it is there when it is whole."""
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        write(file)
    os.replace(f"{path}.new", path)


def _measure(arguments: argparse.Namespace) -> dict:
    plan = _plan(arguments)
    from fastcbw.compare.run import run as measure

    terminate_as_interrupt()
    folder = arguments.folder or (FOLDER if arguments.full else None)
    temporary = None if folder else tempfile.mkdtemp(prefix="fastcbw-compare-")
    try:
        return measure(plan, folder or temporary, _work_folder(arguments.work, plan.length), lambda line: print(line, file=sys.stderr, flush=True))
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


def _plan(arguments: argparse.Namespace):
    from fastcbw.compare import plan
    from fastcbw.compare.loads import LOADS
    from fastcbw.compare.schemes import SCHEMES
    from fastcbw.compare.targets import TARGETS

    if arguments.quick and arguments.full:
        raise UsageError("--quick, --full: contradict each other (give one)")
    if arguments.cross and not arguments.full:
        raise UsageError("--cross: is for a full run (give --full)")
    traced = arguments.trace is not None
    fields = plan.full(traced, arguments.cross) if arguments.full else plan.quick()
    named = {}
    for what, known in (("schemes", SCHEMES), ("loads", LOADS), ("targets", TARGETS)):
        names = getattr(arguments, what)
        try:
            named[what] = None if names is None else plan.select(what, names, known)
        except ValueError as error:
            raise UsageError(f"--{error}") from None
    if traced and named["loads"] is None and not arguments.full:
        named["loads"] = ("trace",)
    fields["parts"] = plan.narrowed(fields["parts"], **named, repetitions=arguments.repetitions)
    length = arguments.size or fields["length"]
    if length < SIZE_MIN or length % 65536:
        raise UsageError(f"--size: {length} is no multiple of 64K from {format_size(SIZE_MIN)} on")
    fields["length"] = length
    if arguments.ram is not None:
        fields["ram"] = arguments.ram
    if arguments.seconds:
        fields["during_s_max"] = float(arguments.seconds)
        fields["during_s_min"] = min(fields["during_s_min"], fields["during_s_max"])
    if arguments.steal_max is not None:
        fields["steal_max"] = arguments.steal_max / 100
    if arguments.trace is not None:
        fields["trace"] = os.path.abspath(arguments.trace)
        _check_trace(arguments.trace)
    return plan.Plan(**fields, pinned=not arguments.unpinned and len(os.sched_getaffinity(0)) > 1)


def _check_trace(path: str) -> None:
    """Raise what is wrong with the trace at PATH before anything is measured with it."""
    from fastcbw.compare.loads.trace import parse

    with open(path, encoding="utf-8", errors="replace") as file:
        try:
            if not sum(1 for _ in parse(file, path)):
                raise UsageError(f"--trace: {path}: has no request")
        except ValueError as error:
            raise UsageError(f"--trace: {error}") from None


def _work_folder(named: str | None, length: int) -> str:
    from fastcbw.compare.run import ROOM

    if named is not None:
        return named
    if os.access(SHM, os.W_OK) and shutil.disk_usage(SHM).free > length * ROOM * 2:
        return SHM
    return tempfile.gettempdir()


def _list() -> int:
    from fastcbw.compare.loads import LOADS
    from fastcbw.compare.schemes import SCHEMES
    from fastcbw.compare.targets import TARGETS

    for what, known in (("schemes", SCHEMES), ("loads", LOADS), ("targets", TARGETS)):
        print(f"{what}:")
        for name, part in known.items():
            print(f"  {name:20} {part.title}")
    return 0
