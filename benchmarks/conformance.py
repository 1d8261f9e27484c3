"""The conformance matrix: every source's neurons on every target, spike for spike, in float32.

    python benchmarks/conformance.py                        every source that is importable
    python benchmarks/conformance.py --source native nir    these alone
    python benchmarks/conformance.py --neuron QIFNode       these alone
    python benchmarks/conformance.py --keep cells.json      add to the cells of earlier runs
    python benchmarks/conformance.py --jobs 8               in as many processes; default: one a core

A cell is one neuron of one source (its reset, its parameters and how they are given, one value for all,
for each channel, or learned) in one time mode on one target. Each has its own input [T, N, ...], whose N
samples expose semantics: on a grid that hits thresholds exactly, chosen step by step to reach the
threshold exactly or stay right below, negative drive, zeros, multiples of the threshold, and noise. What
the target gives is compared with what the source's own module gives (for NIR, this project's reading of
it, which its tests hold against NIR's definitions). "equal": no spike differs. "refused": with its
reason, before anything runs. "explained": some spikes differ, and each parts from the source's where the
potential is within the reach of rounding of its threshold, by the bound that ``deploy.compare`` has: a
charge with an exponential is rounded in the last bit as each runtime's own does. "WRONG": any other
difference, or a failure; the exit code is 1.

The releases of a framework are tried one at a time: run with each on the path and ``--keep``. lynxi-sim
stores in float32 here. The target cuda runs on a GPU, or on the CPU under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import collections
import copy
import importlib
import itertools
import json
import logging
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from conformance_sources import CHANNELS, SOURCES, STEPS, Variant, variants
from torch import nn

from spikeport import deploy
from spikeport import targets as registry
from spikeport.converters import sources
from spikeport.converters.capture import capture
from spikeport.converters.probes import probe_inputs
from spikeport.converters.program import Program, Time
from spikeport.converters.sources import Reading
from spikeport.deploy.judge import Judge
from spikeport.deploy.pipeline import rewrite_for
from spikeport.targets.lynxi.simulator import options

TARGETS = ("reference", "lynxi-sim", "onnx", "nir", "cuda", "ipu-sim")
TIMES: tuple[Time, ...] = ("unrolled", "stepped")
#: Neurons converted as one network, side by side.
TOGETHER = 24
VERDICTS = ("equal", "refused", "WRONG")
#: Some spikes differ, each of which parts where rounding can carry the potential over the threshold.
EXPLAINED = "explained"
#: What kind of probe the samples of an input are, in their order.
SAMPLES = ("grid", "exact", "negative", "zeros", "multiples", "noise")


@dataclass
class Cell:
    """What came of one variant on one target."""

    source: str
    neuron: str
    reset: str
    params: str
    steps: int
    time: str
    target: str
    spikes: int = 0
    fired: int = 0
    differing: int = 0
    explained: bool = False
    refused: str = ""
    failed: str = ""

    @property
    def verdict(self) -> str:
        if self.failed or (self.differing and not self.explained):
            return "WRONG"
        if self.differing:
            return EXPLAINED
        return "refused" if self.refused else "equal"


# Cells


class Parallel(nn.Module):
    """Layers side by side, each with an input and an output of its own."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(layer(x) for layer, x in zip(self.layers, inputs, strict=True))


def drive(layer: nn.Module, steps: int) -> torch.Tensor:
    """The input [T, N, C], or maps of as many, of one neuron, N as in SAMPLES."""
    size = getattr(layer, "size", (CHANNELS,))
    readings = (r for _, _, r in sources.read_all(layer) if isinstance(r, Reading))
    neuron = next(readings, None)
    random = torch.Generator().manual_seed(0)
    grid = torch.randint(-8, 17, (steps, CHANNELS), generator=random) / 8
    threshold = torch.ones(()) if neuron is None else torch.as_tensor(neuron.neuron.v_threshold)
    threshold = threshold.detach().expand(size).flatten()
    exact = grid if neuron is None else probe_inputs(neuron.neuron, steps, size)[:, 0].flatten(1)
    choices = torch.tensor([0.0, 0.5, 1.0, 2.0, -1.0])
    factor = choices[torch.randint(0, 5, (steps, CHANNELS), generator=random)]
    negative = (
        torch.where(torch.rand(steps, CHANNELS, generator=random) < 0.2, 4.0, -1.0) * grid.abs()
    )
    noise = torch.randn(steps, CHANNELS, generator=random)
    rows = (grid, exact, negative, torch.zeros_like(grid), factor * threshold, noise)
    return torch.stack(rows, 1).float().unflatten(2, size)


