"""All other ATen operators in ONNX than the elementwise ones of :mod:`.pointwise`, in the same way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ...converters import ops
from ...converters.ops import Node, aten, shape
from .export import Emitter, NotInOnnx
from .pointwise import POINTWISE, Exporter, argument, arguments, dtype_of, each

# Layers


def _conv(e: Emitter, n: Node) -> str:
    x, weight, bias, stride, padding, dilation, groups = arguments(n, 2, None, 1, 0, 1, 1)
    d = len(shape(x)) - 2
    return e(
        "Conv",
        *(a for a in (x, weight, bias) if a is not None),
        kernel_shape=list(shape(weight)[2:]),
        strides=each(stride, d),
        pads=2 * each(padding, d),
        dilations=each(dilation, d),
        group=groups,
    )


def _conv_transpose(e: Emitter, n: Node) -> str:
    x, weight, bias, stride, padding, out_padding, groups, dilation = arguments(
        n, 2, None, 1, 0, 0, 1, 1
    )
    d = len(shape(x)) - 2
    return e(
        "ConvTranspose",
        *(a for a in (x, weight, bias) if a is not None),
        kernel_shape=list(shape(weight)[2:]),
        strides=each(stride, d),
        pads=2 * each(padding, d),
        output_padding=each(out_padding, d),
        dilations=each(dilation, d),
        group=groups,
    )


def _linear(e: Emitter, n: Node) -> str:
    x, weight, bias = arguments(n, 2, None)
    if len(shape(x)) == 2:
        return e("Gemm", *(a for a in (x, weight, bias) if a is not None), transB=1)
    known = e.tensor(weight)
    transposed = (
        e("Transpose", weight, perm=[1, 0])
        if known is None
        else e.constant(known.t(), f"{weight.target}_transposed")
    )
    product = e("MatMul", x, transposed)
    return product if bias is None else e("Add", product, bias)


def _matmul(e: Emitter, n: Node) -> str:
    return e("MatMul", *n.args[:2])


def _addmm(e: Emitter, n: Node) -> str:
    bias, a, b = n.args
    return e(
        "Gemm",
        *(a, b, bias),
        alpha=float(n.kwargs.get("alpha", 1)),
        beta=float(n.kwargs.get("beta", 1)),
    )


def _filled(e: Emitter, like: int, value: float, dtype: torch.dtype) -> str:
    return e.constant(torch.full((like,), value, dtype=dtype))


def _batch_norm(e: Emitter, n: Node) -> str:
    x, weight, bias, mean, variance, _, _, epsilon = n.args[:8]
    channels, dtype = shape(x)[1], dtype_of(n)
    return e(
        "BatchNormalization",
        x,
        _filled(e, channels, 1.0, dtype) if weight is None else weight,
        _filled(e, channels, 0.0, dtype) if bias is None else bias,
        mean,
        variance,
        epsilon=float(epsilon),
    )


def _affine(e: Emitter, x: str, weight: Any, bias: Any) -> str:
    x = x if weight is None else e("Mul", x, weight)
    return x if bias is None else e("Add", x, bias)


def _layer_norm(e: Emitter, n: Node) -> str:
    x, sizes, weight, bias, epsilon = arguments(n, 2, None, None, 1e-5)[:5]
    axes = list(range(-len(sizes), 0))
    if e.opset >= 17:
        ones = e.constant(torch.ones(tuple(sizes), dtype=dtype_of(n)))
        scale = ones if weight is None else weight
        given = (x, scale) if bias is None else (x, scale, bias)
        return e("LayerNormalization", *given, axis=axes[0], epsilon=float(epsilon))
    centred = e("Sub", x, _mean(e, x, axes, True))
    variance = _mean(e, e("Mul", centred, centred), axes, True)
    deviation = e("Sqrt", e("Add", variance, e.value(float(epsilon), dtype_of(n))))
    return _affine(e, e("Div", centred, deviation), weight, bias)


def _group_norm(e: Emitter, n: Node) -> str:
    x, groups, weight, bias, epsilon = arguments(n, 2, None, None, 1e-5)[:5]
    size, dtype = shape(x), dtype_of(n)
    rows = e("Reshape", x, e.ints([size[0], groups, -1]))
    ones, zeros = _filled(e, groups, 1.0, dtype), _filled(e, groups, 0.0, dtype)
    normed = e("InstanceNormalization", rows, ones, zeros, epsilon=float(epsilon))

    def channels(parameter: Any) -> Any:
        column = e.ints([-1, *[1] * (len(size) - 2)])
        return None if parameter is None else e("Reshape", parameter, column)

    return _affine(e, e("Reshape", normed, e.ints(size)), channels(weight), channels(bias))


# Pooling


def _windows(n: Node, d: int) -> tuple[list[int], list[int], list[int]]:
    """Kernel, stride and padding of a pool."""
    kernel = each(n.args[1], d)
    stride = each(argument(n, 2, "stride", None) or kernel, d)
    return kernel, stride, each(argument(n, 3, "padding", 0), d)


def _ends(
    n: Node, x: Node, reach: Sequence[int], stride: Sequence[int], pads: list[int]
) -> list[int]:
    """Padding behind, so that rounding down gives as many windows as the node's value has.

    ONNX's own ceil_mode counts windows that begin in the padding, in some releases.
    """
    d = len(pads)
    sizes = zip(shape(n)[-d:], shape(x)[-d:], reach, stride, pads, strict=True)
    return [max((out - 1) * s + k - size - p, p) for out, size, k, s, p in sizes]


def _max_pool(d: int) -> Exporter:
    def emit(e: Emitter, n: Node) -> str:
        kernel, stride, pads = _windows(n, d)
        dilation = each(argument(n, 4, "dilation", 1), d)
        reach = [s * (k - 1) + 1 for s, k in zip(dilation, kernel, strict=True)]
        return e(
            "MaxPool",
            n.args[0],
            kernel_shape=kernel,
            strides=stride,
            pads=pads + _ends(n, n.args[0], reach, stride, pads),
            dilations=None if dilation == [1] * d else dilation,
        )

    return emit


def _average_pool(d: int) -> Exporter:
    def emit(e: Emitter, n: Node) -> str:
        kernel, stride, pads = _windows(n, d)
        ends, x = _ends(n, n.args[0], kernel, stride, pads), n.args[0]
        divisor = argument(n, 6, "divisor_override", None)
        counted = bool(argument(n, 5, "count_include_pad", True)) or divisor is not None
        if counted and any(pads):
            # What is padded counts, what a window reaches beyond it does not.
            x = e("Pad", x, e.ints([0, 0, *pads, 0, 0, *pads]))
            ends = [b - a for a, b in zip(pads, ends, strict=True)]
            pads = [0] * d
        if divisor is not None and any(ends):
            raise NotInOnnx("avg_pool with divisor_override and ceil_mode")
        pooled = e("AveragePool", x, kernel_shape=kernel, strides=stride, pads=pads + ends)
        if divisor is None:
            return pooled
        return e("Mul", pooled, e.value(math.prod(kernel) / divisor, dtype_of(n)))

    return emit


def _adaptive_average_pool(d: int) -> Exporter:
    def emit(e: Emitter, n: Node) -> str:
        sizes, wanted = shape(n.args[0])[-d:], shape(n)[-d:]
        if set(wanted) == {1}:
            return _mean(e, n.args[0], list(range(-d, 0)), True)
        if (kernel := _regular(sizes, wanted)) is not None:
            return e("AveragePool", n.args[0], kernel_shape=kernel, strides=kernel)
        if d != 2:
            raise NotInOnnx(f"bins of unequal sizes in {d} dimensions")
        rows, columns = (_bins(a, b, dtype_of(n)) for a, b in zip(sizes, wanted, strict=True))
        return e("MatMul", e("MatMul", e.constant(rows), n.args[0]), e.constant(columns.t()))

    return emit


def _regular(sizes: Sequence[int], wanted: Sequence[int]) -> list[int] | None:
    """The kernel of a pool with these many equal windows, if there is one."""
    if any(a % b for a, b in zip(sizes, wanted, strict=True)):
        return None
    return [a // b for a, b in zip(sizes, wanted, strict=True)]


def _bins(size: int, wanted: int, dtype: torch.dtype) -> torch.Tensor:
    """Averages over torch's adaptive bins as a matrix [wanted, size]."""
    matrix = torch.zeros(wanted, size, dtype=dtype)
    for i in range(wanted):
        start, end = i * size // wanted, -((i + 1) * size // -wanted)
        matrix[i, start:end] = 1 / (end - start)
    return matrix


