"""Training on the IPU: networks rewritten for it against the torch path.

    python benchmarks/ipu.py                  all of it, into benchmarks/ipu.txt and benchmarks/ipu.svg
    python benchmarks/ipu.py speed            some of: replication, speed (minutes), surrogates, training,
                                              deployment (an hour), environment

Deployment takes the checkpoint of training. Needs snnTorch, SpikingJelly, matplotlib, and Fashion-MNIST's
training set. Runs on the simulated SDK; speeds are the simulator's.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from ipu_gradients import T, cases, difference
from torch import nn
from tqdm import tqdm

from spikeport import deploy
from spikeport.deploy import data
from spikeport.deploy.cli import main as spikeport
from spikeport.deploy.network import build
from spikeport.targets import ipu

HERE = Path(__file__).parent
RECIPE = ["--loss", "ce_count", "--optimizer", "adam", "--lr", "0.001", "--no-tensorboard"]


# Equality


def surrogate_table() -> str:
    """Spikes and weight gradients of rewritten networks against their source's own autograd."""
    rows: dict[tuple[str, str, str], list[Any]] = {}
    for case in cases():
        differing, count, weights, parameters = difference(case)
        row = rows.setdefault((case.source, case.neuron, case.reset), [0, 0, 0, 0.0, 0.0, ""])
        row[0] += 1
        row[1] += differing
        row[2] += count
        if weights >= row[3]:
            row[3], row[5] = weights, case.surrogate
        row[4] = max(row[4], parameters)
    head = (
        *("source", "neuron", "reset", "cells", "spikes", "differ", "error of weights'"),
        *("of neurons' gradients", "worst surrogate"),
    )
    lines = [
        (*key, str(cells), str(count), str(differing), f"{weights:.1e}", f"{parameters:.1e}", worst)
        for key, (cells, differing, count, weights, parameters, worst) in rows.items()
    ]
    total = (
        f"{sum(r[0] for r in rows.values())} cells of two layers, T = {T}: "
        f"{sum(r[1] for r in rows.values())} of {sum(r[2] for r in rows.values())} spikes differ; "
        f"largest error of a weight's gradient {max(r[3] for r in rows.values()):.1e}, of a neuron's "
        f"own parameters' {max(r[4] for r in rows.values()):.1e}"
    )
    return f"{_aligned([head, *lines])}\n\n{total}"


# Replication and accumulation


class Spiking(nn.Module):
    """784-100-10 leaky neurons over 5 steps, with the loss inside."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.fc = nn.ModuleList((nn.Linear(784, 100), nn.Linear(100, 10)))
        self.reduction = reduction

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        mem = [torch.zeros(len(x), fc.out_features) for fc in self.fc]
        count = torch.zeros(len(x), 10)
        for _ in range(5):
            spk = x.flatten(1)
            for i, fc in enumerate(self.fc):
                mem[i] = 0.9 * mem[i] + fc(spk)
                smooth = torch.sigmoid(4 * (mem[i] - 1))
                spk = (mem[i] >= 1).float() + (smooth - smooth.detach())
                mem[i] = mem[i] - spk.detach()
            count = count + spk
        return nn.functional.cross_entropy(count, y, reduction=self.reduction)


def replication(steps: int = 20, batch: int = 4) -> str:
    """Weights after training with D x G x R against one plain torch run of the combined batches."""
    rows = [
        (reduction, *dgr, *_replicated(reduction, *dgr, steps, batch))
        for reduction, *dgr in itertools.product(("mean", "sum"), *[(1, 2, 4)] * 3)
    ]
    head = ("reduction", "D", "G", "R", "difference", "trained by")
    shown = [(*map(str, row[:4]), f"{row[4]:.1e}", f"{row[5]:.1e}") for row in rows]
    return (
        f"{_aligned([head, *shown])}\n\nlargest difference of a weight after {steps} optimizer steps on "
        f"Fashion-MNIST, micro-batches of {batch}: {max(row[4] for row in rows):.1e}; training moved a "
        f"weight by up to {max(row[5] for row in rows):.1e}"
    )


def _replicated(
    reduction: str, d: int, g: int, r: int, steps: int, batch: int
) -> tuple[float, float]:
    """Largest difference of a weight from the plain run's, and from where the plain run began."""
    from spikeport.targets.ipu.simulator import poptorch

    mean = reduction == "mean"
    options = poptorch.Options().deviceIterations(d).replicationFactor(r)
    options.Training.gradientAccumulation(g)
    options.Training.accumulationAndReplicationReductionType(
        poptorch.ReductionType.Mean if mean else poptorch.ReductionType.Sum
    )
    torch.manual_seed(0)
    net = Spiking(reduction)
    plain, start = copy.deepcopy(net), copy.deepcopy(net)
    hyper = {"lr": 0.005 if mean else 0.005 / (batch * g * r), "momentum": 0.9}
    optimizer = poptorch.optim.SGD(net.parameters(), **hyper)
    model = poptorch.trainingModel(net, options, optimizer)
    torch_optimizer = torch.optim.SGD(plain.parameters(), **hyper)
    images = data.load("fashion-mnist", limit=steps * batch * g * r)
    for x, y in images.loader(batch * d * g * r):
        model(x, y)
    for x, y in images.loader(batch * g * r):
        torch_optimizer.zero_grad()
        plain(x, y).backward()
        torch_optimizer.step()
    return _distance(net, plain), _distance(start, plain)


