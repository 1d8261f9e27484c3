"""The seed's net against SpikingJelly 2.0: images/s and memory in training, images/s in evaluation.

    python benchmarks/cuda_training.py

128 channels, T = 4, batches of 128 images that are on the GPU already, SGD with momentum 0.9, the mean
squared error of the firing rates, cuDNN's autotuner on. Each number is the median of rounds that take
turns. Ratios are those of one way to run ours, with CUDA graphs, to SpikingJelly's neuron as it comes,
which its users train with, and to the fastest way that it has. Exit code 1 if something asked is not
met.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from asked import Table
from torch import nn

from spikeport import deploy
from spikeport.deploy import data
from spikeport.deploy.bench.neurons import machine
from spikeport.deploy.replay import Replay
from spikeport.targets import cuda
from spikeport.targets.graphs import channels_innermost

T, BATCH, CHANNELS = 4, 128, 128
WARM_UP = 3
OURS, THEIRS = "spikeport", "SpikingJelly"


class CSNN(nn.Module):
    """The net of examples/conv_fashion_mnist.py, layer by layer."""

    def __init__(self, T: int = T, channels: int = CHANNELS) -> None:
        super().__init__()
        self.T = T
        self.conv_fc = cuda.LayerByLayer(
            nn.Conv2d(1, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            cuda.IFNode(),
            nn.MaxPool2d(2, 2),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            cuda.IFNode(),
            nn.MaxPool2d(2, 2),
            nn.Flatten(),
            nn.Linear(channels * 49, channels * 16, bias=False),
            cuda.IFNode(),
            nn.Linear(channels * 16, 10, bias=False),
            cuda.IFNode(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rates: torch.Tensor = self.conv_fc(x.expand(self.T, *x.shape)).mean(0)
        return rates


def spikingjelly_net(T: int = T, channels: int = CHANNELS) -> nn.Module:
    """The same net as SpikingJelly's example builds it."""
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    class Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv_fc = nn.Sequential(
                layer.Conv2d(1, channels, 3, padding=1, bias=False),
                layer.BatchNorm2d(channels),
                neuron.IFNode(surrogate_function=surrogate.ATan()),
                layer.MaxPool2d(2, 2),
                layer.Conv2d(channels, channels, 3, padding=1, bias=False),
                layer.BatchNorm2d(channels),
                neuron.IFNode(surrogate_function=surrogate.ATan()),
                layer.MaxPool2d(2, 2),
                layer.Flatten(),
                layer.Linear(channels * 49, channels * 16, bias=False),
                neuron.IFNode(surrogate_function=surrogate.ATan()),
                layer.Linear(channels * 16, 10, bias=False),
                neuron.IFNode(surrogate_function=surrogate.ATan()),
            )
            functional.set_step_mode(self, "m")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            functional.reset_net(self)
            rates: torch.Tensor = self.conv_fc(x.unsqueeze(0).expand(T, -1, -1, -1, -1)).mean(0)
            return rates

    return Theirs()


def with_precision(net: nn.Module) -> nn.Module:
    """SpikingJelly's float16 kernels, which its node takes only by this setting."""
    from spikingjelly.activation_based.precision import (
        PrecisionConfig,
        prepare_model_for_precision,
    )

    config = PrecisionConfig(mode="fp16", neuron_storage="fp16")
    model: nn.Module = prepare_model_for_precision(net, "cuda", config).model
    return model


@dataclass(frozen=True)
class Contestant:
    """One way to train and evaluate the net.

    Attributes:
        name: Of it.
        build: Gives it on the GPU, in float32.
        graph: Whether a training step is replayed as a CUDA graph, and the net evaluated through the
            target cuda.
    """

    name: str
    build: Callable[[], nn.Module]
    graph: bool = False


def channels_last() -> nn.Module:
    return channels_innermost(CSNN().cuda())


NODE, GRAPH = f"{THEIRS}, node", f"{OURS}, graph"
CONTESTANTS = (
    Contestant(OURS, lambda: CSNN().cuda()),
    Contestant(GRAPH, lambda: CSNN().cuda(), graph=True),
    Contestant(f"{OURS}, channels last, graph", channels_last, graph=True),
    Contestant(NODE, lambda: spikingjelly_net().cuda()),
    Contestant(f"{THEIRS}, precision", lambda: with_precision(spikingjelly_net().cuda())),
)


