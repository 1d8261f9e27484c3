"""One operator on a leading dimension for time: what takes T copies of it at once.

With f an operator on x [N, ...] and stack(x) [T, N, ...], the operator f' with
f'(stack(x)) = stack(f(x)) is f itself where f looks at the last dimensions only or at each element
alone, f with its dimension arguments moved by one, or f between [T, N, ...] -> [TN, ...] and back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from . import ops
from .builder import Builder
from .ops import Node, aten, shape
from .program import where


def over_time(
    build: Builder,
    n: Node,
    T: int,
    one: Callable[[Node], Node],
    stacked: Mapping[Node, Node],
    fixed: Mapping[Node, Node],
) -> Node | None:
    """The stack of an operator's T copies; None if no rule takes them at once.

    Args:
        build: Where it is emitted.
        n: The first copy.
        T: Number of copies.
        one: The node that stands for an operand of ``n`` in the mappings.
        stacked: New operands [T, ...] of those that differ from copy to copy.
        fixed: New operands of those that do not.
    """
    return _Stack(build, n, T, one, stacked, fixed).emit()


#: Position of the argument that is a dimension, or several.
_DIMS = {
    aten.select.int: 1,
    aten.slice.Tensor: 1,
    aten.squeeze.dim: 1,
    aten.unsqueeze.default: 1,
    aten.softmax.int: 1,
    aten._softmax.default: 1,
    aten.mean.dim: 1,
    aten.sum.dim_IntList: 1,
    aten.amax.default: 1,
    aten.permute.default: 1,
}


class _Stack:
    def __init__(
        self,
        build: Builder,
        n: Node,
        T: int,
        one: Callable[[Node], Node],
        stacked: Mapping[Node, Node],
        fixed: Mapping[Node, Node],
    ) -> None:
        self.build, self.n, self.T, self.one = build, n, T, one
        self.stacked, self.fixed = stacked, fixed
        self.rank = len(shape(n)) if hasattr(n.meta["val"], "shape") else 0

    def emit(self) -> Node | None:
        n = self.n
        rule = self._rule()
        if rule is None or not hasattr(n.meta["val"], "shape"):
            return None
        node = rule()
        if node is not None and shape(node) != (self.T, *shape(n)):
            return None
        return node

    def _rule(self) -> Callable[[], Node | None] | None:
        target: Any = self.n.target
        if ops.is_pointwise(target):
            return self._pointwise
        first = self.n.args[0]
        if target is aten.cat.default:
            return self._cat
        if target in (aten.matmul.default, aten.bmm.default):
            return self._matmul
        # In all others time comes with the first operand; the rest are weights.
        if not isinstance(first, fx.Node) or {self.one(first)} != {*self.stacked}:
            return None
        if target in ops.TRAILING:
            return lambda: self._call(target, *self._arguments()[1:])
        if target in (ops.RESHAPE, aten.expand.default):
            return self._resize
        if target in ops.BATCHED and self._has_batch():
            return self._batched
        if target is aten.transpose.int:
            a, b = (ops.dim(first, d) + 1 for d in self.n.args[1:3])
            return lambda: self._call(target, a, b)
        return self._along if target in _DIMS else None

    def _operand(self, a: Node) -> Node:
        return self.stacked.get(self.one(a)) or self.fixed[self.one(a)]

    def _arguments(self) -> list[Any]:
        args: Any = fx.map_arg(self.n.args, self._operand)
        return list(args)

    def _call(self, target: Any, *rest: Any) -> Node:
        """The operator on the stack of its first operand."""
        first = self._operand(self.n.args[0])
        return self.build.call(target, first, *rest, path=where(self.n), **self.n.kwargs)

    def _aligned(self, a: Node, rank: int) -> Node:
        """An operand that broadcasts against [T, ...] of this rank behind T as it did without."""
        x = self._operand(a)
        missing = rank - len(shape(a))
        if self.one(a) not in self.stacked or not missing:
            return x
        T, *rest = shape(x)
        return self.build.call(ops.RESHAPE, x, [T, *[1] * missing, *rest], path=where(self.n))

    def _pointwise(self) -> Node:
        args, kwargs = fx.map_arg(
            (self.n.args, self.n.kwargs), lambda a: self._aligned(a, self.rank)
        )
        return self.build.call(self.n.target, *args, path=where(self.n), **kwargs)

    def _matmul(self) -> Node | None:
        a, b = self.n.args[:2]
        ranks = len(shape(a)), len(shape(b))
        if min(ranks) < 2:
            return None
        operands = [self._aligned(x, max(ranks)) for x in (a, b)]
        return self.build.call(aten.matmul.default, *operands, path=where(self.n))

    def _cat(self) -> Node | None:
        if any(self.one(a) not in self.stacked for a in self.n.args[0]):
            return None
        at = ops.dim(self.n, self.n.args[1] if len(self.n.args) > 1 else 0) + 1
        parts = [self._operand(a) for a in self.n.args[0]]
        return self.build.call(aten.cat.default, parts, at, path=where(self.n))

    def _resize(self) -> Node:
        first = self._aligned(self.n.args[0], self.rank)
        if self.n.target is ops.RESHAPE:
            first = self._operand(self.n.args[0])
        size = [self.T, *shape(self.n)]
        return self.build.call(self.n.target, first, size, path=where(self.n))

    def _has_batch(self) -> bool:
        """Whether the input is [N, C, ...]: convolutions and pooling take [C, ...] too."""
        dims = re.search(r"([123])d", str(self.n.target))
        return dims is None or len(shape(self.n.args[0])) == int(dims[1]) + 2

    def _batched(self) -> Node:
        path = where(self.n)
        x = self._operand(self.n.args[0])
        T, N, *rest = shape(x)
        flat = self.build.call(ops.RESHAPE, x, [T * N, *rest], path=path)
        args = self._arguments()[1:]
        node = self.build.call(self.n.target, flat, *args, path=path, **self.n.kwargs)
        return self.build.call(ops.RESHAPE, node, [T, *shape(self.n)], path=path)

    def _along(self) -> Node:
        at = _DIMS[self.n.target]
        args = self._arguments()
        given = args[at] if len(args) > at else None
        # An unsqueezed dimension counts among those of the result.
        like = self.n if self.n.target is aten.unsqueeze.default else self.n.args[0]
        if isinstance(given, int):
            moved: Any = ops.dim(like, given) + 1
        else:
            moved = [ops.dim(like, d) + 1 for d in given or range(len(shape(like)))]
        if self.n.target is aten.permute.default:
            moved = [0, *moved]
        if given is None and self.n.target is aten.slice.Tensor:
            moved = 1
        return self._call(self.n.target, *args[1:at], moved, *args[at + 1 :])
