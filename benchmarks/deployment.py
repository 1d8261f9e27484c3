"""The numbers of the README, each measured here, ratios in one run.

    make bench                                  all of them
    python benchmarks/deployment.py speed       one of: accuracy, parity, speed, compile

Needs SpikingJelly 2.0.0 beside spikeport. Times are medians of runs that take turns.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spikeport import deploy
from spikeport.deploy import data

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "examples/checkpoints/csnn_c32_t4_half.pth"
sys.path.insert(0, str(ROOT / "examples"))


def spikingjelly_net(channels: int, T: int = 4) -> nn.Module:
    """The seed's CSNN as SpikingJelly's users build it."""
    from spikingjelly.activation_based import functional, layer, neuron

    class CSNN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv_fc = nn.Sequential(
                layer.Conv2d(1, channels, 3, padding=1, bias=False),
                layer.BatchNorm2d(channels),
                neuron.IFNode(),
                layer.MaxPool2d(2, 2),
                layer.Conv2d(channels, channels, 3, padding=1, bias=False),
                layer.BatchNorm2d(channels),
                neuron.IFNode(),
                layer.MaxPool2d(2, 2),
                layer.Flatten(),
                layer.Linear(channels * 49, channels * 16, bias=False),
                neuron.IFNode(),
                layer.Linear(channels * 16, 10, bias=False),
                neuron.IFNode(),
            )
            functional.set_step_mode(self, "m")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.unsqueeze(0).expand(T, -1, -1, -1, -1)
            y: torch.Tensor = self.conv_fc(x).mean(0)
            return y

    torch.manual_seed(0)
    net = CSNN().eval()
    if channels == 32:
        net.load_state_dict(torch.load(CHECKPOINT, weights_only=True)["net"])
        return net
    # Untrained layers hardly fire; statistics of a trained network make the spikes realistic.
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(0, 0.2)
                m.running_var.uniform_(0.05, 0.3)
    return net


def accuracy() -> dict[str, Any]:
    """Source against device on all 10,000 images, and the float32 conversion against the source."""
    net, test = spikingjelly_net(32), data.load("fashion-mnist")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for target in ("lynxi-sim", "reference"):
            program = deploy.convert(net, (test.x[:100],), target=target)
            deploy.compile(program, f"{folder}/{target}", cache=False, probe=True)
            with deploy.load(f"{folder}/{target}") as model:
                report = deploy.compare(net, model, test.loader(100), layers=len(test))
            found[target] = {
                "source accuracy %": round(100 * report.source_accuracy, 2),
                "device accuracy %": round(100 * report.device_accuracy, 2),
                "difference, points": round(
                    100 * (report.source_accuracy - report.device_accuracy), 2
                ),
                "predictions equal": report.samples - len(report.disagreeing),
                "spikes that differ %": {
                    x.layer: round(100 * statistics.mean(x.differing), 5) for x in report.layers
                },
                "explained by rounding": report.explained,
            }
    return found


def parity() -> dict[str, Any]:
    """SpikingJelly's neurons against the converted form in float32, lowered to primitives."""
    from spikingjelly.activation_based import neuron

    from spikeport.converters.capture import capture
    from spikeport.converters.passes import flatten_time, lower_neurons

    cells = spikes = wrong = 0
    for v_reset in (-0.3, 0.0, 0.2, None):
        for make in _neurons(neuron, v_reset):
            for T in (1, 4, 8):
                for drive in (torch.randn(T, 4, 4096), torch.randint(-8, 17, (T, 4, 4096)) / 8):
                    net = nn.Sequential(make()).eval()
                    program = lower_neurons(flatten_time(capture(net, (drive,))))
                    expected = net(drive)
                    net[0].reset()
                    cells, spikes = cells + 1, spikes + expected.numel()
                    wrong += int((program(drive) != expected).sum())
    return {
        "cells": cells,
        "spikes": spikes,
        "differing": wrong,
        "SpikingJelly's own Lynxi port, v_reset=-0.3, LIF, T=8: differing %": _port(neuron),
    }


def _neurons(neuron: Any, v_reset: float | None) -> list[Callable[[], nn.Module]]:
    m = {"v_reset": v_reset, "step_mode": "m"}
    made: list[Callable[[], nn.Module]] = [lambda: neuron.IFNode(**m)]
    for decay in (True, False):
        for tau in (2.0, 3.0):
            made.append(lambda d=decay, t=tau: neuron.LIFNode(tau=t, decay_input=d, **m))
            made.append(
                lambda d=decay, t=tau: neuron.ParametricLIFNode(init_tau=t, decay_input=d, **m)
            )
    return made


def _port(neuron: Any) -> float:
    """The equation of SpikingJelly's Lynxi port: the leak forgets to add v_reset back."""
    v_reset, tau = -0.3, 2.0
    x = torch.randn(8, 65536)
    expected = neuron.LIFNode(tau=tau, v_reset=v_reset, step_mode="m").eval()(x)
    v, wrong = torch.zeros(65536), 0
    for t in range(8):
        v = (1 - 1 / tau) * (v - v_reset) + x[t] / tau
        s = (v >= 1.0).float()
        v = (1 - s) * v + s * v_reset
        wrong += int((s != expected[t]).sum())
    return round(100 * wrong / expected.numel(), 1)


