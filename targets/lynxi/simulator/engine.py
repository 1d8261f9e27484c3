"""Runs a compiled graph: the plain way, and the fast way with the same bits.

The plain way is the definition: every node in float32, its result rounded to the storage type.
The fast way keeps values in the storage type (float16 kernels of torch round sums and products
of float16 numbers correctly), keeps truth values as 0 and 1 of that type (torch's own ``where``
on ``bool`` is thirty times slower than the bit operations below), keeps channels innermost
through elementwise regions, and prepares weights once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import accumulate, aten
from .graph import CONST, FOREIGN, INPUT, Graph, Node, torch_type
from .ops import OPS, channels_last, conv_into, conv_shape, torch_conv
from .options import Options

Step = Callable[[list[Tensor]], Tensor]

_COMPARE = {
    "eq": torch.eq,
    "ne": torch.ne,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
}
_BITS = {torch.float16: (torch.int16, 15), torch.float32: (torch.int32, 31)}


def run_foreign(node: Node, args: Sequence[Tensor]) -> Tensor:
    """Run an operation of the framework itself, in the CPU part of a hybrid build."""

    def fill(value: object) -> object:
        if isinstance(value, list):
            return [fill(v) for v in value]
        return args[value["ref"]] if isinstance(value, dict) else value

    given = [fill(a) for a in node.attrs["args"]]
    overload, keywords = node.attrs["overload"], node.attrs["keywords"]
    result = aten.call(node.op.removeprefix("aten::"), overload, keywords, given)
    picked = result if isinstance(result, Tensor) else result[node.attrs["index"]]
    assert isinstance(picked, Tensor)
    return picked


def _define(node: Node, args: Sequence[Tensor], options: Options) -> Tensor:
    """The definition of a node on float32 tensors, before its result is rounded."""
    if node.op.startswith(FOREIGN):
        return run_foreign(node, args)
    op = OPS[node.op]
    if op.reduces and options.accumulate == "float16" and not node.on_cpu:
        return accumulate.run(node.op, args, node.attrs)
    if node.op == "conv" and options.storage == "float32":
        return torch_conv(args, node.attrs)
    return op.run(args, node.attrs)


class Engine:
    """A graph ready to run.

    Args:
        graph: The compiled graph.
        params: Constants by name.
        options: How to round, and whether to run fast.
    """

    def __init__(self, graph: Graph, params: dict[str, Tensor], options: Options) -> None:
        self.graph = graph
        self.options = options
        self.storage = torch.float16 if options.storage == "float16" else torch.float32
        self._params = params
        self._last = [-1] * len(graph.nodes)
        for i, node in enumerate(graph.nodes):
            for j in node.inputs:
                self._last[j] = i
        for port in graph.outputs:
            self._last[port.value] = len(graph.nodes)
        self._frees = [
            [j for j in set(node.inputs) if self._last[j] == i and not self._is_const(j)]
            for i, node in enumerate(graph.nodes)
        ]
        self._constants = {
            i: self._stored(params[node.attrs["name"]], node)
            for i, node in enumerate(graph.nodes)
            if node.op == CONST
        }
        self._steps = {
            i: self._prepare(i, node)
            for i, node in enumerate(graph.nodes)
            if node.op not in (CONST, INPUT)
        }

    def _is_const(self, i: int) -> bool:
        return self.graph.nodes[i].op == CONST

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Compute the outputs.

        Args:
            inputs: One tensor for each input port, of its shape, any type.

        Returns:
            One tensor for each output port, of its shape and type; new memory each time.
        """
        with torch.no_grad():
            run = self._run_fast if self.options.optimise else self._run_plain
            results = run(inputs)
            return [
                r.to(getattr(torch, port.dtype), copy=True, memory_format=torch.contiguous_format)
                for r, port in zip(results, self.graph.outputs, strict=True)
            ]

    def _apart(self, node: Node) -> bool:
        """Whether a node computes in float32 on the CPU beside a float16 chip."""
        return node.on_cpu and self.storage is torch.float16

    # The plain way.

    def _round(self, x: Tensor, node: Node) -> Tensor:
        if not x.is_floating_point():
            return x
        return x.float() if self._apart(node) else x.to(self.storage).float()

    def _run_plain(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        values: list[Tensor] = []
        given = iter(inputs)
        for node in self.graph.nodes:
            if node.op == INPUT:
                result = next(given).to(torch_type(node.dtype))
            elif node.op == CONST:
                result = self._params[node.attrs["name"]].to(torch_type(node.dtype))
            else:
                args = [self._round(values[i], node) for i in node.inputs]
                result = _define(node, args, self.options)
            values.append(self._round(result, node))
        return [values[port.value] for port in self.graph.outputs]

    # The fast way.

    def _stored(self, x: Tensor, node: Node) -> Tensor:
        """A value as the fast way keeps it."""
        if self._apart(node) and x.is_floating_point():
            return x.float()
        return x.to(self.storage) if x.is_floating_point() or x.dtype == torch.bool else x

    def _run_fast(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        values: list[Tensor | None] = [None] * len(self.graph.nodes)
        for i, constant in self._constants.items():
            values[i] = constant
        for port, given in zip(self.graph.inputs, inputs, strict=True):
            node = self.graph.nodes[port.value]
            values[port.value] = self._stored(given.to(torch_type(node.dtype)), node)
        for i, step in self._steps.items():
            args = [v for v in (values[j] for j in self.graph.nodes[i].inputs) if v is not None]
            values[i] = step(args)
            for j in self._frees[i]:
                values[j] = None
        return [v for v in (values[port.value] for port in self.graph.outputs) if v is not None]

    def _prepare(self, i: int, node: Node) -> Step:
        """How the fast way computes a node."""
        kinds = [self.graph.nodes[j].dtype for j in node.inputs]
        step: Step
        narrow = self.options.accumulate == "float16"
        if self._apart(node) or node.op.startswith(FOREIGN) or (narrow and OPS[node.op].reduces):
            step = self._wide(node, kinds)
        else:
            step = self._special(node, kinds) or self._ordinary(node, kinds)
        from_cpu = [
            self._apart(self.graph.nodes[j]) and k == "float"
            for j, k in zip(node.inputs, kinds, strict=True)
        ]
        if self._apart(node) or not any(from_cpu):
            return step
        return lambda args: step(
            [a.to(self.storage) if c else a for a, c in zip(args, from_cpu, strict=True)]
        )

    def _wide(self, node: Node, kinds: Sequence[str]) -> Step:
        """By the definition: in float32 with true truth values, rounded once."""

        def step(args: list[Tensor]) -> Tensor:
            given = [
                a.bool() if k == "bool" else a.float() if k == "float" else a
                for a, k in zip(args, kinds, strict=True)
            ]
            return self._stored(_define(node, given, self.options), node)

        return step

    def _ordinary(self, node: Node, kinds: Sequence[str]) -> Step:
        """On stored values where that gives the same bits, else by the definition."""
        op = OPS[node.op]
        # Of integers torch makes no float16, or rounds them before it computes.
        whole = node.dtype == "float" and not set(kinds) <= {"float", "bool"}
        if whole and node.op not in ("take", "gather"):
            return self._wide(node, kinds)
        if not op.exact or ("bool" in kinds and not self._takes_masks(node, kinds)):
            return self._wide(node, kinds)
        run, attrs = op.run, node.attrs
        return lambda args: run(args, attrs)

    def _takes_masks(self, node: Node, kinds: Sequence[str]) -> bool:
        if not OPS[node.op].mask or not set(kinds) <= {"bool", "float"}:
            return False
        # Arithmetic of two truth values is not arithmetic of numbers.
        return node.dtype == "float" or node.op not in ("add", "sub", "mul", "div", "cast")

    def _special(self, node: Node, kinds: Sequence[str]) -> Step | None:
        storage = self.storage
        if node.op in _COMPARE and set(kinds) <= {"bool", "float"}:
            compare = _COMPARE[node.op]
            return lambda args: compare(*args, out=_like(args, storage))
        if node.op in _COMPARE:
            return self._wide(node, kinds)
        if node.op == "where" and kinds[0] == "bool" and set(kinds[1:]) == {"float"}:
            return self._select(node)
        if node.op == "cast" and kinds == ["bool"] and node.dtype == "float":
            return lambda args: args[0]
        if node.op == "cast" and (kinds[0] == "bool" or node.dtype == "bool"):
            return self._wide(node, kinds)
        if node.op == "conv" and len(node.shape) == 4 and storage is torch.float16:
            return self._convolution(node)
        if node.op == "dense":
            weights = [self._wide_constant(j) for j in node.inputs[1:]]

            def dense(args: list[Tensor]) -> Tensor:
                given = [
                    w if w is not None else a.float()
                    for w, a in zip(weights, args[1:], strict=True)
                ]
                return F.linear(args[0].float().contiguous(), *given).to(storage)

            return dense
        return None

    def _wide_constant(self, i: int) -> Tensor | None:
        return self._constants[i].float() if i in self._constants else None

    def _convolution(self, node: Node) -> Step:
        attrs, storage = node.attrs, self.storage
        weights = [self._wide_constant(j) for j in node.inputs[1:]]
        kernel = None if weights[0] is None else channels_last(weights[0])

        def convolution(args: list[Tensor]) -> Tensor:
            w = channels_last(args[1]) if kernel is None else kernel
            bias = None
            if len(args) > 2:
                bias = weights[1] if weights[1] is not None else args[2].float()
            shape = conv_shape(args[0], w, attrs)
            out = torch.empty(shape, dtype=storage, memory_format=torch.channels_last)
            return conv_into(out, args[0], w, bias, attrs)

        return convolution

    def _select(self, node: Node) -> Step:
        """``where`` by bits: ``no ^ ((yes ^ no) & mask)``, mask all ones where true."""
        integer, top = _BITS[self.storage]
        constant = self.graph.nodes[node.inputs[1]]
        zero = (
            constant.op == CONST
            and not constant.shape
            and self._constants[node.inputs[1]].view(integer).item() == 0
        )

        def select(args: list[Tensor]) -> Tensor:
            condition, yes, no = (a.view(integer) for a in args)
            # 1.0 is a positive integer and 0.0 is 0: minus one, the top bit tells them apart.
            unchosen = torch.sub(condition, 1)
            unchosen.bitwise_right_shift_(top)
            if zero:
                result = unchosen.bitwise_and_(no) if unchosen.shape == no.shape else unchosen & no
            else:
                result = yes ^ ((yes ^ no) & unchosen)
            return result.view(self.storage)

        return select


def _like(args: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Memory for an elementwise result, in the layout of the largest operand."""
    first = max(args, key=torch.Tensor.numel)
    shape = np.broadcast_shapes(*(a.shape for a in args))
    if first.shape == shape:
        return torch.empty_like(first, dtype=dtype)
    return torch.empty(shape, dtype=dtype)
