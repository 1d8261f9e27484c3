"""Delays of which an example shows nothing: constants where a value of an earlier step may come.

A delay of as many steps as an example has, or more, gives what it starts from at every step, and nothing of
the graph tells it from a constant. What a network makes of a constant that its own forward has made, equal
in all elements as such beginnings are, is therefore refused where a delay could lead: into layers, sums and
joins at every step. Weights and buffers are constants on purpose, and so are the operands of conditions
and extremes, and factors other than 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from . import ops
from .errors import Finding
from .labels import Labels
from .ops import Node, aten, shape
from .program import NEURON_STEP, Program, short, where

#: What capture calls the tensors that a forward makes out of nothing.
_MADE = ("made_", "lifted_tensor_")
_JOINS = frozenset({aten.stack.default, aten.cat.default})
_SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor})
_PRODUCTS = frozenset({aten.matmul.default, aten.mm.default, aten.bmm.default})
_ADDED_PRODUCTS = frozenset({aten.addmm.default, aten.baddbmm.default})
_LAYERS = ops.BATCHED | ops.TRAILING | _PRODUCTS | _ADDED_PRODUCTS | {NEURON_STEP}


@dataclass(frozen=True)
class _Constant:
    """A value that no input reaches; ``made`` if it follows from what the forward has made."""

    value: torch.Tensor
    made: bool

    @property
    def fill(self) -> float | None:
        """What all elements are, if the forward has made it so."""
        if not self.made or not self.value.numel() or self.value.is_complex():
            return None
        first = self.value.reshape(-1)[0]
        return float(first) if bool((self.value == first).all()) else None


def hidden_delays(captured: Program, T: int) -> Iterator[Finding]:
    """Where a delay of T steps or more may be that an example of T steps does not show."""
    constants = _constants(captured)
    labels = Labels(captured)
    seen: dict[Hashable, dict[int, Node]] = defaultdict(dict)
    told: set[Hashable] = set()
    for n in captured.walk():
        if n.target in _JOINS and n in constants and _is_delayed(n, constants[n].value, T):
            yield _together(n, T)
        for a, fill, alike in _operands(n, constants):
            step = labels.at(n).step
            others = None if step is not None else tuple(labels.at(o).label for o in _rest(n, a))
            key = (n.target, where(n), fill, alike, step is None, others)
            # What no input reaches has no step: its copies are counted.
            seen[key][len(seen[key]) if step is None else step] = a
            count = len(seen[key]) if alike else len(set(seen[key].values()))
            if count >= T and key not in told:
                told.add(key)
                yield _finding(n, fill, T)


def _constants(program: Program) -> dict[Node, _Constant]:
    found: dict[Node, _Constant] = {}
    for n in program.walk():
        if n.op == "get_attr":
            found[n] = _Constant(program.tensor(n.target), str(n.target).startswith(_MADE))
        given = n.all_input_nodes
        if n.op == "call_function" and given and all(a in found for a in given):
            args, kwargs = fx.map_arg((n.args, n.kwargs), lambda a: found[a].value)
            found[n] = _Constant(n.target(*args, **kwargs), any(found[a].made for a in given))
    return found


def _operands(n: Node, constants: dict[Node, _Constant]) -> Iterator[tuple[Node, float, bool]]:
    """Constants that a delay could have given, with what all of their elements are.

    And whether one that is the same at every step may be that of a delay, or those computed anew alone.
    """
    if n.op != "call_function":
        return
    first = 1 if n.target in _ADDED_PRODUCTS else 0
    given, layer = n.all_input_nodes, n.target in _LAYERS
    if layer:
        given = [n.args[first]]
    elif n in constants:
        return
    for a in given:
        fill = constants[a].fill if a in constants else None
        if fill is None:
            continue
        several = a.meta["val"].numel() > 1
        if (
            layer
            or n.target in _JOINS
            # What a sum spreads out has another shape than a value of an earlier step.
            or (n.target in _SUMS and (not fill or (several and shape(a) == shape(n))))
            or (n.target is aten.mul.Tensor and not fill)
        ):
            yield a, fill, True
        elif ops.is_pointwise(n.target) and ops.is_pointwise(a.target):
            yield a, fill, False


def _rest(n: Node, a: Node) -> list[Node]:
    return [other for other in n.all_input_nodes if other is not a]


def _is_delayed(n: Node, value: torch.Tensor, T: int) -> bool:
    """Whether time steps are put together that are one constant."""
    if all(u.target is NEURON_STEP for u in n.users):  # a neuron's states
        return False
    steps = value.unbind(ops.dim(n, n.args[1] if len(n.args) > 1 else 0))
    return len(n.args[0]) > 1 and len(steps) == T and all(torch.equal(s, steps[0]) for s in steps)


def _together(n: Node, T: int) -> Finding:
    return Finding(
        rule="time-steps",
        where=where(n) or next(filter(None, map(where, n.users)), ""),
        found=f"{short(n.target)} puts together {T} time steps that no input reaches, as those of "
        f"a delay of {T} steps or more are",
        allowed="time steps that can be told from one another",
        fix="give an example input of more time steps than the longest delay",
        node=n.name,
    )


def _finding(n: Node, fill: float, T: int) -> Finding:
    return Finding(
        rule="time-steps",
        where=where(n),
        found=f"{short(n.target)} takes a constant that the forward has made, {fill:g} in all elements, at "
        f"every one of {T} time steps, as it would what a delay of {T} steps or more starts from",
        allowed="delays shorter than the example; constants that are parameters, buffers or numbers",
        fix="give an example of more time steps than the longest delay; if this is none, leave it out or "
        "make it a buffer",
        node=n.name,
    )
