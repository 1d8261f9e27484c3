"""``spikeport check``: all that would stop a network."""

from __future__ import annotations

import argparse

from .arguments import NET_EPILOG, net_arguments, network
from .console import FOUND, OK, Command, answer


def _arguments(parser: argparse.ArgumentParser) -> None:
    net_arguments(parser, inputs=True)
    parser.add_argument(
        "--target", action="append", required=True, metavar="NAME", help="may be repeated"
    )


def _run(args: argparse.Namespace) -> int:
    from ..pipeline import check

    net, inputs = network(args)
    findings = check(
        net, inputs, args.target, args.dtype, time=args.time, keep_rounding=args.keep_rounding
    )
    document = {"ok": not findings.errors, "findings": [f.to_dict() for f in findings]}
    answer(args, findings, document)
    return FOUND if findings.errors else OK


COMMAND = Command(
    "check", "all findings that stop a network on targets", _run, _arguments, NET_EPILOG
)
