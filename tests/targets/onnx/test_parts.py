"""Layers of each step on their own, against those of all steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spikeport.converters.capture import capture
from spikeport.converters.ops import aten
from spikeport.converters.program import Program
from spikeport.targets.onnx import parts

T, N = 3, 4
STEPS = tuple(torch.randn(N, 8, 6, 6, generator=torch.Generator().manual_seed(t)) for t in range(T))
W = torch.randn(8, 8, 3, 3)


class Joined(nn.Module):
    """Steps [N, 8, 6, 6], joined, and what is made of them."""

    def __init__(self, run: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.run = run
        self.weight, self.matrix = nn.Parameter(W), nn.Parameter(torch.randn(5, 288))

    def forward(self, *steps: torch.Tensor) -> torch.Tensor:
        return self.run(torch.cat(steps), self)


def programs(
    run: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch, fewest: int = 1
) -> tuple[Counter, Counter]:
    """The operators before and after, if both give the same."""
    monkeypatch.setattr(parts, "_FEWEST", fewest)
    program = capture(Joined(run).eval(), STEPS)
    apart = parts.in_parts(program)
    for a, b in zip(program.run(STEPS), apart.run(STEPS), strict=True):
        assert torch.equal(a, b)
    return operators(program), operators(apart)


def operators(program: Program) -> Counter:
    return Counter(n.target for n in program.nodes("call_function"))


@pytest.mark.parametrize(
    ("run", "operator"),
    [
        (lambda x, m: F.max_pool2d(x, 2), aten.max_pool2d.default),
        (lambda x, m: F.conv2d(x, m.weight[:1, :, :1, :1] * 1.0), aten.conv2d.default),
        (lambda x, m: F.linear(x.flatten(1), m.matrix[:, :288]), aten.linear.default),
        (lambda x, m: torch.relu(x), aten.relu.default),
        (lambda x, m: x * m.weight[0, :, :1, :1], aten.mul.Tensor),
        (lambda x, m: x + F.max_pool2d(x, 3, 1, 1), aten.add.Tensor),
        (lambda x, m: torch.where(x > 0, x, 2 * x), aten.where.self),
    ],
)
def test_taken_apart(run, operator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_WEIGHTS", 0)
    before, after = programs(run, monkeypatch)
    assert (before[operator], after[operator]) == (1, T)
    assert after[aten.cat.default] == 1  # at the end


@pytest.mark.parametrize(
    "run",
    [
        lambda x, m: x.sum(0),
        lambda x, m: x.flatten(0, 1) * 2,
        lambda x, m: x.reshape(T, N, 8, 6, 6) * 2,
        lambda x, m: x.transpose(0, 1) * 2,
        lambda x, m: x.softmax(0),
        lambda x, m: x + torch.ones(T * N, 8, 6, 6) * x.mean(),
        lambda x, m: x[:5] * 2,
        lambda x, m: x[:, :4].flatten(1) @ x[:, 4:].flatten(1).t(),
        lambda x, m: F.conv2d(m.weight, x, padding=3),
    ],
)
def test_what_mixes_steps_or_starts_elsewhere_stays(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_WEIGHTS", 0)
    before, after = programs(run, monkeypatch)
    assert before == after


def test_steps_that_are_cut_out_are_neither_joined_nor_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(x: torch.Tensor, m: Joined) -> torch.Tensor:
        y = F.max_pool2d(x, 2).flatten(1)
        return torch.stack([y[t * N : (t + 1) * N] + t for t in range(T)])

    before, after = programs(run, monkeypatch)
    assert before[aten.slice.Tensor] == T
    assert after[aten.slice.Tensor] == after[aten.cat.default] == 0


def test_small_steps_and_large_weights_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(x: torch.Tensor, m: Joined) -> torch.Tensor:
        return F.linear(F.relu(F.conv2d(x, m.weight)).flatten(1), m.matrix[:, :128])

    before, after = programs(run, monkeypatch, fewest=2**15)
    assert before == after
    for weights, apart in ((0, (T, T)), (1, (T, 1)), (4, (1, 1))):
        monkeypatch.setattr(parts, "_WEIGHTS", weights)
        _, after = programs(run, monkeypatch)
        assert (after[aten.conv2d.default], after[aten.linear.default]) == apart
