"""Random graphs: the fast engine gives the bits of the plain one."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spikeport.targets.lynxi.simulator import lyngor, options
from spikeport.targets.lynxi.simulator.compiled import read

BINARY = ["add", "sub", "mul", "div", "maximum", "minimum", "where", "ge", "eq", "cat", "lif"]
UNARY = [
    "conv",
    "depthwise",
    "norm",
    "pool",
    "average",
    "relu",
    "sigmoid",
    "half_space",
    "reset",
    "clamp",
    "neuron",
    "flat_neuron",
    "permute",
    "mean",
    "softmax",
    "slice",
    "count",
    "whole",
    "cast",
]


class Random(nn.Module):
    """Operations on a growing list of [4, C, H, W] values, chosen by numbers."""

    def __init__(self, plan: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.plan = plan
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.depthwise = nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.norm.running_var.uniform_(0.3, 2)
        self.norm.running_mean.normal_()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for name, i, j in self.plan:
            a, b = values[i % len(values)], values[j % len(values)]
            values.append(self.step(name, a, b, j))
        return values[-1], values[-1] + values[len(values) // 2]

    def step(self, name: str, a: Tensor, b: Tensor, j: int) -> Tensor:
        steps: dict[str, Any] = {
            "add": lambda: a + b,
            "sub": lambda: 1.0 - a - b * 0.3,
            "mul": lambda: a * b,
            "div": lambda: a / (b.abs() + 0.3),
            "maximum": lambda: torch.maximum(a, -b),
            "minimum": lambda: torch.minimum(a, b),
            "where": lambda: torch.where(a > b, a, b * 0.7),
            "ge": lambda: (a >= b).to(a) + (a < 0.1).to(a) * 2,
            "eq": lambda: torch.logical_or(a == b, a > 1).float() - (a != b).float(),
            "cat": lambda: torch.cat([a[:2], b[2:]]),
            "lif": lambda: torch.where(a + b >= 0.5, 0.0, a + b),
            "conv": lambda: self.convs[j % 2](a),
            "depthwise": lambda: self.depthwise(a),
            "norm": lambda: self.norm(self.convs[j % 2](a)),
            "pool": lambda: nn.functional.max_pool2d(a, 2).repeat(1, 1, 2, 2),
            "average": lambda: nn.functional.avg_pool2d(a, 2).repeat(1, 1, 2, 2),
            "relu": a.relu,
            "sigmoid": a.sigmoid,
            "half_space": lambda: (a > 0).float() * a,
            "reset": lambda: (1.0 - (a >= 0.4).to(a)) * a,
            "clamp": lambda: a.clamp(-0.5, 0.25),
            "neuron": lambda: self.neuron(a),
            "flat_neuron": lambda: self.neuron(a.reshape(4, -1)).reshape(a.shape),
            "permute": lambda: a.permute(0, 1, 3, 2),
            "mean": lambda: a - a.mean((2, 3), keepdim=True),
            "softmax": lambda: a.softmax(1),
            "slice": lambda: torch.cat([a[:, 1:], a[:, :1]], 1),
            "whole": lambda: a + (a * 700).int() + torch.where(a > 0, (a * 2).int(), a),
            "cast": lambda: torch.where(a > 0, (a * 4).int().float() / 4, a),
            "count": lambda: a + (a > 0).sum(1, keepdim=True) * 0.1,
        }
        result: Tensor = steps[name]()
        return result

    def neuron(self, x: Tensor) -> Tensor:
        v, out = torch.zeros_like(x[:1]), []
        for t in range(4):
            v = v + x[t : t + 1]
            s = v >= 0.5
            out.append(s.to(x))
            v = torch.where(s, torch.zeros_like(v), v)
        return torch.cat(out)


PLANS = st.lists(
    st.tuples(st.sampled_from(BINARY + UNARY), st.integers(0, 9), st.integers(0, 9)),
    min_size=1,
    max_size=9,
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    plan=PLANS,
    seed=st.integers(0, 99),
    side=st.sampled_from([2, 6, 18]),
    storage=st.sampled_from(["float16", "float16", "float32"]),
)
def test_fast_is_plain(
    plan: list[tuple[str, int, int]], seed: int, side: int, storage: str
) -> None:
    torch.manual_seed(seed)
    net = Random(plan).eval()
    x = (torch.randn(4, 3, side, side) * 4).round() / 8
    with tempfile.TemporaryDirectory() as folder, options(storage=storage):
        model = lyngor.DLModel()
        model.load(net, "Pytorch", {"x": tuple(x.shape)})
        path = Path(lyngor.Builder().build(model.graph, model.params, out_path=folder))
        fast = read(path).engine().run([x])
        with options(optimise=False):
            plain = read(path).engine().run([x])
    for f, p in zip(fast, plain, strict=True):
        same = (f == p) & (f.signbit() == p.signbit()) | (f.isnan() & p.isnan())
        assert same.all()


def test_large_convolution_runs_in_pieces_with_the_same_bits(tmp_path: Path) -> None:
    from spikeport.targets.lynxi.simulator.ops import conv_pieces

    assert conv_pieces((64, 64, 48, 48)) < 64
    torch.manual_seed(0)
    model = lyngor.DLModel()
    model.load(nn.Conv2d(3, 64, 3, padding=1).eval(), "Pytorch", {"x": (64, 3, 48, 48)})
    path = Path(lyngor.Builder().build(model.graph, model.params, out_path=tmp_path))
    x = torch.randn(64, 3, 48, 48)
    fast = read(path).engine().run([x])[0]
    with options(optimise=False):
        assert torch.equal(fast, read(path).engine().run([x])[0])


def test_results_of_two_runs_are_two_tensors(build: Any) -> None:
    engine = build(nn.Identity(), [torch.zeros(3)])
    x = torch.ones(3)
    one = engine.run([x])[0]
    two = engine.run([x * 2])[0]
    assert one.tolist() == [1, 1, 1]
    one.add_(5)
    assert x.tolist() == [1, 1, 1]
    assert two.tolist() == [2, 2, 2]
