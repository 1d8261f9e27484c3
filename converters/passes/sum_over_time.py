"""Write the sum of all steps, ``out = out + layer(x[t])``, as one sum over time.

x[0] + x[1] + ... + x[T - 1]  ->  x.sum(0)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .. import ops
from ..builder import Builder
from ..ops import Node, aten, shape
from ..program import NEURON_STEP, PassReport, Program, where


def sum_over_time(program: Program) -> Program:
    """Gather the steps of every sum that takes each of them once."""
    return _Sum(program).run()


class _Sum(Builder):
    def run(self) -> Program:
        steps = self.program.sites[0].T if self.program.sites else 0
        env: dict[Node, Node] = {}
        done: list[str] = []
        for n in self.program.walk():
            if n.op == "placeholder":
                env[n] = self.placeholder(n, n.meta["val"])
            elif n.op == "get_attr":
                env[n] = self.copy(n, {})
            elif n.op == "call_function":
                whole = self._whole(n, steps, env) if _is_sum(n) else None
                if whole is None:
                    env[n] = self.copy(n, env)
                    continue
                env[n] = self.call(aten.sum.dim_IntList, whole, [0], path=where(n))
                done.append(f"{n.name} ({where(n)})")
        report = PassReport("sum_over_time", tuple(done))
        return self.finish([env[r] for r in self.program.results], report)

    def _whole(self, n: Node, steps: int, env: dict[Node, Node]) -> Node | None:
        """All steps [T, N, ...] of what a sum adds up, if it is all of them."""
        parts = self._parts(n)
        if steps < 2 or len(parts) != steps or {*map(shape, parts)} != {shape(n)}:
            return None
        if any(_is_sum(u) and len(self._parts(u)) <= steps for u in n.users):
            return None  # a longer sum goes on from this one
        size = [steps, *shape(parts[0])]
        taken = [_taken(part, steps) for part in parts]
        sources = {source for source, _ in taken}
        if len(sources) == 1 and None not in sources and {t for _, t in taken} == {*range(steps)}:
            source: Node = sources.pop()
            return self.reshaped(env[source], size, path=where(n))
        # Where spikes come back steps are nodes of their own, and other sums may have as many parts.
        looped = any(m.target is NEURON_STEP for m in self.program.graph.nodes)
        if sources == {None} and looped and _is_returned(n):
            steps_in_order = [env[p] for p in sorted(parts)]  # as they are computed
            return self.call(aten.stack.default, steps_in_order, 0, path=where(n))
        return None

    def _parts(self, n: Node) -> list[Node]:
        """What a chain of sums adds up, without zeros to start from."""
        parts = []
        while _is_sum(n):
            so_far, part = n.args
            if _is_sum(part) and not _is_sum(so_far):
                so_far, part = part, so_far
            parts.append(part)
            n = so_far
        return [p for p in (*parts, n) if not self._is_zero(p)]

    def _is_zero(self, value: Any) -> bool:
        if isinstance(value, fx.Node):
            return value.op == "get_attr" and not bool(self.program.tensor(str(value.target)).any())
        return bool(value == 0)


def _is_sum(n: Any) -> bool:
    tensors = (
        isinstance(n, fx.Node)
        and n.op == "call_function"
        and isinstance(n.meta["val"], torch.Tensor)
    )
    return tensors and n.target is aten.add.Tensor and not n.kwargs


def _is_returned(n: Node) -> bool:
    """Whether a value is for outputs alone, as it is, in another shape or divided."""
    kept = (ops.RESHAPE, aten.div.Tensor)
    return all(u.op == "output" or (u.target in kept and _is_returned(u)) for u in n.users)


def _taken(n: Node, steps: int) -> tuple[Node | None, int]:
    """The value [T, N, ...] or [TN, ...] that a node is one step of, and which."""
    while n.target is ops.RESHAPE:
        n = n.args[0]
    if n.target is aten.select.int and ops.dim(n.args[0], n.args[1]) == 0:
        return (n.args[0], n.args[2] % steps) if shape(n.args[0])[0] == steps else (None, 0)
    if n.target is aten.slice.Tensor:
        dim, start, end, step = ops.slice_args(n, 1)
        rows = range(shape(n.args[0])[dim])[start:end:step]
        size, rest = divmod(shape(n.args[0])[dim], steps)
        if dim == 0 and not rest and len(rows) == size and rows.start % size == 0:
            return n.args[0], rows.start // size
    return None, 0
