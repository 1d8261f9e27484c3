"""snnTorch's tutorials: the network of each, converted for several targets and held against itself.

    python benchmarks/tutorials.py                          every network; prints the table
    python benchmarks/tutorials.py regression_2 sae         these alone
    python benchmarks/tutorials.py --target onnx regression_2

Needs snnTorch beside spikeport. Layers, sizes, loops and numbers of steps are those of
https://snntorch.readthedocs.io/en/latest/tutorials/; the last ones are of its documentation of the
neurons.

Float32. Each network is converted, which verifies it layer by layer (s: seconds, nodes: operators of
the result), compiled, loaded, and run on another batch than the one it was converted with. "equal": no
spike of any layer differs there, and "to" is the largest difference of an output, relative to the
largest output; "rank" is the highest of a tensor. "rate" is the mean firing rate over layers, so that
a silent network shows: the networks are not trained, so a neuron that would hardly fire has a threshold
that its potential reaches. Images are Fashion-MNIST's, events are drawn. lynxi-sim stores in float32.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from statistics import mean
from typing import Any

import snntorch as snn
import torch
from torch import nn
from torch.utils import _pytree as pytree
from tutorial_networks import TUTORIALS, build
from zoo import Row, compared

from spikeport import deploy

TARGETS = ("reference", "onnx", "lynxi-sim", "ipu-sim")


def convert(net: nn.Module, batch: Callable[[int], torch.Tensor], n: int, target: str) -> Row:
    """Convert, which verifies layer by layer; compile, load, and compare on another batch."""
    start = time.perf_counter()
    try:
        program = deploy.convert(net, (batch(n),), target, dtype="float32")
    except (deploy.FindingsError, deploy.UsageError, deploy.MismatchError) as error:
        reasons = getattr(error, "findings", None) or [error]
        return Row(verdict=f"REFUSED ({len(reasons)}): {reasons[0]}")
    seconds = time.perf_counter() - start
    calls = list(program.nodes("call_function"))
    x = batch(n)
    outputs, spikes, report = compared(net, program, x, n)
    with torch.no_grad():
        expected = net(x)
    rate = mean(s.mean().item() for s in spikes.values())
    differing = sum(sum(layer.differing) > 0 for layer in report.layers)
    if not report.explained:
        verdict = f"DIFFERS: {report.divergence}"
    elif differing:
        verdict = f"rounding flips spikes in {differing} layers"
    else:
        verdict = f"equal, to {_apart(outputs, expected):.1e}"
    ranks = [value.dim() for n in calls if hasattr(value := n.meta["val"], "dim")]
    return Row(len(calls), seconds, rate, f"{verdict}, rank {max(ranks)}")


def _apart(outputs: Any, expected: Any) -> float:
    """The largest difference of an output, relative to the largest output."""
    pairs = zip(pytree.tree_leaves(outputs), pytree.tree_leaves(expected), strict=True)
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NETWORK", help="all unless given")
    parser.add_argument("--target", action="append", choices=TARGETS, help="may be repeated")
    args = parser.parse_args()
    threads = f"{torch.get_num_threads()} threads"
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, snnTorch "
        f"{snn.__version__}, {threads}, float32, batch 2"
    )
    print(f"{'network':27} {'target':10} {'nodes':>5} {'s':>6} {'rate':>6}  verdict")
    for name in args.names or TUTORIALS:
        net, batch = build(name)
        for target in args.target or TARGETS:
            print(f"{name:27} {target:10} {convert(net, batch, 2, target)}", flush=True)


if __name__ == "__main__":
    main()
