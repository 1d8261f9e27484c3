"""ATen operators in ONNX, one small function each.

An exporter takes the emitter and a node and gives the name of the node's value, or those of its values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ...converters import ops
from ...converters.ops import Node, aten, shape
from .export import Emitter, NotInOnnx

#: Of an operator with one result.
One = Callable[[Emitter, Node], str]
Exporter = One | Callable[[Emitter, Node], list[str]]


def _dtype(n: Node) -> torch.dtype:
    dtype: torch.dtype = n.meta["val"].dtype
    return dtype


def _argument(n: Node, index: int, name: str, default: Any) -> Any:
    """An argument given by position or by name."""
    return n.args[index] if len(n.args) > index else n.kwargs.get(name, default)


def _arguments(n: Node, required: int, *defaults: Any) -> list[Any]:
    """All of a node's arguments, those that are left out by default."""
    given = list(n.args)
    return [*given, *defaults[len(given) - required :]]


def _each(value: Any, count: int) -> list[int]:
    """A number, or a list of one, for each of the spatial dimensions."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * count if len(values) == 1 else values


# Pointwise


def _unary(op: str) -> Exporter:
    return lambda e, n: e(op, e.value(n.args[0], _dtype(n)))


def _binary(op: str) -> One:
    return lambda e, n: e(op, *(e.value(a, _dtype(n)) for a in n.args[:2]))


def _sum_with(op: str) -> Exporter:
    """Add or sub, whose second operand has a factor."""

    def emit(e: Emitter, n: Node) -> str:
        a, b = (e.value(x, _dtype(n)) for x in n.args[:2])
        alpha = n.kwargs.get("alpha", 1)
        return e(op, a, b if alpha == 1 else e("Mul", b, e.value(alpha, _dtype(n))))

    return emit


def _reversed_sub(e: Emitter, n: Node) -> str:
    if n.kwargs.get("alpha", 1) != 1 or len(n.args) > 2:
        raise NotInOnnx("rsub with alpha")
    return e("Sub", e.value(n.args[1], _dtype(n)), e.value(n.args[0], _dtype(n)))


def _division(e: Emitter, n: Node) -> str:
    mode = n.kwargs.get("rounding_mode")
    if mode == "floor":
        return _floor_division(e, n)
    quotient = _binary("Div")(e, n)
    return _towards_zero(e, quotient) if mode == "trunc" else quotient


def _floor_division(e: Emitter, n: Node) -> str:
    """floor(a / b) as torch computes it: from a less its remainder, which a multiple of b divides."""
    dtype = _dtype(n)
    if not dtype.is_floating_point:
        raise NotInOnnx("floor division of whole numbers")
    a, b = (e.value(x, dtype) for x in n.args[:2])
    rest = _modulus(e, n)
    quotient = e("Div", e("Sub", a, rest), b)
    one, half = e.value(1, dtype), e.value(0.5, dtype)
    quotient = e("Where", _opposite(e, rest, b, dtype), e("Sub", quotient, one), quotient)
    floor = e("Floor", quotient)
    floor = e("Where", e("Greater", e("Sub", quotient, floor), half), e("Add", floor, one), floor)
    return e("Where", e("Equal", b, e.value(0, dtype)), e("Div", a, b), floor)


def _opposite(e: Emitter, rest: str, divisor: str, dtype: torch.dtype) -> str:
    """Where a remainder that is not 0 has another sign than the divisor."""
    zero = e.value(0, dtype)
    differs = e("Xor", e("Less", rest, zero), e("Less", divisor, zero))
    return e("And", differs, e("Not", e("Equal", rest, zero)))


def _towards_zero(e: Emitter, x: str) -> str:
    return e("Mul", e("Sign", x), e("Floor", e("Abs", x)))


def _truncation(e: Emitter, n: Node) -> str:
    return _towards_zero(e, e.value(n.args[0], _dtype(n)))


def _modulus(e: Emitter, n: Node) -> str:
    """The remainder with the sign of the dividend, as C's fmod."""
    return e("Mod", *(e.value(a, _dtype(n)) for a in n.args[:2]), fmod=1)


def _remainder(e: Emitter, n: Node) -> str:
    """The remainder with the sign of the divisor, as Python's %."""
    dtype = _dtype(n)
    divisor, rest = e.value(n.args[1], dtype), _modulus(e, n)
    return e("Where", _opposite(e, rest, divisor, dtype), e("Add", rest, divisor), rest)


