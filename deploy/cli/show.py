"""``spikeport show``: the conversion, pass by pass."""

from __future__ import annotations

import argparse

from ...converters.errors import UsageError
from .arguments import NET_EPILOG, net_arguments, network
from .console import OK, Command, answer


def _arguments(parser: argparse.ArgumentParser) -> None:
    net_arguments(parser, inputs=True)
    parser.add_argument("--target", required=True, metavar="NAME", help="see spikeport targets")
    parser.add_argument(
        "--pass", dest="only", metavar="NAME", help="this pass alone, and its graph"
    )


def _run(args: argparse.Namespace) -> int:
    import torch

    from ..show import steps

    net, inputs = network(args)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    found = steps(net, inputs, args.target, dtype, args.time, args.keep_rounding)
    names = [step.report.name for step in found]
    if args.only is not None:
        if args.only not in names:
            raise UsageError(f"{args.target} has no pass {args.only!r}; it has {', '.join(names)}")
        found = [step for step in found if step.report.name == args.only]
        text = "\n\n".join(map(str, found))
    else:
        reports = (str(step.report) for step in found[1:])
        text = "\n\n".join([str(found[0]), *reports, str(found[-1].program)])
    answer(args, text, {"target": args.target, "steps": [step.to_dict() for step in found]})
    return OK


COMMAND = Command("show", "the graph before and after, pass by pass", _run, _arguments, NET_EPILOG)
