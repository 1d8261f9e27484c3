"""Networks of the real SpikingJelly 0.0.0.0.12, ``clock_driven``."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from networks import grid, rand
from torch import nn

from spikeport import deploy
from spikeport.converters.capture import capture
from spikeport.converters.errors import CaptureError
from spikeport.converters.passes import (
    flatten_time,
    hoist_time_invariant,
    lower_neurons,
    reroll_time,
)

pytest.importorskip("spikingjelly.clock_driven")
functional = pytest.importorskip("spikingjelly.clock_driven.functional")
layer = pytest.importorskip("spikingjelly.clock_driven.layer")
neuron = pytest.importorskip("spikingjelly.clock_driven.neuron")
surrogate = pytest.importorskip("spikingjelly.clock_driven.surrogate")

pytestmark = pytest.mark.spikingjelly
T, N = 4, 2


def reference(net: nn.Module, x: torch.Tensor) -> Any:
    work = copy.deepcopy(net).eval()
    functional.reset_net(work)
    with torch.no_grad():
        return work(x)


class Population(nn.Module):
    """Every kind of neuron on the same drive."""

    def __init__(self, neurons: list[nn.Module]) -> None:
        super().__init__()
        self.neurons = nn.ModuleList(neurons)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [n(x) for n in self.neurons]


VARIANTS = [
    (kind, v_reset, given)
    for kind, v_reset, given in itertools.product(
        ("IFNode", "LIFNode", "ParametricLIFNode"),
        (-0.3, 0.0, 0.2, None),
        ((2.0, True), (3.0, True), (3.0, False)),
    )
    if kind != "IFNode" or given == (2.0, True)
]


def made(prefix: str) -> list[nn.Module]:
    found = []
    for kind, v_reset, given in VARIANTS:
        node = getattr(neuron, prefix + kind)
        found.append(node(*(() if kind == "IFNode" else given), v_reset=v_reset))
    return found


@pytest.mark.parametrize("step_mode", ["multi-step", "single-step in a container"])
def test_zero_differing_spikes(step_mode: str) -> None:
    if step_mode == "multi-step":
        net = Population(made("MultiStep"))
    else:
        net = Population([layer.MultiStepContainer(n) for n in made("")])
    program = capture(net, (rand(T, N, 300),))
    lowered = reroll_time(program)
    assert {site.layout for site in lowered.sites} == {"stepped"}
    for rewrite in (hoist_time_invariant, flatten_time, lower_neurons):
        lowered = rewrite(lowered)
    fired = 0.0
    for drive in (rand, grid):
        x = drive(T, N, 300, seed=1)
        for form in (program, lowered):
            for variant, ours, theirs in zip(VARIANTS, form(x), reference(net, x), strict=True):
                assert torch.equal(ours, theirs), variant
                fired += theirs.mean().item()
    assert 0.05 < fired / len(VARIANTS) / 4 < 0.6


def test_charges_that_are_not_linear() -> None:
    kinds = [
        layer.MultiStepContainer(kind(v_reset=v_reset))
        for kind in (neuron.QIFNode, neuron.EIFNode)
        for v_reset in (-0.3, 0.0, None)
    ]
    analogue = [layer.MultiStepContainer(neuron.LIAFNode(torch.relu, b)) for b in (True, False)]
    net = Population([*kinds, neuron.MultiStepEIFNode(v_reset=-0.3), *analogue])
    program = capture(net, (rand(T, N, 300),))
    for drive in (rand, grid):
        x = drive(T, N, 300, seed=1)
        for ours, theirs in zip(program(x), reference(net, x), strict=True):
            assert torch.equal(ours, theirs)
            assert 0.05 < theirs.mean() < 0.8


class CupyNet(nn.Module):
    """The network of SpikingJelly's tutorial on layer-by-layer propagation, narrower."""

    def __init__(self, steps: int = T, channels: int = 8) -> None:
        super().__init__()
        c, node = channels, neuron.MultiStepIFNode
        self.steps = steps
        self.static_conv = nn.Sequential(
            nn.Conv2d(1, c, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(c)
        )
        self.conv = nn.Sequential(
            node(surrogate_function=surrogate.ATan()),
            layer.SeqToANNContainer(
                nn.MaxPool2d(2, 2),
                nn.Conv2d(c, c, kernel_size=3, padding=1, bias=False),
                nn.BatchNorm2d(c),
            ),
            node(surrogate_function=surrogate.ATan()),
            layer.SeqToANNContainer(nn.MaxPool2d(2, 2), nn.Flatten()),
        )
        self.fc = nn.Sequential(
            layer.SeqToANNContainer(nn.Linear(c * 49, c * 16, bias=False)),
            node(surrogate_function=surrogate.ATan()),
            layer.SeqToANNContainer(nn.Linear(c * 16, 10, bias=False)),
            node(surrogate_function=surrogate.ATan()),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_seq = self.static_conv(x).unsqueeze(0).repeat(self.steps, 1, 1, 1, 1)
        out: torch.Tensor = self.fc(self.conv(x_seq)).mean(0)
        return out


class StepByStep(nn.Module):
    """The same layers as single-step modules, with a count of spikes."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        c, node = channels, neuron.LIFNode
        self.net = nn.Sequential(
            *(
                nn.Conv2d(1, c, 3, padding=1, bias=False),
                nn.BatchNorm2d(c),
                node(),
                nn.MaxPool2d(4),
            ),
            *(nn.Flatten(), layer.Dropout(0.5), nn.Linear(c * 49, 10, bias=False), node()),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spikes = self.net(x)
        for _ in range(1, T):
            spikes += self.net(x)
        return torch.as_tensor(spikes / T)


@pytest.mark.parametrize("made", [CupyNet, StepByStep])
@pytest.mark.parametrize("target", ["reference", "lynxi-sim"])
def test_tutorials_are_verified(made: Any, target: str) -> None:
    torch.manual_seed(0)
    net = made()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(0.1)
        elif isinstance(module, nn.Linear):
            module.weight.data *= 4  # untrained layers hardly fire
    program = deploy.convert(net, (rand(N, 1, 28, 28),), target=target)
    if target == "reference":
        x = rand(N, 1, 28, 28, seed=3)
        assert reference(net, x).any()
        assert torch.equal(program(x), reference(net, x))
        assert all(site.layout in ("flat", "static") for site in program.sites)


def test_other_neurons_are_refused_by_name() -> None:
    lava = neuron.MultiStepIFNode()
    lava.backend = "lava"
    others = [neuron.GeneralNode(1.0, 0.0), neuron.GeneralNode(0.5, 0.0)]
    net = Population([*others, lava])
    with pytest.raises(CaptureError) as caught:
        capture(net, (rand(T, N, 5),))
    assert {(f.rule, f.where) for f in caught.value.findings} >= {
        ("unknown-neuron", "neurons.0"),
        ("unknown-neuron", "neurons.1"),
        ("neuron-backend", "neurons.2"),
    }
