"""Arguments that several commands take, and the networks that they stand for."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ...converters.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

NET_EPILOG = """\
NET is path/to/file.py:Class or package.module:Class (a function that returns the network will do), or
path/to/file.nir; conv, fc and leaky are those in examples/:
  spikeport check examples/conv_fashion_mnist.py:CSNN --arg T=4 --arg channels=32 \\
      --checkpoint checkpoint_max.pth --key net --input 16,1,28,28 --target lynxi

"""
DATA = "fashion-mnist, a folder of IDX files, or an .npz with x and y"

_logger = logging.getLogger(__name__)


def net_argument(parser: argparse.ArgumentParser) -> None:
    """NET and what its class takes."""
    forms = "file.py:Class, package.module:Class, conv, fc or leaky"
    parser.add_argument("net", metavar="NET", help=forms)
    parser.add_argument(
        "--arg", action="append", default=[], metavar="K=V", help="for the class; may be repeated"
    )


def net_arguments(parser: argparse.ArgumentParser, inputs: bool) -> None:
    """NET with its weights, for :func:`build`; with ``inputs`` how it is converted, for :func:`network`."""
    net_argument(parser)
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="its weights")
    parser.add_argument("--key", metavar="KEY", help="where the state dict lies in the checkpoint")
    parser.add_argument(
        "--trust-pickle", action="store_true", help="a checkpoint may run code when it is read"
    )
    if inputs:
        parser.add_argument(
            "--input",
            action="append",
            default=[],
            metavar="SHAPE",
            help="shape of an input, batch first, as 16,1,28,28 or 16,1,28,28:float16; repeat it "
            "for several",
        )
        parser.add_argument(
            "--dtype", choices=["float16", "float32"], help="default: the target's own"
        )
        parser.add_argument(
            "--time",
            choices=["unrolled", "stepped"],
            default="unrolled",
            help="all time steps in one call (unrolled), or one step with its states as further inputs "
            "and outputs (stepped)",
        )
        parser.add_argument(
            "--keep-rounding",
            action="store_true",
            help="layers round as the network's own do: no batch norm goes into weights; slower",
        )


def artifact_arguments(parser: argparse.ArgumentParser) -> None:
    """An artifact, how much of the data it is run on, and where."""
    parser.add_argument("artifact", type=Path, metavar="DIR", help="what spikeport compile wrote")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N samples")
    parser.add_argument("--device", type=int, default=0, metavar="ID", help="device id (0)")
    parser.add_argument("--target", help="another target that loads it: ipu one for ipu-sim")


def build(args: argparse.Namespace) -> nn.Module:
    """The network with its weights."""
    import torch

    from ..checkpoint import load_checkpoint
    from ..network import build

    if args.checkpoint is None and (args.key is not None or args.trust_pickle):
        raise UsageError("--key and --trust-pickle are about a checkpoint: give --checkpoint FILE")
    torch.manual_seed(0)  # compile and compare build the same network where there is no checkpoint
    net = build(args.net, args.arg)
    if args.checkpoint is None:
        if not args.net.endswith(".nir"):  # which has its weights
            _logger.info("no --checkpoint: the weights are those of a fresh network, seeded with 0")
    else:
        load_checkpoint(net, args.checkpoint, args.key, trust_pickle=args.trust_pickle)
    return net


def network(args: argparse.Namespace) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The network with its weights, and example inputs."""
    from ...targets import get
    from ..network import example_inputs

    # What costs least is checked first.
    for name in [args.target] if isinstance(args.target, str) else args.target:
        get(name)
    inputs = example_inputs(args.input)
    return build(args), inputs
