"""What the nodes of a program compute relative to the time step, and at which: copies have one label.

A label says what is computed, relative to the step: operator, constants, and for each operand its label
and how many steps it lies back. So the copies that a loop over time leaves of a layer have one label and T
steps, and what computes the same at the same step is one node.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from . import ops
from .ops import Node, aten, shape
from .program import NEURON, STATE, Program, Site


@dataclass(frozen=True)
class Place:
    """What a node computes, relative to the step, and the step; None if it depends on no step."""

    label: int
    step: int | None


class Labels:
    """The label and step of every node, and the nodes of each label by step."""

    def __init__(self, program: Program) -> None:
        self.numbers: dict[Hashable, int] = {}
        self.places: dict[Node, Place] = {}
        self.members: dict[int, dict[int, Node]] = defaultdict(dict)
        self.same: dict[Node, Node] = {}
        self.views: dict[int, tuple[Node, int, int]] = {}
        self.sites: dict[int, Site] = {}
        self.named: dict[str, Node] = {n.name: n for n in program.walk()}
        self.calls: dict[Node, tuple[Site, int]] = {
            self.named[spikes].args[0]: (site, t)
            for site in program.sites
            if site.layout == "steps"
            for t, spikes in enumerate(site.spikes)
        }
        self.repeated: dict[Node, int] = defaultdict(lambda: 1)
        for n in program.walk():
            if n.op != "output":
                self._place(n)

    def one(self, n: Node) -> Node:
        """The node that stands for all that compute the same at the same step."""
        return self.same.get(n, n)

    def at(self, n: Node) -> Place:
        """The place of a node."""
        return self.places[self.one(n)]

    def operands(self, n: Node) -> list[Node]:
        """A node's operands in the order of its arguments."""
        given = pytree.tree_leaves((n.args, n.kwargs))
        return [self.one(a) for a in given if isinstance(a, fx.Node)]

    def _place(self, n: Node) -> None:
        key, step = self._key(n)
        label = self.numbers.setdefault(key, len(self.numbers))
        # A label that depends on no step has one node, as if it had one step.
        first = self.members[label].setdefault(0 if step is None else step, n)
        if first is not n:
            self.same[n] = first
            self.repeated[first] += 1
            return
        self.places[n] = Place(label, step)
        if key[0] == "view":
            self.views[label] = (key[1], key[2], key[3])
        elif key[0] == "site":
            self.sites[label] = self.calls[n][0]

    def _key(self, n: Node) -> tuple[tuple[Any, ...], int | None]:
        if n.op != "call_function" or n.target in (NEURON, STATE):
            return ("alone", n.name), None
        if n in self.calls:
            site, t = self.calls[n]
            return ("site", site.name), t
        if (view := self._view(n)) is not None:
            return view
        steps = {p.step for a in n.all_input_nodes if (p := self.at(a)).step is not None}
        collects = n.target in (aten.stack.default, aten.cat.default) and len(steps) > 1
        step = None if collects or not steps else max(steps)
        value = n.meta["val"]
        kinds = [(tuple(v.shape), v.dtype) for v in (value if _several(value) else [value])]
        operands = self._relative((n.args, n.kwargs), max(steps, default=0))
        return (n.target, operands, tuple(kinds), max(steps) if collects else None), step

    def _view(self, n: Node) -> tuple[tuple[Any, ...], int] | None:
        """Where a step is taken out of a tensor that holds all of them: x[t], x[:, t], chunk."""
        x: Any = n.args[0] if n.args else None
        if not isinstance(x, fx.Node) or self.at(x).step is not None:
            return None
        if n.target is aten.select.int:
            at = ops.dim(x, n.args[1])
            return ("view", self.one(x), at, 0), n.args[2] % shape(x)[at]
        if n.target is aten.slice.Tensor:
            at, start, end, step = ops.slice_args(n, 1)
            if ops.dim(x, at) == 0 and step == 1:
                first, last, _ = slice(start, end).indices(shape(x)[0])
                size = last - first
                if first % size == 0:
                    return ("view", self.one(x), 0, size), first // size
        return None

    def _relative(self, value: Any, step: int) -> Hashable:
        """Arguments with each node as its label and the steps that it lies back."""
        if isinstance(value, fx.Node):
            place = self.at(value)
            return (place.label, None if place.step is None else step - place.step)
        if isinstance(value, (list, tuple)):
            return tuple(self._relative(v, step) for v in value)
        if isinstance(value, dict):
            return tuple((k, self._relative(v, step)) for k, v in value.items())
        return (type(value).__name__, value)


def _several(value: Any) -> bool:
    return isinstance(value, (list, tuple))
