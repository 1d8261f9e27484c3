"""Neurons of the real SpikingJelly, 2.0.0 and 0.0.0.0.14: they convert, or are refused by name."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from activation_based import converted, lowered, make, reference
from networks import grid, rand, refused
from torch import nn

from spikeport.converters import verify
from spikeport.converters.capture import capture
from spikeport.converters.errors import CaptureError
from spikeport.converters.sources.spikingjelly import _KNOWN

pytest.importorskip("spikingjelly")
sj_base = pytest.importorskip("spikingjelly.activation_based.base")
neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
surrogate = pytest.importorskip("spikingjelly.activation_based.surrogate")

pytestmark = pytest.mark.spikingjelly
#: 0.0.0.0.14, whose neurons choose their backend.
OLD = hasattr(neuron.IFNode(), "backend")
T, N = 4, 2


# The grid of neurons

KINDS = ("IFNode", "LIFNode", "ParametricLIFNode")
#: LIF in eval mode, single-step only.
ONLINE = ("OTTTLIFNode", "SLTTLIFNode")
V_RESETS = (-0.3, 0.0, 0.2, None)


class Population(nn.Module):
    """Every kind of neuron on the same drive."""

    def __init__(self, kinds: list[Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kinds)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.layers]


VARIANTS = [
    (kind, v_reset, tau, decay)
    for kind, v_reset, tau, decay in itertools.product(KINDS, V_RESETS, (2.0, 3.0), (True, False))
    if kind != "IFNode" or (tau == 2.0 and decay)
]


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_zero_differing_spikes(steps: int) -> None:
    net = Population([make(*variant) for variant in VARIANTS])
    program = lowered(capture(net, (rand(steps, N, 500),)))
    fired = 0.0
    for drive in (rand, grid):
        x = drive(steps, N, 500, seed=steps)
        for variant, ours, theirs in zip(VARIANTS, program(x), reference(net, x), strict=True):
            assert torch.equal(ours, theirs), variant
            fired += theirs.mean().item()
    assert 0.05 < fired / len(VARIANTS) / 2 < 0.6


@pytest.mark.parametrize("steps", [1, 4])
def test_zero_differing_spikes_step_by_step(steps: int) -> None:
    """The single-step kernels have their own order of rounding in some releases."""

    class Loop(Population):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [torch.stack([layer(x[t]) for t in range(steps)]) for layer in self.layers]

    net = Loop([make(*variant, step_mode="s") for variant in VARIANTS])
    if steps == 1:
        assert {rule for rule, _ in refused(net, rand(1, N, 50))} == {"time-loop-outside"}
        return
    program = lowered(capture(net, (rand(steps, N, 500),)))
    for drive in (rand, grid):
        x = drive(steps, N, 500, seed=steps)
        for variant, ours, theirs in zip(VARIANTS, program(x), reference(net, x), strict=True):
            assert torch.equal(ours, theirs), variant


@pytest.mark.parametrize("mode", ["m", "s"])
def test_thresholds_and_time_constants_set_as_attributes(mode: str) -> None:
    net = nn.Sequential(make("LIFNode", 0.0, 2.0, True), make("ParametricLIFNode", None, 2.0, True))
    net[0].v_threshold, net[0].tau, net[1].v_threshold = 0.5, 4.0, 0.75
    with torch.no_grad():
        net[1].w.fill_(0.3)
    net[0].v_reset = -0.1
    sites = converted(net, rand(T, N, 20)).sites
    assert (sites[0].neuron.v_threshold, sites[0].neuron.params["tau"]) == (0.5, 4.0)
    assert sites[1].neuron.v_threshold == 0.75


def test_the_reset_value() -> None:
    node = make("IFNode", 0.0, 2.0, True)
    node.set_reset_value("v", 0.4)
    node.reset()
    program = converted(nn.Sequential(node), rand(T, N, 50))
    assert program.sites[0].neuron.v_0 == pytest.approx(0.4)


@pytest.mark.parametrize("name", ["ATan", "Sigmoid", "PiecewiseQuadratic", "SoftSign", "Erf"])
def test_surrogates(name: str) -> None:
    node = make("LIFNode", 0.0, 2.0, True, surrogate_function=getattr(surrogate, name)())
    program = capture(nn.Sequential(node), (rand(T, N, 20),))
    x = grid(T, N, 200)
    assert torch.equal(lowered(capture(nn.Sequential(node), (x,)))(x), reference(node, x))
    assert program.sites[0].neuron.fires == ">="


def test_a_surrogate_that_does_not_spike() -> None:
    net = nn.Sequential(
        make("IFNode", 0.0, 2.0, True, surrogate_function=surrogate.Sigmoid(spiking=False)),
        make("IFNode", 0.0, 2.0, True),
    )
    assert refused(net, rand(T, N, 5)) == [("surrogate-output", "0")]


def test_a_surrogate_of_the_users() -> None:
    class Shifted(nn.Module):
        spiking = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x >= 0.5).to(x)

    node = make("ParametricLIFNode", 0.0, 2.0, True)
    node.surrogate_function = Shifted()
    assert refused(nn.Sequential(node), rand(T, N, 5)) == [("surrogate-output", "0")]


def test_store_v_seq_changes_nothing() -> None:
    converted(nn.Sequential(make("LIFNode", 0.0, 2.0, True, store_v_seq=True)), rand(T, N, 5))


@pytest.mark.parametrize("v_reset", [None, 0.0, -0.25])
@pytest.mark.parametrize("decay_input", [True, False])
@pytest.mark.parametrize("name", [name for name in ONLINE if hasattr(neuron, name)])
def test_neurons_for_online_training(name: str, decay_input: bool, v_reset: float | None) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spike = getattr(neuron, name)(decay_input=decay_input, v_reset=v_reset)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([self.spike(step) for step in x])

    program = converted(Loop(), grid(T, N, 5))
    assert program.sites[0].neuron.fires == ">="


# Neurons of other dynamics

SOME = {"tau": 2.5}
OTHERS = {
    "SimpleIFNode": [{}],
    "SimpleLIFNode": [{**SOME, "decay_input": True}, {**SOME, "decay_input": False}],
    "QIFNode": [{**SOME, "v_c": 0.7, "a0": 0.9}],
    "EIFNode": [{**SOME, "delta_T": 0.7}],
    "IzhikevichNode": [{**SOME, "a": 0.3, "b": 0.2, "tau_w": 3.0, "w_rest": 0.25}],
    "KLIFNode": [
        {**SOME, "decay_input": decay_input, "scale_reset": scale_reset}
        for decay_input in (True, False)
        for scale_reset in (True, False)
    ],
    "CUBALIFNode": [{}],
    "RAFNode": [{}],
    "LIAFNode": [
        {**SOME, "act": torch.relu, "threshold_related": related} for related in (True, False)
    ],
    "ComplementaryLIFNode": [SOME],
    "HalfThresholdIFNode": [{}],
    "TernaryIFNode": [{}],
    "TernaryLIFNode": [{**SOME, "decay_input": decay_input} for decay_input in (True, False)],
    "MPBNLIFNode": [{"out_features": 37, "learnable_vth": learned} for learned in (True, False)],
}
#: Their reset is their own.
ONE_RESET = ("ComplementaryLIFNode", "HalfThresholdIFNode")


class Stepwise(nn.Module):
    def __init__(self, spike: nn.Module) -> None:
        super().__init__()
        self.spike = spike

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.spike(step) for step in x])


class SideBySide(nn.Module):
    """Neurons side by side on one input, of all steps or of one after another."""

    def __init__(self, nodes: list[nn.Module]) -> None:
        super().__init__()
        self.nodes = nn.ModuleList(nodes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.nodes[0].step_mode == "m":
            return tuple(node(x) for node in self.nodes)
        steps = [[node(step) for node in self.nodes] for step in x]
        return tuple(torch.stack(spikes) for spikes in zip(*steps, strict=True))


@pytest.mark.parametrize("step_mode", ["m", "s"])
@pytest.mark.parametrize("name", OTHERS)
def test_neurons_of_other_dynamics(name: str, step_mode: str) -> None:
    if not hasattr(neuron, name):
        pytest.skip("only in 2.0.0")
    if name == "LIAFNode" and OLD:
        pytest.skip("fails inside SpikingJelly")
    no_soft_reset = {"KLIFNode": OLD, "SimpleLIFNode": True}.get(name, False)
    resets = [0.0, -0.25] if no_soft_reset else [None, 0.0, -0.25]
    starts: list[dict] = [{}] if name in ONE_RESET else [{"v_reset": reset} for reset in resets]
    nodes = [getattr(neuron, name)(**given, **start) for given in OTHERS[name] for start in starts]
    for node in nodes:
        node.step_mode = step_mode
        if name == "KLIFNode":
            nn.init.constant_(node.k, 1.3)
    net = SideBySide(nodes)
    program = converted(net, grid(T, N + 1, 37))
    assert len(program.sites) >= len(nodes)
    assert verify._probe_neurons(program, net, "unrolled")


@pytest.mark.parametrize(
    ("name", "given"), [("PSN", {"T": T}), ("SlidingPSN", {"k": 3, "step_mode": "m"})]
)
def test_neurons_that_are_a_linear_map_over_time(name: str, given: dict) -> None:
    if not hasattr(neuron, name):
        pytest.skip("only in 2.0.0")
    net = nn.Sequential(nn.Linear(5, 5), getattr(neuron, name)(**given))
    program = converted(net, rand(T, N, 5))
    assert [site.path for site in program.sites] == ["1.surrogate_function"]
    assert verify._probe_neurons(program, net, "unrolled")


def test_a_linear_map_over_time_takes_all_steps() -> None:
    if not hasattr(neuron, "SlidingPSN"):
        pytest.skip("only in 2.0.0")
    assert refused(Stepwise(neuron.SlidingPSN(k=2)), rand(T, N, 5)) == [("step-mode", "spike")]


# Every other keeper of state

NEEDS = {
    "MaskedPSN": {"k": 2, "T": T},
    "SlidingPSN": {"k": 2},
    "PSN": {"T": T},
    "LIAFNode": {"act": torch.relu, "threshold_related": False},
    "SimpleLIFNode": {"tau": 2.0, "decay_input": True},
    "STBIFNode": {"q_threshold": torch.tensor(1.0), "level": 4},
}


def other_neurons() -> list[str]:
    return [
        name
        for name, kind in inspect.getmembers(neuron, inspect.isclass)
        if issubclass(kind, sj_base.MemoryModule) and name not in _KNOWN and "Base" not in name
    ]


@pytest.mark.parametrize("name", other_neurons())
def test_every_other_neuron_is_refused_by_name(name: str) -> None:
    try:
        node = getattr(neuron, name)(**NEEDS.get(name, {}))
    except Exception as error:
        pytest.skip(f"cannot be made without more: {error}")
    with pytest.raises(CaptureError) as caught:
        capture(nn.Sequential(nn.Identity(), node), (rand(T, N, 5),))
    found = {(f.rule, f.where): f.found for f in caught.value.findings}
    assert ("unknown-neuron", "1") in found
    assert name in found["unknown-neuron", "1"]


# Readouts


@pytest.mark.parametrize("decode", [None, "max-mem", "max-abs-mem", "mean-mem", "last_mem"])
@pytest.mark.parametrize("name", ["NonSpikingIFNode", "NonSpikingLIFNode"])
def test_readouts_of_membrane_potentials(name: str, decode: str | None) -> None:
    if not hasattr(neuron, name):
        pytest.skip("only in 2.0.0")
    tau = {"tau": 2.5} if "LIF" in name else {}
    net = nn.Sequential(nn.Linear(5, 5), getattr(neuron, name)(decode=decode, **tau))
    x = rand(T, N, 5)
    low = lowered(capture(net, (x,)))
    found, expected = low(x), reference(net, x)
    if decode is None:
        assert isinstance(found, list)
        found, expected = torch.stack(found), torch.stack(expected)
    # Unrolled, the means are sums in another order.
    assert torch.allclose(found, expected, rtol=0, atol=1e-6 * (decode == "mean-mem"))
    assert not low.sites


# What a neuron was made of


def test_a_subclass_of_the_users() -> None:
    class Mine(neuron.LIFNode):
        def neuronal_charge(self, x: torch.Tensor) -> None:
            self.v = self.v + 2 * x

    net = nn.Sequential(Mine(step_mode="m"))
    assert refused(net, rand(T, N, 5)) == [("look-alike-neuron", "0")]


def test_an_instance_with_another_charge() -> None:
    net = nn.Sequential(make("LIFNode", 0.0, 2.0, True))
    net[0].neuronal_charge = lambda x: x
    if hasattr(neuron.LIFNode, "neuronal_charge"):
        assert refused(net, rand(T, N, 5)) == [("altered-neuron", "0")]


# States that are read


class Reads(nn.Module):
    """Reads what its layers end with, as networks for regression and for values of actions do."""

    def __init__(self, lif: nn.Module, read: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.fc, self.lif, self.read = nn.Linear(6, 5), lif, read

    def forward(self, x: torch.Tensor) -> Any:
        return self.read(self, x)


def step_by_step(net: Any, x: torch.Tensor) -> Any:
    rates = sum(net.lif(net.fc(x[t]) * 4) for t in range(T))
    return rates, net.lif.v


@pytest.mark.parametrize("make", [neuron.LIFNode, neuron.ParametricLIFNode, neuron.EIFNode])
def test_the_membrane_that_a_layer_ends_with(make: Callable[..., nn.Module]) -> None:
    converted(Reads(make(), step_by_step), rand(T, N, 6))
    converted(Reads(make(step_mode="m"), lambda s, x: (s.lif(s.fc(x) * 4), s.lif.v)), rand(T, N, 6))


def test_the_membrane_at_all_steps() -> None:
    lif = neuron.LIFNode(step_mode="m", v_reset=None, store_v_seq=True)
    converted(Reads(lif, lambda s, x: (s.lif(s.fc(x) * 4).mean(0), s.lif.v_seq)), rand(T, N, 6))


def test_potentials_that_the_forward_writes_to_after_the_call() -> None:
    def read(s: Any, x: torch.Tensor) -> Any:
        spikes = s.lif(s.fc(x) * 4)
        s.lif.v_seq.mul_(2.0)[0] = 0.5
        s.lif.v.add_(1.0)
        return spikes, s.lif.v_seq.mean(0) + s.lif.v

    converted(Reads(neuron.LIFNode(step_mode="m", store_v_seq=True), read), rand(T, N, 6))


def test_a_second_state() -> None:
    node = neuron.IzhikevichNode()
    converted(Reads(node, lambda s, x: (*step_by_step(s, x), s.lif.w)), rand(T, N, 6) * 9)


@pytest.mark.skipif(OLD, reason="only in 2.0.0")
def test_an_integrator_that_a_forward_calls_twice_starts_anew() -> None:
    lif = neuron.NonSpikingLIFNode(decode="last_mem")
    converted(
        Reads(lif, lambda s, x: s.lif(s.fc(x)) + s.lif(s.fc(x.flip(0))) + s.lif.v), rand(T, N, 6)
    )


@pytest.mark.skipif(not OLD, reason="only 0.0.0.0.14 has backends to choose from")
def test_a_backend_whose_kernels_run_in_evaluation_too() -> None:
    nodes = [neuron.IFNode(step_mode="m"), neuron.ParametricLIFNode(step_mode="m")]
    for node in nodes:
        node._backend = "cupy"  # its setter asks for CuPy
    with pytest.raises(CaptureError) as caught:
        capture(nn.Sequential(*nodes), (rand(T, N, 5),))
    first = caught.value.findings[0]
    assert (first.rule, first.where) == ("neuron-backend", "1")
    assert "functional.set_backend(net, 'torch')" in first.fix
    nodes[1]._backend = "torch"
    capture(nn.Sequential(*nodes), (rand(T, N, 5),))
