"""What ``torch.export`` gives, with one spelling for what ATen spells in several ways."""

from __future__ import annotations

import json
import operator
from collections.abc import Sequence
from functools import reduce
from itertools import chain
from typing import Any

import torch
from torch import fx, nn

from . import ops, sources
from .builder import Builder, seal
from .equations import SPIKES, named
from .errors import CaptureError, Finding, UsageError
from .exported import HEADLINE, idle, live, path_of
from .moves import moved, pieces
from .neuron_ops import path_and_spec
from .neurons import Neuron
from .ops import Node, aten, shape
from .program import NEURON, NEURON_STEP, STATE, PassReport, Program, TensorSpec, short
from .returned import nesting, refused

#: Copies, which may lie otherwise in memory.
_COPIES = frozenset({aten.clone.default, aten.contiguous.default})
_PASS_THROUGH = _COPIES | {
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
}
#: What writes its second argument into its first, whose type stays.
_WRITES = frozenset(
    {
        aten.fill.Tensor,
        aten.copy.default,
        aten.select_scatter.default,
        aten.slice_scatter.default,
    }
)
#: Where the operators of neurons have their declaration.
_NEURONS = {NEURON: 2, STATE: 2, NEURON_STEP: 3}
_CHECKS = frozenset({"_assert_tensor_metadata", "_assert_scalar", "_assert_async"})


def to_program(
    exported: Any, net: nn.Module, args: Sequence[torch.Tensor], layouts: bool = False
) -> Program:
    """The exported graph as a program.

    Args:
        exported: What ``torch.export`` gave.
        net: The network.
        args: The example inputs.
        layouts: Whether copies stay that lie in the order of their dimensions and their originals do not.

    Raises:
        UsageError: The network returns something else than tensors and None.
    """
    signature = exported.graph_signature
    attributes = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    values = {**dict(exported.state_dict), **exported.constants}
    specs = []
    empty = Program(fx.GraphModule({}, fx.Graph()), (), (), exported.call_spec.out_spec)
    build = _Canonical(empty, net, layouts)
    used = live(exported.graph)
    placeholders = exported.graph.find_nodes(op="placeholder")
    held = [n for n in placeholders if n.name in attributes]
    given = [n for n in placeholders if n.name not in attributes]
    for n in held:
        name = attributes[n.name]
        build.env[n] = build.constant(name, values[name].detach())
    floating = _floating(args, [values[attributes[n.name]] for n in held if n in used])
    for n, x in zip(given, args, strict=True):
        wide = x.to(floating) if x.is_floating_point() else x
        build.env[n] = build.placeholder(n, wide)
        specs.append(TensorSpec(n.name, tuple(x.shape), x.dtype))
    for n, x in zip(given, args, strict=True):
        if x.is_floating_point() and x.dtype != floating:
            build.env[n] = build.call(aten._to_copy.default, build.env[n], path="", dtype=x.dtype)
    for n in exported.graph.nodes:
        if n.op == "call_function" and n in used:
            build.emit(n)
    if build.findings:
        raise CaptureError(HEADLINE, build.findings)
    results = exported.graph.output_node().args[0]
    out_spec = exported.call_spec.out_spec
    if (reason := refused(out_spec, results)) is not None:
        raise UsageError(reason)
    structure = nesting(out_spec, results)
    results = [r for r in results if isinstance(r, fx.Node)]
    outputs = []
    for i, result in enumerate(results):
        value = build.env[result].meta["val"]
        name = "output" if len(results) == 1 else f"output_{i}"
        outputs.append(TensorSpec(name, tuple(value.shape), value.dtype))
    kind = type(net)
    build.graph.output(tuple(build.env[r] for r in results))
    report = PassReport("capture", (f"{kind.__qualname__} through torch.export",))
    return seal(
        empty,
        build.graph,
        build.tensors,
        report,
        inputs=tuple(specs),
        outputs=tuple(outputs),
        structure=structure,
        dtype=floating,
        source={
            "class": f"{kind.__module__}.{kind.__qualname__}",
            "framework": sources.framework(net),
        },
    )