def _compare(op: str, negated: bool = False) -> Exporter:
    def emit(e: Emitter, n: Node) -> str:
        dtype = torch.result_type(
            *(a.meta["val"] if isinstance(a, fx.Node) else a for a in n.args[:2])
        )
        if dtype == torch.bool and op != "Equal":
            dtype = torch.int32
        result = e(op, *(e.value(a, dtype) for a in n.args[:2]))
        return e("Not", result) if negated else result

    return emit


def _logical(op: str) -> Exporter:
    def emit(e: Emitter, n: Node) -> str:
        if _dtype(n) != torch.bool:
            raise NotInOnnx("bits of integers")
        return e(op, *(e.value(a, torch.bool) for a in n.args))

    return emit


def _where(e: Emitter, n: Node) -> str:
    condition, *sides = n.args
    return e("Where", condition, *(e.value(a, _dtype(n)) for a in sides))


def _cast(e: Emitter, n: Node) -> str:
    x = n.args[0]
    return e.cast(e.value(x), _dtype(x), _dtype(n))


def _power(e: Emitter, n: Node) -> str:
    x, exponent = n.args
    if exponent == 2:
        return e("Mul", e.value(x, _dtype(n)), e.value(x, _dtype(n)))
    return _binary("Pow")(e, n)


def _clip(low: int | None, high: int | None) -> Exporter:
    """Clamp between arguments of these numbers."""

    def emit(e: Emitter, n: Node) -> str:
        def bound(index: int | None, name: str) -> Any:
            return None if index is None else _argument(n, index, name, None)

        result = e.value(n.args[0], _dtype(n))
        for op, given in (("Max", bound(low, "min")), ("Min", bound(high, "max"))):
            if given is not None:
                result = e(op, result, e.value(given, _dtype(n)))
        return result

    return emit


def _reciprocal_root(e: Emitter, n: Node) -> str:
    return e("Reciprocal", e("Sqrt", n.args[0]))


def _silu(e: Emitter, n: Node) -> str:
    return e("Mul", n.args[0], e("Sigmoid", n.args[0]))


def _gelu(e: Emitter, n: Node) -> str:
    x, dtype = n.args[0], _dtype(n)
    if n.kwargs.get("approximate", "none") == "tanh":
        cube = e("Mul", e("Mul", x, x), e("Mul", x, e.value(0.044715, dtype)))
        scaled = e("Mul", e("Add", x, cube), e.value(math.sqrt(2 / math.pi), dtype))
        inner = e("Tanh", scaled)
    else:
        inner = e("Erf", e("Mul", x, e.value(math.sqrt(0.5), dtype)))
    half = e("Mul", x, e.value(0.5, dtype))
    return e("Mul", half, e("Add", inner, e.value(1.0, dtype)))


def _hard_sigmoid(e: Emitter, n: Node) -> str:
    shifted = e("Add", n.args[0], e.value(3.0, _dtype(n)))
    clipped = e("Min", e("Max", shifted, e.value(0.0, _dtype(n))), e.value(6.0, _dtype(n)))
    return e("Div", clipped, e.value(6.0, _dtype(n)))


def _hard_swish(e: Emitter, n: Node) -> str:
    return e("Mul", n.args[0], _hard_sigmoid(e, n))


def _leaky_relu(e: Emitter, n: Node) -> str:
    return e("LeakyRelu", n.args[0], alpha=float(_argument(n, 1, "negative_slope", 0.01)))


def _elu(e: Emitter, n: Node) -> str:
    alpha, scale, input_scale = _arguments(n, 1, 1, 1, 1)[1:]
    if scale != 1 or input_scale != 1:
        raise NotInOnnx("elu with other factors than alpha")
    return e("Elu", n.args[0], alpha=float(alpha))


def _softplus(e: Emitter, n: Node) -> str:
    if _argument(n, 1, "beta", 1) != 1 or _argument(n, 2, "threshold", 20) < 20:
        raise NotInOnnx("softplus with a beta or a threshold of its own")
    return e("Softplus", n.args[0])


def _mish(e: Emitter, n: Node) -> str:
    return e("Mul", n.args[0], e("Tanh", e("Softplus", n.args[0])))


# Layers


def _conv(e: Emitter, n: Node) -> str:
    x, weight, bias, stride, padding, dilation, groups = _arguments(n, 2, None, 1, 0, 1, 1)
    d = len(shape(x)) - 2
    return e(
        "Conv",
        *(a for a in (x, weight, bias) if a is not None),
        kernel_shape=list(shape(weight)[2:]),
        strides=_each(stride, d),
        pads=2 * _each(padding, d),
        dilations=_each(dilation, d),
        group=groups,
    )


