"""``spikeport compile``: a network into an artifact."""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

from ...converters.errors import UsageError
from .arguments import NET_EPILOG, net_arguments, network
from .console import OK, Command, answer, progress


def _arguments(parser: argparse.ArgumentParser) -> None:
    net_arguments(parser, inputs=True)
    parser.add_argument("--target", required=True, metavar="NAME", help="see spikeport targets")
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="DIR", help="the artifact to write"
    )
    parser.add_argument("--force", action="store_true", help="replace an artifact that is there")
    parser.add_argument("--no-cache", dest="cache", action="store_false", help="compile anew")
    parser.add_argument(
        "--probe",
        action=argparse.BooleanOptionalAction,
        help="a second build that gives each layer's spikes; default: if the SDK is simulated",
    )
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false", help="do not run source and result"
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="K=V", help="of the target's compiler"
    )


def _run(args: argparse.Namespace) -> int:
    from ..compile import compile
    from ..network import parse_arguments
    from ..pipeline import convert

    options = parse_arguments(args.option)
    if own := sorted({*options} & {*inspect.signature(compile).parameters}):
        raise UsageError(
            f"--option {', '.join(own)}: no option of a target's compiler; this command has --output, "
            "--force, --no-cache and --probe"
        )
    net, inputs = network(args)
    with progress(total=2, unit="step") as bar:
        bar.set_description("convert and verify" if args.verify else "convert")
        program = convert(
            net,
            inputs,
            args.target,
            dtype=args.dtype,
            time=args.time,
            keep_rounding=args.keep_rounding,
            verify=args.verify,
        )
        bar.update()
        bar.set_description("compile")
        made = compile(
            program,
            args.output,
            overwrite=args.force,
            cache=args.cache,
            probe=args.probe,
            **options,
        )
        bar.update()
    if program.evidence is not None:
        print(program.evidence, file=sys.stderr)
    document = {"path": str(made.path), "cached": made.cached, "manifest": made.manifest}
    answer(args, made, document)
    return OK


COMMAND = Command("compile", "convert, verify and compile a network", _run, _arguments, NET_EPILOG)
