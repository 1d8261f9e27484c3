"""Neurons in training: the same spikes, and the gradients of every surrogate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from populations import POPULATIONS, drive, name_of
from torch import nn

from spikeport.converters import neurons, surrogates
from spikeport.converters.errors import UsageError
from spikeport.converters.neurons import LIF, IFNode, LIFNode, Neuron


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
