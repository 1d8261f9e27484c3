"""Where a network of its own turns potentials into zeros and ones, which nobody declared."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import fx

from .ops import COMPARISONS, RESHAPE, SELECT, Node, aten
from .program import NEURON, NEURON_STEP, Program

_STEPS = frozenset({aten.heaviside.default, aten.sign.default})
#: Operators that give whole numbers of whole numbers.
_WHOLE = frozenset(
    {
        RESHAPE,
        aten._to_copy.default,
        aten.add.Tensor,
        aten.amax.default,
        aten.amin.default,
        aten.cat.default,
        aten.clone.default,
        aten.expand.default,
        aten.index_select.default,
        aten.mul.Tensor,
        aten.permute.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.squeeze.dim,
        aten.stack.default,
        aten.sub.Tensor,
        aten.sum.dim_IntList,
        aten.sum.default,
        aten.transpose.int,
        aten.unsqueeze.default,
    }
)


def undeclared(program: Program) -> Iterator[Node]:
    """Comparisons that become numbers, of values that rounding may carry across."""
    whole: set[Node] = set()
    for n in program.walk():
        if n.op == "get_attr":
            whole.add(n)  # the same on both sides
        if n.op != "call_function":
            continue
        known = all(a in whole for a in n.all_input_nodes)
        if n.target in COMPARISONS or n.target in _STEPS:
            whole.add(n)
            if not known and (n.target in _STEPS or any(map(_as_number, n.users))):
                yield n
        elif _are_spikes(n) or (known and n.target in _WHOLE):
            whole.add(n)


def _are_spikes(n: Node) -> bool:
    if n.target is operator.getitem:
        return bool(n.args[1] == 0 and n.args[0].target is NEURON_STEP)
    return n.target is NEURON


def _as_number(user: Node) -> bool:
    """Whether what takes a truth value makes a number of it."""
    if user.target is aten._to_copy.default or user.target is aten.mul.Tensor:
        return bool(user.meta["val"].is_floating_point())
    sides: Any = user.args[1:]
    constants = all(not isinstance(s, fx.Node) or s.op == "get_attr" for s in sides)
    return user.target in SELECT and constants
