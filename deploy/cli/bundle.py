"""``spikeport bundle``: an artifact for a machine with an old SDK."""

from __future__ import annotations

import argparse
from pathlib import Path

from .console import OK, Command, answer


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="DIR", help="an artifact compiled for onnx")
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="DIR", help="the bundle to write"
    )


def _run(args: argparse.Namespace) -> int:
    from ..bundle import bundle

    path = bundle(args.artifact, args.output)
    text = f"{path}: run.py there needs the Lynxi SDK, NumPy and Python 3.8"
    answer(args, text, {"path": str(path), "files": sorted(p.name for p in path.iterdir())})
    return OK


COMMAND = Command(
    "bundle", "an onnx artifact for a machine with an old Lynxi SDK", _run, _arguments
)
