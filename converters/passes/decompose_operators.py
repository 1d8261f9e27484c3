"""Write operators that a target lacks in those that it has.

    b + x W                        of addmm and baddbmm
    b - a                          of rsub
    max(x, -x)                     of abs
    sqrt(sum of x x)               of the Euclidean norm, and likewise of other orders
    pool2d of [N, 1, rest, K]      of amax over K values, and -amax(-x) of amin
    (x - m) / sqrt(var + eps)      of layer, group and instance norm, m and var being means
    x / sqrt(mean of x x + eps)    of RMS norm
    s - m - log(sum exp(s - m))    of log_softmax, m being the largest
    sum of (x - m)^2, over n - c   of the variance, and its root of the standard deviation
    softmax(s Q K' + mask) V       of attention
    conv2d by kernels of one 1     of im2col, and its transpose of col2im
    x_1 x_2 ...                    of the product
    pool2d of [N, C, 1, L]         of pooling over [N, C, L]
    x W, along H and along W       of adaptive average pooling whose windows differ, and of resampling
    x W, W ones above the diagonal of the running sum
    slice, concatenate             of padding
    (x y') W                       of the bilinear layer, x y' being all products
    log(1 + x)                     of log1p, less exact near 0
    where(x != x, 0, x)            of nan_to_num, and likewise for infinities
    a != b                         of the exclusive or
    x                              of its copy
    their steps                    of LSTM, GRU and RNN (converters/recurrences.py)
    formulas                       of elementwise operators (converters/passes/formulas.py)
    conv2d, pool2d, upsample2d     of those over [N, C, D, H, W] (converters/passes/volumes.py)

A transposed convolution is a convolution of its input with s - 1 zeros after each row and column, s
being the stride, by the kernel turned round (Dumoulin and Visin 2016, arXiv:1603.07285, section 4).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from .. import ops
from ..builder import Builder
from ..ops import Node, aten, shape
from ..program import PassReport, Program, short, where
from ..recurrences import RECURRENT, recurrent
from . import volumes
from .formulas import FORMULAS, Term


@dataclass(frozen=True, eq=False)
class decompose_operators:  # noqa: N801, the name of the pass
    """The pass for a target that has ``available``, such as ``"aten.conv2d"``."""

    available: Collection[str]
    __name__ = "decompose_operators"

    def __call__(self, program: Program) -> Program:
        """The program in those operators, as far as there are rules for others."""

        def lacking(target: Any) -> bool:
            return short(target) not in self.available

        return _Decompose(program, lacking, _IN_PART).run(self.__name__)

    def sparing(self, targets: Iterable[Any]) -> decompose_operators:
        """The pass that leaves these operators as they are too."""
        return decompose_operators({*self.available, *map(short, targets)})


def unroll_recurrences(program: Program) -> Program:
    """Take LSTM, GRU and RNN apart into their steps."""
    return _Decompose(program, RECURRENT.__contains__).run("unroll_recurrences")


class _Decompose(Builder):
    def __init__(
        self, program: Program, lacking: Callable[[Any], bool], in_part: Collection[Any] = ()
    ) -> None:
        super().__init__(program)
        self.lacking, self.in_part = lacking, in_part
        #: Whether a rule came to an operator that the target lacks.
        self.failed = False
        # Of an operator with several results the list of them.
        self.env: dict[Node, Any] = {}
        self.path = ""

    def run(self, name: str) -> Program:
        done: list[str] = []
        skipped: list[str] = []
        for n in self.program.walk():
            if n.op == "placeholder":
                self.env[n] = self.placeholder(n, n.meta["val"])
            elif n.op == "get_attr":
                self.env[n] = self.copy(n, {})
            elif n.op == "call_function":
                rule = self.rule(n.target)
                self.path = where(n)
                if n.target is operator.getitem and isinstance(self.env[n.args[0]], list):
                    self.env[n] = self.env[n.args[0]][n.args[1]]
                    continue
                self.failed = False
                made = None if rule is None else rule(self, n)
                made = None if self.failed else made
                if made is not None:
                    done.append(f"{n.name} ({self.path})")
                elif rule is not None and n.target not in self.in_part:
                    skipped.append(f"{n.name} ({self.path})")
                self.env[n] = self.copy(n, self.env) if made is None else made
        report = PassReport(name, tuple(done), tuple(skipped))
        named = self.program.named()
        # One step's neurons are not found anew: their states are inputs of the graph.
        sites = [
            replace(
                site,
                drives=tuple(self.env[named[drive]].name for drive in site.drives),
                spikes=tuple(self.env[named[spikes]].name for spikes in site.spikes),
            )
            for site in self.program.sites
        ]
        return self.finish([self.env[r] for r in self.program.results], report, sites)

    def rule(self, target: Any) -> Callable[[_Decompose, Node], Node | list[Node] | None] | None:
        """How an operator is taken apart, if the target lacks it."""
        return _RULES.get(target) if self.lacking(target) or target in self.in_part else None

    # What the rules are written in

    def given(self, n: Node) -> list[Any]:
        """A node's arguments in the new graph, as its schema has them."""
        values: Any = fx.map_arg(ops.arguments(n), lambda a: self.env.get(a, a))
        return [*values.values()]

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A call, itself taken apart where the target lacks it."""
        node = self.call(target, *args, path=self.path, **kwargs)
        rule = self.rule(target)
        made: Any = None if rule is None else rule(self, node)
        self.failed |= made is None and self.lacking(target)
        return node if made is None else made

    def reshape(self, x: Node, *size: int) -> Node:
        return self.emit(ops.RESHAPE, x, list(size))

    def scaled(self, x: Node, factor: float) -> Node:
        return x if factor == 1 else self.emit(aten.mul.Tensor, x, factor)

    def filled(self, size: Sequence[int], value: float, dtype: torch.dtype) -> Node:
        """A constant of equal elements."""
        return self.constant("filled", torch.full(size, value, dtype=dtype))

    def single_places(self, kernel: Sequence[int], dtype: torch.dtype) -> Node:
        """A convolution's weight [K, 1, ...], of whose K kernels each is 1 in a place of its own."""
        count = math.prod(kernel)
        ones = torch.eye(count, dtype=dtype).reshape(count, 1, *kernel)
        return self.constant("single_places", ones)

    def of_channels(self, x: Node, *weights: Node | None) -> Iterator[Node | None]:
        """One number for each channel of x [N, C, ...], as it broadcasts."""
        sizes = (shape(x)[1], *[1] * (len(shape(x)) - 2))
        yield from (None if w is None else self.reshape(w, *sizes) for w in weights)

    def normalised(self, x: Node, dims: list[int], eps: float) -> Node:
        mean = self.emit(aten.mean.dim, x, dims, True)
        centred = self.emit(aten.sub.Tensor, x, mean)
        square = self.emit(aten.mul.Tensor, centred, centred)
        variance = self.emit(aten.mean.dim, square, dims, True)
        scale = self.emit(aten.rsqrt.default, self.emit(aten.add.Tensor, variance, eps))
        return self.emit(aten.mul.Tensor, centred, scale)

    def affine(self, x: Node, weight: Node | None, bias: Node | None) -> Node:
        x = x if weight is None else self.emit(aten.mul.Tensor, x, weight)
        return x if bias is None else self.emit(aten.add.Tensor, x, bias)

    # The rules: the node in other operators, or None where they do not do

    def addmm(self, n: Node) -> Node:
        bias, x, weight, beta, alpha = self.given(n)
        product = self.scaled(self.emit(aten.matmul.default, x, weight), alpha)
        return self.emit(aten.add.Tensor, product, self.scaled(bias, beta))

    def rsub(self, n: Node) -> Node:
        a, b, alpha = self.given(n)
        a = self.scaled(a, alpha)
        if isinstance(b, fx.Node):
            return self.emit(aten.sub.Tensor, b, a)
        return self.emit(aten.add.Tensor, self.emit(aten.neg.default, a), b)

    def abs(self, n: Node) -> Node:
        (x,) = self.given(n)
        return self.emit(aten.maximum.default, x, self.emit(aten.neg.default, x))

    def vector_norm(self, n: Node) -> Node | None:
        x, order, dims, keep, _ = self.given(n)
        if order in (1, 2) and not self.lacking(n.target):
            return None
        dims = [*range(len(shape(x)))] if dims is None else dims
        if order == 2:
            square = self.emit(aten.mul.Tensor, x, x)
            return self.emit(aten.sqrt.default, self.emit(aten.sum.dim_IntList, square, dims, keep))
        if order == 0:
            other = self.emit(aten.ne.Scalar, x, 0)
            ones = self.emit(aten._to_copy.default, other, dtype=x.meta["val"].dtype)
            return self.emit(aten.sum.dim_IntList, ones, dims, keep)
        size = self.emit(aten.abs.default, x)
        if math.isinf(order):
            extreme = aten.amax.default if order > 0 else aten.amin.default
            return self.emit(extreme, size, dims, keep)
        if order == 1:
            return self.emit(aten.sum.dim_IntList, size, dims, keep)
        powers = self.emit(aten.pow.Tensor_Scalar, size, order)
        total = self.emit(aten.sum.dim_IntList, powers, dims, keep)
        return self.emit(aten.pow.Tensor_Scalar, total, 1 / order)

    def product(self, n: Node) -> Node | None:
        given = ops.arguments(n)
        x, dtype = self.env.get(given["self"], given["self"]), n.meta["val"].dtype
        if not dtype.is_floating_point:
            return None
        x = x if x.meta["val"].dtype == dtype else self.emit(aten._to_copy.default, x, dtype=dtype)
        if given.get("dim") is None:
            x = self.reshape(x, -1)
        at = ops.dim(x, given.get("dim") or 0)
        if not 0 < shape(x)[at] <= _MOST_FACTORS:
            return None
        factors = [self.emit(aten.slice.Tensor, x, at, i, i + 1) for i in range(shape(x)[at])]
        made = factors[0]
        for factor in factors[1:]:
            made = self.emit(aten.mul.Tensor, made, factor)
        return self.reshape(made, *shape(n))

    def amax(self, n: Node) -> Node:
        x, dims, _ = self.given(n)
        rank = len(shape(x))
        dims = sorted({d % rank for d in dims or range(rank)})
        others = [d for d in range(rank) if d not in dims]
        if others + dims != [*range(rank)]:
            x = self.emit(aten.permute.default, x, others + dims)
        window = [1, math.prod(shape(x)[len(others) :])]
        # The first dimension, which may be time, stays the first.
        rows = self.reshape(x, shape(x)[0] if others else 1, 1, -1, window[1])
        largest = self.emit(aten.max_pool2d.default, rows, window, window)
        return self.reshape(largest, *shape(n))

    def amin(self, n: Node) -> Node:
        x, dims, keep = self.given(n)
        largest = self.emit(aten.amax.default, self.emit(aten.neg.default, x), dims, keep)
        return self.emit(aten.neg.default, largest)

    def log_softmax(self, n: Node) -> Node:
        x, dim, dtype = self.given(n)
        if dtype is not None:
            x = self.emit(aten._to_copy.default, x, dtype=dtype)
        shifted = self.emit(aten.sub.Tensor, x, self.emit(aten.amax.default, x, [dim], True))
        total = self.emit(aten.sum.dim_IntList, self.emit(aten.exp.default, shifted), [dim], True)
        return self.emit(aten.sub.Tensor, shifted, self.emit(aten.log.default, total))

    def rms_norm(self, n: Node) -> Node:
        x, normalised, weight, eps = self.given(n)
        eps = torch.finfo(x.meta["val"].dtype).eps if eps is None else eps
        dims = list(range(-len(normalised), 0))
        square = self.emit(aten.mean.dim, self.emit(aten.mul.Tensor, x, x), dims, True)
        scale = self.emit(aten.rsqrt.default, self.emit(aten.add.Tensor, square, eps))
        return self.affine(self.emit(aten.mul.Tensor, x, scale), weight, None)

    def gated(self, n: Node) -> Node:
        x, dim = self.given(n)
        half = shape(n)[dim]
        a = self.emit(aten.slice.Tensor, x, dim, 0, half)
        b = self.emit(aten.slice.Tensor, x, dim, half, 2 * half)
        return self.emit(aten.mul.Tensor, a, self.emit(aten.sigmoid.default, b))

    def layer_norm(self, n: Node) -> Node:
        x, normalised, weight, bias, eps, _ = self.given(n)
        dims = list(range(-len(normalised), 0))
        return self.affine(self.normalised(x, dims, eps), weight, bias)

    def group_norm(self, n: Node) -> Node:
        x, groups, weight, bias, eps, _ = self.given(n)
        N, C, *image = shape(x)
        y = self.normalised(self.reshape(x, N, groups, -1), [-1], eps)
        weight, bias = self.of_channels(x, weight, bias)
        return self.affine(self.reshape(y, N, C, *image), weight, bias)

    def instance_norm(self, n: Node) -> Node:
        x, weight, bias, mean, variance, own, momentum, eps, _ = self.given(n)
        if not own:
            fixed = weight, bias, mean, variance, False, momentum, eps, False
            return self.emit(aten.batch_norm.default, x, *fixed)
        weight, bias = self.of_channels(x, weight, bias)
        return self.affine(self.normalised(x, [*range(2, len(shape(x)))], eps), weight, bias)

    def norm_by_batch(self, n: Node) -> list[Node]:
        """A batch norm without statistics of its own; of its results the first."""
        x, weight, bias, _, _, eps = self.given(n)
        weight, bias = self.of_channels(x, weight, bias)
        dims = [d for d in range(len(shape(x))) if d != 1]
        return [self.affine(self.normalised(x, dims, eps), weight, bias)]

    def variance(self, n: Node) -> Node:
        x, dims, correction, keep = self.given(n)
        dims = [*range(len(shape(x)))] if dims is None else dims
        count = math.prod(shape(x)[d] for d in dims)
        mean = self.emit(aten.mean.dim, x, dims, True)
        centred = self.emit(aten.sub.Tensor, x, mean)
        square = self.emit(aten.mul.Tensor, centred, centred)
        left = count - (1 if correction is None else int(correction))
        total = self.emit(aten.sum.dim_IntList, square, dims, keep)
        return self.emit(aten.mul.Tensor, total, 1 / left if left else math.inf)

    def deviation(self, n: Node) -> Node:
        return self.emit(aten.sqrt.default, self.variance(n))

    def spread_and_mean(self, n: Node) -> list[Node]:
        spread = self.deviation if "std" in short(n.target) else self.variance
        given = ops.arguments(n)
        x, dims = self.env[given["self"]], given["dim"]
        dims = [*range(len(shape(x)))] if dims is None else dims
        return [spread(n), self.emit(aten.mean.dim, x, dims, given["keepdim"])]

    def attention(self, n: Node) -> Node | None:
        q, k, v, mask, dropped, causal, scale, grouped = self.given(n)
        if dropped or grouped:
            return None
        turned = self.emit(aten.transpose.int, k, -2, -1)
        scale = shape(q)[-1] ** -0.5 if scale is None else scale
        scores = self.scaled(self.emit(aten.matmul.default, q, turned), scale)
        if causal:
            seen = torch.ones(shape(scores)[-2:], dtype=torch.bool).tril()
            mask = self.constant("causal", seen)
        if mask is not None and mask.meta["val"].dtype == torch.bool:
            # What exp gives 0 for all the same, unless a row sees nothing.
            known = self.tensors[str(mask.target)] if mask.op == "get_attr" else None
            seeing = known is not None and bool(known.any(-1).all())
            hidden = torch.finfo(scores.meta["val"].dtype).min if seeing else -math.inf
            scores = self.emit(aten.where.ScalarOther, mask, scores, hidden)
        elif mask is not None:
            scores = self.emit(aten.add.Tensor, scores, mask)
        return self.emit(aten.matmul.default, self.emit(aten.softmax.int, scores, -1), v)

    def im2col(self, n: Node) -> Node | None:
        x, kernel, dilation, padding, stride = self.given(n)
        if len(shape(x)) != 4:
            return None
        N, C, H, W = shape(x)
        kernels = self.single_places(kernel, x.meta["val"].dtype)
        rows = self.reshape(x, N * C, 1, H, W)
        taken = self.emit(aten.conv2d.default, rows, kernels, None, stride, padding, dilation)
        return self.reshape(taken, *shape(n))

    def col2im(self, n: Node) -> Node | None:
        x, size, kernel, dilation, padding, stride = self.given(n)
        if len(shape(x)) != 3:
            return None
        spans = [*zip(size, kernel, dilation, padding, stride, strict=True)]
        rest = [h + 2 * p - d * (k - 1) - 1 for h, k, d, p, _ in spans]
        counts = [r // s + 1 for r, (*_, s) in zip(rest, spans, strict=True)]
        left = [r % s for r, (*_, s) in zip(rest, spans, strict=True)]
        count = math.prod(kernel)
        kernels = self.single_places(kernel, x.meta["val"].dtype)
        rows = self.reshape(x, -1, count, *counts)
        whole = stride, padding, left, 1, dilation
        made = self.emit(aten.conv_transpose2d.input, rows, kernels, None, *whole)
        return self.reshape(made, *shape(n))

    def running_sum(self, n: Node) -> Node | None:
        x, dim, _ = self.given(n)
        rank, dtype = len(shape(x)), x.meta["val"].dtype
        if rank == 0 or not dtype.is_floating_point:
            return None
        dim, size = dim % rank, shape(x)[dim]
        above = torch.ones(size, size, dtype=dtype).triu()
        ones = self.constant("running_sum", above)
        row = x if dim == rank - 1 else self.emit(aten.transpose.int, x, dim, rank - 1)
        total = self.emit(aten.matmul.default, row, ones)
        return total if row is x else self.emit(aten.transpose.int, total, dim, rank - 1)

    def bilinear(self, n: Node) -> Node:
        x, y, weight, bias = self.given(n)
        products = self.emit(
            aten.mul.Tensor,
            self.reshape(x, *shape(x), 1),
            self.reshape(y, *shape(y)[:-1], 1, shape(y)[-1]),
        )
        rows = self.reshape(products, *shape(x)[:-1], -1)
        return self.emit(aten.linear.default, rows, self.reshape(weight, shape(n)[-1], -1), bias)

    def padded(self, n: Node) -> Node:
        x, widths, value = self.given(n)
        dtype = x.meta["val"].dtype
        for i, (before, after) in enumerate(zip(widths[::2], widths[1::2], strict=True)):
            at = len(shape(x)) - 1 - i
            if min(before, after) < 0:
                end = shape(x)[at] + min(after, 0)
                x = self.emit(aten.slice.Tensor, x, at, max(-before, 0), end)
            size = [*shape(x)]
            first, last = (
                [self.filled([*size[:at], width, *size[at + 1 :]], value, dtype)]
                if width > 0
                else []
                for width in (before, after)
            )
            if first or last:
                x = self.emit(aten.cat.default, [*first, x, *last], at)
        return x

    def log1p(self, n: Node) -> Node:
        (x,) = self.given(n)
        return self.emit(aten.log.default, self.emit(aten.add.Tensor, x, 1.0))

    def nan_to_num(self, n: Node) -> Node:
        x, nan, high, low = self.given(n)
        if not x.meta["val"].dtype.is_floating_point:
            return x
        most = torch.finfo(x.meta["val"].dtype).max
        ends = (
            (math.inf, most if high is None else high),
            (-math.inf, -most if low is None else low),
        )
        y = x
        for end, value in ends:
            y = self.emit(aten.where.ScalarSelf, self.emit(aten.eq.Scalar, x, end), value, y)
        nans = self.emit(aten.ne.Tensor, x, x)
        return self.emit(aten.where.ScalarSelf, nans, 0.0 if nan is None else nan, y)

    def exclusive_or(self, n: Node) -> Node | None:
        a, b = self.given(n)
        if {v.meta["val"].dtype for v in (a, b)} != {torch.bool}:
            return None
        return self.emit(aten.ne.Tensor, a, b)

    def copied(self, n: Node) -> Node:
        return self.given(n)[0]

    def recurrent(self, n: Node) -> list[Node] | None:
        return recurrent(self, n, self.given(n), self.path)

    def adaptive_average(self, n: Node) -> Node | None:
        x, wanted = self.given(n)
        sizes = shape(x)[-2:]
        if not any(have % want for have, want in zip(sizes, wanted, strict=True)):
            return None
        for have, want in zip(reversed(sizes), reversed(wanted), strict=True):
            windows = _windows(have, want).to(x.meta["val"].dtype)
            averages = self.constant("adaptive_average", windows)
            x = self.emit(aten.matmul.default, x, averages)
            x = self.emit(aten.transpose.int, x, -2, -1)
        return x

    def resampled(self, n: Node) -> Node | None:
        if ops.by_sizes(n) and not self.lacking(n.target):
            return None
        x, *rest = self.given(n)
        dtype = x.meta["val"].dtype
        sizes = shape(x)[-2:]
        for at in (1, 0):
            # What becomes of each place alone, the other dimension being one value all along.
            places = torch.eye(sizes[at])[:, None].unsqueeze(3 - at).expand(-1, -1, *sizes)
            made = n.target(places.contiguous(), *rest)[:, 0].select(2 - at, 0)
            name = f"{n.name}.{'rows' if at == 0 else 'columns'}"
            x = self.emit(aten.matmul.default, x, self.constant(name, made.to(dtype)))
            x = self.emit(aten.transpose.int, x, -2, -1)
        return x

    def adaptive_average_volume(self, n: Node) -> Node | None:
        x, wanted = self.given(n)
        sizes = zip(shape(x)[-3:], wanted, strict=True)
        if not self.lacking(n.target) and not any(have % want for have, want in sizes):
            return None
        return volumes.adaptive_average(self, n)

    def pool1d(self, n: Node) -> Node:
        x, *windows = self.given(n)
        target, *neutral = _ROWS[n.target]
        row = self.emit(aten.unsqueeze.default, x, -2)
        wide = [
            [first, *window] if isinstance(window, (list, tuple)) and window else window
            for first, window in zip(neutral, windows, strict=False)
        ]
        pooled = self.emit(target, row, *wide, *windows[len(neutral) :])
        return self.emit(aten.squeeze.dim, pooled, -2)

    def conv_transpose1d(self, n: Node) -> Node | None:
        x, weight, bias, stride, padding, output, groups, dilation = self.given(n)
        x, weight = (self.emit(aten.unsqueeze.default, t, -2) for t in (x, weight))
        spans = ([1, *stride], [0, *padding], [0, *output], groups, [1, *dilation])
        size = (*shape(n)[:-1], 1, shape(n)[-1])
        made = self.transposed(x, weight, bias, *spans, size)
        return None if made is None else self.emit(aten.squeeze.dim, made, -2)

    def conv_transpose(self, n: Node) -> Node | None:
        x, weight, bias, stride, padding, output, groups, dilation = self.given(n)
        return self.transposed(x, weight, bias, stride, padding, output, groups, dilation, shape(n))

    def transposed(
        self,
        x: Node,
        weight: Node,
        bias: Node | None,
        stride: list[int],
        padding: list[int],
        output: list[int],
        groups: int,
        dilation: list[int],
        size: tuple[int, ...],
    ) -> Node | None:
        kernel = shape(weight)[2:]
        margin = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
        # The zeros after the last row stand for what the output is padded by.
        if min(margin) < 0 or any(o >= s for o, s in zip(output, stride, strict=True) if o):
            return None
        turned = self.turned(weight, groups)
        for at, s in enumerate(stride):
            x = self.spread(x, 2 + at, s)
        spatial = range(2, len(size))
        convolve = aten.conv2d.default if len(spatial) == 2 else aten.conv3d.default
        ones = [1] * len(spatial)
        y = self.emit(convolve, x, turned, bias, ones, margin, dilation, groups)
        for at in spatial:
            if shape(y)[at] != size[at]:
                y = self.emit(aten.slice.Tensor, y, at, 0, size[at])
        return y

    def turned(self, weight: Node, groups: int) -> Node:
        """A transposed convolution's kernel [C, K / groups, ...] as the convolution's."""
        value = self.constant_value(weight)
        C, K, *kernel = value.shape
        ends = value.flip(*range(2, value.dim()))
        turned = ends.reshape(groups, C // groups, K, *kernel).transpose(1, 2)
        return self.constant(
            f"{weight.name}_turned", turned.reshape(groups * K, C // groups, *kernel).contiguous()
        )

    def constant_value(self, weight: Node) -> torch.Tensor:
        """A weight's value, or that of a weight with a dimension of 1 put in."""
        if weight.op == "get_attr":
            return self.tensors[str(weight.target)]
        return self.tensors[str(weight.args[0].target)].unsqueeze(weight.args[1])

    def spread(self, x: Node, at: int, s: int) -> Node:
        """x with s - 1 zeros after each element along a dimension."""
        if s == 1:
            return x
        size = shape(x)
        after = math.prod(size[at + 1 :])
        rows = self.reshape(x, math.prod(size[:at]), size[at], after)
        zeros = self.filled((*shape(rows)[:2], (s - 1) * after), 0.0, x.meta["val"].dtype)
        wide = self.emit(aten.cat.default, [rows, zeros], 2)
        return self.reshape(wide, *size[:at], size[at] * s, *size[at + 1 :])


def _windows(have: int, want: int) -> torch.Tensor:
    """Adaptive average pooling along one dimension as a matrix [have, want]."""
    matrix = torch.zeros(have, want)
    for i in range(want):
        start, end = i * have // want, -(-(i + 1) * have // want)
        matrix[start:end, i] = 1.0 / (end - start)
    return matrix


#: Pooling over [N, C, L]: what it is over [N, C, 1, L], and what its windows have in the first place.
_ROWS: dict[Any, tuple[Any, ...]] = {
    aten.max_pool1d.default: (aten.max_pool2d.default, 1, 1, 0, 1),
    aten.adaptive_avg_pool1d.default: (aten.adaptive_avg_pool2d.default, 1),
}

#: Operators that a target has, but not in all forms: a pooling whose windows differ, a norm of another
#: order, rounding to decimals, resampling by factors that its sizes do not say.
_IN_PART = frozenset(
    {
        aten.adaptive_avg_pool2d.default,
        aten.adaptive_avg_pool3d.default,
        aten.linalg_vector_norm.default,
        aten.round.decimals,
        aten.upsample_bilinear2d.vec,
        aten.upsample_bicubic2d.vec,
        aten.upsample_nearest2d.vec,
    }
)

#: Factors of a product that is taken apart.
_MOST_FACTORS = 64


def _formula(write: Callable[..., Term | None]) -> Callable[[_Decompose, Node], Node | None]:
    """The rule that writes a formula."""

    def rule(self: _Decompose, n: Node) -> Node | None:
        given = (Term(self, a) if isinstance(a, fx.Node) else a for a in self.given(n))
        made = write(*given)
        return None if made is None else made.node

    return rule


_RULES: dict[Any, Callable[[_Decompose, Node], Node | list[Node] | None]] = {
    aten.addmm.default: _Decompose.addmm,
    aten.baddbmm.default: _Decompose.addmm,
    aten.rsub.Scalar: _Decompose.rsub,
    aten.rsub.Tensor: _Decompose.rsub,
    aten.abs.default: _Decompose.abs,
    aten.amax.default: _Decompose.amax,
    aten.linalg_vector_norm.default: _Decompose.vector_norm,
    aten.adaptive_avg_pool2d.default: _Decompose.adaptive_average,
    aten.layer_norm.default: _Decompose.layer_norm,
    aten.group_norm.default: _Decompose.group_norm,
    aten.instance_norm.default: _Decompose.instance_norm,
    aten.std.correction: _Decompose.deviation,
    aten.std.dim: _Decompose.deviation,
    aten.var.correction: _Decompose.variance,
    aten.var.dim: _Decompose.variance,
    aten.std_mean.correction: _Decompose.spread_and_mean,
    aten.std_mean.dim: _Decompose.spread_and_mean,
    aten.var_mean.correction: _Decompose.spread_and_mean,
    aten.var_mean.dim: _Decompose.spread_and_mean,
    aten.scaled_dot_product_attention.default: _Decompose.attention,
    aten.im2col.default: _Decompose.im2col,
    aten.col2im.default: _Decompose.col2im,
    aten.prod.default: _Decompose.product,
    aten.prod.dim_int: _Decompose.product,
    aten._native_batch_norm_legit.no_stats: _Decompose.norm_by_batch,
    aten.cumsum.default: _Decompose.running_sum,
    aten.bilinear.default: _Decompose.bilinear,
    aten.log1p.default: _Decompose.log1p,
    aten.nan_to_num.default: _Decompose.nan_to_num,
    aten.logical_xor.default: _Decompose.exclusive_or,
    aten.conv_transpose1d.default: _Decompose.conv_transpose1d,
    aten.conv_transpose2d.input: _Decompose.conv_transpose,
    aten.conv_transpose3d.input: _Decompose.conv_transpose,
    aten.conv3d.default: volumes.conv,
    aten.max_pool3d.default: volumes.max_pool,
    aten.avg_pool3d.default: volumes.average_pool,
    aten.adaptive_avg_pool3d.default: _Decompose.adaptive_average_volume,
    aten.upsample_nearest1d.vec: volumes.upsample,
    aten.upsample_linear1d.vec: volumes.upsample,
    aten.upsample_nearest3d.vec: volumes.upsample,
    aten._upsample_nearest_exact1d.vec: volumes.upsample,
    aten._upsample_nearest_exact3d.vec: volumes.upsample,
    aten.upsample_trilinear3d.vec: volumes.upsample,
    aten.upsample_bilinear2d.vec: _Decompose.resampled,
    aten.upsample_bicubic2d.vec: _Decompose.resampled,
    aten.upsample_nearest2d.vec: _Decompose.resampled,
    aten._upsample_nearest_exact2d.vec: _Decompose.resampled,
    aten.amin.default: _Decompose.amin,
    aten.clone.default: _Decompose.copied,
    aten.constant_pad_nd.default: _Decompose.padded,
    aten.log_softmax.int: _Decompose.log_softmax,
    aten.rms_norm.default: _Decompose.rms_norm,
    aten.glu.default: _Decompose.gated,
    **dict.fromkeys(_ROWS, _Decompose.pool1d),
    **dict.fromkeys(RECURRENT, _Decompose.recurrent),
    **{target: _formula(write) for target, write in FORMULAS.items()},
}
