"""State: what survives a call is refused by name, and what a neuron keeps within one is traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capturing import SingleStep, captured, findings, lowered, rules
from networks import Net, rand
from torch import nn

from spikeport.converters.neurons import IFNode, LIFNode

T, N = 4, 2

pytestmark = pytest.mark.usefixtures("single_step")


class Memory(nn.Module):
    """Keeps a trace of its inputs from one call to the next."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("trace", torch.zeros(3))
        self.last: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "buffer":
            self.trace.add_(x[0, 0])
            return x + self.trace
        if self.how == "attribute":
            y = x if self.last is None else x + self.last
            self.last = x
            return y
        if self.how == "unused attribute":
            self.last = x
            return x
        if self.how == "counter":
            self.last = (self.last or 0) + 1
            return x * self.last
        if self.how == "new buffer":
            self.trace = self.trace + x[0, 0]
            return x + self.trace
        raise AssertionError


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("buffer", "trace"),
        ("attribute", "last"),
        ("unused attribute", "last"),
        ("counter", "last"),
        ("new buffer", "trace"),
    ],
)
def test_state_that_survives(how: str, name: str) -> None:
    found = findings(nn.Sequential(Memory(how), IFNode()), rand(T, N, 3))
    assert rules(found) == [("surviving-state", "0")]
    assert f"self.{name}" in found[0].found


def test_a_written_buffer_whose_value_is_not_used_in_the_same_call() -> None:
    """Two calls give the same outputs here; a third, on other inputs, would not."""

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        y = s.spike(x + s.memory.trace)
        s.memory.trace.clamp_(min=x.min().detach())
        return y

    found = findings(Net(run, spike=IFNode(), memory=Memory("")), rand(T, N, 3) + 100)
    assert rules(found) == [("surviving-state", "memory")]


def test_a_value_that_the_first_call_caches() -> None:
    """The network goes on with what its first input gave; no constant of the graph may."""

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        if s.memory.last is None:
            s.memory.last = float(x.max())
        return s.spike(x / s.memory.last)

    found = findings(Net(run, spike=IFNode(), memory=Memory("")), rand(T, N, 3))
    assert rules(found) == [("surviving-state", "memory")]


def test_a_spike_count_noted_on_self() -> None:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        s.steps = x.shape[0]
        return s.spike(x)

    found = findings(Net(run, spike=IFNode()), rand(T, N, 3))
    assert rules(found) == [("surviving-state", "")]


def test_a_single_step_neuron_whose_spikes_are_used_at_the_end_only() -> None:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        for t in range(T):
            y = s.b(s.fc(s.a(x[t])))
        return y

    net = Net(run, fc=nn.Linear(3, 3), a=SingleStep(), b=SingleStep())
    program = captured(net, rand(T, N, 3))
    for form in (program, lowered(program)):
        assert [len(s.spikes) for s in form.sites] == [T, T]


def test_a_neurons_state_is_read_after_its_call() -> None:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        between = []
        for t in range(T):
            s.spike(s.fc(x[t]))
            between.append(s.spike.v)
        return torch.stack(between) + s.spike.v

    net = Net(run, fc=nn.Linear(3, 3), spike=SingleStep())
    program = captured(net, rand(T, N, 3))
    for form in (program, lowered(program)):
        assert [len(s.spikes) for s in form.sites] == [T]


def test_a_neurons_state_before_its_first_call() -> None:
    net = Net(
        lambda s, x: s.spike.v + torch.stack([s.spike(x[t]) for t in range(T)]), spike=SingleStep()
    )
    found = findings(net, rand(T, N, 3))
    assert rules(found) == [("neuron-state", "spike")]
    assert found[0].found == "the forward reads its v"


def test_setting_a_neurons_state() -> None:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        s.spike.v = torch.full_like(x[0], 0.5)
        return torch.stack([s.spike(x[t]) for t in range(T)])

    found = findings(Net(run, spike=SingleStep()), rand(T, N, 3))
    assert rules(found) == [("neuron-state", "spike")]
    assert found[0].found == "the forward sets its v"


def test_a_neuron_in_a_list() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spikes = [SingleStep()]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([self.spikes[0](x[t]) for t in range(T)])

    found = findings(Hidden(), rand(T, N, 3))
    assert [f.rule for f in found] == ["hidden-module"]
    assert found[0].where == "spikes[0]"


def test_a_multi_step_neuron_in_a_list_is_refused_too() -> None:
    """Its equation would be traced as loose arithmetic, with no layer to compare or to name."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spikes = {"a": (LIFNode(),)}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.spikes["a"][0](x)

    assert [f.rule for f in findings(Hidden(), rand(T, N, 3))] == ["hidden-module"]


def test_state_outside_the_network() -> None:
    calls: list[int] = []

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return s.spike(x) * len(calls)

    found = findings(Net(run, spike=IFNode()), rand(T, N, 3) + 1)
    assert rules(found) == [("surviving-state", "")]


class Settings:
    """An object that is equal to itself alone."""

    scale = 2.0


def test_objects_that_a_module_keeps_are_no_state() -> None:
    net = Net(lambda s, x: s.spike(s.fc(x) * s.settings.scale), fc=nn.Linear(3, 3), spike=IFNode())
    net.settings = Settings()
    captured(net, rand(T, N, 3))
