"""What is asked of the neurons' kernels, against what is measured, in one run on one GPU.

    python benchmarks/cuda_neurons.py                   all of it
    python benchmarks/cuda_neurons.py --elements 26     T x N = 2^26 instead of 2^27

Needs SpikingJelly 2.0.0 beside spikeport. Times are those of ``spikeport bench neurons``, see
``deploy/bench/timing.py``. Exit code 1 if something asked is not met.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator

import torch
from asked import Table

from spikeport.deploy.bench import contestants, neurons
from spikeport.deploy.bench.contestants import LAYER_FUSED, NODES, SPIKINGJELLY
from spikeport.deploy.bench.neurons import Cell, Entry
from spikeport.deploy.bench.timing import Timer

DTYPES = ("float32", "float16")
PASSES = ("forward", "forward_backward")
#: Time steps beside those that others are measured for too.
LONG = (16, 32, 64, 128)
#: Configurations whose first result is timed: neuron, dtype, T.
FIRST = [
    ("IF", "float32", 4),
    ("LIF", "float32", 8),
    ("LIF", "float16", 16),
    ("LIF", "float16", 128),
]
CHILD = """
import json, sys, time, torch
from spikeport.deploy.bench.contestants import NODES
torch.zeros(1, device="cuda").sum().item()
seconds = []
for kind, dtype, T in json.loads(sys.argv[1]):
    x = torch.rand(T, 2**20, device="cuda", dtype=getattr(torch, dtype)).requires_grad_()
    torch.cuda.synchronize()
    start = time.perf_counter()
    spikes = NODES[kind](backend="fused")(x)
    torch.autograd.grad(spikes, x, torch.ones_like(x))
    torch.cuda.synchronize()
    seconds.append(time.perf_counter() - start)
print(json.dumps(seconds))
"""


def measured(kind: str, dtype: str, T: int, elements: int, others: bool, timer: Timer) -> Cell:
    """Ours in one cell, with others beside it or without."""
    found = [c for c in contestants.patterns(kind, fused=True) if c.name == LAYER_FUSED]
    if others:
        found += contestants.spikingjelly(kind, neurons.DTYPES[dtype], timer.device)
        found.append(contestants.compiled(kind))
    return neurons.measure(kind, dtype, T, max(elements // T, 1), found, timer)


def ratio(entry: Entry | None, ours: Entry, what: str) -> float | None:
    """How many times as long another takes."""
    theirs = getattr(entry, what) if entry else None
    return None if theirs is None else theirs / getattr(ours, what)


def fastest(cell: Cell, what: str) -> Entry | None:
    """SpikingJelly's fastest way."""
    found = [e for e in cell.entries if e.name.startswith(SPIKINGJELLY)]
    working = [e for e in found if getattr(e, what) is not None]
    return min(working, key=lambda e: getattr(e, what), default=None)


def layers(table: Table, cells: Iterable[Cell]) -> None:
    """Fractions of the roofline, and ratios to the others."""
    for cell in cells:
        name = f"{cell.neuron} {cell.dtype} T={cell.T}"
        ours = cell.entry(LAYER_FUSED)
        assert ours is not None
        assert ours.errors is not None
        for what in PASSES:
            said = f"{name} {what.replace('_', ' + ')}"
            table.at_least(f"{said}: of the roofline", 0.9, getattr(ours, f"{what}_fraction"))
            best, node = fastest(cell, what), cell.entry(f"{SPIKINGJELLY} node")
            against = best.name if best else SPIKINGJELLY
            if cell.dtype == "float32":
                asked = 1.5 if what == "forward" else 1.3
                table.at_least(f"{said}: x {against}", asked, ratio(best, ours, what))
            else:
                against = node.name if node else SPIKINGJELLY
                table.at_least(f"{said}: x {against}", 10, ratio(node, ours, what))
                if best is not None and best is not node:
                    table.note(f"{said}: x {best.name}", f"{ratio(best, ours, what):.4g}")
        compiled = cell.entry(contestants.COMPILED)
        table.at_least(
            f"{name} forward + backward: x torch.compile",
            2.5,
            ratio(compiled, ours, "forward_backward"),
        )
        for entry in cell.entries:
            if entry.failure is not None:
                table.note(f"{name}: {entry.name} failed", entry.failure)
        errors(table, name, cell.dtype, ours.errors)


def errors(table: Table, name: str, dtype: str, found: neurons.Errors) -> None:
    """Spikes and gradient against the float32 torch backend."""
    if dtype == "float32":
        table.at_most(f"{name}: spikes that differ, of {found.spikes}", 0, found.differing)
        table.at_most(f"{name}: relative error of the gradient", 1e-6, found.gradient)
        return
    # x is given in the dtype, the state is float32: nothing is rounded that the reference does not.
    table.at_most(f"{name}: |h - threshold| where spikes differ", 1e-6, found.distance)
    table.note(f"{name}: spikes that differ", str(found.differing))
    table.note(f"{name}: relative error of the gradient", f"{found.gradient:.2g}")


def long_sequences(table: Table, elements: int, timer: Timer) -> None:
    """Fractions of the roofline for more steps, and T = 128 against T = 8; as many elements in all."""
    for kind in NODES:
        for dtype in DTYPES:
            found = {
                T: measured(kind, dtype, T, elements, False, timer).entries[0] for T in (8, *LONG)
            }
            for what in PASSES:
                said = f"{kind} {dtype} {what.replace('_', ' + ')}"
                for T in LONG:
                    fraction = getattr(found[T], f"{what}_fraction")
                    table.at_least(f"{said}, T={T}: of the roofline", 0.9, fraction)
                ratio = getattr(found[128], what) / getattr(found[8], what)
                table.at_most(f"{said}: T = 128 / T = 8, an element", 1.1, ratio)


def first_results(table: Table) -> None:
    """Time to the first forward and backward pass of a fresh process, without and with a cache."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TRITON_CACHE_DIR": folder}
        command = [sys.executable, "-c", CHILD, json.dumps(FIRST)]
        for cache, asked in (("empty", 5.0), ("warm", 5.0)):
            done = subprocess.run(
                command, env=environment, check=True, stdout=subprocess.PIPE, text=True
            )
            for (kind, dtype, T), seconds in zip(FIRST, json.loads(done.stdout), strict=True):
                said = f"{kind} {dtype} T={T}: first result in s, cache {cache}"
                table.at_most(said, asked, seconds)


def rows(elements: int, timer: Timer) -> Iterator[Cell]:
    """IF and LIF in both dtypes, with the others."""
    for kind in NODES:
        for dtype in DTYPES:
            for T in (4, 8):
                yield measured(kind, dtype, T, elements, True, timer)


def main() -> int:
    parser = argparse.ArgumentParser(description="The kernels' numbers, asked and measured")
    parser.add_argument("--elements", type=int, default=27, help="log2 of T x N (27)")
    args = parser.parse_args()
    if args.elements < 26:
        parser.error(f"--elements {args.elements}; what is asked holds from 26 on")
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA GPU: torch sees none")
    timer, elements = Timer(torch.device("cuda", 0)), 2**args.elements
    print(", ".join(f"{k} {v}" for k, v in neurons.machine(timer.device).items()))
    table = Table(f"T x N = 2^{args.elements}")
    layers(table, rows(elements, timer))
    long_sequences(table, elements, timer)
    first_results(table)
    return table.verdict()


if __name__ == "__main__":
    sys.exit(main())
