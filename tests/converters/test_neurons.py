"""Neurons against recursions written here in NumPy, operation by operation, in float32."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from populations import POPULATIONS, SHAPE, drive
from torch import nn

from spikeport.converters import neurons, sources, surrogates
from spikeport.converters.capture import capture
from spikeport.converters.errors import CaptureError
from spikeport.converters.neurons import IF, LIF, LIFNode, Neuron, Node, ParametricLIF
from spikeport.converters.passes import flatten_time, lower_neurons

F32 = np.float32


def recursion(
    x: torch.Tensor,
    charge: Any,
    *,
    v_threshold: Any = 1.0,
    v_reset: Any = 0.0,
    reset: str = "hard",
    reset_at: str = "now",
    fires: str = ">=",
    v_0: Any = 0.0,
) -> np.ndarray:
    """The spikes by the equations of the module's docstring."""

    def array(value: Any) -> Any:
        return value.detach().numpy() if isinstance(value, torch.Tensor) else F32(value)

    threshold, rest = array(v_threshold), array(v_reset)

    def after(h: np.ndarray, s: np.ndarray) -> np.ndarray:
        target = {"hard": rest, "soft": h - threshold, "none": h}[reset]
        return np.where(s, target, h).astype(F32)

    xs = x.numpy()
    v = np.broadcast_to(array(v_0), xs[0].shape).astype(F32)
    s = np.zeros(xs[0].shape, dtype=bool)
    spikes = []
    for x_t in xs:
        h = charge(v, x_t)
        assert h.dtype == F32
        if reset_at == "next":
            h = after(h, s)
        s = h >= threshold if fires == ">=" else h > threshold
        v = after(h, s) if reset_at == "now" else h
        spikes.append(s)
    return np.stack(spikes)


class Population(nn.Module):
    """Any declaration as a layer, made known as a user makes a neuron class known."""

    def __init__(self, neuron: Neuron) -> None:
        super().__init__()
        self.neuron = neuron

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.neuron.multi_step(x)


sources.register(Population, lambda module: sources.Reading(module.neuron))


def lowered(neuron: Neuron, x: torch.Tensor) -> torch.Tensor:
    """The spikes of the neuron as a target gets it."""
    program = lower_neurons(flatten_time(capture(nn.Sequential(Population(neuron)), (x,))))
    return program(x)


class All(nn.Module):
    """Many populations side by side, so that one capture lowers them all."""

    def __init__(self, population: list[Neuron]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(Population, population))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.layers]


def test_every_kind_of_population_against_a_recursion() -> None:
    x = drive(grid=True)
    population = [Neuron(LIF, {"tau": 2.0, "v_rest": 0.0}, **p) for p in POPULATIONS]
    program = lower_neurons(flatten_time(capture(All(population), (x,))))
    results = program(x)
    for neuron, kind, result in zip(population, POPULATIONS, results, strict=True):
        expected = recursion(x, lambda v, x: v + (x - (v - F32(0))) / F32(2), **kind)
        assert expected.any()
        assert not expected.all()
        assert np.array_equal(neuron.multi_step(x).numpy() != 0, expected), kind
        v, single = neuron.initial(x[0]), []
        for t, x_t in enumerate(x):
            s, v = neuron.single_step(x_t, v, t)
            single.append(s)
        assert np.array_equal(torch.stack(single).numpy() != 0, expected), kind
        assert np.array_equal(result.numpy() != 0, expected), kind


def test_the_comparison_decides_on_the_grid() -> None:
    x = drive(grid=True)
    at, above = (Neuron(IF, fires=fires).multi_step(x) for fires in (">=", ">"))
    assert (at != above).float().mean() > 0.01


def sigmoid(w: float) -> Any:
    """As torch rounds it."""
    return torch.tensor(w).sigmoid().numpy()


CHARGES = {
    "IF": (IF, {}, lambda v, x: v + x),
    "LIF tau 3": (LIF, {"tau": 3.0, "v_rest": 0.0}, lambda v, x: v + (x - (v - F32(0))) / F32(3)),
    "LIF towards -0.3": (
        LIF,
        {"tau": 3.0, "v_rest": -0.3},
        lambda v, x: v + (x - (v - F32(-0.3))) / F32(3),
    ),
    "LIF, input as a jump": (
        LIF,
        {"tau": 3.0, "v_rest": 0.2, "decay_input": False},
        lambda v, x: v - (v - F32(0.2)) / F32(3) + x,
    ),
    "LIF, factored": (
        LIF,
        {"tau": 3.0, "v_rest": 0.0, "decay_input": False, "factored": True},
        lambda v, x: v * F32(1.0 - 1.0 / 3.0) + x,
    ),
    "PLIF": (
        ParametricLIF,
        {"w": torch.tensor(-0.7), "v_rest": -0.3},
        lambda v, x: v + (x - (v - F32(-0.3))) * sigmoid(-0.7),
    ),
    "PLIF, input as a jump": (
        ParametricLIF,
        {"w": torch.tensor(-0.7), "v_rest": 0.2, "decay_input": False},
        lambda v, x: v - (v - F32(0.2)) * sigmoid(-0.7) + x,
    ),
    "PLIF, factored": (
        ParametricLIF,
        {"w": torch.tensor(-0.7), "v_rest": 0.0, "decay_input": False, "factored": True},
        lambda v, x: v * (F32(1) - sigmoid(-0.7)) + x,
    ),
}


