"""The command ``fastcbw``: one verb per module, and one place where errors become an exit status and one line.

Exit status: 0 success, 1 a failed operation, 2 wrong usage, 130 Ctrl-C (143 SIGTERM, where a verb ends by it). With
FASTCBW_TRACEBACK=1 in the environment a failure shows where it happened.
"""

from __future__ import annotations

import errno
import os
import sys

from fastcbw.cli import backup, bitmap, compare, demo, graph, map, serve, snapshot, status, top
from fastcbw.cli.common import Parser, Terminated, UsageError, one_line
from fastcbw.version import __version__

VERBS = (demo, serve, snapshot, backup, bitmap, status, map, top, graph, compare)
#: Verbs of the interface that do not exist yet: refused by name.
VERBS_UNBUILT = ("restore",)


def parser() -> Parser:
    """Return the parser of the whole command line."""
    top = Parser(prog="fastcbw", description="A point-in-time view of a virtual disk while the guest keeps writing, "
                                             "and backups made from it.")
    top.add_argument("--version", action="version", version=f"fastcbw {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb in VERBS:
        verb.add_parser(verbs)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run the command line ARGV (default: the process's) and return the exit status."""
    _fill_standard_streams()
    status = _guarded(sys.argv[1:] if argv is None else argv)
    try:
        sys.stdout.flush()
    except OSError as error:
        if error.errno != errno.EPIPE:
            return _complain(f"standard output: {error.strerror}", status or 1)
        # Who read our output has gone; the interpreter would complain of it when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def _fill_standard_streams() -> None:
    """Open what the caller has closed of descriptors 0 to 2 on the null device: an image must never become one of them."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def _guarded(argv: list[str]) -> int:
    """Run ARGV; whatever goes wrong becomes one line and a status."""
    try:
        try:
            return _run(argv)
        except BaseException:
            if os.environ.get("FASTCBW_TRACEBACK", "") not in ("", "0"):
                import traceback
                traceback.print_exc()
            raise
    except UsageError as error:
        return _complain(error, 2)
    except Terminated:
        return 143
    except KeyboardInterrupt:
        return 130
    except SystemExit as ended:  # --help and --version
        return ended.code if isinstance(ended.code, int) else 0
    except BrokenPipeError:
        return 1
    except (ValueError, TypeError) as error:
        return _complain(error, 2)
    except Exception as error:  # fastcbw.Error, OSError, and what should not happen: one line all the same
        return _complain(error, 1)


def _run(argv: list[str]) -> int:
    if argv and argv[0] in VERBS_UNBUILT:
        exist = ", ".join(verb.__name__.rpartition(".")[2] for verb in VERBS)
        raise UsageError(f"{argv[0]}: not built yet (what exists: {exist})")
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    # argparse takes positionals in one run only: `serve a.img --socket s b.img` leaves b.img over.
    several = next((name for name in ("images", "disks") if hasattr(arguments, name)), None)
    if rest and (several is None or any(word.startswith("-") for word in rest)):
        words = argv[:2] if "action" in arguments else argv[:1]
        raise UsageError(f"unrecognized arguments: {' '.join(rest)} (see fastcbw {' '.join(words)} --help)")
    if rest:
        getattr(arguments, several).extend(rest)
    return arguments.run(arguments)


def _complain(error: BaseException | str, status: int) -> int:
    print(f"fastcbw: {error if isinstance(error, str) else one_line(error)}", file=sys.stderr)
    return status