def images_per_second(step: Callable[[int], Any], steps: int) -> float:
    for i in range(WARM_UP):
        step(i)
    torch.cuda.reset_peak_memory_stats()  # before a graph is captured: later its pool does not count
    for i in range(WARM_UP, WARM_UP + steps // 4):
        step(i)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for i in range(steps):
        step(i)
    end.record()
    end.synchronize()
    return steps * BATCH / start.elapsed_time(end) * 1e3


def training(
    c: Contestant, x: torch.Tensor, y: torch.Tensor, amp: bool, steps: int
) -> tuple[float, float]:
    """Images/s and peak memory in MiB, weights and all else in float16, or with autocast.

    The images, and workspaces that libraries keep for each stream there was, do not count.
    """
    before = torch.cuda.memory_allocated()
    torch.manual_seed(0)
    net = c.build().train()
    net = net if amp else net.half()
    x = x if amp else x.half()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler("cuda", enabled=amp)

    def step(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.half) if amp else nullcontext():
            rates = net(x)
            loss = F.mse_loss(rates, F.one_hot(y, 10).to(rates.dtype))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach(), (rates.argmax(1) == y).sum()

    run = Replay(step, WARM_UP) if c.graph else step
    batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    speed = images_per_second(lambda i: run(*batches[i % len(batches)]), steps)
    return speed, (torch.cuda.max_memory_allocated() - before) / 2**20


@torch.no_grad()
def evaluation(c: Contestant, x: torch.Tensor, steps: int) -> float:
    """Images/s in float16."""
    torch.manual_seed(0)
    net, x = c.build().eval(), x.half()
    if not c.graph:
        net = net.half()
        return images_per_second(lambda i: net(x[i * BATCH % len(x) :][:BATCH]), steps)
    example = x[:BATCH].float().cpu()
    program = deploy.convert(net.cpu(), (example,), target="cuda", dtype="float16", verify=False)
    with tempfile.TemporaryDirectory() as folder:
        deploy.compile(program, Path(folder) / "artifact")
        with deploy.load(Path(folder) / "artifact") as model:
            return images_per_second(lambda i: model(x[i * BATCH % len(x) :][:BATCH]), steps)


def rounds(count: int, measure: Callable[[Contestant], Any], table: Table) -> dict[str, list[Any]]:
    """What each contestant measures, in turns; those of SpikingJelly's that fail are named."""
    found: dict[str, list[Any]] = {}
    contestants = [*CONTESTANTS]
    for _ in range(count):
        for c in [*contestants]:
            gc.collect()
            torch.cuda.empty_cache()
            try:
                found.setdefault(c.name, []).append(measure(c))
            except Exception as error:
                if c.name.startswith(OURS):
                    raise
                table.note(f"{c.name} failed", f"{type(error).__name__}: {error}".splitlines()[0])
                contestants.remove(c)
    return {name: values for name, values in found.items() if values}


def opponents(speeds: dict[str, float]) -> list[str]:
    """What ours is measured against: SpikingJelly's node, and the fastest way that SpikingJelly has."""
    fastest = max((n for n in speeds if n.startswith(THEIRS)), key=lambda n: speeds[n])
    return list(dict.fromkeys([NODE, fastest]))


def main() -> int:
    parser = argparse.ArgumentParser(description="Training and evaluation against SpikingJelly")
    parser.add_argument("--steps", type=int, default=100, help="batches of a round (100)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (3)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA GPU: torch sees none")
    torch.backends.cudnn.benchmark = True
    print(", ".join(f"{k} {v}" for k, v in machine(torch.device("cuda", 0)).items()))
    images = data.load("fashion-mnist", limit=20 * BATCH)  # few, as they count as memory
    count = len(images) // BATCH * BATCH  # no partial batch
    x, y = images.x[:count].cuda().float(), images.y[:count].cuda()
    table = Table(f"{CHANNELS} channels, T = {T}, batch {BATCH}")
    for title, amp in (("float16", False), ("autocast", True)):
        found = rounds(args.rounds, lambda c, a=amp: training(c, x, y, a, args.steps), table)
        speeds = {n: statistics.median(s for s, _ in values) for n, values in found.items()}
        memory = {n: max(m for _, m in values) for n, values in found.items()}
        for name in speeds:
            table.note(f"training, {title}: {name}: images/s", f"{speeds[name]:.0f}")
            table.note(f"training, {title}: {name}: peak MiB", f"{memory[name]:.0f}")
        for theirs in opponents(speeds):
            said = f"training, {title}: {GRAPH} / {theirs}"
            table.at_least(f"{said}: images/s", 2.5, speeds[GRAPH] / speeds[theirs])
            table.at_most(f"{said}: peak memory", 0.6, memory[GRAPH] / memory[theirs])
    found = rounds(args.rounds, lambda c: evaluation(c, x, args.steps), table)
    speeds = {n: statistics.median(values) for n, values in found.items()}
    for name, speed in speeds.items():
        table.note(f"evaluation, float16: {name}: images/s", f"{speed:.0f}")
    for theirs in opponents(speeds):
        said = f"evaluation, float16: {GRAPH} / {theirs}: images/s"
        table.at_least(said, 4, speeds[GRAPH] / speeds[theirs])
    return table.verdict()


if __name__ == "__main__":
    sys.exit(main())