def speed() -> dict[str, Any]:
    """Images per second on this machine's CPU, the contenders taking turns."""
    from spikingjelly.activation_based import functional

    found: dict[str, Any] = {}
    for channels, batch in ((32, 100), (128, 32)):
        net = spikingjelly_net(channels)
        half = spikingjelly_net(channels).half()
        x = data.load("fashion-mnist", limit=batch).x
        x16 = x.half()

        def source(net: nn.Module, x: torch.Tensor) -> Any:
            functional.reset_net(net)
            with torch.no_grad():
                return net(x)

        with tempfile.TemporaryDirectory() as folder:
            models = {}
            for target in ("reference", "lynxi-sim"):
                program = deploy.convert(net, (x,), target=target)
                deploy.compile(program, f"{folder}/{target}", cache=False, probe=False)
                models[target] = deploy.load(f"{folder}/{target}")
            contenders: dict[str, Callable[[], Any]] = {
                "SpikingJelly float32": lambda n=net, x=x: source(n, x),
                "SpikingJelly float16": lambda n=half, x=x16: source(n, x),
                "converted float32 (reference)": lambda m=models["reference"], x=x: m(x),
                "lynxi-sim": lambda m=models["lynxi-sim"], x=x: m(x),
            }
            seconds = _turns(contenders)
        first = seconds["SpikingJelly float32"]
        flops = 2 * _products(channels) * batch
        found[f"{channels} channels, batch {batch}"] = {
            "images/s": {name: round(batch / s) for name, s in seconds.items()},
            "x SpikingJelly float32": {n: round(first / s, 2) for n, s in seconds.items()},
            "lynxi-sim x SpikingJelly float16": round(
                seconds["SpikingJelly float16"] / seconds["lynxi-sim"], 1
            ),
            "matrix peak, GFLOP/s": round(_peak() / 1e9),
            "fraction of the peak": {
                name: round(flops / s / _peak(), 2)
                for name, s in seconds.items()
                if name.startswith("converted")
            },
        }
    return found


def _products(channels: int) -> int:
    """Multiplications for one image, the first convolution once, the rest for T = 4 steps."""
    c = channels
    return 9 * c * 784 + 4 * (9 * c * c * 196 + 49 * c * 16 * c + 160 * c)


def _peak() -> float:
    """FLOP/s of a large float32 matrix product."""
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / min(_once(lambda: a @ a) for _ in range(5))


def _once(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _turns(contenders: dict[str, Callable[[], Any]], rounds: int = 15) -> dict[str, float]:
    """Median seconds of each, taking turns, so that a slow moment of the machine hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(rounds):
        for name, run in contenders.items():
            seconds[name].append(_once(run))
    return {name: statistics.median(s) for name, s in seconds.items()}


def compile_cost() -> dict[str, Any]:
    """Convert and compile of the 128-channel network, in a fresh process."""
    here = str(Path(__file__).resolve())
    run = subprocess.run(
        [sys.executable, here, "compile-once"], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def compile_once() -> dict[str, Any]:
    """One conversion and compile, with its own peak of memory."""
    net = spikingjelly_net(128)
    x = data.load("fashion-mnist", limit=16).x
    # Code is loaded first, by a tiny conversion: it is neither the network's nor the conversion's.
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        tiny = deploy.convert(spikingjelly_net(2), (x[:1],), target="lynxi-sim")
        deploy.compile(tiny, f"{folder}/tiny", cache=False, probe=False)
        net(x)
    before = _peak_memory()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        program = deploy.convert(net, (x,), target="lynxi-sim")
        middle = time.perf_counter()
        deploy.compile(program, f"{folder}/artifact", cache=False, probe=False)
    end = time.perf_counter()
    captured = program.captured
    assert captured is not None
    weights = sum(t.numel() * t.element_size() for t in captured.tensors.values())
    calls = captured.nodes("call_function")
    values = (n.meta["val"] for n in calls)
    activations = sum(v.numel() * v.element_size() for v in values)
    allowed = 3 * weights + activations
    used = _peak_memory() - before
    return {
        "convert s": round(middle - start, 1),
        "compile s": round(end - middle, 1),
        "peak above the loaded network, MiB": round(used / 2**20),
        "3 x weights + one batch of activations, MiB": round(allowed / 2**20),
    }


def _peak_memory() -> int:
    # Not getrusage: its peak is that of the process before exec too.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "accuracy": accuracy,
    "parity": parity,
    "speed": speed,
    "compile": compile_cost,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, "compile-once", []], default=[])
    args = parser.parse_args()
    if args.parts == ["compile-once"]:
        print(json.dumps(compile_once()))
        return
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    print(f"python {platform.python_version()}, torch {torch.__version__}, {machine}")
    for name in args.parts or PARTS:
        print(json.dumps({name: PARTS[name]()}, indent=2), flush=True)


if __name__ == "__main__":
    main()