def _distance(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((p.detach() - q.detach()).abs().max()) for p, q in pairs)


# Speed


def speed(batch: int = 128) -> str:
    """Seconds of an epoch, the plain torch loop and the simulator taking turns at every step.

    The simulator's include its compilation.
    """
    images = data.load("fashion-mnist", split="train")
    rows = [("threads", "seconds", "plain torch loop", "ipu-sim", "ratio")]
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        plain, simulated = _epoch([b for b in images.loader(batch) if len(b[1]) == batch])
        for clock, a, b in zip(("of the clock", "of all cores"), plain, simulated, strict=True):
            rows.append((str(count), clock, f"{a:.1f}", f"{b:.1f}", f"{b / a:.2f}"))
    torch.set_num_threads(threads)
    return f"{_aligned(rows)}\n\none epoch of {len(images) // batch} steps of {batch} images"


def _epoch(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> list[list[float]]:
    """Seconds of the clock and of all cores: of the plain torch loop, and of the simulator."""
    from snntorch import functional

    torch.manual_seed(0)
    net = build("leaky")
    plain = copy.deepcopy(net).train()
    optimizer, loss = torch.optim.Adam(plain.parameters(), lr=1e-3), functional.ce_count_loss()
    trainer = ipu.trainer(ipu.training_module(net), lr=1e-3, simulator=True)

    def torch_step(x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss(plain(x), y).backward()
        optimizer.step()

    clocks = (time.perf_counter, time.process_time)
    spent = [[0.0, 0.0], [0.0, 0.0]]
    order = [(torch_step, spent[0]), (trainer.step, spent[1])]
    for x, y in tqdm(batches, disable=None):
        for step, seconds in order:
            start = [clock() for clock in clocks]
            step(x, y)
            for i, clock in enumerate(clocks):
                seconds[i] += clock() - start[i]
        order.reverse()
    return spent


# Training


def training(epochs: int, folder: Path) -> str:
    """The same network, seed and recipe by the torch path and on the simulator, and their curves.

    A log of ``spikeport train`` that lies in the folder is taken for its run.
    """
    curves: dict[str, list[dict[str, float]]] = {}
    for name, more in (("torch", []), ("ipu-sim", ["--target", "ipu-sim"])):
        log = folder / f"{name}.log"
        if not log.exists():
            _train([*more, "--epochs", str(epochs), "--out-dir", str(folder / name)], log)
        curves[name] = _epochs(log)
    done = min(map(len, curves.values()))
    curves = {name: epochs[:done] for name, epochs in curves.items()}
    _plot(curves, HERE / "ipu.svg")
    head = ("epoch", *(f"{n} {what}" for what in ("loss", "test acc.") for n in curves))
    rows = [
        (
            str(e + 1),
            *(f"{c[e]['train_loss']:.4f}" for c in curves.values()),
            *(f"{c[e]['test_acc']:.2%}" for c in curves.values()),
        )
        for e in range(done)
    ]
    a, b = (c[-1]["test_acc"] for c in curves.values())
    last = f"after {done} of {epochs} epochs: {100 * (b - a):+.2f} points"
    return f"{_aligned([head, *rows])}\n\n{last}"


def _train(options: list[str], log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    partial = log.with_suffix(".part")
    with partial.open("w", encoding="utf-8") as file, redirect_stdout(file):
        if code := spikeport(["train", "leaky", *RECIPE, *options]):
            raise SystemExit(f"the training failed: exit code {code}")
    partial.replace(log)


def _epochs(log: Path) -> list[dict[str, float]]:
    """What a log of ``spikeport train`` says of each epoch."""
    lines = log.read_text(encoding="utf-8").splitlines()
    found = (dict(re.findall(r"(\w+) = ([\d.]+)", x)) for x in lines if x.startswith("epoch = "))
    return [{name: float(value) for name, value in epoch.items()} for epoch in found]


def _plot(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "spikeport"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4))
    styles = {"torch": {"lw": 4, "alpha": 0.4}, "ipu-sim": {"lw": 1.4, "color": "black"}}
    for name, epochs in curves.items():
        x = [int(e["epoch"]) + 1 for e in epochs]
        axes[0].plot(x, [e["train_loss"] for e in epochs], label=name, **styles[name])
        axes[1].plot(x, [100 * e["test_acc"] for e in epochs], label=name, **styles[name])
    for axis, title in zip(axes, ("training loss", "test accuracy, %"), strict=True):
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.legend()
    figure.suptitle("784-1000-10 Leaky, T = 25, Fashion-MNIST")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def deployment(folder: Path, limit: int | None) -> str:
    """What the simulator trained, converted for other targets and compared with the source."""
    net = build("leaky")
    checkpoint = folder / "ipu-sim" / "checkpoint_latest.pth"
    net.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["net"])
    test = data.load("fashion-mnist", limit=limit)
    x = test.x[:100]
    lines = []
    for target in ("lynxi-sim", "onnx", "ipu-sim", "reference"):
        program = deploy.convert(net, (x,), target=target)
        deploy.compile(program, folder / "artifacts" / target, overwrite=True)
        with deploy.load(folder / "artifacts" / target) as model:
            report = deploy.compare(net, model, test.loader(100), layers=100)
            text = (
                f"{target}: source {report.source_accuracy:.2%}, {target} "
                f"{report.device_accuracy:.2%}, same predictions {report.agreement:.2%}"
            )
            if report.probed:
                text += f"; spikes of {report.probed} differ by rounding alone: {report.explained}"
            if differ := list(report.disagreeing):
                other = deploy.compare(net, model, [test[differ]], layers=len(differ))
                text += f"; those of the {other.probed} that differ: {other.explained}"
        lines.append(text)
    return "\n".join([f"{test.name}, {len(test)} images", *lines])


def environment(folder: Path) -> str:
    """Tests of rewriting, training and the simulator, and what deployment compiled, in this torch.

    Run it with those that the SDK is built for: Python 3.10 and torch 2.0.1.
    """
    here = HERE.parent / "tests" / "targets" / "ipu"
    tests = [here / "test_lowering.py", here / "test_training.py", here / "simulator"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *map(str, tests)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, check=False)
    tested = re.sub(r" in .*", "", done.stdout.strip().splitlines()[-1])
    said = StringIO()
    with redirect_stdout(said):
        spikeport(
            ["run", str(folder / "artifacts" / "ipu-sim"), "--data", "fashion-mnist", "--verify"]
        )
    _, verified, accuracy, _ = said.getvalue().splitlines()
    return f"{tested}\nan artifact for ipu-sim, converted elsewhere: {verified}; {accuracy}"


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def main() -> None:
    """Run what was asked for, and write it where all of it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts: dict[str, Callable[[argparse.Namespace], str]] = {
        "surrogates": lambda args: surrogate_table(),
        "replication": lambda args: replication(),
        "speed": lambda args: speed(),
        "training": lambda args: training(args.epochs, args.folder),
        "environment": lambda args: environment(args.folder),
        "deployment": lambda args: deployment(args.folder, args.limit),
    }
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(parts)}; default: all"
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--limit", type=int, help="of deployment's test images; default: all")
    parser.add_argument("--folder", type=Path, default=Path("build/ipu"), help="for checkpoints")
    args = parser.parse_args()
    if unknown := [name for name in args.parts if name not in parts]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(parts)}")
    path = HERE / "ipu.txt"
    for name in args.parts or parts:
        start = time.perf_counter()
        text = parts[name](args)
        machine = f"Python {platform.python_version()}, torch {torch.__version__}"
        section = f"## {name}\n{machine}, {time.perf_counter() - start:.0f} s\n\n{text}\n"
        print(section)
        _put(path, name, section)


def _put(path: Path, name: str, section: str) -> None:
    """Replace a section of the file."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    kept = [f"## {s}" for s in old.split("## ")[1:] if not s.startswith(f"{name}\n")]
    path.write_text(
        "\n".join(sorted([*(s.rstrip() + "\n" for s in kept), section])), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
