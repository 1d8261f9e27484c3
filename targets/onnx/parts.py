"""Matrix products of each time step alone, where putting the steps together costs more than it saves.

A neuron's steps are nodes of their own; the layer after it takes all of them at once, [TN, ...]. To join
them, and to cut the result for the next neuron, moves every value twice. A product with few weights is
as fast on each step [N, ...], and each row of its result is the same.
"""

from __future__ import annotations

import math

from ...converters import ops
from ...converters.builder import Builder
from ...converters.ops import Node, aten, shape
from ...converters.program import PassReport, Program, where

#: Elements of a step below which a node's launch takes longer than moving them.
_FEWEST = 2**15
#: How often a step's elements must outnumber the weights, which each step reads again.
_WEIGHTS = 4


def in_parts(program: Program) -> Program:
    """The same graph with products taken apart; the program names no sites, and is for export alone."""
    return _Parts(program).run()


class _Parts(Builder):
    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.env: dict[Node, Node] = {}
        #: Of values that are not joined yet, the nodes of their equal parts along dimension 0.
        self.parts: dict[Node, list[Node]] = {}

    def run(self) -> Program:
        for n in self.program.walk():
            if n.op == "placeholder":
                self.env[n] = self.placeholder(n, n.meta["val"])
            elif n.op == "get_attr":
                self.env[n] = self.copy(n, self.env)
            elif n.op == "call_function":
                if parts := self._taken_apart(n):
                    self.parts[n] = parts
                else:
                    self.env[n] = self._slice(n) or self._copied(n, {})
        results = [self._joined(r) for r in self.program.results]
        return self.finish(results, PassReport("in_parts", ()), ())

    def _joined(self, n: Node) -> Node:
        """A value as one node."""
        if n not in self.env:
            self.env[n] = self.call(aten.cat.default, self.parts[n], 0, path=where(n))
        return self.env[n]

    def _copied(self, n: Node, taken: dict[Node, Node]) -> Node:
        """The node over parts of some inputs and the whole of the others."""
        return self.copy(n, {a: taken.get(a) or self._joined(a) for a in n.all_input_nodes})

    def _taken_apart(self, n: Node) -> list[Node]:
        """The parts of a value, or none."""
        if n.target is aten.cat.default:
            given, at = n.args[0], ops.dim(n, n.args[1] if len(n.args) > 1 else 0)
            kinds = {(shape(a), a.meta["val"].dtype) for a in given}
            equal = len(given) > 1 and at == 0 and len(kinds) == 1
            return [self._joined(a) for a in given] if equal else []
        if n.target is not aten.linear.default or n.args[0] not in self.parts or len(shape(n)) != 2:
            return []
        x, *weights = n.all_input_nodes
        parts = self.parts[x]
        moved = max(math.prod(shape(a)) for a in (n, x)) // len(parts)
        if moved < max(_FEWEST, _WEIGHTS * sum(math.prod(shape(a)) for a in weights)):
            return []
        return [self._copied(n, {x: part}) for part in parts]

    def _slice(self, n: Node) -> Node:
        """The part that a slice cuts out, if it is one."""
        if n.target is not aten.slice.Tensor or n.args[0] not in self.parts:
            return None
        parts, cut = self.parts[n.args[0]], ops.slice_args(n, 1)
        rows = shape(n.args[0])[0] // len(parts)
        exact = {(0, i * rows, (i + 1) * rows, 1): part for i, part in enumerate(parts)}
        return exact.get(cut)
