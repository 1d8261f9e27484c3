"""Products of each step on their own, against those of all steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spikeport.converters.capture import capture
from spikeport.converters.ops import aten
from spikeport.targets.onnx import parts

T, N, C = 3, 4, 10
STEPS = tuple(torch.randn(N, C, generator=torch.Generator().manual_seed(t)) for t in range(T))


class Joined(nn.Module):
    """Steps [N, C], joined, and what is made of them."""

    def __init__(self, run: Callable[[torch.Tensor, Any], torch.Tensor]) -> None:
        super().__init__()
        self.run, self.fc = run, nn.Linear(C, 5)

    def forward(self, *steps: torch.Tensor) -> torch.Tensor:
        return self.run(torch.cat(steps), self)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small steps are large enough."""
    monkeypatch.setattr(parts, "_FEWEST", 1)
    monkeypatch.setattr(parts, "_WEIGHTS", 0)


def operators(run: Callable[[torch.Tensor, Any], torch.Tensor]) -> tuple[Counter, Counter]:
    """Those before and after, if both give the same."""
    program = capture(Joined(run).eval(), STEPS)
    apart = parts.in_parts(program)
    for a, b in zip(program.run(STEPS), apart.run(STEPS), strict=True):
        assert torch.equal(a, b)
    before, after = (Counter(n.target for n in p.nodes("call_function")) for p in (program, apart))
    return before, after


@pytest.mark.usefixtures("small")
def test_a_product_is_joined_at_the_end() -> None:
    before, after = operators(lambda x, m: m.fc(x))
    assert (before[aten.linear.default], after[aten.linear.default]) == (1, T)
    assert after[aten.cat.default] == 1


@pytest.mark.usefixtures("small")
def test_steps_that_are_cut_out_are_neither_joined_nor_cut() -> None:
    def run(x: torch.Tensor, m: Any) -> torch.Tensor:
        y = m.fc(x)
        return torch.stack([y[t * N : (t + 1) * N] + t for t in range(T)])

    before, after = operators(run)
    assert before[aten.slice.Tensor] == T
    assert after[aten.slice.Tensor] == after[aten.cat.default] == 0
    assert after[aten.linear.default] == T


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "run",
    [
        lambda x, m: x.sum(0),
        lambda x, m: F.linear(m.fc.weight, x),
        lambda x, m: m.fc(x[:5]),
        lambda x, m: m.fc(x.reshape(T, N, C)),
        lambda x, m: m.fc(torch.cat([x, x], 1)[:, :C]),
        lambda x, m: x[1 : N + 1] * 2,
        lambda x, m: torch.cat([x > 0, x])[: T * N] * 2,
    ],
)
def test_all_else_stays(run: Callable[[torch.Tensor, Any], torch.Tensor]) -> None:
    before, after = operators(run)
    assert before == after


@pytest.mark.parametrize(("weights", "apart"), [(0, T), (0.5, T), (1, 1)])
def test_large_weights_stay_together(
    weights: float, apart: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_FEWEST", 1)
    monkeypatch.setattr(parts, "_WEIGHTS", weights)
    _, after = operators(lambda x, m: m.fc(x))  # 40 elements of a step, 55 weights
    assert after[aten.linear.default] == apart


def test_small_steps_stay_together() -> None:
    _, after = operators(lambda x, m: m.fc(x))
    assert after[aten.linear.default] == 1
