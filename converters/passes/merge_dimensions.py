"""Write operators on tensors of more dimensions than a target takes on tensors of fewer.

A value of too many dimensions is held in whatever shape its user asks for, since dimensions that stand
beside each other in memory are one to an operator that treats them alike:

    elementwise, expand           those along which the same operands vary
    permute                       those that stay together; where they are still too many, two blocks
                                  trade places after another, each time in [before, a, b, after]
    one dimension of its own      [before, it, after] of select, slice, softmax, stack, cat, ...
    mean, sum, max                those that are reduced, and those that are not
    matmul, linear                those before the matrix
    batch norm                    those after the channels
    neurons                       the last ones, as of inputs and outputs

A reshape is no operation then. What mixes dimensions otherwise stays as it is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from .. import ops
from ..builder import Builder, holds_state
from ..ops import Node, aten, shape
from ..program import (
    NEURON,
    NEURON_STEP,
    STATE,
    PassReport,
    Program,
    TensorSpec,
    merged,
    short,
    where,
)


def merge_dimensions(most: int) -> Callable[[Program], Program]:
    """The pass for a target that takes tensors of up to ``most`` dimensions, 4 or more."""

    def merge(program: Program) -> Program:
        return _Merge(program, most).run()

    merge.__name__ = merge_dimensions.__name__  # as its report says
    return merge


class _Merge(Builder):
    def __init__(self, program: Program, most: int) -> None:
        super().__init__(program)
        self.most = most
        # A value of the old graph, in any shape that has its elements in the same order.
        self.env: dict[Node, Node] = {}
        self.path = ""
        #: The shapes of samples of layers whose neurons stand in fewer dimensions now.
        self.samples: dict[str, tuple[int, ...]] = {}
        self.views: dict[tuple[Node, tuple[int, ...]], Node] = {}

    def run(self) -> Program:
        done: list[str] = []
        skipped: list[str] = []
        inputs: list[TensorSpec] = []
        given = iter(self.program.inputs)
        for n in self.program.walk():
            self.path = where(n)
            if n.op == "placeholder":
                inputs.append(self._port(next(given)))
                self.env[n] = self.placeholder(n, n.meta["val"].reshape(inputs[-1].graph_shape))
            elif n.op == "get_attr":
                self.env[n] = self.copy(n, {})
            elif n.op == "call_function":
                made = self._merged(n) if self._is_wide(n) else None
                if self._is_wide(n):
                    size = shape(n.args[0] if n.target is NEURON_STEP else n)
                    report = skipped if made is None else done
                    report.append(f"{short(n.target)} {list(size)} ({self.path})")
                if made is None:
                    held = self.env.__getitem__ if _of_neurons(n) else self._whole
                    made = self.copy(n, {a: held(a) for a in n.all_input_nodes})
                self.env[n] = made
        outputs, results = [], []
        for spec, r in zip(self.program.outputs, self.program.results, strict=True):
            self.path = where(r)
            outputs.append(self._port(spec))
            results.append(self.form(r, outputs[-1].graph_shape))
        passed = PassReport("merge_dimensions", tuple(done), tuple(skipped))
        result = self.finish(results, passed, inputs=tuple(inputs), outputs=tuple(outputs))
        sites = (
            replace(site, sample=self.samples.get(site.name, site.sample)) for site in result.sites
        )
        return replace(result, sites=tuple(sites))

    def _port(self, spec: TensorSpec) -> TensorSpec:
        """An input or output, held in no more dimensions than the target takes."""
        return replace(spec, rank=self.most) if len(spec.graph_shape) > self.most else spec

    def _is_wide(self, n: Node) -> bool:
        if _of_neurons(n):
            return False
        around = n.args[:1] if n.target is NEURON_STEP else (n, *n.all_input_nodes)
        values = [v.meta["val"] for v in around]
        return any(isinstance(v, torch.Tensor) and v.dim() > self.most for v in values)

    def _merged(self, n: Node) -> Node | None:
        rule = _RULES.get(n.target)
        if rule is not None:
            return rule(self, n)
        return self.elementwise(n) if ops.is_pointwise(n.target) else None

    # What the rules are written in

    def _whole(self, n: Node) -> Node:
        """A value in its own shape."""
        held = self.env[n]
        same = not isinstance(n.meta["val"], torch.Tensor) or shape(held) == shape(n)
        return held if same else self.form(n, shape(n))

    def reshaped(self, node: Node, size: Sequence[int], path: str) -> Node:
        """One node for all that ask, so that what every step uses is seen to be the same."""
        key = (node, tuple(size))
        if key not in self.views:
            self.views[key] = super().reshaped(node, size, path)
        return self.views[key]

    def form(self, n: Node, size: Sequence[int]) -> Node:
        """A value of the old graph in another shape."""
        return self.reshaped(self.env[n], size, path=self.path)

    def view(self, node: Node, *size: int) -> Node:
        """A value of the new graph in another shape."""
        return self.reshaped(node, size, path=self.path)

    def emit(self, target: Any, *args: Any) -> Node:
        return self.call(target, *args, path=self.path)

    def again(self, n: Node, /, **changed: Any) -> Node:
        """The operator with some of its arguments, which have names, changed."""
        given = {**ops.arguments(n), **changed}
        own: dict[Node, Node] = {a: self._whole(a) for a in n.all_input_nodes}
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for a in n.target._schema.arguments:
            value: Any = given[a.name]
            if a.name not in changed:
                value = fx.map_arg(value, own.__getitem__)
            if a.kwarg_only:
                kwargs[a.name] = value
            else:
                args.append(value)
        return self.call(n.target, *args, path=self.path, **kwargs)

    def expanded(self, node: Node, size: Sequence[int], wanted: Sequence[int]) -> Node:
        """A value of a shape, held in any, expanded to one of the same rank."""
        size = list(size)
        while size != list(wanted):
            last = max(d for d, s in enumerate(size) if s != wanted[d])
            first = last
            while first and size[first - 1] == 1:
                first -= 1
            before, after = math.prod(size[:first]), math.prod(size[last + 1 :])
            count = math.prod(wanted[first : last + 1])
            row = self.view(node, before, 1, after)
            node = self.emit(aten.expand.default, row, [before, count, after])
            size[first : last + 1] = wanted[first : last + 1]
        return node

    def permuted(self, node: Node, size: Sequence[int], order: Sequence[int]) -> Node:
        """A value of a shape, held in any, with its dimensions in another order."""
        wide = [d for d, s in enumerate(size) if s != 1]
        blocks: list[list[int]] = []
        for d in (d for d in order if size[d] != 1):
            if blocks and wide.index(d) == wide.index(blocks[-1][-1]) + 1:
                blocks[-1].append(d)
            else:
                blocks.append([d])
        count = [math.prod(size[d] for d in block) for block in blocks]
        now = sorted(range(len(blocks)), key=blocks.__getitem__)
        if len(blocks) <= self.most:
            if now == [*range(len(blocks))]:
                return node
            node = self.view(node, *(count[b] for b in now))
            return self.emit(aten.permute.default, node, [now.index(b) for b in range(len(blocks))])
        for at in range(len(blocks)):
            place = now.index(at)
            if place == at:
                continue
            parts = now[:at], now[at:place], [at], now[place + 1 :]
            node = self.view(node, *(math.prod(count[b] for b in part) for part in parts))
            node = self.emit(aten.permute.default, node, [0, 2, 1, 3])
            now = [*parts[0], *parts[2], *parts[1], *parts[3]]
        return node

    def around(self, n: Node, dim: int) -> Node:
        """A value of the old graph as [before, it, after] of a dimension."""
        size = shape(n)
        return self.form(n, [math.prod(size[:dim]), size[dim], math.prod(size[dim + 1 :])])

    # The rules: the value in any shape, or None where the operator has to stay as it is

    def same(self, n: Node) -> Node:
        return self.env[n.args[0]]

    def neurons(self, n: Node) -> Node | None:
        x, params, spec, layout, *rest = n.args
        size = shape(x)
        if layout == "stepped" or len(size) <= self.most:
            return None
        if n.target is NEURON:
            self.samples[self.program.site(n).name] = size[1:]
        own = [self._parameter(p, size[1:]) for p in params]
        return self.instead(n, self.form(x, merged(size, self.most)), own, spec, layout, *rest)

    def step(self, n: Node) -> Node:
        x, before, params, *rest = n.args
        size = shape(x)
        for spikes in (u for u in n.users if rest[1] == 0 and u.args[1] == 0):
            self.samples[self.program.site(spikes).name] = size[1:]
        own = [self._parameter(p, size[1:]) for p in params]
        held = merged(size, self.most)
        state = self.form(before, [shape(before)[0], *held])
        return self.instead(n, self.form(x, held), state, own, *rest)

    def _parameter(self, p: Node, sample: tuple[int, ...]) -> Node:
        """What is broadcast over a sample, over one whose last dimensions are one."""
        value = self.program.tensor(str(p.target))
        value = value.reshape([1] * (len(sample) - value.dim()) + [*value.shape])
        last = self.most - 2
        if math.prod(value.shape[last:]) > 1:
            value = value.expand(*value.shape[:last], *sample[last:])
        return self.constant(f"{p.target}_merged", value.flatten(last))

    def elementwise(self, n: Node) -> Node:
        size = shape(n)
        padded = {a: [1] * (len(size) - len(shape(a))) + [*shape(a)] for a in n.all_input_nodes}
        held = {a: self.env[a] for a in padded}
        while len(spans := _spans(self._varies(padded, size), size)) > self.most:
            left = {
                a: len(_spans(self._varies({**padded, a: [*size]}, size), size))
                for a in padded
                if padded[a] != [*size]
            }
            a = min(left, key=left.__getitem__)
            held[a] = self.expanded(held[a], padded[a], size)
            padded[a] = [*size]
        operands = {
            a: self.view(node, *(math.prod(padded[a][d] for d in dims) for _, dims in spans))
            for (a, node) in held.items()
        }
        return self.copy(n, operands)

    @staticmethod
    def _varies(padded: dict[Node, list[int]], size: Sequence[int]) -> list[Hashable]:
        """For each dimension, which operands have it."""
        return [tuple(own[d] == s for own in padded.values()) for d, s in enumerate(size)]

    def permute(self, n: Node) -> Node:
        x = n.args[0]
        return self.permuted(self.env[x], shape(x), ops.permutation(n))

    def expand(self, n: Node) -> Node:
        x, size = n.args[0], shape(n)
        return self.expanded(self.env[x], [1] * (len(size) - len(shape(x))) + [*shape(x)], size)

    def repeat(self, n: Node) -> Node:
        x, times = n.args[0], n.args[1]
        own = [1] * (len(times) - len(shape(x))) + [*shape(x)]
        # [2, 3] repeated is [1, 2, 1, 3] expanded.
        each = [s for size in own for s in (1, size)]
        wanted = [s for pair in zip(times, own, strict=True) for s in pair]
        return self.expanded(self.env[x], each, wanted)

    def along(self, n: Node) -> Node | None:
        given = ops.arguments(n)
        name = next(iter(given))
        if given["dim"] is None:
            return None
        x = given[name]
        at = ops.dim(x, given["dim"])
        return self.again(n, **{name: self.around(x, at), "dim": 1})

    def stack(self, n: Node) -> Node:
        given = ops.arguments(n)
        at, size = ops.dim(n, given["dim"]), shape(n)
        row = [math.prod(size[:at]), 1, math.prod(size[at + 1 :])]
        return self.emit(aten.cat.default, [self.form(p, row) for p in given["tensors"]], 1)

    def cat(self, n: Node) -> Node:
        given = ops.arguments(n)
        at = ops.dim(n, given["dim"])
        return self.emit(aten.cat.default, [self.around(p, at) for p in given["tensors"]], 1)

    def reduce(self, n: Node) -> Node:
        given = ops.arguments(n)
        x = given["self"]
        size = shape(x)
        dims = {ops.dim(x, d) for d in given.get("dim") or range(len(size))}
        node = self.env[x]
        spans = [
            (taken, math.prod(size[d] for d in at))
            for taken, at in _spans([d in dims for d in range(len(size))], size)
        ]
        if len(spans) > self.most:
            kept = [d for d in range(len(size)) if d not in dims]
            node = self.permuted(node, size, [*kept, *sorted(dims)])
            count = math.prod(size[d] for d in kept)
            spans = [(False, count), (True, math.prod(size) // count)]
        if not any(taken for taken, _ in spans):
            spans.append((True, 1))
        node = self.view(node, *(count for _, count in spans))
        if "dim" not in given:
            return self.again(n, self=node)
        places = [place for place, (taken, _) in enumerate(spans) if taken]
        return self.again(n, self=node, dim=places, keepdim=False)

    def rows(self, n: Node) -> Node | None:
        given = ops.arguments(n)
        kept = len(given.get("normalized_shape", "1"))
        size = shape(given["input"])
        if kept >= self.most:
            return None
        node = self.form(given["input"], [math.prod(size[:-kept]), *size[-kept:]])
        return self.again(n, input=node)

    def matmul(self, n: Node) -> Node | None:
        a, b = n.args
        if min(len(shape(a)), len(shape(b))) < 2:
            return None
        *batch, rows, columns = shape(n)
        inner = shape(a)[-1]
        if len(shape(b)) == 2:
            node = self.form(a, [math.prod(batch) * rows, inner])
            return self.emit(aten.matmul.default, node, self.env[b])
        sides = []
        for side, matrix in ((a, [rows, inner]), (b, [inner, columns])):
            own = [1] * (len(batch) + 2 - len(shape(side))) + [*shape(side)]
            whole = self.expanded(self.env[side], own, [*batch, *matrix])
            sides.append(self.view(whole, math.prod(batch), *matrix))
        return self.emit(aten.matmul.default, *sides)

    def batch_norm(self, n: Node) -> Node:
        x = n.args[0]
        N, C, first, *rest = shape(x)
        return self.again(n, input=self.form(x, [N, C, first, math.prod(rest)]))


def _of_neurons(n: Node) -> bool:
    """Whether a value is what a step of neurons gives, or their state, which lowering takes away."""
    given = n.args[0] if n.target is operator.getitem else None
    return holds_state(n) or (isinstance(given, fx.Node) and given.target is NEURON_STEP)


def _spans(marks: Sequence[Hashable], size: Sequence[int]) -> list[tuple[Hashable, list[int]]]:
    """Dimensions beside each other with the same mark; those of size 1 go with any."""
    spans: list[tuple[Hashable, list[int]]] = []
    for d, mark in enumerate(marks):
        if size[d] == 1:
            continue
        if spans and spans[-1][0] == mark:
            spans[-1][1].append(d)
        else:
            spans.append((mark, [d]))
    return spans or [(None, [])]


_RULES: dict[Any, Callable[[_Merge, Node], Node | None]] = {
    **dict.fromkeys(
        (ops.RESHAPE, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims), _Merge.same
    ),
    **dict.fromkeys((aten.permute.default, aten.transpose.int), _Merge.permute),
    **dict.fromkeys(
        (
            aten.select.int,
            aten.slice.Tensor,
            aten.index_select.default,
            aten.softmax.int,
            aten._softmax.default,
            aten.log_softmax.int,
            aten.cumsum.default,
            aten.argmax.default,
        ),
        _Merge.along,
    ),
    **dict.fromkeys(
        (
            aten.mean.dim,
            aten.mean.default,
            aten.sum.dim_IntList,
            aten.sum.default,
            aten.amax.default,
            aten.amin.default,
        ),
        _Merge.reduce,
    ),
    **dict.fromkeys(ops.TRAILING, _Merge.rows),
    **dict.fromkeys((NEURON, STATE), _Merge.neurons),
    NEURON_STEP: _Merge.step,
    aten.expand.default: _Merge.expand,
    aten.repeat.default: _Merge.repeat,
    aten.stack.default: _Merge.stack,
    aten.cat.default: _Merge.cat,
    aten.matmul.default: _Merge.matmul,
    aten.batch_norm.default: _Merge.batch_norm,
}