def _floating(inputs: Sequence[torch.Tensor], held: Sequence[torch.Tensor]) -> torch.dtype:
    """The type in which all inputs come: every number of theirs has its place in it."""
    kinds = [[x.dtype for x in some if x.is_floating_point()] for some in (inputs, held)]
    widest = reduce(torch.promote_types, kinds[0]) if kinds[0] else None
    if widest in (torch.float32, torch.float64):
        return widest
    return reduce(torch.promote_types, chain(*kinds)) if any(kinds) else torch.float32


class _Canonical(Builder):
    """Copies exported nodes, with one spelling for what ATen spells in several ways."""

    def __init__(self, program: Program, net: nn.Module, layouts: bool) -> None:
        super().__init__(program)
        self._layouts = layouts
        self._modules = dict(net.named_modules(remove_duplicate=False))
        self.env: dict[fx.Node, Any] = {}
        self.findings: list[Finding] = []
        # The steps of neurons that a later one has gone on from.
        self.handed: set[Node] = set()
        # What was put together as a stack, which may go on: the rows, by dimension.
        self.rows: dict[tuple[fx.Node, int], list[fx.Node]] = {}

    def emit(self, n: fx.Node) -> None:
        target: Any = n.target
        given: Any = fx.map_arg((n.args, n.kwargs), self.env.__getitem__)
        args, kwargs = given
        path = path_of(n)
        if target in _NEURONS:
            at = _NEURONS[target]
            own, spec = path_and_spec(args[at])
            # One module may have several paths; that of the call is known unless torch has lost it.
            path = path if self._modules.get(path) is self._modules[own] else own
            args = (*args[:at], spec, *args[at + 1 :])
        if getattr(target, "_opname", "") in _CHECKS:
            return
        if target is operator.getitem and isinstance(args[0], list):
            self.env[n] = args[0][args[1]]
            return
        if target is operator.getitem and isinstance(args[0], fx.Node):
            if not isinstance(args[0].meta["val"], (tuple, list)) and args[1] == 0:
                self.env[n] = args[0]
                return
        elif self._layouts and target in _COPIES and _moved_in_memory(n):
            form = torch.contiguous_format
            self.env[n] = self.call(aten.clone.default, args[0], path=path, memory_format=form)
            return
        elif (
            target in _PASS_THROUGH
            or idle(n)
            or (target is aten._to_copy.default and _same(args[0], kwargs))
            # x[:, :, 1:] comes with a slice for each dimension that it leaves whole.
            or (target is aten.slice.Tensor and n.meta["val"].shape == shape(args[0]))
        ):
            self.env[n] = args[0]
            return
        if target in _PARTS:
            self.env[n] = self._parts(n, args[0], path)
            return
        if target is aten.select.int and (part := self._put_together(args, path)) is not None:
            self.env[n] = part
            return
        if (value := _made(n, args, kwargs)) is not None:
            self.env[n] = self.constant(f"made_{n.name}", value)
            return
        if (made := moved(self, n, args, path)) is not None:
            self.env[n] = made
            return
        if target is NEURON_STEP:
            args = self._in_its_place(args, path)
        self.env[n] = self._spelled(target, args, kwargs, path, n)
        if target is NEURON_STEP and all(u.args[1] != 0 for u in n.users):
            # Spikes that nothing uses are a step of the layer all the same.
            self.call(operator.getitem, self.env[n], 0, path=path)

    def _spelled(self, target: Any, args: Any, kwargs: Any, path: str, n: fx.Node) -> fx.Node:
        if target in _POOLS and len(shape(args[0])) == 1 + _POOLS[target]:
            # Without a batch; each row is pooled alone all the same.
            rows = self.call(aten.unsqueeze.default, args[0], 1, path=path)
            pooled = self._spelled(target, (rows, *args[1:]), kwargs, path, n)
            return self.call(aten.squeeze.dim, pooled, 1, path=path)
        if target in (aten._unsafe_view.default, aten.reshape.default, aten.view.default):
            return self.call(aten.reshape.default, args[0], list(n.meta["val"].shape), path=path)
        if target is aten.expand.default:
            return self.call(target, args[0], list(n.meta["val"].shape), path=path)
        if target is aten._native_batch_norm_legit_no_training.default:
            x, weight, bias, mean, var, momentum, eps = args
            return self.call(
                aten.batch_norm.default,
                x,
                weight,
                bias,
                mean,
                var,
                False,
                momentum,
                eps,
                False,
                path=path,
            )
        if target in _WITH_INDICES and _only_first(n):
            return self._spelled(_WITH_INDICES[target], args, kwargs, path, n)
        if target in _PADDED:
            return self._padded(n, target, args, kwargs, path)
        if target is aten.avg_pool1d.default:
            return self._average_pool(args, kwargs, path)
        if target is aten.max.dim and _only_first(n):
            return self.call(aten.amax.default, args[0], [args[1]], *args[2:], path=path)
        if target in _ADAPTIVE_MAX and _only_first(n):
            return self._adaptive_max(n, args[0], path)
        if target is aten.max.default:
            return self.call(aten.amax.default, args[0], [*range(len(shape(args[0])))], path=path)
        if target is aten._prelu_kernel.default:
            x, weight = args
            positive = self.call(aten.gt.Scalar, x, 0, path=path)
            scaled = self.call(aten.mul.Tensor, weight, x, path=path)
            return self.call(aten.where.self, positive, x, scaled, path=path)
        if target is aten.squeeze.dim:
            less: fx.Node = self._squeezed(args[0], ops.dim(args[0], args[1]), path)
            return less
        if target in _BITS:
            truths = all(isinstance(a, fx.Node) and a.meta["val"].dtype == torch.bool for a in args)
            bits, logic = _BITS[target]
            return self.call(
                logic if truths else bits, *args, path=path, **({} if truths else kwargs)
            )
        if target is aten._to_copy.default:
            # Where the values lie, and whether to wait for them, is not the program's.
            return self.call(target, *args, path=path, dtype=kwargs["dtype"])
        if target is aten.cat.default:
            return self._joined(n, args, path)
        if target in _MATMULS:
            return self.call(aten.matmul.default, *args, path=path)
        if target is aten.div.Tensor_mode:
            return self._quotient(n, args, kwargs["rounding_mode"], path)
        if target in _ANY:
            return self._any(n, args[0], path)
        if target is aten.t.default:
            if len(shape(args[0])) < 2:
                return args[0]  # type: ignore[no-any-return]
            return self.call(aten.transpose.int, args[0], 0, 1, path=path)
        if target in _WRITES:
            args = (args[0], self._written(args[1], args[0], path), *args[2:])
        if target in (aten.fill.Tensor, aten.copy.default):
            like, value = args[0].meta["val"], args[1]
            if shape(value) == like.shape:
                return value  # type: ignore[no-any-return]
            return self.call(aten.expand.default, value, list(like.shape), path=path)
        if target is aten.select_scatter.default:
            base, source, dim, index = args
            row = self.call(aten.unsqueeze.default, source, dim, path=path)
            index %= base.meta["val"].shape[dim]
            return self._scatter(base, row, dim, index, index + 1, path)
        if target is aten.slice_scatter.default:
            base, source, *_ = args
            dim, start, end, step = ops.slice_args(n, 2)
            size = base.meta["val"].shape[dim]
            if step == 1:
                return self._scatter(base, source, dim, *slice(start, end).indices(size)[:2], path)
        return self.call(target, *args, path=path, **kwargs)

    def _written(self, value: fx.Node, base: fx.Node, path: str) -> fx.Node:
        """What is written into a tensor, which keeps its type."""
        dtype = base.meta["val"].dtype
        if value.meta["val"].dtype == dtype:
            return value
        return self.call(aten._to_copy.default, value, path=path, dtype=dtype)

    def _quotient(self, n: fx.Node, args: Any, rounding: str | None, path: str) -> fx.Node:
        """A quotient towards a whole number; floor division is not the floor of the rounded quotient."""
        if rounding == "floor":
            return self.call(aten.floor_divide.default, *args, path=path)
        if rounding == "trunc" and not n.meta["val"].is_floating_point():
            return self.call(n.target, *args, path=path, rounding_mode=rounding)
        quotient = self.call(aten.div.Tensor, *args, path=path)
        return quotient if rounding is None else self.call(aten.trunc.default, quotient, path=path)

    def _any(self, n: fx.Node, x: fx.Node, path: str) -> fx.Node:
        """Whether any is true, as the largest of them is."""
        dims, keep = (*n.args[1:], None, False)[:2]
        dims = [dims] if isinstance(dims, int) else dims or [*range(len(shape(x)))]
        if x.meta["val"].dtype != torch.bool:
            x = self.call(aten.ne.Scalar, x, 0, path=path)
        ones = self.call(aten._to_copy.default, x, path=path, dtype=torch.float32)
        largest = self.call(aten.amax.default, ones, dims, keep, path=path)
        return self.call(aten.gt.Scalar, largest, 0, path=path)

    def _squeezed(self, x: Node, dim: int, path: str) -> Node:
        """x without a dimension of 1, which what comes before need not have either."""
        if shape(x)[dim] != 1:
            return x
        if x.target in (aten.permute.default, aten.transpose.int):
            order = ops.permutation(x)
            gone = order.pop(dim)
            less = self._squeezed(x.args[0], gone, path)
            order = [d - (d > gone) for d in order]
            if order == sorted(order):
                return less
            return self.call(aten.permute.default, less, order, path=path)
        if x.target is aten.unsqueeze.default:
            at = ops.dim(x, x.args[1])
            if at == dim:
                return x.args[0]
            less = self._squeezed(x.args[0], dim - (dim > at), path)
            return self.call(aten.unsqueeze.default, less, at - (at > dim), path=path)
        if x.target is ops.RESHAPE:
            sizes = [s for d, s in enumerate(shape(x)) if d != dim]
            return self.call(ops.RESHAPE, x.args[0], sizes, path=path)
        return self.call(aten.squeeze.dim, x, dim, path=path)

    def _joined(self, n: fx.Node, args: Any, path: str) -> fx.Node:
        """A concatenation without empty parts, and without another in the same dimension inside."""
        like = n.meta["val"]
        at = ops.dim(n, (*args, 0)[1])
        parts = [
            piece
            for part in args[0]
            if part.meta["val"].numel() or not like.numel()
            for piece in self.rows.get((part, at))
            or pieces(self, part, at, 0, shape(part)[at], path)
        ]
        if len(parts) > 1 and all(_put_in(part, at) for part in parts):
            stack = self.call(aten.stack.default, [part.args[0] for part in parts], at, path=path)
            self.rows[stack, at] = parts
            return stack
        if any(part.meta["val"].dtype != like.dtype for part in parts):
            return self.call(aten.cat.default, args[0], at, path=path)
        return parts[0] if len(parts) == 1 else self.call(aten.cat.default, parts, at, path=path)

    def _padded(self, n: fx.Node, target: Any, args: Any, kwargs: Any, path: str) -> fx.Node:
        """A convolution whose padding is ``"same"`` or ``"valid"``, with numbers, as torch computes it."""
        names = [a.name for a in target._schema.arguments]
        given = {**ops.arguments(n), **dict(zip(names, args, strict=False)), **kwargs}
        x, weight, dilation = given["input"], given["weight"], given["dilation"]
        kernel = shape(weight)[2:]
        left = [0] * len(kernel)
        if given["padding"] == "same":
            dilation = dilation * len(kernel) if len(dilation) == 1 else dilation
            whole = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            left = [w // 2 for w in whole]
            # An odd number of zeros in all is one more on the right.
            more = [right for w in reversed(whole) for right in (0, w % 2)]
            if any(more):
                x = self.call(aten.constant_pad_nd.default, x, more, 0.0, path=path)
        rest = x, weight, given["bias"], given["stride"], left, dilation, given["groups"]
        return self.call(_PADDED[target], *rest, path=path)

    def _average_pool(self, args: Any, kwargs: Any, path: str) -> fx.Node:
        """Average pooling of [N, C, L] as torch itself computes it, on [N, C, 1, L]."""
        given: list[Any] = [*args, *([], [0])[max(len(args) - 2, 0) :]]
        x, kernel, stride, padding, *rest = given
        row = self.call(aten.unsqueeze.default, x, -2, path=path)
        windows = ([1, *kernel], [1, *(stride or kernel)], [0, *padding], *rest)
        pooled = self.call(aten.avg_pool2d.default, row, *windows, path=path, **kwargs)
        return self.call(aten.squeeze.dim, pooled, -2, path=path)

    def _adaptive_max(self, n: Node, x: fx.Node, path: str) -> fx.Node:
        """Adaptive max pooling as what it is where all its windows are alike."""
        sizes, wanted = shape(x)[-len(n.args[1]) :], n.args[1]
        if set(wanted) == {1}:
            spatial = list(range(-len(wanted), 0))
            return self.call(aten.amax.default, x, spatial, True, path=path)
        if any(a % b for a, b in zip(sizes, wanted, strict=True)):
            for at, count in enumerate(wanted, len(shape(x)) - len(wanted)):
                x = self._largest_of_bins(x, at, count, path)
            return x
        kernel = [a // b for a, b in zip(sizes, wanted, strict=True)]
        return self.call(_ADAPTIVE_MAX[n.target], x, kernel, kernel, path=path)

    def _largest_of_bins(self, x: fx.Node, at: int, count: int, path: str) -> fx.Node:
        """The largest value of each of torch's adaptive bins along a dimension."""
        size = shape(x)[at]
        bins = ((i * size // count, -((i + 1) * size // -count)) for i in range(count))
        largest = [
            self.call(
                aten.amax.default,
                self.call(aten.slice.Tensor, x, at, start, end, path=path),
                [at],
                True,
                path=path,
            )
            for start, end in bins
        ]
        return self.call(aten.cat.default, largest, at, path=path)

    def _in_its_place(self, step: Sequence[Any], path: str) -> tuple[Any, ...]:
        """A neuron's step with its number, which follows from where its state comes from."""
        x, state, params, spec, t = step
        state = _unchanged(state, spec)
        if state.target is operator.getitem and state.args[0].args[2:4] == (params, spec):
            t = state.args[0].args[4] + 1
            if state.args[0] in self.handed and not any(f.where == path for f in self.findings):
                self.findings.append(_handed_twice(path, state))
            self.handed.add(state.args[0])
        elif t > 0 and self._starts(state, params, spec):
            t = 0
        elif t > 0 and not any(f.where == path for f in self.findings):
            self.findings.append(_foreign_state(path, state))
        return x, state, params, spec, t

    def _starts(self, state: Node, params: Sequence[Node], spec: str) -> bool:
        """Whether a state is the one before the first step, as constants."""
        parts = _told(state, spec)
        if not all(map(_is_constant, parts.values())):
            return False
        neuron = Neuron.from_json(spec, (self.tensors[str(p.target)] for p in params))
        values = {i: self._constant_value(p) for i, p in parts.items()}
        initial = neuron.initial(values[0])
        return all(torch.equal(value, initial[i]) for i, value in values.items())

    def _constant_value(self, n: Node) -> torch.Tensor:
        if n.op == "get_attr":
            return self.tensors[str(n.target)]
        args, kwargs = fx.map_arg((n.args, n.kwargs), self._constant_value)
        value: torch.Tensor = n.target(*args, **kwargs)
        return value

    def _parts(self, n: fx.Node, x: fx.Node, path: str) -> list[fx.Node]:
        """What an operator cuts a tensor into, piece by piece."""
        given: Any = (n.args[1:] if n.target is aten.unbind.int else n.args[2:]) or (0,)
        at = ops.dim(x, given[0])
        sizes = [1 if n.target is aten.unbind.int else piece.shape[at] for piece in n.meta["val"]]
        pieces, start = [], 0
        for size in sizes:
            if n.target is aten.unbind.int:
                pieces.append(self.call(aten.select.int, x, at, start, path=path))
            else:
                pieces.append(self.call(aten.slice.Tensor, x, at, start, start + size, path=path))
            start += size
        return pieces

    def _put_together(self, args: Any, path: str) -> Node | None:
        """What a selection takes out of what was put together, if it is."""
        x, dim, index = args
        at = ops.dim(x, dim)
        index %= shape(x)[at]
        if x.target not in _JOINS or ops.dim(x, (*x.args, 0)[1]) != at:
            return None
        if x.target is aten.stack.default:
            row: Node = x.args[0][index]
            return row
        (part,) = pieces(self, x, at, index, index + 1, path)
        if _put_in(part, at):
            return part.args[0]
        first = 0
        if part.target is aten.slice.Tensor and ops.dim(part, ops.slice_args(part, 1)[0]) == at:
            start, part = ops.slice_args(part, 1)[1], part.args[0]
            first = slice(start, None).indices(shape(part)[at])[0]
        return self.call(aten.select.int, part, at, first, path=path)

    def _scatter(
        self, base: fx.Node, part: fx.Node, dim: int, start: int, end: int, path: str
    ) -> fx.Node:
        """A write to base[start:end] along dim, as slices and a concatenation."""
        if start >= end:
            return base
        dim %= len(shape(base))
        parts = [
            *pieces(self, base, dim, 0, start, path),
            part,
            *pieces(self, base, dim, end, shape(base)[dim], path),
        ]
        return part if len(parts) == 1 else self.call(aten.cat.default, parts, dim, path=path)


_JOINS = (aten.stack.default, aten.cat.default)
_MATMULS = (aten.mm.default, aten.mv.default, aten.dot.default, aten.vdot.default)
_ANY = (aten.any.default, aten.any.dim, aten.any.dims)
#: Operators on whole numbers by one name, and on truth values, whose product and sum are these too.
_BITS = {
    aten.__and__.Tensor: (aten.bitwise_and.Tensor, aten.logical_and.default),
    aten.__or__.Tensor: (aten.bitwise_or.Tensor, aten.logical_or.default),
    aten.__xor__.Tensor: (aten.bitwise_xor.Tensor, aten.logical_xor.default),
    aten.bitwise_and.Tensor: (aten.bitwise_and.Tensor, aten.logical_and.default),
    aten.bitwise_or.Tensor: (aten.bitwise_or.Tensor, aten.logical_or.default),
    aten.bitwise_xor.Tensor: (aten.bitwise_xor.Tensor, aten.logical_xor.default),
    aten.bitwise_not.default: (aten.bitwise_not.default, aten.logical_not.default),
    aten.mul.Tensor: (aten.mul.Tensor, aten.logical_and.default),
    aten.add.Tensor: (aten.add.Tensor, aten.logical_or.default),
}
#: Pooling, with the number of dimensions that it is over.
_POOLS = {
    aten.max_pool1d.default: 1,
    aten.avg_pool1d.default: 1,
    aten.max_pool2d.default: 2,
    aten.avg_pool2d.default: 2,
    aten.max_pool3d.default: 3,
    aten.avg_pool3d.default: 3,
}
#: Pooling that tells where the largest values stand too.
_WITH_INDICES = {
    aten.max_pool1d_with_indices.default: aten.max_pool1d.default,
    aten.max_pool2d_with_indices.default: aten.max_pool2d.default,
    aten.max_pool3d_with_indices.default: aten.max_pool3d.default,
}
#: Convolutions whose padding is a word, and those with numbers.
_PADDED = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}
#: Adaptive max pooling, and the pooling that it is with windows of one size.
_ADAPTIVE_MAX = {
    aten.adaptive_max_pool1d.default: aten.max_pool1d.default,
    aten.adaptive_max_pool2d.default: aten.max_pool2d.default,
    aten.adaptive_max_pool3d.default: aten.max_pool3d.default,
}


def _told(state: Node, spec: str) -> dict[int, Node]:
    """The parts that a state was put together of, less those that follow from others."""
    parts: Any = state.args[0] if state.target is aten.stack.default else [state]
    states = ("v", *named(json.loads(spec)["dynamics"]).states)
    return {i: p for i, p in enumerate(parts) if len(parts) == 1 or states[i] != SPIKES}


def _unchanged(state: Node, spec: str) -> Node:
    """The state itself where its parts were taken out of it and put together again."""
    parts = _told(state, spec)
    sources = {p.args[0] if p.target is aten.select.int else None for p in parts.values()}
    source: Any = sources.pop()
    if sources or source is None or source.target is not operator.getitem:
        return state
    same = all(p.args[1:] == (0, i) for i, p in parts.items())
    return source if same else state


def _foreign_state(path: str, state: Node) -> Finding:
    parts: Any = state.args[0] if state.target is aten.stack.default else [state]
    v = next((p for p in parts if p.op == "placeholder"), parts[0])
    kind = {
        "placeholder": "an input of the network",
        "get_attr": "another constant than it starts from",
    }
    return Finding(
        rule="neuron-state",
        where=path,
        node=v.name,
        found="the state that is handed to it is "
        + kind.get(v.op, f"the result of {short(v.target)}"),
        allowed="the state that its last call returned, or the one that it starts from",
        fix="start it from its initial state inside the forward (mem = lif.reset_mem()), which is how "
        "each call starts, and hand back what it returned",
    )


def _handed_twice(path: str, state: Node) -> Finding:
    return Finding(
        rule="neuron-state",
        where=path,
        node=state.name,
        found="two of its calls go on from the same state",
        allowed="calls that each go on from the state that the one before returned",
        fix="write what the other call gives as arithmetic on the state that was returned (mem), or leave "
        "it out of the network",
    )


#: Operators that cut a tensor into several.
_PARTS = frozenset(
    {
        aten.unbind.int,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unsafe_split.Tensor,
        aten.unsafe_chunk.default,
    }
)
#: Operators that ask of their input no more than its shape and dtype.
_FILLED = frozenset(
    {
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten.new_zeros.default,
        aten.new_ones.default,
        aten.new_full.default,
    }
)
_UNFILLED = frozenset({aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default})


def _made(n: fx.Node, args: Any, kwargs: Any) -> torch.Tensor | None:
    """The tensor that a node makes out of nothing: with static shapes it is a constant."""
    value = n.meta["val"]
    if n.target in _UNFILLED:
        return torch.zeros(value.shape, dtype=value.dtype)
    if n.target in _FILLED:
        args = (torch.empty(args[0].meta["val"].shape, dtype=args[0].meta["val"].dtype), *args[1:])
    elif n.all_input_nodes or not isinstance(value, torch.Tensor):
        return None
    made: torch.Tensor = n.target(*args, **kwargs)  # type: ignore[operator]
    return made


def _is_constant(n: Node) -> bool:
    """Whether a value is a tensor of the network, or that in another shape."""
    while n.op == "call_function" and len(n.all_input_nodes) == 1:
        (n,) = n.all_input_nodes
    return bool(n.op == "get_attr")


def _put_in(x: Node, dim: int) -> bool:
    """Whether a dimension of 1 was put in there."""
    return x.target is aten.unsqueeze.default and ops.dim(x, x.args[1]) == dim


def moves_in_memory(exported: Any) -> bool:
    """Whether an exported graph has copies that lie otherwise in memory than their originals."""
    return any(n.target in _COPIES and _moved_in_memory(n) for n in exported.graph.nodes)


def _moved_in_memory(n: Node) -> bool:
    """Whether a copy lies in the order of its dimensions, and what it is a copy of does not."""
    return bool(n.meta["val"].is_contiguous() and not n.args[0].meta["val"].is_contiguous())


def _same(x: fx.Node, kwargs: dict[str, Any]) -> bool:
    value = x.meta["val"]
    return bool(kwargs.get("dtype", value.dtype) == value.dtype)


def _only_first(n: fx.Node) -> bool:
    return all(u.target is operator.getitem and u.args[1] == 0 for u in n.users)
