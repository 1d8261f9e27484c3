"""``spikeport simulate``: a script written for an SDK, on the simulated SDK."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import redirect_stdout

from .console import Command, emit


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("vendor", choices=["ipu", "lynxi"], help="whose SDK")
    parser.add_argument("script", metavar="SCRIPT", help="a Python file")
    parser.add_argument("args", nargs=argparse.REMAINDER, metavar="ARGS", help="go to the script")


def _run(args: argparse.Namespace) -> int:
    from importlib import import_module

    simulator = import_module(f"...targets.{args.vendor}.simulator.simulate", __package__)
    run_script: Callable[..., int] = simulator.run_script
    if not args.json:
        return run_script(args.script, args.args)
    with redirect_stdout(sys.stderr):  # so that standard output holds the document alone
        code = run_script(args.script, args.args)
    emit({"script": args.script, "exit_code": code})
    return code


COMMAND = Command("simulate", "a script written for an SDK, on the simulated SDK", _run, _arguments)
