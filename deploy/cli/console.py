"""What every command shares: how it is declared, its exit codes, what it prints."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

OK, FOUND, USAGE, TARGET, FILES, INTERRUPTED = 0, 1, 2, 3, 4, 130

EPILOG = """\
exit codes:
  0    done
  1    the network cannot run there (findings), it computes something else, or a verification failed
  2    an argument that cannot be used
  3    the target's SDK or the device is missing, or failed
  4    an artifact, data or a checkpoint that is missing, damaged or does not fit
  130  interrupted

Results go to standard output, all else to standard error. With --json there is one JSON document on
standard output, also for an error: {"error": its kind, "message": ..., "findings": [...]}.
"""


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: What the shell calls it.
        text: What it does, in a line.
        run: Runs it; gives the exit code.
        arguments: Adds its arguments to its parser, if it takes any.
        epilog: Further help.
    """

    name: str
    text: str
    run: Callable[[argparse.Namespace], int]
    arguments: Callable[[argparse.ArgumentParser], None] | None = None
    epilog: str = ""


def emit(document: Any) -> None:
    """Print a document as JSON."""
    print(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False))


def answer(args: argparse.Namespace, text: object, document: Any) -> None:
    """Print a command's result: the document with ``--json``, else the text."""
    if args.json:
        emit(document)
    else:
        print(text)


def progress(total: int, unit: str) -> Any:
    """A bar on standard error, if that is a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, unit=f" {unit}s", disable=None, leave=False)