def _conv_transpose(e: Emitter, n: Node) -> str:
    x, weight, bias, stride, padding, out_padding, groups, dilation = _arguments(
        n, 2, None, 1, 0, 0, 1, 1
    )
    d = len(shape(x)) - 2
    return e(
        "ConvTranspose",
        *(a for a in (x, weight, bias) if a is not None),
        kernel_shape=list(shape(weight)[2:]),
        strides=_each(stride, d),
        pads=2 * _each(padding, d),
        output_padding=_each(out_padding, d),
        dilations=_each(dilation, d),
        group=groups,
    )


def _linear(e: Emitter, n: Node) -> str:
    x, weight, bias = _arguments(n, 2, None)
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
    channels, dtype = shape(x)[1], _dtype(n)
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
    x, sizes, weight, bias, epsilon = _arguments(n, 2, None, None, 1e-5)[:5]
    axes = list(range(-len(sizes), 0))
    if e.opset >= 17:
        ones = e.constant(torch.ones(tuple(sizes), dtype=_dtype(n)))
        scale = ones if weight is None else weight
        given = (x, scale) if bias is None else (x, scale, bias)
        return e("LayerNormalization", *given, axis=axes[0], epsilon=float(epsilon))
    centred = e("Sub", x, _mean(e, x, axes, True))
    variance = _mean(e, e("Mul", centred, centred), axes, True)
    deviation = e("Sqrt", e("Add", variance, e.value(float(epsilon), _dtype(n))))
    return _affine(e, e("Div", centred, deviation), weight, bias)


def _group_norm(e: Emitter, n: Node) -> str:
    x, groups, weight, bias, epsilon = _arguments(n, 2, None, None, 1e-5)[:5]
    size, dtype = shape(x), _dtype(n)
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
    kernel = _each(n.args[1], d)
    stride = _each(_argument(n, 2, "stride", None) or kernel, d)
    return kernel, stride, _each(_argument(n, 3, "padding", 0), d)


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
        dilation = _each(_argument(n, 4, "dilation", 1), d)
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
        divisor = _argument(n, 6, "divisor_override", None)
        counted = bool(_argument(n, 5, "count_include_pad", True)) or divisor is not None
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
        return e("Mul", pooled, e.value(math.prod(kernel) / divisor, _dtype(n)))

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
        rows, columns = (_bins(a, b, _dtype(n)) for a, b in zip(sizes, wanted, strict=True))
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


def _resize(mode: str) -> Exporter:
    def emit(e: Emitter, n: Node) -> str:
        aligned = mode == "linear" and bool(n.args[2])
        place = "align_corners" if aligned else "half_pixel"
        return e(
            "Resize",
            *(n.args[0], None, None, e.ints(shape(n))),
            mode=mode,
            coordinate_transformation_mode="asymmetric" if mode == "nearest" else place,
            nearest_mode="floor" if mode == "nearest" else None,
        )

    return emit


# Shape


def _reshape(e: Emitter, n: Node) -> str:
    return e("Reshape", n.args[0], e.ints(shape(n)))


def _permute(e: Emitter, n: Node) -> str:
    return e("Transpose", n.args[0], perm=ops.permutation(n))


def _turn(e: Emitter, n: Node) -> str:
    return e("Transpose", n.args[0], perm=[1, 0])


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
    at = ops.dim(n, _argument(n, 1, "dim", 0))
    return e("Concat", *(e.value(p, _dtype(n)) for p in n.args[0]), axis=at)


def _stack(e: Emitter, n: Node) -> str:
    at = ops.dim(n, _argument(n, 1, "dim", 0))
    rows = [e("Unsqueeze", e.value(p, _dtype(n)), e.ints([at])) for p in n.args[0]]
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
    return e("Pad", x, e.ints(pads), e.value(_argument(n, 2, "value", 0), _dtype(n)))


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
        given = _argument(n, 1, "dim", None)
        given = [given] if isinstance(given, int) else given or range(len(shape(x)))
        axes = [ops.dim(x, d) for d in given]
        keep = bool(_argument(n, 2, "keepdim", False))
        return _axes(e, op, e.value(x, _dtype(n)), axes, keep, since)

    return emit


