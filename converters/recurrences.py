"""Recurrent layers of torch, step by step in operators that targets have.

    LSTM    c' = f c + i g, h' = o tanh(c')                     i, f, o = sigmoid, g = tanh
    GRU     h' = (1 - z) n + z h, n = tanh(u + r (W h + b))     r, z = sigmoid
    RNN     h' = tanh or relu

of W x + b + V h + d each, as the documentation of ``torch.nn`` has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .builder import Builder
from .ops import Node, aten, shape


def recurrent(build: Builder, n: Node, args: Sequence[Any], path: str) -> list[Node] | None:
    """The results of a recurrent layer: its outputs, then its last states; None if it is another.

    Args:
        build: Where it is emitted.
        n: The operator.
        args: Its arguments in the new graph, as its schema has them.
        path: Of its module.
    """
    kind = _KINDS.get(n.target)
    x, hx, params, biases, layers, dropout, training, both, batch_first = args
    states = hx if isinstance(hx, (list, tuple)) else [hx]
    each = 4 if biases else 2
    directions = 2 if both else 1
    projects = len(params) != each * layers * directions
    if kind is None or (dropout and training) or projects or len(shape(x)) != 3:
        return None
    at = 1 if batch_first else 0
    ends: list[list[Node]] = []
    for layer in range(layers):
        sides = []
        for direction in range(directions):
            place = layer * directions + direction
            weights = params[place * each : (place + 1) * each]
            cell = _Cell(build, kind, weights if biases else (*weights, None, None), path)
            start = [cell.emit(aten.select.int, s, 0, place) for s in states]
            outputs, end = cell.run(x, at, start, reverse=direction == 1)
            sides.append(outputs)
            ends.append(end)
        x = sides[0] if len(sides) == 1 else build.call(aten.cat.default, sides, 2, path=path)
    last = [build.call(aten.stack.default, list(s), 0, path=path) for s in zip(*ends, strict=True)]
    return [x, *last]


@dataclass(frozen=True)
class _Cell:
    """One direction of one layer.

    Attributes:
        build: Where it is emitted.
        kind: One step: the cell, W x + b, V h + d and the states before give those after.
        weights: W, V, b and d.
        path: Of the module.
    """

    build: Builder
    kind: Callable[..., list[Node]]
    weights: Sequence[Any]
    path: str

    def emit(self, target: Any, *args: Any) -> Node:
        return self.build.call(target, *args, path=self.path)

    def run(self, x: Node, at: int, start: list[Node], reverse: bool) -> tuple[Node, list[Node]]:
        """All steps of x, whose dimension ``at`` is time: the outputs, the last states."""
        W, V, b, d = self.weights
        driven = self.emit(aten.linear.default, x, W, b)
        states, outputs = start, []
        times = range(shape(x)[at])
        for t in reversed(times) if reverse else times:
            now = self.emit(aten.select.int, driven, at, t)
            states = self.kind(self, now, self.emit(aten.linear.default, states[0], V, d), *states)
            outputs.append(states[0])
        return self.emit(aten.stack.default, outputs[::-1] if reverse else outputs, at), states

    def gates(self, x: Node, count: int) -> list[Node]:
        """[N, count H] in its parts."""
        size = shape(x)[-1] // count
        return [self.emit(aten.slice.Tensor, x, 1, i * size, (i + 1) * size) for i in range(count)]

    def lstm(self, x: Node, back: Node, _: Node, c: Node) -> list[Node]:
        i, f, g, o = self.gates(self.emit(aten.add.Tensor, x, back), 4)
        i, f, o = (self.emit(aten.sigmoid.default, gate) for gate in (i, f, o))
        new = self.emit(aten.mul.Tensor, i, self.emit(aten.tanh.default, g))
        c = self.emit(aten.add.Tensor, self.emit(aten.mul.Tensor, f, c), new)
        return [self.emit(aten.mul.Tensor, o, self.emit(aten.tanh.default, c)), c]

    def gru(self, x: Node, back: Node, h: Node) -> list[Node]:
        (r, z, n), (back_r, back_z, back_n) = self.gates(x, 3), self.gates(back, 3)
        r = self.emit(aten.sigmoid.default, self.emit(aten.add.Tensor, r, back_r))
        z = self.emit(aten.sigmoid.default, self.emit(aten.add.Tensor, z, back_z))
        n = self.emit(aten.add.Tensor, n, self.emit(aten.mul.Tensor, r, back_n))
        n = self.emit(aten.tanh.default, n)
        kept = self.emit(aten.mul.Tensor, z, self.emit(aten.sub.Tensor, h, n))
        return [self.emit(aten.add.Tensor, n, kept)]

    def tanh(self, x: Node, back: Node, _: Node) -> list[Node]:
        return [self.emit(aten.tanh.default, self.emit(aten.add.Tensor, x, back))]

    def relu(self, x: Node, back: Node, _: Node) -> list[Node]:
        return [self.emit(aten.relu.default, self.emit(aten.add.Tensor, x, back))]


_KINDS: dict[Any, Callable[..., list[Node]]] = {
    aten.lstm.input: _Cell.lstm,
    aten.gru.input: _Cell.gru,
    aten.rnn_tanh.input: _Cell.tanh,
    aten.rnn_relu.input: _Cell.relu,
}

#: The layers that are known.
RECURRENT = frozenset(_KINDS)
