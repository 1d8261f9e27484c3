"""What a neuron computes of its parameters alone, computed once.

A sigmoid or an exponential of a device differs from this machine's in the last bit, and so would every
potential after it. Of parameters that no longer change it is computed here, as the source computes it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .equations import SPIKES, Dynamics, exp, registered, relu, sigmoid, tanh
from .neurons import Neuron
from .symbolic import Expr, Tape, needed

_OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "pow": operator.pow,
    "neg": operator.neg,
    "abs": abs,
    "sigmoid": sigmoid,
    "exp": exp,
    "tanh": tanh,
    "relu": relu,
}


class _Tape(Tape):
    """A tape that takes tensors for inputs k0, k1, ..."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []

    def lift(self, value: Any) -> Expr:
        """A tensor as its input, all else as on any tape."""
        if not isinstance(value, torch.Tensor):
            return super().lift(value)
        for i, known in enumerate(self.tensors):
            if known.shape == value.shape and torch.equal(known, value):
                return self.input(f"k{i}")
        self.tensors.append(value)
        return self.input(f"k{len(self.tensors) - 1}")


def precomputed(neuron: Neuron) -> Neuron:
    """The same neuron, whose charge takes what it would compute of its tensors alone.

    One that computes nothing of them alone is returned as it is. Another's kind is known in this process
    only.
    """
    tape, kind = _Tape(), neuron.dynamics
    inputs = ("v", *kind.states, "x")
    results = _written(tape, neuron, inputs)
    own = neuron.tensors().values()
    if all(any(tensor is one for one in own) for tensor in tape.tensors):
        return neuron
    starts = [start for start in kind.states.values() if isinstance(start, str)]
    params = {f"k{i}": tensor for i, tensor in enumerate(tape.tensors)}
    params |= {name: neuron.params[name] for name in starts}
    name = f"{kind.name}: {results}"  # which says all that distinguishes it
    return Neuron(
        registered(Dynamics(name, _charge(inputs, results), (*params,), {}, kind.states)),
        params,
        v_threshold=neuron.v_threshold,
        v_reset=neuron.v_reset,
        reset=neuron.reset,
        reset_at=neuron.reset_at,
        fires=neuron.fires,
        v_0=neuron.v_0,
    )


def functions(neuron: Neuron) -> list[str]:
    """Names of the functions that its charge takes of the state, whose last bit is each runtime's own."""
    inputs = ("v", *neuron.dynamics.states, "x")
    used = {e.op for e in needed(_written(_Tape(), neuron, inputs))}
    return sorted(used & {"exp", "pow", "sigmoid", "tanh"})


def _written(tape: _Tape, neuron: Neuron, inputs: Sequence[str]) -> list[Expr]:
    """The charge on a tape, part by part of the state after it."""
    *state, x = map(tape.input, inputs)
    charged = zip(inputs, neuron.charge(tuple(state), x), strict=False)
    return [tape.lift(part) for name, part in charged if name != SPIKES]


def _charge(inputs: Sequence[str], results: Sequence[Expr]) -> Callable[..., Any]:
    """The charge that computes the results, on values of any kind."""

    def charge(*values: Any, **params: Any) -> Any:
        given = {**dict(zip(inputs, values, strict=True)), **params}
        found: dict[int, Any] = {}
        for e in needed(results):
            if e.op == "const":
                found[e.index] = e.value
            elif e.op == "input":
                found[e.index] = given[e.value]
            else:
                found[e.index] = _OPERATIONS[e.op](*(found[a.index] for a in e.args))
        first, *others = (found[r.index] for r in results)
        return (first, *others) if others else first

    return charge