def _norm(e: Emitter, n: Node) -> str:
    """ReduceL2 or ReduceL1; ONNX has no other norm."""
    x, order = n.args[0], _argument(n, 1, "ord", 2)
    if order not in (1, 2):
        raise NotInOnnx(f"the norm of order {order}")
    given = _argument(n, 2, "dim", None)
    axes = [ops.dim(x, d) for d in given or range(len(shape(x)))]
    keep = bool(_argument(n, 3, "keepdim", False))
    return _axes(e, f"ReduceL{order:g}", e.value(x, _dtype(n)), axes, keep, 18)


def _variance(e: Emitter, n: Node) -> str:
    """Var, whose divisor is the number of values less ``correction`` (or ``unbiased``, 1)."""
    x = n.args[0]
    axes = [ops.dim(x, d) for d in _argument(n, 1, "dim", None) or range(len(shape(x)))]
    correction = n.kwargs.get("correction", 1)
    if n.target in (aten.var.dim, aten.std.dim):
        correction = int(_argument(n, 2, "unbiased", True))
    keep = bool(n.kwargs.get("keepdim", n.args[3] if len(n.args) > 3 else False))
    count = math.prod(shape(x)[d] for d in axes)
    centred = e("Sub", x, _mean(e, x, axes, True))
    total = _axes(e, "ReduceSum", e("Mul", centred, centred), axes, keep, 13)
    divisor = count - (1 if correction is None else correction)
    return e("Div", total, e.value(float(divisor), _dtype(n)))


def _deviation(e: Emitter, n: Node) -> str:
    return e("Sqrt", _variance(e, n))


def _log_sum_exp(e: Emitter, n: Node) -> str:
    x, given, keep = _arguments(n, 2, False)
    axes = [ops.dim(x, d) for d in ([given] if isinstance(given, int) else given)]
    return _axes(e, "ReduceLogSumExp", x, axes, bool(keep), 18)


def _product_along(e: Emitter, n: Node) -> str:
    x, at, keep = _arguments(n, 2, False)
    return _axes(e, "ReduceProd", e.value(x, _dtype(n)), [ops.dim(x, at)], bool(keep), 18)


def _running_sum(e: Emitter, n: Node) -> str:
    x, at = n.args[:2]
    return e("CumSum", e.value(x, _dtype(n)), e.constant(torch.tensor(ops.dim(x, at))))


def _place(op: str) -> Exporter:
    """Where the largest or smallest value stands."""

    def emit(e: Emitter, n: Node) -> str:
        x, at, keep = _arguments(n, 1, None, False)
        if at is None:
            raise NotInOnnx("over all dimensions")
        return e(op, x, axis=ops.dim(x, at), keepdims=int(keep))

    return emit


def _extreme(reduction: str, place: str) -> Exporter:
    """The largest or smallest value, and where it stands."""

    def emit(e: Emitter, n: Node) -> list[str]:
        x, at, keep = _arguments(n, 2, False)
        axis = ops.dim(x, at)
        index = e(place, x, axis=axis, keepdims=int(keep))
        return [_axes(e, reduction, x, [axis], bool(keep), 18), index]

    return emit


def _top(e: Emitter, n: Node) -> list[str]:
    x, count, at, largest, _ = _arguments(n, 2, -1, True, True)
    return e.several(2, "TopK", x, e.ints([count]), axis=ops.dim(x, at), largest=int(largest))


def _in_order(e: Emitter, n: Node) -> list[str]:
    given = ops.arguments(n)
    x = given["self"]
    at, falling = ops.dim(x, given["dim"]), int(given["descending"])
    return e.several(2, "TopK", x, e.ints([shape(x)[at]]), axis=at, largest=falling)


def _gather(e: Emitter, n: Node) -> str:
    x, at, index = n.args[:3]
    return e("GatherElements", x, index, axis=ops.dim(x, at))


def _softmax(op: str) -> Exporter:
    return lambda e, n: e(op, e.value(n.args[0], _dtype(n)), axis=ops.dim(n, n.args[1]))