def expected(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the source's own module gives."""
    own = copy.deepcopy(layer)
    with torch.no_grad(), sources.isolated(own):
        y: torch.Tensor = own(x)
    return y


def cells(group: Sequence[Variant], targets: Sequence[str], mode: Time) -> list[Cell]:
    """Convert variants of as many steps as one network, and compare their spikes."""
    layers = [v.make().eval() for v in group]
    inputs = [drive(layer, v.steps) for layer, v in zip(layers, group, strict=True)]
    wanted = [expected(layer, x) for layer, x in zip(layers, inputs, strict=True)]
    work = []
    for v, layer, x, y in zip(group, layers, inputs, wanted, strict=True):
        made = [Cell(v.source, v.neuron, v.reset, v.params, v.steps, mode, t) for t in targets]
        for cell in made:
            cell.spikes, cell.fired = y.numel(), int((y != 0).sum())
        work.append(Work(layer, x, y, dict(zip(targets, made, strict=True))))
    able = [t for t in targets if mode in registry.get(t).capabilities.times]
    for w in work:
        for target in {*targets} - {*able}:
            w.cells[target].refused = f"the target takes no {mode} programs"
    _fill(work, able, mode)
    return [cell for w in work for cell in w.cells.values()]


@dataclass
class Work:
    """A neuron, its input, the spikes expected, and its cell for each target."""

    layer: nn.Module
    x: torch.Tensor
    wanted: torch.Tensor
    cells: dict[str, Cell]


def _fill(work: list[Work], targets: Sequence[str], mode: Time) -> None:
    """Set what is refused and what differs; what is refused drops out, and the others go on."""
    if not work:
        return
    net = Parallel(copy.deepcopy([w.layer for w in work])).eval()
    inputs = tuple(w.x for w in work)
    try:
        captured = capture(net, inputs)
    except Exception as error:
        for rest in _without(work, targets, error):
            _fill(rest, targets, mode)
        return
    for target in targets:
        try:
            outputs = run(captured, inputs, target, mode)
        except Exception as error:
            for rest in _without(work, [target], error):
                _fill(rest, [target], mode)
            continue
        for w, found in zip(work, outputs, strict=True):
            cell = w.cells[target]
            cell.differing = int((found != w.wanted).sum())
            cell.explained = bool(cell.differing) and explained(w, target, mode)


def explained(work: Work, target: str, mode: Time) -> bool:
    """Whether every spike at which the target parts from the source is within the reach of rounding."""
    net = Parallel([copy.deepcopy(work.layer)]).eval()
    with tempfile.TemporaryDirectory() as folder, options(storage="float32"):
        program = rewrite_for(capture(net, (work.x,)), target, torch.float32, mode)
        deploy.compile(program, f"{folder}/artifact", cache=False, probe=True)
        with deploy.load(f"{folder}/artifact") as model:
            judge = Judge(net, model)
            judge.add((work.x,), 0)
    layers = judge.layers()
    return any(layer.flips for layer in layers) and not any(layer.unexplained for layer in layers)


def _without(work: list[Work], targets: Sequence[str], error: Exception) -> list[list[Work]]:
    """What is left to do after a refusal or a failure, which is noted where it names its layers."""
    refused = _places(error)
    if len(work) == 1:
        refused.setdefault(0, f"{type(error).__name__}: {error}")
    meant = isinstance(error, (deploy.FindingsError, deploy.UsageError))
    for (i, reason), target in itertools.product(refused.items(), targets):
        setattr(work[i].cells[target], "refused" if meant else "failed", reason)
    if refused:
        return [[w for i, w in enumerate(work) if i not in refused]]
    half = len(work) // 2  # it does not say which
    return [work[:half], work[half:]]


def _places(error: Exception) -> dict[int, str]:
    """The layers that the findings of an error name, with the first reason of each."""
    found: dict[int, str] = {}
    for f in getattr(error, "findings", ()):
        _, _, rest = f.where.partition("layers.")
        index = rest.split(".")[0]
        if index.isdigit() and f.severity == "error":
            found.setdefault(int(index), f"{f.rule}: {f.found}")
    return found


def run(
    captured: Program, inputs: Sequence[torch.Tensor], target: str, mode: Time
) -> tuple[torch.Tensor, ...]:
    """Rewrite, compile, load, run; not verified, so that nothing but the comparison here judges."""
    with tempfile.TemporaryDirectory() as folder, options(storage="float32"):
        program = rewrite_for(captured, target, torch.float32, mode)
        if errors := registry.check(program, registry.get(target)).errors:
            raise deploy.UnsupportedError(f"{target} refuses:", errors)
        deploy.compile(program, f"{folder}/artifact", cache=False, probe=False)
        with deploy.load(f"{folder}/artifact") as model:
            outputs: tuple[torch.Tensor, ...] = model(*inputs)
    return outputs


#: Variants of one kind that are converted together, as places in the list of all; targets; time mode.
Task = tuple[tuple[int, ...], tuple[str, ...], Time]
#: The list of all, in each process.
_chosen: list[Variant] = []


def tasks(chosen: Sequence[Variant], targets: Sequence[str], times: Sequence[Time]) -> list[Task]:
    """The work in pieces."""
    groups = collections.defaultdict(list)
    for i, v in enumerate(chosen):
        groups[v.source, v.neuron, v.steps].append(i)
    found: list[Task] = []
    for (_, _, steps), members in groups.items():
        size = max(1, TOGETHER * STEPS // steps)
        for mode, at in itertools.product(times, range(0, len(members), size)):
            found.append(((*members[at : at + size],), (*targets,), mode))
    return found


def matrix(
    names: Sequence[str],
    kinds: Sequence[str],
    every: int,
    targets: Sequence[str],
    times: Sequence[Time],
    jobs: int,
) -> Iterator[list[Cell]]:
    """The cells of each ``every``-th variant of these sources and neurons, some at a time."""
    work, start = tasks(variants(names, kinds)[::every], targets, times), time.perf_counter()
    # Variants hold functions, so each process makes its own list of them.
    with multiprocessing.get_context("spawn").Pool(jobs, _prepare, (names, kinds, every)) as pool:
        for done, found in enumerate(pool.imap(_cells, work), 1):
            yield found
            seconds = time.perf_counter() - start
            print(f"{done} of {len(work)}, {seconds:.0f} s: {found[0]}", file=sys.stderr)


def _prepare(names: Sequence[str], kinds: Sequence[str], every: int) -> None:
    torch.set_num_threads(1)  # the tensors are small
    logging.getLogger("spikeport").setLevel(logging.ERROR)  # what goes into metadata is no refusal
    _chosen.extend(variants(names, kinds)[::every])


def _cells(task: Task) -> list[Cell]:
    places, targets, mode = task
    return cells([_chosen[i] for i in places], targets, mode)


def runnable(targets: Iterable[str]) -> list[str]:
    """Those that run on this machine; of the others standard error says why not."""
    found = []
    for name in targets:
        try:
            registry.get(name).sdk()
            found.append(name)
        except deploy.TargetUnavailableError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    return found


# The table


def table(found: Sequence[Cell]) -> str:
    """A line for each neuron and reset: cells equal, refused and wrong by target."""
    targets = [t for t in TARGETS if any(c.target == t for c in found)]
    ran = [c for c in found if not c.refused]
    lines = [
        f"{len(found)} cells: "
        + ", ".join(
            f"{count} {verdict}"
            for verdict in (*VERDICTS, EXPLAINED)
            if (count := sum(c.verdict == verdict for c in found)) or verdict == "WRONG"
        ),
        f"{sum(c.spikes for c in ran):,} outputs compared, {sum(c.fired for c in ran):,} of them "
        f"spikes, {sum(c.differing for c in found):,} differing",
        "",
        "equal / refused / wrong cells, by target; +n: as many that rounding explains",
        "",
    ]
    groups = collections.defaultdict(list)
    for c in found:
        how = c.params.partition(",")[0]
        groups[c.source, c.neuron, c.reset, how, f"T={c.steps}", c.time].append(c)
    head = ("source", "neuron", "reset", "parameters", "steps", "time", *targets)
    rows = [head]
    for key, members in groups.items():
        counts = []
        for t in targets:
            own = [c.verdict for c in members if c.target == t]
            shown = "/".join(str(own.count(v)) for v in VERDICTS)
            shown += f"+{own.count(EXPLAINED)}" if EXPLAINED in own else ""
            counts.append(shown if own else "-")
        rows.append((*key, *counts))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines += [
        "  ".join(p.ljust(w) for p, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    refused = [(c.target, c.neuron, c.refused.partition("; the neuron is")[0]) for c in found]
    reasons = collections.Counter(reason for reason in refused if reason[2])
    wrong = [c for c in found if c.verdict == "WRONG"]
    if wrong:
        lines += ["", "WRONG", *(f"  {c}" for c in wrong)]
    if reasons:
        lines += ["", "refused"]
        lines += [f"  {n:4}  {t}: {kind}: {why}" for (t, kind, why), n in sorted(reasons.items())]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", nargs="+", choices=SOURCES, help="default: all importable")
    parser.add_argument("--neuron", nargs="+", default=[], metavar="KIND", help="default: all")
    parser.add_argument("--target", nargs="+", default=list(TARGETS), help="default: all")
    parser.add_argument(
        "--time", nargs="+", choices=TIMES, default=list(TIMES), help="default: all"
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each N-th neuron alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="cells of all runs, as JSON")
    args = parser.parse_args()
    there = [n for n, (m, _) in SOURCES.items() if importlib.util.find_spec(m) is not None]
    targets = runnable(args.target)
    chosen = args.source or there
    found: list[Cell] = []
    kept = []
    if args.keep and args.keep.is_file():
        kept = [Cell(**c) for c in json.loads(args.keep.read_text(encoding="utf-8"))]
    own = {(v.source, v.neuron) for v in variants(chosen, args.neuron)}
    anew = set(itertools.product(own, targets, args.time))
    kept = [c for c in kept if ((c.source, c.neuron), c.target, c.time) not in anew]
    for some in matrix(chosen, args.neuron, args.every, targets, args.time, args.jobs):
        found += some
        if args.keep:
            cells_so_far = json.dumps([asdict(c) for c in kept + found])
            args.keep.write_text(cells_so_far, encoding="utf-8")
    found = kept + found
    on = "interpreted on the CPU" if os.environ.get("TRITON_INTERPRET") == "1" else "on a GPU"
    print(f"python {platform.python_version()}, torch {torch.__version__}, float32; cuda {on}")
    print(table(found))
    return int(any(c.verdict == "WRONG" for c in found))


if __name__ == "__main__":
    sys.exit(main())
