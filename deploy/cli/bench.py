"""``spikeport bench``: how fast the neurons' kernels are."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from .console import OK, Command, answer

_logger = logging.getLogger(__name__)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["neurons"], help="what is measured")
    parser.add_argument("--device", metavar="NAME", help="such as cuda:1 or cpu; default: a GPU")
    parser.add_argument(
        "--neurons",
        type=int,
        metavar="N",
        help="neurons of the layer (2^20 on a GPU, 2^12 on a CPU)",
    )
    parser.add_argument("--T", type=_numbers, metavar="T,T,...", help="time steps (8,16,32,64,128)")
    parser.add_argument(
        "--dtype",
        action="append",
        choices=["float32", "float16", "bfloat16"],
        help="may be repeated (float32 and float16)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/bench"), metavar="DIR", help="for JSON and charts"
    )
    parser.add_argument("--quick", action="store_true", help="few repeats, for a trial")


def _numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    return tuple(int(part) for part in text.split(","))


def _run(args: argparse.Namespace) -> int:
    from ..bench import neurons, report

    report.prepare(args.out)
    options = neurons.Options(
        args.device,
        args.neurons,
        args.T or neurons.Options.T,
        tuple(args.dtype or neurons.Options.dtypes),
        args.quick,
    )
    results = neurons.run(options, progress=_logger.info)
    files = report.write(results, args.out)
    text = "\n\n".join([report.tables(results), "\n".join(f"written: {file}" for file in files)])
    answer(args, text, {**results.to_dict(), "files": [str(file) for file in files]})
    return OK


COMMAND = Command(
    "bench", "how fast the neurons' kernels are, beside other frameworks", _run, _arguments
)
