"""Networks written as a loop over time: how fast they run re-rolled, and how long conversion takes.

    make bench                                  all benchmarks
    python benchmarks/rerolling.py speed        one of: speed, conversion

Needs snnTorch beside spikeport. Times are medians of runs that take turns, in one run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from spikeport import deploy
from spikeport.converters.capture import capture
from spikeport.converters.passes import flatten_time, hoist_time_invariant, reroll_time
from spikeport.deploy import data


class Tutorial(nn.Module):
    """The fully connected network of snnTorch's fifth tutorial: 784-1000-10, a static image."""

    def __init__(self, steps: int = 25, layers: int = 1) -> None:
        import snntorch as snn

        super().__init__()
        sizes = [784, *[1000] * layers, 10]
        self.steps = steps
        self.fc = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.lif = nn.ModuleList(snn.Leaky(beta=0.95) for _ in self.fc)

    def forward(self, x: torch.Tensor) -> Any:
        mem = [lif.init_leaky() for lif in self.lif]
        spk_rec, mem_rec = [], []
        for _ in range(self.steps):
            spk = x.flatten(1)
            for i, (fc, lif) in enumerate(zip(self.fc, self.lif, strict=True)):
                spk, mem[i] = lif(fc(spk), mem[i])
            spk_rec.append(spk)
            mem_rec.append(mem[-1])
        return torch.stack(spk_rec), torch.stack(mem_rec)


def trained() -> nn.Module:
    """The network after one pass over 2,000 images, so that it fires as such networks do."""
    torch.manual_seed(0)
    net, images = Tutorial(), data.load("fashion-mnist", limit=2000)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-4)
    for x, y in zip(images.x.split(100), images.y.split(100), strict=True):
        _, mem = net(x)
        loss = sum(nn.functional.cross_entropy(m, y) for m in mem)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
    return net.eval()


def speed() -> dict[str, Any]:
    """Images per second, 25 steps, static input: snnTorch's own evaluation and the re-rolled program."""
    net, found = trained(), dict[str, Any]()
    for batch in (1, 128):
        x = data.load("fashion-mnist", limit=batch).x

        def source(x: torch.Tensor = x) -> Any:
            with torch.no_grad():
                return net(x)

        program = deploy.convert(net, (x,), target="reference")
        with tempfile.TemporaryDirectory() as folder:
            deploy.compile(program, f"{folder}/net", cache=False, probe=False)
            model = deploy.load(f"{folder}/net")
            equal = sum(
                int((a != b).sum()) for a, b in zip(model(x)[:1], source()[:1], strict=True)
            )
            seconds = _turns({"snnTorch": source, "reference": lambda m=model, x=x: m(x)})
        found[f"batch {batch}"] = {
            "images/s": {name: round(batch / s) for name, s in seconds.items()},
            "x snnTorch": round(seconds["snnTorch"] / seconds["reference"], 1),
            "differing output spikes": equal,
            "firing rate of the output": round(source()[0].mean().item(), 3),
        }
    return found


def conversion() -> dict[str, Any]:
    """Seconds of capture, which is linear in T, and of all that comes after; and nodes of the graph."""
    x = torch.rand(16, 1, 28, 28)
    found: dict[str, Any] = {}
    cases = [(steps, 1) for steps in (5, 25, 100)] + [(5, layers) for layers in (4, 16, 64)]
    for steps, layers in cases:
        net = Tutorial(steps, layers).eval()
        captured, capturing = _timed(lambda net=net: capture(net, (x,)))
        rolled, rolling = _timed(lambda p=captured: reroll_time(p))
        result, rest = _timed(lambda p=rolled: flatten_time(hoist_time_invariant(p)))
        found[f"T = {steps}, {layers + 1} layers"] = {
            "capture": round(capturing, 2),
            "re-rolling": round(rolling, 3),
            "passes after it": round(rest, 3),
            "nodes": [len(list(p.graph.nodes)) for p in (captured, result)],
        }
    return found


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def _turns(contenders: dict[str, Callable[[], Any]], rounds: int = 15) -> dict[str, float]:
    """Median seconds of each, one after the other in every round."""
    for run in contenders.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            seconds[name].append(_timed(run)[1])
    return {name: statistics.median(s) for name, s in seconds.items()}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"speed": speed, "conversion": conversion}


def main() -> None:
    """Print the parts that were asked for as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="*", choices=[*PARTS, []], help="all unless given")
    chosen = parser.parse_args().part or [*PARTS]
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads"
    )
    print(json.dumps({name: PARTS[name]() for name in chosen}, indent=2))


if __name__ == "__main__":
    main()
