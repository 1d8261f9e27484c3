"""Fold [T, N, ...] into [TN, ...], so that no tensor has a dimension for time alone.

The graph is emitted anew while every value that is [T, N, ...] in the old one is held as [TN, ...] in
the new one. A reshape from one to the other then is no operation at all, elementwise operators,
neurons and whatever acts on later dimensions carry the folded form on, and only an operator that
treats time and batch differently is given the form that it needs. A value that is the same at every
step is held as [N, ...].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from .. import ops
from ..builder import Builder
from ..ops import Node, aten, shape
from ..program import NEURON, STATE, PassReport, Program, TensorSpec, short, where


@dataclass(frozen=True)
class _Folded:
    """node [TN, ...] standing for [T, N, ...]; or [N, ...] if it is the same at every step."""

    node: Node
    T: int
    N: int
    static: bool = False

    @property
    def rest(self) -> tuple[int, ...]:
        return shape(self.node)[1:]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.T, self.N, *self.rest)


def flatten_time(program: Program) -> Program:
    """Hold every [T, N, ...] as [TN, ...]; inputs and outputs of rank > 4 are folded at the border."""
    return _Flatten(program).run()


class _Flatten(Builder):
    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.env: dict[Node, Node | _Folded] = {}
        self.kept: list[str] = []
        self.handlers: dict[Any, Callable[[Node], Node | _Folded | None]] = {
            ops.RESHAPE: self._reshape,
            NEURON: self._neuron,
            STATE: self._neuron,
            aten.expand.default: self._expand,
            aten.repeat.default: self._expand,
            aten.unsqueeze.default: self._unsqueeze,
            aten.squeeze.dim: self._squeeze,
            aten.select.int: self._select,
            aten.slice.Tensor: self._slice,
            aten.stack.default: self._stack,
            aten.cat.default: self._cat,
            aten.mean.dim: self._reduce,
            aten.sum.dim_IntList: self._reduce,
            aten.amax.default: self._reduce,
            aten.permute.default: self._permute,
            aten.transpose.int: self._transpose,
            aten.softmax.int: self._along,
            aten._softmax.default: self._along,
            aten.matmul.default: self._matmul,
            **dict.fromkeys(ops.TRAILING, self._trailing),
        }

    def run(self) -> Program:
        inputs = []
        nodes = self.program.walk()
        specs = iter(self.program.inputs)
        for n in nodes:
            if n.op == "placeholder":
                inputs.append(self._input(n, next(specs)))
            elif n.op == "get_attr":
                self.env[n] = self.copy(n, {})
            elif n.op == "call_function":
                self.env[n] = self._emit(n)
        outputs, results = [], []
        for spec, r in zip(self.program.outputs, self.program.results, strict=True):
            value = self.env[r]
            if isinstance(value, _Folded) and not value.static and len(shape(r)) > 4:
                outputs.append(replace(spec, folded=True))
                results.append(value.node)
            else:
                outputs.append(spec)
                results.append(self._plain(r))
        before = self._reshapes(nodes)
        after = self._reshapes(self.graph.nodes)
        done = [f"reshapes {before} -> {after}, highest rank {self._rank(nodes)} -> "]
        done[0] += str(self._rank(self.graph.nodes))
        done += [
            f"input {s.name} {list(s.shape)} is folded on the host" for s in inputs if s.folded
        ]
        done += [f"output {s.name} is unfolded on the host" for s in outputs if s.folded]
        report = PassReport("flatten_time", tuple(done), tuple(self.kept))
        return self.finish(results, report, inputs=tuple(inputs), outputs=tuple(outputs))

    @staticmethod
    def _reshapes(nodes: Any) -> int:
        return sum(n.target is ops.RESHAPE for n in nodes)

    @staticmethod
    def _rank(nodes: Any) -> int:
        values = (n.meta["val"] for n in nodes if "val" in n.meta)
        return max(len(v.shape) for v in values if hasattr(v, "shape"))

    def _input(self, n: Node, spec: TensorSpec) -> TensorSpec:
        value = n.meta["val"]
        if len(spec.shape) <= 4:
            self.env[n] = self.placeholder(n, value)
            return spec
        T, N, *rest = spec.shape
        node = self.placeholder(n, value.reshape(T * N, *rest))
        self.env[n] = _Folded(node, T, N)
        return replace(spec, folded=True)

    def _emit(self, n: Node) -> Node | _Folded:
        handler = self.handlers.get(n.target)
        if handler is None and ops.is_pointwise(n.target):
            handler = self._elementwise
        if handler is not None:
            emitted = handler(n)
            if emitted is not None:
                return emitted
        folded = [a for a in n.all_input_nodes if isinstance(self.env[a], _Folded)]
        if folded and len(shape(folded[0])) > 4:
            self.kept.append(
                f"{where(n) or n.name}: {short(n.target)} mixes time with other dimensions and keeps "
                f"{list(shape(folded[0]))}"
            )
        return self.copy(n, {a: self._plain(a) for a in n.all_input_nodes})

    # Forms of a value

    def _plain(self, n: Node) -> Node:
        """The value in the old graph's own shape."""
        value = self.env[n]
        if isinstance(value, fx.Node):
            return value
        path = where(n)
        if value.static:
            value = self._varying(value, path)
        return self.call(ops.RESHAPE, value.node, list(value.shape), path=path)

    def _varying(self, value: _Folded, path: str) -> _Folded:
        """[TN, ...] with every step written out."""
        if not value.static:
            return value
        node = self.call(aten.cat.default, [value.node] * value.T, 0, path=path)
        return replace(value, node=node, static=False)

    def _fold(self, n: Node) -> _Folded:
        """A value of shape [T, N, ...] in folded form."""
        value = self.env[n]
        if isinstance(value, _Folded):
            return value
        value = self._plain(n)
        T, N, *rest = shape(value)
        return _Folded(self.reshaped(value, (T * N, *rest), where(n)), T, N)

    def _inputs(self, n: Node) -> list[Node | _Folded]:
        return [self.env[a] for a in n.all_input_nodes]

    def _unit(self, n: Node) -> _Folded | None:
        """The first argument, if it is folded."""
        value = self.env.get(n.args[0]) if isinstance(n.args[0], fx.Node) else None
        return value if isinstance(value, _Folded) else None

    def _replace(self, n: Node, value: _Folded, *args: Any, **kwargs: Any) -> _Folded:
        """The operator on the folded node, with these arguments after it."""
        node = self.call(n.target, value.node, *args, path=where(n), **kwargs)
        return replace(value, node=node)

    # One method for each kind of operator; None where time and batch cannot stay folded

    def _reshape(self, n: Node) -> Node | _Folded | None:
        x, target, path = self.env[n.args[0]], shape(n), where(n)
        if isinstance(x, fx.Node):
            source = shape(x)
            if len(target) > 2 and len(source) > 1 and source[0] == target[0] * target[1]:
                T, N, *rest = target
                return _Folded(self.reshaped(x, (T * N, *rest), path), T, N)
            return self.reshaped(x, target, path)
        if target[:2] == (x.T, x.N) and len(target) > 2:
            rows = x.N if x.static else x.T * x.N
            return replace(x, node=self.reshaped(x.node, (rows, *target[2:]), path))
        return self.reshaped(self._varying(x, path).node, target, path)

    def _neuron(self, n: Node) -> _Folded:
        x = self._fold(n.args[0])
        params = [self.env[p] for p in n.args[1]]
        layout = "static" if x.static else "flat"
        spec, index = n.args[2], n.args[5:]
        node = self.instead(n, x.node, params, spec, layout, x.T, *index)
        return _Folded(node, x.T, x.N)

    def _expand(self, n: Node) -> Node | _Folded | None:
        """x, or unsqueeze(x, 0), expanded over a new leading dimension."""
        x = self.env[n.args[0]]
        if isinstance(x, fx.Node) and len(shape(x)) > 1 and shape(n)[1:] == shape(x):
            return _Folded(x, shape(n)[0], shape(x)[0], static=True)
        if isinstance(x, _Folded) and x.T == 1 and shape(n)[1:] == (x.N, *x.rest):
            return _Folded(x.node, shape(n)[0], x.N, static=True)
        return None

    def _unsqueeze(self, n: Node) -> Node | _Folded | None:
        at = ops.dim(n, n.args[1])
        if isinstance(x := self.env[n.args[0]], fx.Node):
            return _Folded(x, 1, shape(x)[0]) if at == 0 and len(shape(x)) > 1 else None
        return self._replace(n, x, at - 1) if at > 1 else None

    def _squeeze(self, n: Node) -> _Folded | None:
        at = ops.dim(n.args[0], n.args[1])
        return None if (x := self._unit(n)) is None or at < 2 else self._replace(n, x, at - 1)

    def _select(self, n: Node) -> Node | _Folded | None:
        if (x := self._unit(n)) is None:
            return None
        at = ops.dim(n.args[0], n.args[1])
        if at == 0:
            t = n.args[2] % x.T
            if x.static:
                return x.node
            return self.call(aten.slice.Tensor, x.node, 0, t * x.N, (t + 1) * x.N, path=where(n))
        return self._replace(n, x, at - 1, n.args[2]) if at > 1 else None

    def _slice(self, n: Node) -> _Folded | None:
        if (x := self._unit(n)) is None:
            return None
        at, start, end, step = ops.slice_args(n, 1)
        at = ops.dim(n.args[0], at)
        if at > 1:
            return self._replace(n, x, at - 1, start, end, step)
        if at == 1 or step != 1:
            return None
        first, last, _ = slice(start, end).indices(x.T)
        if x.static:
            return replace(x, T=last - first)
        node = self.call(aten.slice.Tensor, x.node, 0, first * x.N, last * x.N, path=where(n))
        return _Folded(node, last - first, x.N)

    def _stack(self, n: Node) -> Node | _Folded | None:
        parts = [self.env[p] for p in n.args[0]]
        at = n.args[1] if len(n.args) > 1 else 0
        plain = [p for p in parts if isinstance(p, fx.Node)]
        if at != 0 or len(plain) < len(parts) or len(shape(plain[0])) < 2:
            return None
        node = self.call(aten.cat.default, plain, 0, path=where(n))
        return _Folded(node, len(parts), shape(plain[0])[0])

    def _cat(self, n: Node) -> Node | _Folded | None:
        parts = [self.env[p] for p in n.args[0]]
        if not any(isinstance(p, _Folded) for p in parts):
            return None
        at = ops.dim(n, n.args[1] if len(n.args) > 1 else 0)
        if at == 1:
            return None
        folded = [self._varying(self._fold(p), where(n)) for p in n.args[0]]
        nodes = [p.node for p in folded]
        node = self.call(aten.cat.default, nodes, max(at - 1, 0), path=where(n))
        T = sum(p.T for p in folded) if at == 0 else folded[0].T
        return _Folded(node, T, folded[0].N)

    def _reduce(self, n: Node) -> Node | _Folded | None:
        keep = n.args[2] if len(n.args) > 2 else n.kwargs.get("keepdim", False)
        if (x := self._unit(n)) is None:
            return None
        kwargs = {k: v for k, v in n.kwargs.items() if k != "keepdim"}
        dims = sorted(ops.dim(n.args[0], d) for d in n.args[1] or range(len(x.shape)))
        if min(dims) > 1:
            return self._replace(n, x, [d - 1 for d in dims], keep, **kwargs)
        if dims != [0]:
            return None
        x = self._varying(x, where(n))
        # [T, N * rest] reduces over time where [T, N, ...] has too many dimensions.
        wide = (x.N, *x.rest) if len(x.shape) <= 4 else (x.N * _numel(x.rest),)
        rows = self.reshaped(x.node, (x.T, *wide), where(n))
        node = self.call(n.target, rows, [0], False, path=where(n), **kwargs)
        return self.reshaped(node, shape(n), where(n))

    def _permute(self, n: Node) -> _Folded | None:
        order = ops.permutation(n)
        if (x := self._unit(n)) is None or order[:2] != [0, 1]:
            return None
        return self._replace(n, x, [0, *(d - 1 for d in order[2:])])

    def _transpose(self, n: Node) -> _Folded | None:
        a, b = (ops.dim(n, d) for d in n.args[1:3])
        if (x := self._unit(n)) is None or min(a, b) < 2:
            return None
        return self._replace(n, x, a - 1, b - 1)

    def _along(self, n: Node) -> _Folded | None:
        """Operators with one dimension as their second argument."""
        at = ops.dim(n, n.args[1])
        if (x := self._unit(n)) is None or at < 2:
            return None
        return self._replace(n, x, at - 1, *n.args[2:], **n.kwargs)

    def _trailing(self, n: Node) -> _Folded | None:
        if (x := self._unit(n)) is None:
            return None
        # Of a network without a batch, the second dimension is one of features.
        taken = len(n.args[1]) if n.target is aten.layer_norm.default else 1
        if taken > len(x.rest):
            return None
        weights: Any = self.env.__getitem__
        args: Any = fx.map_arg(n.args[1:], weights)
        return self._replace(n, x, *args, **n.kwargs)

    def _matmul(self, n: Node) -> _Folded | None:
        parts = self._inputs(n)
        if len(parts) != 2 or not isinstance(parts[0], _Folded):
            return None
        left, right = parts
        if not left.rest:
            return None
        if isinstance(right, fx.Node):
            if len(shape(right)) != 2:
                return None
            return replace(left, node=self.call(n.target, left.node, right, path=where(n)))
        if (left.T, left.N, len(left.rest)) != (right.T, right.N, len(right.rest)):
            return None
        if len(left.rest) < 2:  # it sums over the samples
            return None
        left, right = self._varying(left, where(n)), self._varying(right, where(n))
        return replace(left, node=self.call(n.target, left.node, right.node, path=where(n)))

    def _elementwise(self, n: Node) -> _Folded | None:
        folded = [v for v in self._inputs(n) if isinstance(v, _Folded)]
        if not folded:
            return None
        rank = len(shape(n))
        lead = max(folded, key=lambda v: (len(v.shape), v.T * v.N))
        T, N = shape(n)[:2]
        if len(lead.shape) < rank or (lead.T, lead.N) != (T, N):
            return None
        static = all(self._same_each_step(a, rank) for a in n.all_input_nodes)
        env: dict[Node, Node] = {}
        for a in n.all_input_nodes:
            operand = self._operand(a, (T, N), rank, static, where(n))
            if operand is None:
                return None
            env[a] = operand
        return _Folded(self.copy(n, env), T, N, static)

    def _same_each_step(self, n: Node, rank: int) -> bool:
        value = self.env[n]
        if isinstance(value, _Folded):
            return value.static
        return len(shape(value)) < rank or shape(value)[0] == 1

    def _operand(
        self, n: Node, lead: tuple[int, int], rank: int, static: bool, path: str
    ) -> Node | None:
        """One operand, so that it broadcasts against [TN, ...] as it did against [T, N, ...]."""
        T, N = lead
        value = self.env[n]
        if isinstance(value, _Folded):
            if lead != (value.T, value.N) or len(value.shape) < rank:
                return None
            return value.node if static else self._varying(value, path).node
        size = shape(value)
        if len(size) < rank - 1 or (len(size) == rank - 1 and size[0] == 1):
            return value
        if len(size) == rank - 1:
            return value if static else self._varying(_Folded(value, T, N, True), path).node
        if size[:2] == (1, 1):
            return self.reshaped(value, (1, *size[2:]), path)
        if size[0] == 1:
            one = self.reshaped(value, (N, *size[2:]), path)
            return one if static else self._varying(_Folded(one, T, N, True), path).node
        if size[1] == 1:
            # A value a step, the same for the whole batch: written out for each of the N.
            columns = self.reshaped(value, (T, 1, _numel(size[2:])), path)
            sizes = [T, N, _numel(size[2:])]
            value = self.call(aten.expand.default, columns, sizes, path=path)
        return self.reshaped(value, (T * N, *size[2:]), path)


def _numel(sizes: tuple[int, ...]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
