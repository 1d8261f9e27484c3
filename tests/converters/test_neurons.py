"""Neurons against recursions written here in NumPy, operation by operation, in float32."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from spikeport.converters import equations, neurons, sources, surrogates
from spikeport.converters.capture import capture
from spikeport.converters.errors import CaptureError, UsageError
from spikeport.converters.neurons import IF, LIF, IFNode, LIFNode, Neuron, Node, ParametricLIF
from spikeport.converters.passes import flatten_time, lower_neurons

F32 = np.float32
SHAPE = (7, 2, 3, 4)


def drive(seed: int = 0, grid: bool = False) -> torch.Tensor:
    """Inputs [T, N, C, L]; on the grid, sums and halves of sums hit the threshold exactly."""
    generator = torch.Generator().manual_seed(seed)
    if grid:
        return torch.randint(-8, 25, SHAPE, generator=generator) / 8
    return torch.randn(SHAPE, generator=generator) * 2 + 0.5


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


POPULATIONS = [
    {"reset": reset, "reset_at": at, "fires": fires, "v_reset": v_reset, "v_0": v_0}
    for reset, at, fires, v_reset, v_0 in itertools.product(
        ("hard", "soft", "none"), ("now", "next"), (">=", ">"), (0.0, -0.25), (0.0, 0.5)
    )
]


def name_of(population: dict[str, Any]) -> str:
    return " ".join(str(v) for v in population.values())


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


@pytest.mark.parametrize("name", CHARGES)
@pytest.mark.parametrize("reset", ["hard", "soft"])
@pytest.mark.parametrize("grid", [False, True])
def test_every_charge_equation_bit_for_bit(name: str, reset: Any, grid: bool) -> None:
    kind, params, charge = CHARGES[name]
    x = drive(1, grid)
    population = {"reset": reset, "v_reset": -0.3, "v_0": -0.3}
    neuron = Neuron(kind, params, **population)
    expected = recursion(x, charge, **population)
    assert 0.02 < expected.mean() < 0.98
    assert np.array_equal(neuron.multi_step(x).numpy() != 0, expected)
    assert np.array_equal(lowered(neuron, x).numpy() != 0, expected)


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


# Declarations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reset": "subtract"}, "reset is 'subtract'; allowed: hard, soft, none"),
        ({"reset_at": "later"}, "reset_at is 'later'; allowed: now, next"),
        ({"fires": "=>"}, "fires is '=>'; allowed: >=, >"),
    ],
)
def test_a_wrong_population(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Neuron(IF, **changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "given", ["atan", surrogates.ATan, nn.Sigmoid()], ids=["name", "kind", "module"]
)
def test_what_is_no_surrogate(given: Any) -> None:
    with pytest.raises(
        UsageError, match=r"surrogate is .*; allowed: .*ATan\(alpha=2.0\).*Gaussian"
    ):
        neurons.LIFNode(surrogate=given)


@pytest.mark.parametrize("kind", [neurons.Node, neurons.Readout])
def test_parameters_and_inputs_that_do_not_meet(kind: Any) -> None:
    population = {"tau": torch.full((5,), 2.0), "v_rest": torch.zeros(4, 1), "decay_input": True}
    layer = kind(neurons.LIF, **population)
    with pytest.raises(UsageError) as error:
        layer(torch.zeros(2, 1, 3))
    assert str(error.value) == (
        f"{kind.__name__}: tau has shape [5], which does not broadcast against [1, 3]; one value a "
        "channel is [C, 1, 1]; v_rest has shape [4, 1], which does not broadcast against [1, 3]; one "
        "value a channel is [C, 1, 1]"
    )
    with pytest.raises(UsageError, match=r"the input has shape \[3\]; allowed: \[T, N, ...\]"):
        layer(torch.zeros(3))


def test_missing_and_unknown_parameters_are_named_together() -> None:
    with pytest.raises(UsageError) as caught:
        Neuron(LIF, {"tua": 2.0, "v_rest": 0.0})
    assert "LIF: missing tau; unknown tua" in str(caught.value)
    assert "its parameters are tau, v_rest, decay_input, factored" in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "two", [1.0, 2.0], None])
def test_a_parameter_that_is_no_number(value: Any) -> None:
    for arguments in ({"v_threshold": value}, {"v_0": value}):
        with pytest.raises(UsageError, match=next(iter(arguments))):
            Neuron(IF, **arguments)
    with pytest.raises(UsageError, match="tau"):
        Neuron(LIF, {"tau": value, "v_rest": 0.0})


@pytest.fixture
def registry() -> Iterator[None]:
    kept = dict(equations._REGISTRY)
    yield
    equations._REGISTRY.clear()
    equations._REGISTRY.update(kept)


@pytest.mark.usefixtures("registry")
class TestDeclaring:
    def test_signature(self) -> None:
        def Wrong(x, v, *, tau):  # noqa: N802
            return v + x

        with pytest.raises(UsageError, match=r"dynamics Wrong.*def Wrong\(v, x, \*, tau"):
            neurons.dynamics(Wrong)

    def test_positional_parameter(self) -> None:
        def Wrong(v, x, tau):  # noqa: N802
            return v + x / tau

        with pytest.raises(UsageError, match="keyword-only"):
            neurons.dynamics(Wrong)

    def test_a_name_of_the_population(self) -> None:
        def Wrong(v, x, *, v_reset):  # noqa: N802
            return v + x - v_reset

        with pytest.raises(UsageError, match="v_reset belong to the population"):
            neurons.dynamics(Wrong)

    def test_a_name_that_is_taken(self) -> None:
        def IF(v, x):  # noqa: N802
            return v - x

        with pytest.raises(UsageError, match="dynamics IF is declared already"):
            neurons.dynamics(IF)

    def test_the_same_name_with_another_default(self) -> None:
        def make(value: float) -> Any:
            def Leaking(v, x, *, leak=value):  # noqa: N802
                return v * leak + x

            return Leaking

        neurons.dynamics(make(0.5))
        neurons.dynamics(make(0.5))
        with pytest.raises(UsageError, match="declared already"):
            neurons.dynamics(make(0.25))

    def test_the_same_name_with_another_function_called(self) -> None:
        def first() -> Any:
            def Gated(v, x):  # noqa: N802
                return v + neurons.sigmoid(x)

            return Gated

        def second() -> Any:
            def Gated(v, x):  # noqa: N802
                return v + neurons.tanh(x)

            return Gated

        neurons.dynamics(first())
        with pytest.raises(UsageError, match="declared already"):
            neurons.dynamics(second())

    def test_an_equation_that_fails(self) -> None:
        def Broken(v, x):  # noqa: N802
            return v + missing  # noqa: F821

        with pytest.raises(UsageError, match="Broken: the equation fails: name 'missing'"):
            neurons.dynamics(Broken)

    def test_an_equation_that_branches(self) -> None:
        def Branching(v, x):  # noqa: N802
            return v + x if v > 0 else x

        with pytest.raises(UsageError, match="Branching: .*no branch on their values"):
            neurons.dynamics(Branching)

    def test_an_equation_that_changes_the_shape(self) -> None:
        def Sum(v, x):  # noqa: N802
            return (v + x).sum(0)

        with pytest.raises(UsageError, match="must keep the shape"):
            neurons.dynamics(Sum)

    def test_an_equation_that_cannot_be_lowered(self) -> None:
        def Clamped(v, x):  # noqa: N802
            return torch.clamp(v + x, min=-1.0)

        with pytest.raises(UsageError, match="Clamped.*plain arithmetic"):
            neurons.dynamics(Clamped)


def test_no_such_dynamics() -> None:
    with pytest.raises(UsageError, match="no dynamics 'Missing' is declared; there are IF, LIF"):
        neurons.named("Missing")


# Training


@pytest.mark.parametrize("population", POPULATIONS[::3], ids=name_of)
def test_training_gives_the_same_spikes(population: dict[str, Any]) -> None:
    x = drive(4, grid=True)
    neuron = Neuron(LIF, {"tau": 2.0, "v_rest": 0.0}, **population)
    v, spikes = neuron.initial(x[0]), []
    for t, x_t in enumerate(x):
        s, v, _ = neuron.train_step(v, x_t, surrogates.ATan(), False, t)
        spikes.append(s)
    assert torch.equal(torch.stack(spikes), neuron.multi_step(x))


#: What each surrogate is the derivative of, at its defaults; written out independently.
PRIMITIVES: dict[str, Any] = {
    "ATan": lambda u: torch.atan(math.pi * u) / math.pi,
    "Sigmoid": lambda u: torch.sigmoid(4.0 * u),
    "FastSigmoid": lambda u: u / (1 + 25.0 * u.abs()),
    "SoftSign": lambda u: u / (1 + 2.0 * u.abs()),
    "StraightThrough": lambda u: u,
    "Rectangle": lambda u: u.clamp(-0.5, 0.5),
    "PiecewiseQuadratic": lambda u: (
        (u - u * u.abs() / 2) * (u.abs() < 1) + u.sign() / 2 * (u.abs() >= 1)
    ),
    "PiecewiseExp": lambda u: -u.sign() * torch.exp(-u.abs()) / 2,
    "Gaussian": lambda u: torch.erf(2.0 * u) / 2,
    "PiecewiseLeakyReLU": lambda u: u.clamp(-1, 1) + 0.01 * (u - u.clamp(-1, 1)),
    "LeakyKReLU": lambda u: u.clamp(min=0),
    "LogTailedReLU": lambda u: u.clamp(0, 1) + u.clamp(min=1).log(),
}


def test_every_surrogate_has_its_primitive_here() -> None:
    assert PRIMITIVES.keys() <= surrogates.KINDS.keys()


@pytest.mark.parametrize("surrogate", [surrogates.KINDS[n]() for n in PRIMITIVES], ids=repr)
def test_the_gradient_of_one_step_is_the_surrogates(surrogate: surrogates.Surrogate) -> None:
    x = torch.linspace(-2.013, 3, 41, dtype=torch.float64).reshape(1, 1, -1).requires_grad_()
    IFNode(surrogate=surrogate)(x).sum().backward()
    u = (x.detach() - 1.0).flatten()
    primitive = PRIMITIVES[surrogate.name]
    step = 1e-6
    expected = (primitive(u + step) - primitive(u - step)) / (2 * step)
    assert torch.allclose(x.grad.flatten(), expected, atol=1e-8)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("v_reset", [-0.25, None])
def test_the_gradient_over_time(detach: bool, v_reset: float | None) -> None:
    """Two steps by hand: ds1/dx0 through the membrane, and through the reset unless detached."""
    x = torch.tensor([[[0.6], [1.5]], [[0.7], [0.8]]], dtype=torch.float64).requires_grad_()
    node = LIFNode(tau=2.0, decay_input=False, v_reset=v_reset, detach_reset=detach)
    node(x)[1].sum().backward()
    rest = 0.0 if v_reset is None else v_reset
    surrogate = lambda u: 1.0 / (1 + (math.pi * u) ** 2)  # noqa: E731 -- ATan, alpha = 2
    for n in range(2):
        x0, x1 = x[:, n, 0].tolist()
        h0 = rest - (rest - rest) / 2 + x0
        s0 = float(h0 >= 1)
        v0 = h0 - s0 if v_reset is None else s0 * v_reset + (1 - s0) * h0
        h1 = v0 - (v0 - rest) / 2 + x1
        through_membrane = 1.0 if v_reset is None else 1 - s0
        jump = -1.0 if v_reset is None else v_reset - h0
        through_reset = 0.0 if detach else surrogate(h0 - 1) * jump
        dv0 = through_membrane + through_reset
        expected = surrogate(h1 - 1) * 0.5 * dv0
        assert x.grad[0, n, 0].item() == pytest.approx(expected, rel=1e-9)
        assert x.grad[1, n, 0].item() == pytest.approx(surrogate(h1 - 1), rel=1e-9)


def test_learned_parameters_get_gradients() -> None:
    node = neurons.ParametricLIFNode(v_threshold=nn.Parameter(torch.tensor(0.8)))
    assert {n for n, _ in node.named_parameters()} == {"w", "v_threshold"}
    node(drive(5)).sum().backward()
    assert node.w.grad.abs() > 0
    assert node.v_threshold.grad.abs() > 0


class TestSurrogateDeclarations:
    def test_a_users_own(self) -> None:
        @surrogates.surrogate
        def Tenth(u, *, scale=0.1):  # noqa: N802
            return scale / (1 + u**2)

        given = Tenth(scale=0.2)
        assert surrogates.Surrogate.from_json(given.to_json()).derivative(2.0) == 0.2 / 5
        with pytest.raises(UsageError, match="its parameters are scale"):
            Tenth(width=1.0)
        with pytest.raises(UsageError, match="scale is nan"):
            Tenth(float("nan"))

    def test_a_wrong_one(self) -> None:
        def NoDefault(u, *, scale):  # noqa: N802
            return scale * u

        def Rounded(u):  # noqa: N802
            return torch.round(u)

        with pytest.raises(UsageError, match=r"write def NoDefault\(u"):
            surrogates.surrogate(NoDefault)
        with pytest.raises(UsageError, match="Rounded: the equation must be plain arithmetic"):
            surrogates.surrogate(Rounded)

    def test_a_name_that_is_not_declared(self) -> None:
        with pytest.raises(UsageError, match="no surrogate 'Missing' is declared; there are ATan"):
            surrogates.Surrogate.from_json('{"surrogate": "Missing"}')


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


class TestStateDeclarations:
    def test_a_state_that_the_equation_does_not_give(self) -> None:
        def Forgets(v, w, x):  # noqa: N802
            return v + x - w

        with pytest.raises(
            UsageError, match=r"Forgets: the equation gives one value.*must give h, w"
        ):
            neurons.dynamics(states={"w": 0.0})(Forgets)

    def test_a_state_that_the_signature_lacks(self) -> None:
        def Lacks(v, x):  # noqa: N802
            return v + x, v

        with pytest.raises(UsageError, match=r"write def Lacks\(v, w, x"):
            neurons.dynamics(states={"w": 0.0})(Lacks)

    def test_a_comparison_has_no_derivative(self) -> None:
        def Decides(v, x):  # noqa: N802
            return v + x * (v > 0)

        with pytest.raises(UsageError, match="Decides.*no derivative"):
            neurons.dynamics(Decides)

    def test_spikes_start_from_none(self) -> None:
        def Early(v, s, x):  # noqa: N802
            return v + x - s

        with pytest.raises(UsageError, match="there is no spike"):
            neurons.dynamics(states={"s": 1.0})(Early)


# As data, and as a module


@pytest.mark.parametrize("population", POPULATIONS[::5], ids=name_of)
def test_json_and_back(population: dict[str, Any]) -> None:
    tau = torch.tensor([1.5, 2.0, 3.0]).reshape(3, 1)
    neuron = Neuron(LIF, {"tau": tau, "v_rest": 0.1, "decay_input": False}, **population)
    text = neuron.to_json()
    assert json.loads(text)["dynamics"] == "LIF"
    again = Neuron.from_json(text, neuron.tensors().values())
    assert again.to_json() == text
    x = drive(6)
    assert torch.equal(again.multi_step(x), neuron.multi_step(x))
    assert again.describe() == neuron.describe()


def test_json_with_scalars_that_only_look_like_numbers() -> None:
    """NumPy's and integer scalars are what they say after a round trip."""
    neuron = Neuron(LIF, {"tau": np.float64(2.0), "v_rest": 0}, v_threshold=np.float32(1.5))
    again = Neuron.from_json(neuron.to_json(), ())
    x = drive(6)
    assert torch.equal(again.multi_step(x), neuron.multi_step(x))


