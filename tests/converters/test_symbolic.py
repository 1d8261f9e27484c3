from __future__ import annotations

from typing import Any

import pytest
import torch

from spikeport.converters import neurons, surrogates
from spikeport.converters.symbolic import Expr, Tape, backward, needed

EVALUATE: dict[str, Any] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "pow": torch.pow,
    "neg": torch.neg,
    "abs": torch.abs,
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "where": torch.where,
    "detach": torch.Tensor.detach,
}


def evaluate(results: list[Expr], inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    values: dict[Expr, torch.Tensor] = {}
    for e in needed(results):
        if e.op == "const":
            values[e] = torch.tensor(e.value, dtype=torch.float64)
        elif e.op == "input":
            values[e] = inputs[e.value]
        else:
            values[e] = EVALUATE[e.op](*(values[a] for a in e.args))
    return [values[r] for r in results]


@pytest.mark.parametrize(
    "f",
    [
        lambda a, b: a + b - 2.0 * a,
        lambda a, b: a * b / (a - 3.0),
        lambda a, b: 1.0 / b - b / 4.0 + (-a),
        lambda a, b: a**3 + b**0.5 + a**-2 + a**2,
        lambda a, b: abs(a) * neurons.exp(b) + neurons.tanh(a * b) - neurons.relu(a - b),
        lambda a, b: neurons.sigmoid(a) * a * 1.0 + 0.0,
        lambda a, b: a.detach() * b + a,
    ],
)
def test_derivatives_are_those_of_autograd(f: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(50, generator=generator, dtype=torch.float64).requires_grad_()
    b = (torch.rand(50, generator=generator, dtype=torch.float64) + 0.5).requires_grad_()
    tape = Tape()
    x, y = tape.input("a"), tape.input("b")
    result = f(x, y)
    grads = backward(tape, {result: tape.input("g")}, [x, y])
    g = torch.randn(50, generator=generator, dtype=torch.float64)
    value, *found = evaluate([result, *grads], {"a": a, "b": b, "g": g})
    expected = f(a, b)
    assert torch.allclose(value, expected)
    wanted = torch.autograd.grad(expected, [a, b], g, materialize_grads=True)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one.broadcast_to(other.shape), other)


@pytest.mark.parametrize("f", [abs, neurons.relu, neurons.tanh, neurons.exp, lambda a: a * a])
def test_derivatives_at_zero_infinity_and_nan_are(f: Any) -> None:
    inf = float("inf")
    a = torch.tensor([0.0, inf, -inf, float("nan"), 1.0], dtype=torch.float64).requires_grad_()
    for g in (torch.ones_like(a), torch.zeros_like(a)):
        tape = Tape()
        x = tape.input("a")
        (found,) = evaluate(backward(tape, {f(x): tape.input("g")}, [x]), {"a": a, "g": g})
        (expected,) = torch.autograd.grad(f(a), [a], g)
        torch.testing.assert_close(found.detach(), expected, equal_nan=True)


@pytest.mark.parametrize("f", [lambda a, b: a * b, lambda a, b: a / b, lambda a, b: a**3 + b])
def test_idle_seeds_add_nothing_where_their_factors_are_finite(f: Any) -> None:
    tape = Tape()
    x, y = tape.input("a"), tape.input("b")
    live, idle = x * 2.0, f(x, y)

    def finite(factor: Expr) -> Expr:
        return tape.const(1.0)

    seeds = {live: tape.input("g")}, [x, y], {idle: tape.input("zero")}
    inputs = {"a": torch.tensor(float("inf")), "b": torch.tensor(0.0)}
    inputs |= {"g": torch.tensor(1.0), "zero": torch.tensor(0.0)}
    assert any(g.isnan() for g in evaluate(backward(tape, *seeds), inputs))
    assert evaluate(backward(tape, *seeds, finite), inputs) == [2.0, 0.0]


def test_a_spikes_derivative_is_the_surrogates() -> None:
    tape = Tape()
    h, threshold = tape.input("h"), tape.input("threshold")
    surrogate = surrogates.Sigmoid(3.0)
    s = tape.fire(h, threshold, ">=", surrogate)
    into_h, into_threshold = backward(tape, {s: tape.const(1.0)}, [h, threshold])
    u = torch.linspace(-1, 1, 9, dtype=torch.float64)
    inputs = {"h": u + 0.5, "threshold": torch.full_like(u, 0.5)}
    found, opposite = evaluate([into_h, into_threshold], inputs)
    assert torch.allclose(found, surrogate.derivative(u))
    assert torch.equal(opposite, -found)


def test_equal_expressions_are_one_and_what_changes_nothing_is_left_out() -> None:
    tape = Tape()
    x = tape.input("x")
    assert x * 2.0 + 1.0 is x * 2.0 + 1.0
    assert x + 0.0 is x
    assert 1.0 * x is x
    assert x / 1.0 is x
    assert x.apply("neg", -x) is x
    assert (x / 4.0).op == "mul"  # exact
    assert (x / 3.0).op == "div"
    assert tape.emit("mul", 2.0, 3.0).value == 6.0


def test_what_has_no_derivative_gives_zero() -> None:
    tape = Tape()
    x, y = tape.input("x"), tape.input("y")
    [grad] = backward(tape, {x.detach() * 2.0: tape.const(1.0)}, [y])
    assert (grad.op, grad.value) == ("const", 0.0)