@pytest.mark.parametrize("grid", [False, True])
def test_every_charge_equation_bit_for_bit(grid: bool) -> None:
    x = drive(1, grid)
    cases = [*itertools.product(CHARGES, ("hard", "soft"))]
    populations: list[Any] = [{"reset": r, "v_reset": -0.3, "v_0": -0.3} for _, r in cases]
    declared = [
        Neuron(*CHARGES[name][:2], **population)
        for (name, _), population in zip(cases, populations, strict=True)
    ]
    results = lower_neurons(flatten_time(capture(All(declared), (x,))))(x)
    for case, population, neuron, result in zip(cases, populations, declared, results, strict=True):
        expected = recursion(x, CHARGES[case[0]][2], **population)
        assert 0.02 < expected.mean() < 0.98, case
        assert np.array_equal(neuron.multi_step(x).numpy() != 0, expected), case
        assert np.array_equal(result.numpy() != 0, expected), case


@pytest.mark.parametrize("reset", ["hard", "soft"])
@pytest.mark.parametrize("reset_at", ["now", "next"])
def test_parameters_per_channel(reset: Any, reset_at: Any) -> None:
    tau = torch.tensor([1.5, 2.0, 3.0]).reshape(3, 1)
    threshold = torch.tensor([0.5, 1.0, 0.75]).reshape(3, 1)
    v_reset = torch.tensor([0.0, -0.25, 0.125]).reshape(3, 1)
    population = {
        "v_threshold": threshold,
        "v_reset": v_reset,
        "v_0": v_reset,
        "reset": reset,
        "reset_at": reset_at,
    }
    x = drive(2, grid=True)
    neuron = Neuron(LIF, {"tau": tau, "v_rest": v_reset}, **population)
    t, rest = tau.numpy(), v_reset.numpy()
    expected = recursion(x, lambda v, x: v + (x - (v - rest)) / t, **population)
    assert np.array_equal(neuron.multi_step(x).numpy() != 0, expected)
    assert np.array_equal(lowered(neuron, x).numpy() != 0, expected)


def test_trace_gives_h_and_the_last_v() -> None:
    neuron = Neuron(IF, reset="soft")
    spikes, h, (v,) = neuron.trace(torch.tensor([[0.75], [0.5], [0.5]]))
    assert spikes.flatten().tolist() == [0, 1, 0]
    assert h.flatten().tolist() == [0.75, 1.25, 0.75]
    assert v.tolist() == [0.75]


@pytest.mark.parametrize("threshold", [0.5, torch.tensor([0.5, 0.25])], ids=["scalar", "channels"])
def test_a_potential_beyond_all_numbers_stays_there_when_it_is_lowered(threshold: Any) -> None:
    """Quadratic neurons run away under a soft reset, which takes nothing from infinity."""
    params = {"tau": 2.0, "v_rest": 0.0, "v_c": 0.5, "a_0": 1.0}
    neuron = Neuron(neurons.QIF, params, v_threshold=threshold, reset="soft")
    x = torch.tensor([[4.0, -1.0]]).expand(20, 1, 2)
    v, expected = torch.zeros(1, 2), []
    for x_t in x:
        h = v + (x_t + v * (v - 0.5)) / 2.0
        s = (h >= threshold).float()
        v = h - s * threshold
        expected.append(s)
    assert v.isinf().any()
    assert torch.equal(neuron.multi_step(x), torch.stack(expected))
    state, trained = neuron.initial(x[0]), []
    for t, x_t in enumerate(x):
        s, state, _ = neuron.train_step(state, x_t, surrogates.ATan(), False, t)
        trained.append(s)
    assert torch.equal(torch.stack(trained), torch.stack(expected))


def test_going_on_from_a_state_equals_one_run() -> None:
    x = drive(3)
    for reset_at in ("now", "next"):
        neuron = Neuron(LIF, {"tau": 2.0, "v_rest": 0.0}, reset_at=reset_at)
        whole = neuron.multi_step(x)
        head, _, v = neuron.trace(x[:3])
        assert torch.equal(torch.cat([head, neuron.multi_step(x[3:], v)]), whole)


