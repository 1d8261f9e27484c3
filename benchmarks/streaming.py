"""Stepped programs at batch 1: how long a step takes, and whether it takes longer after many of them.

    make bench                                  all benchmarks
    python benchmarks/streaming.py

The networks of the examples, their images as a stream of frames: the convolutional one with its
checkpoint, the fully connected one as it is built. A fresh stream, one that has run for long, and calls
of all T steps at once take turns; times are medians, in milliseconds a step. One thread: at batch 1 a
layer is too small to be shared.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spikeport import deploy
from spikeport.deploy import data

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "examples/checkpoints/csnn_c32_t4_half.pth"
TARGETS = (("reference", None), ("lynxi-sim", None), ("onnx", None), ("onnx", "float16"))
T = 4
sys.path.insert(0, str(ROOT / "examples"))


def networks() -> dict[str, nn.Module]:
    """The examples' networks by name."""
    from conv_fashion_mnist import CSNN
    from fc_fashion_mnist import FCSNN

    trained = torch.load(CHECKPOINT, map_location="cpu", weights_only=True)
    conv = CSNN(T=T, channels=trained["args"]["channels"])
    conv.load_state_dict(trained["net"])
    torch.manual_seed(0)
    return {"conv, 32 channels": conv.eval(), "fc": FCSNN(T=T).eval()}


def measure(net: nn.Module, target: str, dtype: str | None, steps: int, window: int) -> Any:
    """Milliseconds a step, in a window at the start of a stream and in one after ``steps``."""
    frames = data.load("fashion-mnist", limit=window).x.split(1)
    with tempfile.TemporaryDirectory() as folder:
        models = {}
        for kind in ("stepped", "unrolled"):
            program = deploy.convert(net, (frames[0],), target=target, dtype=dtype, time=kind)
            deploy.compile(program, f"{folder}/{kind}", cache=False, probe=False)
            models[kind] = deploy.load(f"{folder}/{kind}")
        fresh, unrolled, old = (
            models["stepped"],
            models["unrolled"],
            deploy.load(f"{folder}/stepped"),
        )
        equal = all(torch.equal(fresh(x), unrolled(x)) for x in frames[:32])
        for t in range(steps):
            old.step(frames[t % window])
        runs = {"fresh": fresh.step, "old": old.step, "call": unrolled}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for x in frames:
            for name, run in runs.items():
                start = time.perf_counter()
                run(x)
                seconds[name].append(1000 * (time.perf_counter() - start))
    ms = {name: statistics.median(found) for name, found in seconds.items()}
    return {
        "ms a step, fresh": round(ms["fresh"], 3),
        f"ms a step, after {steps}": round(ms["old"], 3),
        "old / fresh": round(ms["old"] / ms["fresh"], 3),
        "one call, ms / T": round(ms["call"] / T, 3),
        "T steps equal one call": equal,
    }


def main() -> None:
    """Print the latencies as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--steps", type=int, default=1800, help="steps before the last window (1800)"
    )
    parser.add_argument("--window", type=int, default=200, help="steps of a median (200)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, "
        f"{torch.get_num_threads()} thread, windows of {args.window} steps, batch 1, T = {T}"
    )
    found = {
        name: {
            " ".join(filter(None, (target, dtype))): measure(
                net, target, dtype, args.steps, args.window
            )
            for target, dtype in TARGETS
        }
        for name, net in networks().items()
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
