"""What is refused of the real snnTorch, 1.0 and 0.9: neurons by name, and states that are not their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import equal, grid, refused
from snntorch_loops import Loop, beta, normal
from torch import nn

from spikeport.converters.capture import capture

snn = pytest.importorskip("snntorch")

pytestmark = pytest.mark.snntorch
N, F = 2, 100


class Look(snn.Leaky):  # type: ignore[misc, name-defined]
    """Named as it likes."""


@pytest.mark.parametrize(
    ("neuron", "rule"),
    [
        (lambda: snn.Leaky(beta=0.9, inhibition=True), "inhibition"),
        (lambda: snn.Leaky(beta=0.9, state_quant=lambda v: v), "state-quant"),
        (lambda: snn.Leaky(beta=0.9, spike_grad=torch.sigmoid), "surrogate-output"),
        (lambda: snn.Leaky(beta=0.9, threshold=-0.5), "negative-threshold"),
        (lambda: snn.Leaky(beta=0.9, graded_spikes_factor=0.0), "graded-spikes"),
        (lambda: snn.Leaky(beta=beta(F).double()), "parameter-dtype"),
        (lambda: Look(beta=0.9), "look-alike-neuron"),
        (lambda: snn.LeakyParallel(F, F), "unknown-neuron"),
        (lambda: snn.SLSTM(F, F, threshold=-0.5), "negative-threshold"),
    ],
)
@pytest.mark.filterwarnings("ignore:Inhibition")
def test_refused_by_name(neuron: Callable[[], Any], rule: str) -> None:
    assert (rule, "neurons.0") in refused(Loop(neuron()), normal(2, N, F))


def test_a_reset_mechanism_that_was_changed_later() -> None:
    neuron = snn.Leaky(beta=0.9)
    neuron.reset_mechanism = "zero"
    assert refused(Loop(neuron), normal(2, N, F)) == [("reset-mechanism", "neurons.0")]


class Handed(nn.Module):
    """Hands something to the neuron as its membrane."""

    def __init__(self, hand: Callable[..., Any]) -> None:
        super().__init__()
        self.lif, self.hand = snn.Leaky(beta=0.9), hand

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mem: Any = torch.zeros(N, F)
        spikes = []
        for x_t in x:
            spk, mem = self.lif(x_t, self.hand(mem, x))
            spikes.append(spk)
        return torch.stack(spikes)


@pytest.mark.parametrize(
    "hand",
    [lambda mem, x: mem * 0.5, lambda mem, x: x[0], lambda mem, x: mem * 0 + torch.ones(N, F)],
)
def test_another_membrane_than_its_own(hand: Callable[..., Any]) -> None:
    assert refused(Handed(hand), normal(3, N, F)) == [("neuron-state", "lif")]


@pytest.mark.parametrize("used", [True, False])
def test_a_second_call_from_the_same_membrane(used: bool) -> None:
    """Is refused, unless nothing uses it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lif = snn.Leaky(beta=0.9)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mem, spikes = self.lif.reset_mem(), []
            for x_t in x:
                ahead, _ = self.lif(2 * x_t, mem)
                spk, mem = self.lif(x_t, mem)
                spikes.append(spk - ahead if used else spk)
            return torch.stack(spikes)

    if used:
        assert refused(Net(), normal(3, N, F)) == [("neuron-state", "lif")]
    else:
        (site,) = capture(Net(), (normal(3, N, F),)).sites
        assert site.T == 3


def test_a_state_that_comes_with_the_input() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lif = snn.Leaky(beta=0.9)

        def forward(self, x: torch.Tensor, mem: torch.Tensor) -> Any:
            return self.lif(x, mem)

    assert refused(Net(), normal(N, F), torch.zeros(N, F)) == [("neuron-state", "lif")]


def test_a_time_loop_outside() -> None:
    net = nn.Sequential(nn.Linear(F, F), snn.Leaky(beta=0.9, init_hidden=True))
    assert refused(net, normal(N, F)) == [("time-loop-outside", "1")]


class Fed(nn.Module):
    """Feeds back to a neuron what ``feed`` makes of its last spikes."""

    def __init__(self, feed: Callable[..., Any]) -> None:
        super().__init__()
        self.lif, self.feed = snn.RLeaky(beta=0.5, V=0.5, all_to_all=False), feed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spk, mem = self.lif.reset_mem()
        found = []
        for t, x_t in enumerate(x):
            spk, mem = self.lif(x_t, self.feed(spk, t), mem)
            found.append(spk)
        return torch.stack(found)


@pytest.mark.parametrize(
    "feed",
    [
        lambda spk, t: spk * 0.5,
        lambda spk, t: torch.zeros_like(spk) if t == 3 else spk,
        lambda spk, t: spk if t else torch.ones(N, F),
    ],
)
def test_other_spikes_than_its_own_even_where_the_example_has_none(
    feed: Callable[..., Any],
) -> None:
    assert refused(Fed(feed), torch.zeros(5, N, F)) == [("neuron-state", "lif")]


def test_own_spikes_without_a_history() -> None:
    net, x = Fed(lambda spk, t: spk.detach()), grid(5, N, F)
    assert equal(capture(net, (x,))(x), net(x))
