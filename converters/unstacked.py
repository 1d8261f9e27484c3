"""One time step of an operator on whole sequences: the inverse of :mod:`.stacked`.

A sequence holds its T steps along one dimension, alone, [..., T, ...], or with others folded into it,
[..., outer T inner, ...]; in a step the dimension is gone, or outer inner. Where an operator computes
every step alone, one step of its result follows from one step of its operands; where it mixes steps
there is a reason why not.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import fx

from . import ops
from .builder import Builder
from .ops import Node, aten, shape
from .program import short, where


class MixesTimeError(Exception):
    """Why one step of a value does not follow from one step of its operands.

    Attributes:
        rule: Name of the rule, for a finding.
    """

    def __init__(self, reason: str, rule: str = "mixes-time") -> None:
        self.rule = rule
        super().__init__(reason)


@dataclass(frozen=True)
class Steps:
    """A sequence, held as one of its steps.

    Attributes:
        node: One step.
        axis: Which of the sequence's dimensions holds time.
        count: How many steps the sequence has, from the first on.
        outer: What comes before time in that dimension.
        inner: What comes after it.
        bare: Whether time is alone there, so that the step lacks the dimension.
    """

    node: Node
    axis: int
    count: int
    outer: int = 1
    inner: int = 1
    bare: bool = True


#: What an operand is in the one step's graph: a step of a sequence, or a value that no step changes.
Operand: TypeAlias = "Steps | Node"


def unstack(
    build: Builder,
    n: Node,
    operands: Mapping[Node, Operand],
    still: Callable[[Node, int, Steps], Node],
) -> Steps:
    """One step of an operator that has at least one sequence among its operands.

    Args:
        build: Where it is emitted.
        n: The operator on the whole sequences.
        operands: Its operands.
        still: Gives one step of a value that has a dimension for time and no step changes.

    Raises:
        MixesTimeError: It mixes time steps, or takes another value at each.
    """
    return _Unstack(build, n, operands, still).emit()


def fold_in(build: Builder, x: Steps, path: str) -> Steps:
    """The sequence with its time folded into a dimension that its steps have."""
    if not x.bare:
        return x
    node = build.call(aten.unsqueeze.default, x.node, x.axis, path=path)
    return replace(x, node=node, bare=False)


def lay_bare(build: Builder, x: Steps, path: str) -> Steps:
    """The sequence with its time alone in a dimension, where nothing is folded with it."""
    if x.bare:
        return x
    sizes = list(shape(x.node))
    if sizes.pop(x.axis) != 1:
        raise MixesTimeError(f"time is folded with {x.outer * x.inner} others")
    return replace(x, node=build.call(ops.RESHAPE, x.node, sizes, path=path), bare=True)


class _Unstack:
    def __init__(
        self,
        build: Builder,
        n: Node,
        operands: Mapping[Node, Operand],
        still: Callable[[Node, int, Steps], Node],
    ) -> None:
        self.build, self.n, self.path = build, n, where(n)
        self.operands, self.still = operands, still

    def emit(self) -> Steps:
        target: Any = self.n.target
        if ops.is_pointwise(target):
            return self._pointwise()
        rule = _RULES.get(target)
        if rule is not None:
            return rule(self)
        if target in ops.BATCHED:
            return self._batched()
        raise MixesTimeError(f"{short(target)} is not known step by step")

    @property
    def rank(self) -> int:
        """Of the result."""
        return len(shape(self.n))

    def _mixes(self, how: str = "over the time steps together") -> MixesTimeError:
        return MixesTimeError(f"{short(self.n.target)} computes {how}")

    # Operands

    @property
    def x(self) -> Steps:
        """The first operand, if that alone is a sequence."""
        first = self.n.args[0]
        x = self.operands[first] if isinstance(first, fx.Node) else None
        others = [a for a in self.n.all_input_nodes if a is not first]
        if not isinstance(x, Steps) or any(isinstance(self.operands[a], Steps) for a in others):
            raise self._mixes("with weights of its own at each time step")
        return x

    def _call(self, x: Steps, *rest: Any, **changes: Any) -> Steps:
        """The operator on one step, with these arguments after it."""
        weights: Any = self.operands.__getitem__
        args: Any = fx.map_arg(rest, weights)
        node = self.build.call(self.n.target, x.node, *args, path=self.path, **self.n.kwargs)
        return replace(x, node=node, **changes)

    def _dim(self, x: Steps, d: int) -> int:
        """A dimension of the sequence, other than time's, in its step."""
        return d - 1 if x.bare and d > x.axis else d

    def _without_time(self, x: Steps, sizes: Sequence[int], axis: int) -> list[int]:
        """Sizes of a sequence as those of its step."""
        found = list(sizes)
        if x.bare:
            del found[axis]
        else:
            found[axis] = x.outer * x.inner
        return found

    def _aligned(self, given: Sequence[Node], rank: int) -> tuple[Steps, list[Node]]:
        """Operands that broadcast against one another, as steps; and what all have in common."""
        pairs = [(a, v) for a in given if isinstance(v := self.operands[a], Steps)]
        depths = {len(shape(a)) - v.axis for a, v in pairs}
        if len(depths) > 1 or len({v.count for _, v in pairs}) > 1:
            raise self._mixes("with time in two dimensions")
        depth = depths.pop()
        if any(not v.bare for _, v in pairs):
            pairs = [(a, fold_in(self.build, v, self.path)) for a, v in pairs]
        if len({(v.outer, v.inner) for _, v in pairs}) > 1:
            raise self._mixes("with time in two dimensions")
        like, steps = replace(pairs[0][1], axis=rank - depth), dict(pairs)
        return like, [
            steps[a].node if a in steps else self._still(a, like, len(shape(a)) - depth)
            for a in given
        ]

    def _still(self, a: Node, like: Steps, at: int) -> Node:
        """A value that no step changes, as it broadcasts against a step."""
        node: Any = self.operands[a]
        sizes = list(shape(node))
        if at < 0 or (sizes[at] == 1 and not like.bare):
            return node
        if sizes[at] == 1:
            del sizes[at]
            return self.build.call(ops.RESHAPE, node, sizes, path=self.path)
        return self.still(a, at, like)

    # One method for each kind of operator

    def _pointwise(self) -> Steps:
        given = list(dict.fromkeys(self.n.all_input_nodes))
        like, nodes = self._aligned(given, self.rank)
        new = dict(zip(given, nodes, strict=True))
        args, kwargs = fx.map_arg((self.n.args, self.n.kwargs), new.__getitem__)
        node = self.build.call(self.n.target, *args, path=self.path, **kwargs)
        return replace(like, node=node)

    def _reshape(self) -> Steps:
        x, target = self.x, shape(self.n)
        before = math.prod(shape(self.n.args[0])[: x.axis]) * x.outer
        passed = 1
        for axis, size in enumerate(target):
            outer, rest = divmod(before, passed)
            if not rest and size % (outer * x.count) == 0:
                inner = size // (outer * x.count)
                bare = outer * inner == 1 and not self._keeps_one(x, axis)
                made = replace(x, axis=axis, outer=outer, inner=inner, bare=bare)
                sizes = self._without_time(made, target, axis)
                if sizes == list(shape(x.node)):
                    return made
                return replace(
                    made, node=self.build.call(ops.RESHAPE, x.node, sizes, path=self.path)
                )
            passed *= size
        raise self._mixes("with time split over dimensions")

    def _keeps_one(self, x: Steps, axis: int) -> bool:
        """Whether a reshape to time in this dimension folds a batch of 1 with it, or keeps it so."""
        folded = shape(x.node)[axis : axis + 1] == (1,) and x.axis == axis
        return folded and shape(self.n)[axis + 1 : axis + 2] != (1,)

    def _batched(self) -> Steps:
        x = self.x
        dims = re.search(r"([123])d", str(self.n.target))
        if x.axis or (dims is not None and len(shape(self.n.args[0])) != int(dims[1]) + 2):
            raise self._mixes()
        return self._call(fold_in(self.build, x, self.path), *self.n.args[1:])

    def _trailing(self) -> Steps:
        x, depth = self.x, 1
        if self.n.target in (aten.layer_norm.default, aten.rms_norm.default):
            depth = len(self.n.args[1])
        if x.axis >= len(shape(self.n.args[0])) - depth:
            raise self._mixes()
        return self._call(x, *self.n.args[1:])

    def _along(self) -> Steps:
        """Operators along one dimension, their argument ``dim``."""
        x, d = self.x, ops.dim(self.n.args[0], ops.arguments(self.n)["dim"])
        if d == x.axis:
            raise self._mixes()
        return self._on_dims(x, self._dim(x, d))

    def _on_dims(self, x: Steps, dim: int | list[int], **changes: Any) -> Steps:
        """The operator on one step, with another argument ``dim``."""
        rest: list[Any]
        rest, kwargs = list(self.n.args[1:]), dict(self.n.kwargs)
        at = list(ops.arguments(self.n)).index("dim") - 1
        if at < len(rest):
            rest[at] = dim
        else:
            kwargs["dim"] = dim
        weights: Any = self.operands.__getitem__
        args: Any = fx.map_arg(rest, weights)
        node = self.build.call(self.n.target, x.node, *args, path=self.path, **kwargs)
        return replace(x, node=node, **changes)

    def _result(self) -> Steps:
        """One of several results."""
        return self._call(self.x, *self.n.args[1:])

    def _entries(self) -> Steps:
        """Entries along one dimension, taken or written by their numbers."""
        source, dim, *rest = self.n.args
        given = list(dict.fromkeys(self.n.all_input_nodes))
        like, nodes = self._aligned(given, self.rank)
        d = ops.dim(source, dim)
        if d == like.axis or len({shape(a)[like.axis] for a in given}) > 1:
            raise self._mixes()
        new = dict(zip(given, nodes, strict=True))
        args: Any = fx.map_arg(rest, new.__getitem__)
        node = self.build.call(
            self.n.target, new[source], self._dim(like, d), *args, path=self.path
        )
        return replace(like, node=node)

    def _slice(self) -> Steps:
        x = self.x
        at, start, end, step = ops.slice_args(self.n, 1)
        return self._call(x, self._dim(x, ops.dim(self.n.args[0], at)), start, end, step)

    def _select(self) -> Steps:
        x, d = self.x, ops.dim(self.n.args[0], self.n.args[1])
        return self._call(x, self._dim(x, d), self.n.args[2], axis=x.axis - (d < x.axis))

    def _squeeze(self) -> Steps:
        x, d = self.x, ops.dim(self.n.args[0], self.n.args[1])
        if shape(self.n.args[0])[d] != 1:
            return x
        return self._call(x, self._dim(x, d), axis=x.axis - (d < x.axis))

    def _unsqueeze(self) -> Steps:
        x, d = self.x, ops.dim(self.n, self.n.args[1])
        at = d - 1 if x.bare and d > x.axis else d
        return self._call(x, at, axis=x.axis + (d <= x.axis))

    def _permute(self) -> Steps:
        x = self.x
        order = ops.permutation(self.n)
        axis = order.index(x.axis)
        moved = [self._dim(x, d) for d in order if not (x.bare and d == x.axis)]
        node = x.node
        if moved != sorted(moved):
            node = self.build.call(aten.permute.default, node, moved, path=self.path)
        return replace(x, node=node, axis=axis)

    def _expand(self) -> Steps:
        x = self.x
        axis = x.axis + self.rank - len(shape(self.n.args[0]))
        return self._call(x, self._without_time(x, shape(self.n), axis), axis=axis)

    def _repeat(self) -> Steps:
        x, times = self.x, list(self.n.args[1])
        axis = x.axis + self.rank - len(shape(self.n.args[0]))
        if times[axis] != 1:
            raise self._mixes()
        if x.bare:
            del times[axis]
        return self._call(x, times, axis=axis)

    def _reduce(self) -> Steps:
        """Operators with arguments ``dim`` and ``keepdim``."""
        x, source = self.x, self.n.args[0]
        given = ops.arguments(self.n)
        dim = given["dim"]
        dims = [dim] if isinstance(dim, int) else dim or range(len(shape(source)))
        dims = [ops.dim(source, d) for d in dims]
        if x.axis in dims:
            raise self._mixes()
        before = 0 if given["keepdim"] else sum(d < x.axis for d in dims)
        moved = [self._dim(x, d) for d in dims]
        return self._on_dims(x, moved[0] if isinstance(dim, int) else moved, axis=x.axis - before)

    def _pad(self) -> Steps:
        x = self.x
        if x.axis >= len(shape(self.n.args[0])) - len(self.n.args[1]) // 2:
            raise self._mixes()
        return self._call(x, *self.n.args[1:])

    def _join(self) -> Steps:
        """Parts side by side in a dimension that is not time."""
        parts = list(self.n.args[0])
        stacks = self.n.target is aten.stack.default
        rank = len(shape(parts[0]))
        d = ops.dim(self.n, self.n.args[1] if len(self.n.args) > 1 else 0)
        if not stacks and any(
            isinstance(v := self.operands[p], Steps) and v.axis == d for p in parts
        ):
            raise self._mixes()
        like, nodes = self._aligned(parts, rank)
        at = d - 1 if like.bare and d > like.axis else d
        node = self.build.call(self.n.target, nodes, at, path=self.path)
        return replace(like, node=node, axis=like.axis + (stacks and d <= like.axis))

    def _product(self) -> Steps:
        """Matrix products, with time among the dimensions that broadcast or the rows."""
        a, b = self.n.args[:2]
        right = self.operands[b]
        left = self.operands[a]
        rows = isinstance(left, Steps) and left.axis == len(shape(a)) - 2
        if not isinstance(right, Steps) and (len(shape(b)) == 2 or rows):
            x = self.x
            if x.axis == len(shape(a)) - 1 or len(shape(b)) > len(shape(a)):
                raise self._mixes()
            if rows and len(shape(a)) > 2 and x.bare:
                x = fold_in(self.build, x, self.path)
            return self._matmul(x, [x.node, right])
        for one in (a, b):
            x = self.operands[one]
            if isinstance(x, Steps) and x.axis >= len(shape(one)) - 2:
                raise self._mixes()
        like, nodes = self._aligned([a, b], self.rank)
        return self._matmul(like, nodes)

    def _added_product(self) -> Steps:
        """A matrix product and what is added to it, with time among the rows, or the batch."""
        parts = list(self.n.args[: 2 if self.n.target is aten.addmm.default else 3])
        rest = [self.operands[a] for a in self.n.args[len(parts) : 3]]
        for one in parts[1:]:
            x = self.operands[one]
            if isinstance(x, Steps) and x.axis:
                raise self._mixes()
        if any(isinstance(x, Steps) for x in rest):
            raise self._mixes("with weights of its own at each time step")
        self.operands = {
            a: fold_in(self.build, x, self.path) if isinstance(x, Steps) else x
            for a, x in self.operands.items()
        }
        like, nodes = self._aligned(parts, self.rank)
        if like.axis:
            raise self._mixes()
        node = self.build.call(
            self.n.target, *nodes, *rest, *self.n.args[3:], path=self.path, **self.n.kwargs
        )
        return replace(like, node=node)

    def _bilinear(self) -> Steps:
        like, nodes = self._aligned(self.n.args[:2], self.rank)
        weights = [a and self.operands[a] for a in self.n.args[2:]]
        if like.axis == self.rank - 1 or any(isinstance(w, Steps) for w in weights):
            raise self._mixes()
        node = self.build.call(self.n.target, *nodes, *weights, path=self.path)
        return replace(like, node=node)

    def _attention(self) -> Steps:
        """Attention of queries, keys and values [..., L, E], with time among what stands before."""
        parts, mask = list(self.n.args[:3]), self.n.args[3] if len(self.n.args) > 3 else None
        for one in parts:
            x = self.operands[one]
            if isinstance(x, Steps) and x.axis >= len(shape(one)) - 2:
                raise self._mixes()
        if mask is not None and (isinstance(self.operands[mask], Steps) or len(shape(mask)) > 2):
            raise self._mixes("with a mask of its own at each time step")
        like, nodes = self._aligned(parts, self.rank)
        rest = [None if mask is None else self.operands[mask], *self.n.args[4:]]
        given = () if len(self.n.args) < 4 else rest
        node = self.build.call(self.n.target, *nodes, *given, path=self.path, **self.n.kwargs)
        return replace(like, node=node)

    def _index_select(self) -> Steps:
        """Entries of each step, or rows of a table by a sequence of their numbers."""
        table, d, index = self.n.args
        rows = self.operands[index]
        if not isinstance(rows, Steps):
            return self._along()
        if isinstance(self.operands[table], Steps) or d % len(shape(table)) or rows.bare:
            raise self._mixes("with a table of its own at each time step")
        node = self.build.call(self.n.target, self.operands[table], 0, rows.node, path=self.path)
        return replace(rows, node=node)

    def _matmul(self, like: Steps, nodes: Sequence[Any]) -> Steps:
        # mm and bmm want ranks that a step need not have.
        node = self.build.call(aten.matmul.default, *nodes, path=self.path)
        return replace(like, node=node)