def _nearest(e: Emitter, n: Node) -> str:
    """Resize by whole factors; else a selection of the rows and columns that torch itself takes."""
    x = n.args[0]
    sizes, wanted = shape(x)[-2:], shape(n)[-2:]
    taken = []
    for at, size in enumerate(sizes):
        places = torch.arange(size, dtype=torch.float32).reshape(-1, *[1] * (1 - at))
        rows = n.target(places.expand(1, 1, *sizes).contiguous(), *n.args[1:])[0, 0]
        taken.append((rows[:, 0] if at == 0 else rows[0]).long())
    if all(
        not b % a and torch.equal(index, torch.arange(b) // (b // a))
        for a, b, index in zip(sizes, wanted, taken, strict=True)
    ):
        return e(
            "Resize",
            *(x, None, None, e.ints(shape(n))),
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
    for axis, index in enumerate(taken, 2):
        x = e("Gather", x, e.constant(index), axis=axis)
    return x  # type: ignore[no-any-return]


def _resize(mode: str) -> Exporter:
    """Between the values that are there; cubic with torch's coefficient."""

    def emit(e: Emitter, n: Node) -> str:
        if not ops.by_sizes(n):
            raise NotInOnnx("resampling by factors that are no quotients of the sizes")
        aligned = bool(n.args[2])
        return e(
            "Resize",
            *(n.args[0], None, None, e.ints(shape(n))),
            mode=mode,
            coordinate_transformation_mode="align_corners" if aligned else "half_pixel",
            cubic_coeff_a=-0.75 if mode == "cubic" else None,
        )

    return emit


# Shape


def _reshape(e: Emitter, n: Node) -> str:
    return e("Reshape", n.args[0], e.ints(shape(n)))


def _permute(e: Emitter, n: Node) -> str:
    return e("Transpose", n.args[0], perm=ops.permutation(n))


def _slice(e: Emitter, n: Node) -> str:
    at, start, end, step = ops.slice_args(n, 1)
    at = ops.dim(n, at)
    first, last, _ = slice(start, end).indices(shape(n.args[0])[at])
    return e("Slice", n.args[0], *(e.ints([i]) for i in (first, last, at, step)))


def _select(e: Emitter, n: Node) -> str:
    x, at, index = n.args
    at = ops.dim(x, at)
    position = torch.tensor(index % shape(x)[at], dtype=torch.int64)
    return e("Gather", x, e.constant(position), axis=at)


def _index_select(e: Emitter, n: Node) -> str:
    return e("Gather", n.args[0], n.args[2], axis=ops.dim(n.args[0], n.args[1]))


def _cat(e: Emitter, n: Node) -> str:
    at = ops.dim(n, argument(n, 1, "dim", 0))
    return e("Concat", *(e.value(p, dtype_of(n)) for p in n.args[0]), axis=at)


def _stack(e: Emitter, n: Node) -> str:
    at = ops.dim(n, argument(n, 1, "dim", 0))
    rows = [e("Unsqueeze", e.value(p, dtype_of(n)), e.ints([at])) for p in n.args[0]]
    return e("Concat", *rows, axis=at)


def _expand(e: Emitter, n: Node) -> str:
    return e("Expand", n.args[0], e.ints(shape(n)))


def _repeat(e: Emitter, n: Node) -> str:
    x, counts = n.args
    new = len(counts) - len(shape(x))
    base = e("Reshape", x, e.ints([*[1] * new, *shape(x)])) if new else x
    return e("Tile", base, e.ints(counts))


def _pad(e: Emitter, n: Node) -> str:
    x, flat = n.args[:2]
    rank, pairs = len(shape(x)), list(zip(flat[::2], flat[1::2], strict=True))[::-1]
    rest = [0] * (rank - len(pairs))
    pads = [*rest, *(a for a, _ in pairs), *rest, *(b for _, b in pairs)]
    return e("Pad", x, e.ints(pads), e.value(argument(n, 2, "value", 0), dtype_of(n)))


# Reduction


def _axes(e: Emitter, op: str, x: Any, axes: Sequence[int], keep: bool, since: int) -> str:
    """A reduction whose axes are an input since this opset, before it an attribute."""
    if e.opset >= since:
        return e(op, x, e.ints(axes), keepdims=int(keep))
    return e(op, x, axes=list(axes), keepdims=int(keep))


def _mean(e: Emitter, x: Any, axes: Sequence[int], keep: bool) -> str:
    return _axes(e, "ReduceMean", x, axes, keep, 18)


def _reduce(op: str, since: int) -> Exporter:
    def emit(e: Emitter, n: Node) -> str:
        x = n.args[0]
        given = argument(n, 1, "dim", None)
        given = [given] if isinstance(given, int) else given or range(len(shape(x)))
        axes = [ops.dim(x, d) for d in given]
        keep = bool(argument(n, 2, "keepdim", False))
        return _axes(e, op, e.value(x, dtype_of(n)), axes, keep, since)

    return emit


def _norm(e: Emitter, n: Node) -> str:
    """ReduceL2 or ReduceL1; ONNX has no other norm."""
    x, order = n.args[0], argument(n, 1, "ord", 2)
    if order not in (1, 2):
        raise NotInOnnx(f"the norm of order {order}")
    given = argument(n, 2, "dim", None)
    axes = [ops.dim(x, d) for d in given or range(len(shape(x)))]
    keep = bool(argument(n, 3, "keepdim", False))
    return _axes(e, f"ReduceL{order:g}", e.value(x, dtype_of(n)), axes, keep, 18)


def _variance(e: Emitter, n: Node) -> str:
    """Var, whose divisor is the number of values less ``correction`` (or ``unbiased``, 1)."""
    x = n.args[0]
    axes = [ops.dim(x, d) for d in argument(n, 1, "dim", None) or range(len(shape(x)))]
    correction = n.kwargs.get("correction", 1)
    if n.target in (aten.var.dim, aten.std.dim):
        correction = int(argument(n, 2, "unbiased", True))
    keep = bool(n.kwargs.get("keepdim", n.args[3] if len(n.args) > 3 else False))
    count = math.prod(shape(x)[d] for d in axes)
    centred = e("Sub", x, _mean(e, x, axes, True))
    total = _axes(e, "ReduceSum", e("Mul", centred, centred), axes, keep, 13)
    divisor = count - (1 if correction is None else correction)
    return e("Div", total, e.value(float(divisor), dtype_of(n)))


def _deviation(e: Emitter, n: Node) -> str:
    return e("Sqrt", _variance(e, n))


def _log_sum_exp(e: Emitter, n: Node) -> str:
    x, given, keep = arguments(n, 2, False)
    axes = [ops.dim(x, d) for d in ([given] if isinstance(given, int) else given)]
    return _axes(e, "ReduceLogSumExp", x, axes, bool(keep), 18)


def _product_along(e: Emitter, n: Node) -> str:
    x, at, keep = arguments(n, 2, False)
    return _axes(e, "ReduceProd", e.value(x, dtype_of(n)), [ops.dim(x, at)], bool(keep), 18)


def _product(e: Emitter, n: Node) -> str:
    x = n.args[0]
    return _axes(e, "ReduceProd", e.value(x, dtype_of(n)), range(len(shape(x))), False, 18)


def _running_sum(e: Emitter, n: Node) -> str:
    x, at = n.args[:2]
    return e("CumSum", e.value(x, dtype_of(n)), e.constant(torch.tensor(ops.dim(x, at))))


def _place(op: str) -> Exporter:
    """Where the largest or smallest value stands."""

    def emit(e: Emitter, n: Node) -> str:
        x, at, keep = arguments(n, 1, None, False)
        if at is None:
            raise NotInOnnx("over all dimensions")
        return e(op, x, axis=ops.dim(x, at), keepdims=int(keep))

    return emit


def _extreme(reduction: str, place: str) -> Exporter:
    """The largest or smallest value, and where it stands."""

    def emit(e: Emitter, n: Node) -> list[str]:
        x, at, keep = arguments(n, 2, False)
        axis = ops.dim(x, at)
        index = e(place, x, axis=axis, keepdims=int(keep))
        return [_axes(e, reduction, x, [axis], bool(keep), 18), index]

    return emit


def _top(e: Emitter, n: Node) -> list[str]:
    x, count, at, largest, _ = arguments(n, 2, -1, True, True)
    return e.several(2, "TopK", x, e.ints([count]), axis=ops.dim(x, at), largest=int(largest))


def _in_order(e: Emitter, n: Node) -> list[str]:
    given = ops.arguments(n)
    x = given["self"]
    at, falling = ops.dim(x, given["dim"]), int(given["descending"])
    return e.several(2, "TopK", x, e.ints([shape(x)[at]]), axis=at, largest=falling)


def _gather(e: Emitter, n: Node) -> str:
    x, at, index = n.args[:3]
    return e("GatherElements", x, index, axis=ops.dim(x, at))


def _scatter(e: Emitter, n: Node) -> str:
    x, at, index, source = n.args
    adds = n.target is aten.scatter_add.default
    if adds and e.opset < 16:
        raise NotInOnnx("scatter_add before opset 16")
    size = shape(index)
    if not isinstance(source, fx.Node):
        source = e.constant(torch.full(size, source, dtype=dtype_of(n)))
    elif shape(source) != size:  # torch passes over the rest
        source = e("Slice", source, e.ints([0] * len(size)), e.ints(size))
    reduction = "add" if adds else None
    return e("ScatterElements", x, index, source, axis=ops.dim(x, at), reduction=reduction)


def _kth(e: Emitter, n: Node) -> list[str]:
    """The k-th smallest value, and where it stands; of the median the lower of two."""
    given = ops.arguments(n)
    x = given["self"]
    at = ops.dim(x, given["dim"])
    k = given.get("k") or (shape(x)[at] + 1) // 2
    sides = e.several(2, "TopK", x, e.ints([k]), axis=at, largest=0)
    last = [e("Slice", v, e.ints([k - 1]), e.ints([k]), e.ints([at])) for v in sides]
    if given["keepdim"]:
        return last
    sizes = [s for d, s in enumerate(shape(x)) if d != at]
    return [e("Reshape", v, e.ints(sizes)) for v in last]


def _softmax(op: str) -> Exporter:
    return lambda e, n: e(op, e.value(n.args[0], dtype_of(n)), axis=ops.dim(n, n.args[1]))


OPERATORS: dict[Any, Exporter] = {
    **POINTWISE,
    # Layers
    aten.conv1d.default: _conv,
    aten.conv2d.default: _conv,
    aten.conv3d.default: _conv,
    aten.conv_transpose1d.default: _conv_transpose,
    aten.conv_transpose2d.input: _conv_transpose,
    aten.conv_transpose3d.input: _conv_transpose,
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    aten.addmm.default: _addmm,
    aten.batch_norm.default: _batch_norm,
    aten.layer_norm.default: _layer_norm,
    aten.group_norm.default: _group_norm,
    aten.softmax.int: _softmax("Softmax"),
    aten._softmax.default: _softmax("Softmax"),
    aten.log_softmax.int: _softmax("LogSoftmax"),
    aten._log_softmax.default: _softmax("LogSoftmax"),
    # Pooling and resampling
    aten.max_pool1d.default: _max_pool(1),
    aten.max_pool2d.default: _max_pool(2),
    aten.max_pool3d.default: _max_pool(3),
    aten.avg_pool2d.default: _average_pool(2),
    aten.avg_pool3d.default: _average_pool(3),
    aten.adaptive_avg_pool1d.default: _adaptive_average_pool(1),
    aten.adaptive_avg_pool2d.default: _adaptive_average_pool(2),
    aten._adaptive_avg_pool2d.default: _adaptive_average_pool(2),
    aten.adaptive_avg_pool3d.default: _adaptive_average_pool(3),
    aten.upsample_nearest2d.default: _nearest,
    aten.upsample_nearest2d.vec: _nearest,
    aten._upsample_nearest_exact2d.vec: _nearest,
    aten.upsample_bicubic2d.vec: _resize("cubic"),
    aten.upsample_bilinear2d.default: _resize("linear"),
    aten.upsample_bilinear2d.vec: _resize("linear"),
    # Shape
    ops.RESHAPE: _reshape,
    aten.unsqueeze.default: _reshape,
    aten.squeeze.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.squeeze.dims: _reshape,
    aten.permute.default: _permute,
    aten.transpose.int: _permute,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.index_select.default: _index_select,
    aten.gather.default: _gather,
    aten.scatter.value: _scatter,
    aten.scatter.src: _scatter,
    aten.scatter_add.default: _scatter,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.expand.default: _expand,
    aten.repeat.default: _repeat,
    aten.constant_pad_nd.default: _pad,
    # Reduction
    aten.mean.dim: _reduce("ReduceMean", 18),
    aten.mean.default: _reduce("ReduceMean", 18),
    aten.sum.dim_IntList: _reduce("ReduceSum", 13),
    aten.sum.default: _reduce("ReduceSum", 13),
    aten.amax.default: _reduce("ReduceMax", 18),
    aten.linalg_vector_norm.default: _norm,
    aten.amin.default: _reduce("ReduceMin", 18),
    aten.var.dim: _variance,
    aten.var.correction: _variance,
    aten.std.dim: _deviation,
    aten.std.correction: _deviation,
    aten.logsumexp.default: _log_sum_exp,
    aten.prod.dim_int: _product_along,
    aten.prod.default: _product,
    aten.cumsum.default: _running_sum,
    aten.argmax.default: _place("ArgMax"),
    aten.argmin.default: _place("ArgMin"),
    # Order
    aten.max.dim: _extreme("ReduceMax", "ArgMax"),
    aten.min.dim: _extreme("ReduceMin", "ArgMin"),
    aten.median.dim: _kth,
    aten.kthvalue.default: _kth,
    aten.topk.default: _top,
    aten.sort.default: _in_order,
    aten.sort.stable: _in_order,
}
