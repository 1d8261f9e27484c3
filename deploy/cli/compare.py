"""``spikeport compare``: a source network against its artifact."""

from __future__ import annotations

import argparse

from ...converters.errors import UsageError
from .arguments import DATA, NET_EPILOG, artifact_arguments, build, net_arguments
from .console import FOUND, OK, Command, answer


def _arguments(parser: argparse.ArgumentParser) -> None:
    artifact_arguments(parser)
    net_arguments(parser, inputs=False)
    parser.add_argument("--data", required=True, metavar="DATA", help=DATA)
    parser.add_argument(
        "--layers", type=int, default=64, metavar="N", help="samples whose spikes are compared (64)"
    )
    parser.add_argument(
        "--min-agreement",
        type=float,
        default=0.98,
        metavar="FRACTION",
        help="least fraction of equal predictions (0.98)",
    )


def _run(args: argparse.Namespace) -> int:
    from .. import data
    from ..artifact import load
    from ..compare import compare

    if not 0 <= args.min_agreement <= 1:
        raise UsageError(
            f"--min-agreement is {args.min_agreement:g}; allowed: a fraction from 0 to 1, such as 0.98"
        )
    dataset = data.load(args.data, limit=args.limit)
    net = build(args)
    with load(args.artifact, args.device, args.target) as model:
        loader = dataset.loader(model.batch)
        found = compare(net, model, loader, layers=args.layers, progress=True)
    ok = found.explained is not False and found.agreement >= args.min_agreement
    lines = [f"{dataset.name}: {found}"]
    if found.agreement < args.min_agreement:
        lines.append(f"the agreement is below the limit of {args.min_agreement:.2%}")
    answer(args, "\n".join(lines), {"data": dataset.name, "ok": ok, **found.to_dict()})
    return OK if ok else FOUND


COMMAND = Command("compare", "a source network against its artifact", _run, _arguments, NET_EPILOG)