def test_describe_says_what_decides() -> None:
    text = LIFNode(v_reset=None, reset_at="next", fires=">").neuron.describe()
    assert text == (
        "LIF(tau=2, v_rest=0, decay_input=True), fires at h > 1, soft reset, at the next step, v_0=0"
    )


def test_state_dict_holds_the_tensors() -> None:
    first = LIFNode(v_threshold=nn.Parameter(torch.full((3, 1), 0.5)))
    second = LIFNode(v_threshold=nn.Parameter(torch.ones(3, 1)))
    assert list(first.state_dict()) == ["v_threshold"]
    second.load_state_dict(first.state_dict())
    x = drive(7)
    assert torch.equal(second(x), first(x))
    assert torch.equal(second.neuron.v_threshold, torch.full((3, 1), 0.5))


def test_a_copy_is_its_own() -> None:
    node = LIFNode(v_threshold=nn.Parameter(torch.tensor(0.5)))
    other = copy.deepcopy(node)
    with torch.no_grad():
        other.v_threshold.fill_(3.0)
    assert node.neuron.v_threshold.item() == 0.5
    assert other.neuron.v_threshold.item() == 3.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_another_dtype(dtype: torch.dtype) -> None:
    node = neurons.ParametricLIFNode(v_threshold=torch.tensor(1.0)).to(dtype)
    x = drive(8, grid=True).to(dtype)
    with torch.no_grad():
        spikes = node(x)
    assert spikes.dtype == dtype
    assert set(spikes.unique().tolist()) == {0.0, 1.0}
    trained = node(x)
    assert trained.dtype == dtype
    assert torch.equal(trained, spikes)


def test_v_0_defaults_to_v_reset() -> None:
    assert LIFNode(v_reset=-0.3).neuron.v_0 == -0.3
    assert LIFNode(v_reset=None).neuron.v_0 == 0.0
    assert LIFNode(v_reset=-0.3, v_0=0.1).neuron.v_0 == 0.1


def test_init_tau_must_be_above_one() -> None:
    with pytest.raises(UsageError, match="init_tau is 1"):
        neurons.ParametricLIFNode(init_tau=1.0)


def test_each_call_starts_from_v_0() -> None:
    node, x = IFNode(), torch.full((1, 1, 1), 0.75)
    assert node(x).item() == node(x).item() == 0.0


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
