"""The command line ``spikeport``, a file for each command.

What a command needs is imported when it runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from ...converters.errors import (
    ArtifactError,
    CheckpointError,
    DataError,
    FindingsError,
    SpikeportError,
    TargetError,
    UsageError,
)
from . import bench, bundle, check, compare, compile, run, show, simulate, targets, train
from .console import EPILOG, FILES, FOUND, INTERRUPTED, OK, TARGET, USAGE, Command, emit

_COMMANDS: tuple[Command, ...] = (
    targets.COMMAND,
    check.COMMAND,
    show.COMMAND,
    compile.COMMAND,
    run.COMMAND,
    compare.COMMAND,
    train.COMMAND,
    bundle.COMMAND,
    simulate.COMMAND,
    bench.COMMAND,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Its arguments; those of the process unless given.

    Returns:
        The exit code, as ``spikeport --help`` lists them.
    """
    given = sys.argv[1:] if argv is None else [*argv]
    try:
        args = parser().parse_args(given)
    except UsageError as error:
        return _fail(error, argparse.Namespace(json="--json" in given, traceback=False))
    args.argv = given
    with _diagnostics():
        try:
            code: int = args.run(args)
            sys.stdout.flush()
        except SpikeportError as error:
            return _fail(error, args)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:  # `spikeport show ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return OK
    return code


def parser() -> argparse.ArgumentParser:
    """What reads the arguments of every command."""
    made = _Parser(
        prog="spikeport",
        description="Trained spiking networks onto accelerators, proved to compute the same.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
    commands = made.add_subparsers(metavar="COMMAND", required=True)
    for command in _COMMANDS:
        its = commands.add_parser(
            command.name,
            help=command.text,
            description=command.text,
            epilog=command.epilog + EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        its.set_defaults(run=command.run)
        its.add_argument("--json", action="store_true", help="one JSON document")
        its.add_argument("--traceback", action="store_true", help="show where an error arose")
        if command.arguments is not None:
            command.arguments(its)
    return made


def _fail(error: SpikeportError, args: argparse.Namespace) -> int:
    if args.traceback:
        traceback.print_exception(error)
    if args.json:
        findings = error.findings if isinstance(error, FindingsError) else ()
        emit(
            {
                "error": type(error).__name__,
                "message": str(error),
                "findings": [f.to_dict() for f in findings],
            }
        )
    print(f"error: {error}", file=sys.stderr)
    codes: tuple[tuple[type[SpikeportError], int], ...] = (
        (UsageError, USAGE),
        (TargetError, TARGET),
        (ArtifactError, FILES),
        (DataError, FILES),
        (CheckpointError, FILES),
    )
    return next((code for kind, code in codes if isinstance(error, kind)), FOUND)


class _Parser(argparse.ArgumentParser):
    """Raises what it would leave the process with: :func:`main` says it as any other error."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and raise a UsageError."""
        self.print_usage(sys.stderr)
        raise UsageError(message)


@contextmanager
def _diagnostics() -> Iterator[None]:
    """What the library logs goes to standard error, as plain text."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("spikeport")
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


class _Version(argparse.Action):
    """Reads the version when it is asked for: looking it up takes time."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        parser.exit(OK, f"spikeport {version('spikeport')}\n")