# More states than the membrane


@neurons.dynamics(states={"w": 0.0, "s": 0.0})
def Adaptive(v, w, s, x, *, tau, tau_w, a, b):  # noqa: N802
    w = w + b * s
    return v + (x - v - w) / tau, w + (a * v - w) / tau_w


ADAPTIVE = {"tau": 2.0, "tau_w": 4.0, "a": 0.5, "b": 0.25}


def test_a_neuron_of_two_states_and_spikes_that_come_back() -> None:
    x = drive(6) * 1.5
    neuron = Neuron(Adaptive, ADAPTIVE)
    v = w = s = torch.zeros_like(x[0])
    expected = []
    for x_t in x:
        w = w + 0.25 * s
        h, w = v + (x_t - v - w) / 2.0, w + (0.5 * v - w) / 4.0
        s = (h >= 1).float()
        v = torch.where(h >= 1, 0.0, h)
        expected.append(s)
    expected = torch.stack(expected)
    assert 0.02 < expected.mean() < 0.9
    assert torch.equal(neuron.multi_step(x), expected)
    assert torch.equal(neurons.Node(Adaptive, **ADAPTIVE)(x), expected)
    assert torch.equal(lowered(neuron, x), expected)


# Readouts


@pytest.mark.parametrize("target", ["reference", "onnx", "lynxi-sim"])
def test_a_readout_gives_its_membrane_potentials(target: str) -> None:
    from spikeport.deploy.pipeline import convert

    torch.manual_seed(0)
    beta = nn.Parameter(torch.tensor([0.5, 0.75, 0.9, 1.0]))
    net = nn.Sequential(
        nn.Linear(4, 4), LIFNode(), neurons.Readout(neurons.Leaky, beta=beta, v_0=0.5)
    )
    x = drive(11)
    program = convert(net, (x,), target, dtype="float32")
    assert len(program.sites) == 1
    v, decay = np.full(SHAPE[1:], 0.5, F32), beta.detach().numpy()
    with torch.no_grad():
        spikes = net[:2](x).numpy()
    for found, s in zip(program(x).numpy(), spikes, strict=True):
        v = decay * v + s
        assert np.array_equal(found, v)
    net(x)[-1].sum().backward()
    assert beta.grad is not None
    assert beta.grad.abs().min() > 0
    assert "does not fire" in repr(net)


def test_a_readout_that_was_made_another_layer_is_refused() -> None:
    class Louder(neurons.Readout):
        def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x_seq)

    with pytest.raises(CaptureError, match="look-alike-neuron"):
        capture(nn.Sequential(Louder(LIF, tau=2.0, v_rest=0.0)), (drive(0),))


# A user's neuron: everything it takes


@neurons.dynamics
def QuadraticIF(v, x, *, tau, v_rest, v_c, a_0):  # noqa: N802
    return v + (x + a_0 * (v - v_rest) * (v - v_c)) / tau


@neurons.dynamics
def ExponentialIF(v, x, *, tau, v_rest, sharpness):  # noqa: N802
    return v + (x + v_rest - v + sharpness * neurons.exp((v - 1.0) / sharpness)) / tau


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "node",
    [
        Node(QuadraticIF, tau=2.0, v_rest=0.0, v_c=0.8, a_0=1.0, v_reset=-0.1),
        Node(QuadraticIF, tau=torch.tensor([[2.0], [3.0], [4.0]]), v_rest=0.0, v_c=0.8, a_0=1.0),
        Node(ExponentialIF, tau=2.0, v_rest=0.0, sharpness=0.5, v_reset=None),
    ],
    ids=["QIF", "QIF per channel", "EIF"],
)
def test_a_users_neuron_goes_the_whole_way(node: Node, dtype: str) -> None:
    from spikeport.deploy.pipeline import convert

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), copy.deepcopy(node))
    x = drive(9, grid=True)
    program = convert(net, (x,), "lynxi-sim", dtype=dtype)
    assert program.evidence is not None
    if dtype == "float32":
        with torch.no_grad():
            assert torch.equal(program(x), net(x))


def test_a_users_neuron_against_a_recursion() -> None:
    x = drive(10)
    neuron = Neuron(QuadraticIF, {"tau": 2.0, "v_rest": 0.0, "v_c": 0.8, "a_0": 1.0}, v_reset=-0.1)
    f = F32
    expected = recursion(
        x,
        lambda v, x: v + (x + f(1) * (v - f(0)) * (v - f(0.8))) / f(2),
        v_reset=-0.1,
    )
    assert np.array_equal(neuron.multi_step(x).numpy() != 0, expected)
    assert np.array_equal(lowered(neuron, x).numpy() != 0, expected)
