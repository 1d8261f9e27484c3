"""ONNX Runtime on this machine's CPU against the source framework's own evaluation, and conversion.

    python benchmarks/onnx_runtime.py           everything
    python benchmarks/onnx_runtime.py speed     one of: speed, conversion

Needs SpikingJelly 2.0.0 and snnTorch 1.0 beside spikeport. Float32; times are medians of turns, so that a
slow moment of the machine hits all, each of as many calls as fill a tenth of a second; ratios in one
run. The fraction of the matrix peak counts the multiplications and additions of the exported graph
against those of a large matrix product that takes turns with it, by torch or by ONNX Runtime, whichever
is faster: on some processors torch's library leaves half of the machine unused.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import onnx
import onnxruntime
import torch
import zoo
from asked import Table
from deployment import spikingjelly_net
from rerolling import Tutorial, trained
from torch import nn

from spikeport import deploy
from spikeport.converters import ops
from spikeport.converters.capture import capture
from spikeport.converters.neurons import IFNode
from spikeport.converters.passes import reroll_time
from spikeport.converters.program import Program
from spikeport.deploy import data
from spikeport.deploy.pipeline import rewrite_for

#: Seconds that a turn takes at least.
_TURN = 0.1
#: Side of the matrices whose product is the peak.
_SIDE = 2048
_SEW = "SEW-ResNet18, 224 x 224, T = 4"
_PRODUCTS = (ops.aten.conv2d.default, ops.aten.linear.default, ops.aten.matmul.default)


def speed(table: Table) -> None:
    """How much faster the exported graphs run than the networks that they come from."""
    from spikingjelly.activation_based import functional

    def spikingjelly(net: nn.Module) -> Callable[[torch.Tensor], Any]:
        def run(x: torch.Tensor) -> Any:
            functional.reset_net(net)
            return net(x)

        return run

    images = data.load("fashion-mnist", limit=128).x
    csnn = spikingjelly_net(128)
    _faster(
        table,
        "the tutorial's CSNN, 128 channels, T = 4",
        2.2,
        csnn,
        spikingjelly(csnn),
        images[:32],
    )
    sew, batch = _sew_resnet18()
    for n in (1, 4):
        _faster(table, f"{_SEW}, batch {n}", 2.0, sew, spikingjelly(sew), batch(n))
    fc = trained()
    for n in (1, 128):
        _faster(table, f"snnTorch's tutorial, 25 steps, batch {n}", 10.0, fc, fc, images[:n])


def _sew_resnet18() -> tuple[nn.Module, Callable[[int], torch.Tensor]]:
    zoo.ZOO["sew_resnet18"] = zoo.Builder(
        "sew_resnet", (3, 224, 224), options=(("cnf", "ADD"),), neuron="IFNode"
    )
    return zoo.build("sew_resnet18")


def _faster(
    table: Table,
    what: str,
    asked: float,
    net: nn.Module,
    source: Callable[[torch.Tensor], Any],
    x: torch.Tensor,
) -> None:
    program = deploy.convert(net, (x,), "onnx", verify=False)
    matrix = torch.randn(_SIDE, _SIDE)
    product = _product(matrix)
    with tempfile.TemporaryDirectory() as folder:
        deploy.compile(program, f"{folder}/net", cache=False, probe=False)
        model = deploy.load(f"{folder}/net")
        with torch.no_grad():
            seconds = _turns(
                {
                    "source": lambda: source(x),
                    "onnx": lambda: model(x),
                    "torch": lambda: matrix @ matrix,
                    "runtime": product,
                }
            )
    table.at_least(f"{what}: x source", asked, seconds["source"] / seconds["onnx"])
    peak = 2 * _SIDE**3 / min(seconds["torch"], seconds["runtime"])
    table.note("  images a second", f"{len(x) / seconds['onnx']:.4g}")
    table.note("  fraction of the matrix peak", f"{_flops(program) / seconds['onnx'] / peak:.2f}")


def _product(matrix: torch.Tensor) -> Callable[[], Any]:
    """ONNX Runtime's product of a matrix with itself, a weight on one side as in a layer."""
    value, shape = onnx.TensorProto.FLOAT, [*matrix.shape]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "product",
        [onnx.helper.make_tensor_value_info("x", value, shape)],
        [onnx.helper.make_tensor_value_info("y", value, shape)],
        [onnx.numpy_helper.from_array(matrix.numpy(), "weight")],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return partial(session.run, None, {"x": matrix.numpy()})


def _turns(contenders: dict[str, Callable[[], Any]], rounds: int = 7) -> dict[str, float]:
    """Median seconds of a call of each."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            run()  # what ran before has left its own data in the caches
            start, calls = time.perf_counter(), 0
            while not calls or time.perf_counter() - start < _TURN:
                run()
                calls += 1
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(s) for name, s in seconds.items()}


def _flops(program: Program) -> float:
    """Multiplications and additions of a program's convolutions and matrix products."""
    products = (n for n in program.walk() if n.target in _PRODUCTS)
    return sum(2.0 * ops.fan_in(n) * math.prod(ops.shape(n)) for n in products)


class Chain(nn.Module):
    """Convolutions and neurons, one after another."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(depth))
        self.spike = nn.ModuleList(IFNode(v_threshold=0.1) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, N, 8, H, W] -> spikes, likewise."""
        for conv, spike in zip(self.conv, self.spike, strict=True):
            x = spike(conv(x.flatten(0, 1)).reshape(x.shape))
        return x


def conversion(table: Table) -> None:
    """Seconds of a conversion, and how they grow."""
    sew, batch = _sew_resnet18()
    table.at_most(f"{_SEW}: seconds to convert and verify", 30, _convert(sew, batch(1)))
    depths = (16, 64)
    each = []
    for depth in depths:
        whole = _convert(Chain(depth).eval(), torch.rand(4, 1, 8, 8, 8))
        table.note(f"a chain of {depth} layers: seconds to convert and verify", f"{whole:.3g}")
        each.append(whole / depth)
    table.at_most(f"a layer of {depths[1]}: x a layer of {depths[0]}", 1.5, each[1] / each[0])
    rolled = {str(T): _rerolled(T) for T in (10, 100)}
    seconds = _turns({T: partial(_rewritten, program) for T, program in rolled.items()})
    for T, passes in seconds.items():
        table.note(f"a loop of {T} steps, re-rolled: seconds of all other passes", f"{passes:.3g}")
    table.at_most("100 steps: x 10 steps", 1.5, seconds["100"] / seconds["10"])


def _rerolled(T: int) -> Program:
    return reroll_time(capture(Tutorial(T).eval(), (torch.rand(16, 1, 28, 28),)))


def _rewritten(program: Program) -> Program:
    return rewrite_for(program, "reference", torch.float32, "unrolled")


def _convert(net: nn.Module, x: torch.Tensor) -> float:
    start = time.perf_counter()
    deploy.convert(net, (x,), "onnx")
    return time.perf_counter() - start


PARTS: dict[str, Callable[[Table], None]] = {"speed": speed, "conversion": conversion}


def main() -> int:
    """Print the table; 1 if something asked is not met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="*", choices=[*PARTS, []], help="all unless given")
    chosen = parser.parse_args().part or [*PARTS]
    table = Table(
        f"onnxruntime {onnxruntime.__version__}, torch {torch.__version__}, "
        f"python {platform.python_version()}, {os.cpu_count()} cores"
    )
    torch.manual_seed(0)
    for part in chosen:
        PARTS[part](table)
    return table.verdict()


if __name__ == "__main__":
    sys.exit(main())
