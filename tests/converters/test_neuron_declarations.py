"""Declarations of neurons: what is refused, and neurons as data and as modules."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from populations import POPULATIONS, drive, name_of
from torch import nn

from spikeport.converters import equations, neurons, surrogates
from spikeport.converters.errors import UsageError
from spikeport.converters.neurons import IF, LIF, IFNode, LIFNode, Neuron


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