_RULES: dict[Any, Callable[[_Unstack], Steps]] = {
    ops.RESHAPE: _Unstack._reshape,
    aten.linear.default: _Unstack._trailing,
    aten.layer_norm.default: _Unstack._trailing,
    aten.rms_norm.default: _Unstack._trailing,
    aten.softmax.int: _Unstack._along,
    aten._softmax.default: _Unstack._along,
    aten.log_softmax.int: _Unstack._along,
    aten._log_softmax.default: _Unstack._along,
    aten.cumsum.default: _Unstack._along,
    aten.cumprod.default: _Unstack._along,
    aten.cummax.default: _Unstack._along,
    aten.cummin.default: _Unstack._along,
    aten.sort.default: _Unstack._along,
    aten.sort.stable: _Unstack._along,
    aten.topk.default: _Unstack._along,
    aten.glu.default: _Unstack._along,
    aten.gather.default: _Unstack._entries,
    aten.scatter.src: _Unstack._entries,
    aten.scatter.value: _Unstack._entries,
    aten.scatter_add.default: _Unstack._entries,
    operator.getitem: _Unstack._result,
    aten.index_select.default: _Unstack._index_select,
    aten.slice.Tensor: _Unstack._slice,
    aten.select.int: _Unstack._select,
    aten.squeeze.dim: _Unstack._squeeze,
    aten.unsqueeze.default: _Unstack._unsqueeze,
    aten.permute.default: _Unstack._permute,
    aten.transpose.int: _Unstack._permute,
    aten.expand.default: _Unstack._expand,
    aten.repeat.default: _Unstack._repeat,
    aten.mean.dim: _Unstack._reduce,
    aten.sum.dim_IntList: _Unstack._reduce,
    aten.amax.default: _Unstack._reduce,
    aten.amin.default: _Unstack._reduce,
    aten.argmax.default: _Unstack._reduce,
    aten.argmin.default: _Unstack._reduce,
    aten.linalg_vector_norm.default: _Unstack._reduce,
    aten.logsumexp.default: _Unstack._reduce,
    aten.prod.dim_int: _Unstack._reduce,
    aten.max.dim: _Unstack._reduce,
    aten.min.dim: _Unstack._reduce,
    aten.median.dim: _Unstack._reduce,
    aten.kthvalue.default: _Unstack._reduce,
    aten.mode.default: _Unstack._reduce,
    aten.aminmax.default: _Unstack._reduce,
    aten.std_mean.correction: _Unstack._reduce,
    aten.std_mean.dim: _Unstack._reduce,
    aten.var_mean.correction: _Unstack._reduce,
    aten.var_mean.dim: _Unstack._reduce,
    aten.std.correction: _Unstack._reduce,
    aten.std.dim: _Unstack._reduce,
    aten.var.correction: _Unstack._reduce,
    aten.var.dim: _Unstack._reduce,
    aten.constant_pad_nd.default: _Unstack._pad,
    aten.cat.default: _Unstack._join,
    aten.stack.default: _Unstack._join,
    aten.matmul.default: _Unstack._product,
    aten.bmm.default: _Unstack._product,
    aten.addmm.default: _Unstack._added_product,
    aten.baddbmm.default: _Unstack._added_product,
    aten.bilinear.default: _Unstack._bilinear,
    aten.scaled_dot_product_attention.default: _Unstack._attention,
}
