"""Compute once what does not depend on time, and repeat it after.

A static image repeated over T steps goes through the layers before the first neuron T times with the
same result. With ``repeat(x)[t] = x`` for each of the T steps, and f any operator that treats the
entries of a batch alone::

    f(flatten(repeat(x))) = flatten(repeat(f(x)))

so the repeat is moved down the graph until an operator that mixes time steps, which is a neuron or an
operand that varies with time.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from .. import ops
from ..builder import Builder
from ..ops import Node, aten, shape
from ..program import NEURON, STATE, PassReport, Program, short, where


@dataclass(frozen=True)
class _Repeated:
    """base [N, ...], standing for [T, N, ...], or for [TN, ...] if folded."""

    base: Node
    T: int
    folded: bool


def hoist_time_invariant(program: Program) -> Program:
    """Move repeats over time behind the operators that do not depend on time."""
    return _Hoist(program).run()


class _Hoist(Builder):
    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.env: dict[Node, Node] = {}
        self.repeated: dict[Node, _Repeated] = {}
        self.moved: list[str] = []
        self.stopped: list[str] = []

    def run(self) -> Program:
        for n in self.program.walk():
            if n.op == "placeholder":
                self.env[n] = self.placeholder(n, n.meta["val"])
            elif n.op == "call_function":
                found = self._repeat(n) or self._through(n)
                if found is None:
                    for a in n.all_input_nodes:
                        self._materialise(a, n)
                    self.env[n] = self.copy(n, self.env)
                else:
                    self.repeated[n] = found
            elif n.op == "get_attr":
                self.env[n] = self.copy(n, self.env)
        results = self.program.results
        for r in results:
            self._materialise(r, None)
        layers = list(dict.fromkeys(self.moved))
        done = [f"computed once, repeated after: {', '.join(layers)}"] if layers else []
        if not self.repeated:
            self.stopped.append("no input is repeated over time")
        report = PassReport("hoist_time_invariant", tuple(done), tuple(self.stopped))
        return self.finish([self.env[r] for r in results], report)

    def _repeat(self, n: Node) -> _Repeated | None:
        """Where a repeat over a new leading time dimension begins."""
        if n.target in (aten.stack.default, aten.cat.default):
            parts, at = n.args[0], n.args[1] if len(n.args) > 1 else 0
            x = parts[0]
            if at == 0 and len(parts) > 1 and set(parts) == {x} and x not in self.repeated:
                folded = n.target is aten.cat.default
                return _Repeated(self.env[x], len(parts), folded) if len(shape(x)) > 1 else None
            return None
        if n.target not in (aten.expand.default, aten.repeat.default):
            return None
        x = n.args[0]
        if not isinstance(x, fx.Node):
            return None
        if x.target is aten.unsqueeze.default and x.args[1] == 0:
            x = x.args[0]
        base, whole = shape(x), shape(n)
        if x in self.repeated or len(base) < 2 or whole[0] == 1:
            return None
        if whole[1:] == base:
            return _Repeated(self.env[x], whole[0], folded=False)
        if n.target is aten.repeat.default and x is n.args[0]:
            T, *others = n.args[1]
            if len(others) + 1 == len(base) and set(others) == {1} and T > 1:
                return _Repeated(self.env[x], T, folded=True)
        return None

    def _through(self, n: Node) -> _Repeated | None:
        """The operator on the base alone, if it commutes with the repeat."""
        operands = [self.repeated[a] for a in n.all_input_nodes if a in self.repeated]
        if not operands:
            return None
        first = operands[0]
        same = all((o.T, o.folded) == (first.T, first.folded) for o in operands)
        if n.target is ops.RESHAPE:
            return self._reshape(n, first)
        weights = [a for a in n.all_input_nodes if a not in self.repeated]
        if (
            ops.is_pointwise(n.target)
            and same
            and all(a.op == "get_attr" and self._constant_over_batch(a, first) for a in weights)
        ):
            return self._apply(n, first)
        constant = all(a.op == "get_attr" for a in weights)
        if n.target in ops.TRAILING and constant and n.args[0] in self.repeated:
            if n.target is aten.layer_norm.default and len(n.args[1]) >= len(shape(first.base)):
                return None
            return self._apply(n, first)
        if n.target in ops.BATCHED and constant and first.folded and n.args[0] in self.repeated:
            return self._apply(n, first)
        return None

    @staticmethod
    def _constant_over_batch(weight: Node, x: _Repeated) -> bool:
        """Whether a weight broadcasts over all dimensions before the features."""
        return len(shape(weight)) < len(shape(x.base))

    def _apply(self, n: Node, like: _Repeated) -> _Repeated:
        inputs = {
            a: self.repeated[a].base if a in self.repeated else self.env[a]
            for a in n.all_input_nodes
        }
        self.moved.append(where(n) or short(n.target))
        return _Repeated(self.copy(n, inputs), like.T, like.folded)

    def _reshape(self, n: Node, x: _Repeated) -> _Repeated | None:
        """A reshape that keeps time and batch apart from the rest, or folds them."""
        T, N, target = x.T, shape(x.base)[0], shape(n)
        if target[:2] == (T, N):
            rest, folded = target[2:], False
        elif target[0] == T * N:
            rest, folded = target[1:], True
        else:
            return None
        if (N, *rest) == shape(x.base):
            return _Repeated(x.base, T, folded)
        base = self.call(ops.RESHAPE, x.base, [N, *rest], path=where(n))
        return _Repeated(base, T, folded)

    def _materialise(self, n: Node, user: Node | None) -> None:
        """The repeated value itself, for an operator that does not commute with the repeat."""
        if n in self.env or n not in self.repeated:
            return
        x = self.repeated[n]
        path = where(n)
        head = self.call(aten.unsqueeze.default, x.base, 0, path=path)
        full = self.call(aten.expand.default, head, [x.T, *shape(x.base)], path=path)
        if x.folded:
            full = self.call(ops.RESHAPE, full, list(shape(n)), path=path)
        self.env[n] = full
        if user is not None and user.target not in (NEURON, STATE):
            self.stopped.append(
                f"{where(user) or user.name}: {short(user.target)} needs the time steps themselves"
            )