OPERATORS: dict[Any, Exporter] = {
    # Pointwise
    aten.add.Tensor: _sum_with("Add"),
    aten.add.Scalar: _sum_with("Add"),
    aten.sub.Tensor: _sum_with("Sub"),
    aten.sub.Scalar: _sum_with("Sub"),
    aten.rsub.Scalar: _reversed_sub,
    aten.rsub.Tensor: _reversed_sub,
    aten.mul.Tensor: _binary("Mul"),
    aten.mul.Scalar: _binary("Mul"),
    aten.div.Tensor: _division,
    aten.div.Scalar: _division,
    aten.div.Tensor_mode: _division,
    aten.floor_divide.default: _floor_division,
    aten.fmod.Scalar: _modulus,
    aten.fmod.Tensor: _modulus,
    aten.remainder.Scalar: _remainder,
    aten.remainder.Tensor: _remainder,
    aten.pow.Tensor_Scalar: _power,
    aten.pow.Tensor_Tensor: _power,
    aten.maximum.default: _binary("Max"),
    aten.minimum.default: _binary("Min"),
    aten.neg.default: _unary("Neg"),
    aten.abs.default: _unary("Abs"),
    aten.sign.default: _unary("Sign"),
    aten.exp.default: _unary("Exp"),
    aten.log.default: _unary("Log"),
    aten.sqrt.default: _unary("Sqrt"),
    aten.rsqrt.default: _reciprocal_root,
    aten.reciprocal.default: _unary("Reciprocal"),
    aten.sin.default: _unary("Sin"),
    aten.cos.default: _unary("Cos"),
    aten.tan.default: _unary("Tan"),
    aten.asin.default: _unary("Asin"),
    aten.acos.default: _unary("Acos"),
    aten.atan.default: _unary("Atan"),
    aten.sinh.default: _unary("Sinh"),
    aten.cosh.default: _unary("Cosh"),
    aten.erf.default: _unary("Erf"),
    aten.floor.default: _unary("Floor"),
    aten.ceil.default: _unary("Ceil"),
    aten.round.default: _unary("Round"),
    aten.trunc.default: _truncation,
    aten.sigmoid.default: _unary("Sigmoid"),
    aten.tanh.default: _unary("Tanh"),
    aten.relu.default: _unary("Relu"),
    aten.leaky_relu.default: _leaky_relu,
    aten.silu.default: _silu,
    aten.elu.default: _elu,
    aten.softplus.default: _softplus,
    aten.mish.default: _mish,
    aten.gelu.default: _gelu,
    aten.hardsigmoid.default: _hard_sigmoid,
    aten.hardswish.default: _hard_swish,
    aten.hardtanh.default: _clip(1, 2),
    aten.clamp.default: _clip(1, 2),
    aten.clamp.Tensor: _clip(1, 2),
    aten.clamp_min.default: _clip(1, None),
    aten.clamp_max.default: _clip(None, 1),
    aten._to_copy.default: _cast,
    # Comparison and selection
    aten.ge.Scalar: _compare("GreaterOrEqual"),
    aten.ge.Tensor: _compare("GreaterOrEqual"),
    aten.gt.Scalar: _compare("Greater"),
    aten.gt.Tensor: _compare("Greater"),
    aten.le.Scalar: _compare("LessOrEqual"),
    aten.le.Tensor: _compare("LessOrEqual"),
    aten.lt.Scalar: _compare("Less"),
    aten.lt.Tensor: _compare("Less"),
    aten.eq.Scalar: _compare("Equal"),
    aten.eq.Tensor: _compare("Equal"),
    aten.ne.Scalar: _compare("Equal", negated=True),
    aten.ne.Tensor: _compare("Equal", negated=True),
    aten.logical_and.default: _logical("And"),
    aten.logical_or.default: _logical("Or"),
    aten.logical_xor.default: _logical("Xor"),
    aten.logical_not.default: _logical("Not"),
    aten.bitwise_and.Tensor: _logical("And"),
    aten.bitwise_or.Tensor: _logical("Or"),
    aten.bitwise_xor.Tensor: _logical("Xor"),
    aten.bitwise_not.default: _logical("Not"),
    **dict.fromkeys(ops.SELECT, _where),
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
    aten.upsample_nearest2d.default: _resize("nearest"),
    aten.upsample_nearest2d.vec: _resize("nearest"),
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
    aten.t.default: _turn,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.index_select.default: _index_select,
    aten.gather.default: _gather,
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
    aten.cumsum.default: _running_sum,
    aten.argmax.default: _place("ArgMax"),
    aten.argmin.default: _place("ArgMin"),
    # Order
    aten.max.dim: _extreme("ReduceMax", "ArgMax"),
    aten.min.dim: _extreme("ReduceMin", "ArgMin"),
    aten.topk.default: _top,
    aten.sort.default: _in_order,
    aten.sort.stable: _in_order,
    aten.argsort.default: lambda e, n: _in_order(e, n)[1],
}
