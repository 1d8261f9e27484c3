"""ONNX operations as primitives, opsets 11 to 21."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from .graph import LyngorError, kind_of
from .lowering import Lowering, wrap


@dataclass
class Node:
    """One ONNX node: values of its inputs (None where left out), attributes, opset."""

    args: list[Any]
    attrs: dict[str, Any]
    opset: int
    outputs: int

    def arg(self, i: int) -> Any:
        """An input, or None where it is left out."""
        return self.args[i] if i < len(self.args) else None

    def ints(self, i: int, name: str) -> list[int] | None:
        """Known integers from an input, or in older opsets from an attribute."""
        value = self.arg(i)
        if value is None:
            found = self.attrs.get(name)
            return None if found is None else list(found)
        if not isinstance(value, Tensor):
            raise LyngorError(f"{name} depends on an input; shapes are static")
        return [int(v) for v in value.reshape(-1).tolist()]

    def text(self, name: str, default: str) -> str:
        """A text attribute."""
        value = self.attrs.get(name, default)
        return value.decode() if isinstance(value, bytes) else str(value)


Lower = Callable[[Lowering, Node], Any]


def _rank(out: Lowering, value: Any) -> int:
    return len(out.shape(out.ref(value)))


def _binary(op: str) -> Lower:
    return lambda out, n: out.binary(op, n.args[0], n.args[1])


def _unary(op: str) -> Lower:
    return lambda out, n: out.emit(op, n.args[0])


def _several(op: str) -> Lower:
    def lower(out: Lowering, n: Node) -> Any:
        result = n.args[0]
        for other in n.args[1:]:
            result = out.binary(op, result, other)
        return result

    return lower


def _padding(n: Node, spatial: int) -> tuple[list[int], list[int]]:
    """Padding that both sides share, and what must be padded before, as torch counts it."""
    pads = list(n.attrs.get("pads", [0] * (2 * spatial)))
    before, after = pads[:spatial], pads[spatial:]
    if n.text("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise LyngorError("auto_pad; allowed: explicit pads")
    if before == after:
        return before, []
    flat = [p for i in reversed(range(spatial)) for p in (before[i], after[i])]
    return [0] * spatial, flat


def _conv(out: Lowering, n: Node) -> Any:
    spatial = _rank(out, n.args[1]) - 2
    padding, extra = _padding(n, spatial)
    x = n.args[0]
    if extra:
        x = out.emit("pad", x, pads=extra, mode="constant", value=0.0)
    ones = [1] * spatial
    stride, dilation = n.attrs.get("strides", ones), n.attrs.get("dilations", ones)
    groups = n.attrs.get("group", 1)
    return out.conv(x, n.args[1], n.arg(2), stride, padding, dilation, groups)


def _conv_transpose(out: Lowering, n: Node) -> Any:
    padding, extra = _padding(n, 2)
    if _rank(out, n.args[1]) != 4 or extra or "output_shape" in n.attrs:
        raise LyngorError("allowed: 2-D transposed convolutions with the same pads on both sides")
    bias = n.arg(2)
    return out.emit(
        "conv_transpose",
        n.args[0],
        n.args[1],
        *([] if bias is None else [bias]),
        stride=list(n.attrs.get("strides", [1, 1])),
        padding=padding,
        output_padding=list(n.attrs.get("output_padding", [0, 0])),
        dilation=list(n.attrs.get("dilations", [1, 1])),
        groups=n.attrs.get("group", 1),
    )


def _gemm(out: Lowering, n: Node) -> Any:
    a, b, c = n.args[0], n.args[1], n.arg(2)
    alpha, beta = n.attrs.get("alpha", 1.0), n.attrs.get("beta", 1.0)
    if n.attrs.get("transA", 0):
        a = out.emit("permute", a, dims=[1, 0])
    if n.attrs.get("transB", 0) and alpha == beta == 1 and (c is None or _rank(out, c) == 1):
        return out.dense(a, b, c)
    if n.attrs.get("transB", 0):
        b = b.t() if isinstance(b, Tensor) else out.emit("permute", b, dims=[1, 0])
    product = out.scaled(out.emit("matmul", a, b), alpha)
    return product if c is None else out.binary("add", product, out.scaled(c, beta))


def _matmul(out: Lowering, n: Node) -> Any:
    weight = n.args[1]
    if isinstance(weight, Tensor) and weight.dim() == 2:
        return out.dense(n.args[0], weight.t().contiguous(), None)
    return out.emit("matmul", n.args[0], weight)


def _batch_norm(out: Lowering, n: Node) -> Any:
    if n.attrs.get("training_mode", 0):
        raise LyngorError("a batch normalisation in training mode; export the network in eval")
    x, weight, bias, mean, variance = n.args
    return out.batch_norm(x, weight, bias, mean, variance, n.attrs.get("epsilon", 1e-5))


def _pool(op: str) -> Lower:
    def lower(out: Lowering, n: Node) -> Any:
        kernel = n.attrs["kernel_shape"]
        if len(kernel) != 2 or n.outputs > 1:
            raise LyngorError("allowed: 2-D pooling without indices")
        padding, extra = _padding(n, 2)
        if extra:
            raise LyngorError("allowed: the same pads on both sides")
        stride, ceil = n.attrs.get("strides", [1, 1]), bool(n.attrs.get("ceil_mode", 0))
        dilation = n.attrs.get("dilations", [1, 1])
        count = bool(n.attrs.get("count_include_pad", 0))
        return out.pool(op, n.args[0], kernel, stride, padding, dilation, ceil, count)

    return lower


def _global_pool(op: str) -> Lower:
    return lambda out, n: out.reduce(op, n.args[0], list(range(2, _rank(out, n.args[0]))), True)


def _reshape(out: Lowering, n: Node) -> Any:
    shape = n.ints(1, "shape") or []
    old = out.shape(out.ref(n.args[0]))
    if not n.attrs.get("allowzero", 0):
        shape = [old[i] if s == 0 else s for i, s in enumerate(shape)]
    return out.reshape(n.args[0], shape)


def _flatten(out: Lowering, n: Node) -> Any:
    shape = out.shape(out.ref(n.args[0]))
    axis = n.attrs.get("axis", 1)
    axis = axis + len(shape) if axis < 0 else axis
    return out.reshape(n.args[0], [torch.Size(shape[:axis]).numel(), -1])


def _transpose(out: Lowering, n: Node) -> Any:
    rank = _rank(out, n.args[0])
    return out.emit("permute", n.args[0], dims=list(n.attrs.get("perm", range(rank)[::-1])))


def _unsqueeze(out: Lowering, n: Node) -> Any:
    axes = n.ints(1, "axes") or []
    shape = list(out.shape(out.ref(n.args[0])))
    for axis in sorted(wrap(a, len(shape) + len(axes)) for a in axes):
        shape.insert(axis, 1)
    return out.reshape(n.args[0], shape)


def _slice(out: Lowering, n: Node) -> Any:
    starts, stops = n.ints(1, "starts") or [], n.ints(2, "ends") or []
    axes = n.ints(3, "axes") or list(range(len(starts)))
    steps = n.ints(4, "steps") or [1] * len(starts)
    result = n.args[0]
    for axis, start, stop, step in zip(axes, starts, stops, steps, strict=True):
        result = out.slice(result, axis, start, stop, step)
    return result


def _gather(out: Lowering, n: Node) -> Any:
    x, index = n.args
    axis = wrap(n.attrs.get("axis", 0), _rank(out, x))
    if isinstance(index, Tensor):
        size = out.shape(out.ref(x))[axis]
        if index.dim() == 0:
            return out.select(x, axis, int(index))
        index = torch.where(index < 0, index + size, index)
    return out.emit("take", x, index, dim=axis)


def _split(out: Lowering, n: Node) -> Any:
    x = out.ref(n.args[0])
    axis = wrap(n.attrs.get("axis", 0), _rank(out, x))
    size = out.shape(x)[axis]
    piece = -(-size // n.outputs)
    even = [min(piece, size - i) for i in range(0, size, piece)]
    return out.split(x, n.ints(1, "split") or even, axis)


def _expand(out: Lowering, n: Node) -> Any:
    old = out.shape(out.ref(n.args[0]))
    wanted = n.ints(1, "shape") or []
    return out.emit("expand", n.args[0], shape=list(np.broadcast_shapes(old, wanted)))


def _pad(out: Lowering, n: Node) -> Any:
    pads = n.ints(1, "pads") or []
    rank = len(pads) // 2
    if n.arg(3) is not None:
        raise LyngorError("pads of chosen axes; allowed: pads of all")
    value = n.arg(2)
    mode = {"edge": "replicate"}.get(n.text("mode", "constant"), n.text("mode", "constant"))
    flat = [p for i in reversed(range(rank)) for p in (pads[i], pads[i + rank])]
    while mode != "constant" and flat[-2:] == [0, 0] and len(flat) > 4:
        flat = flat[:-2]
    number = float(value) if isinstance(value, Tensor) else 0.0
    return out.emit("pad", n.args[0], pads=flat, mode=mode, value=number)


def _cast(out: Lowering, n: Node) -> Any:
    return out.typed(n.args[0], kind_of_onnx(n.attrs["to"]))


def kind_of_onnx(number: int) -> str:
    """The graph's type for ONNX's number of a type.

    Raises:
        LyngorError: A type that torch does not have.
    """
    try:
        array = np.empty(0, onnx.helper.tensor_dtype_to_np_dtype(number))
        return kind_of(torch.from_numpy(array).dtype)
    except (KeyError, TypeError) as error:
        raise LyngorError(f"type number {number}; allowed: numbers and truth values") from error


def _clip(out: Lowering, n: Node) -> Any:
    bounds = [out.scalar_like(b, n.args[0]) for b in (n.arg(1), n.arg(2)) if b is not None]
    low, high = n.arg(1) is not None, n.arg(2) is not None
    return out.emit("clamp", n.args[0], *bounds, low=low, high=high) if bounds else n.args[0]


def _where(out: Lowering, n: Node) -> Any:
    condition, yes, no = n.args
    return out.emit("where", condition, out.scalar_like(yes, no), out.scalar_like(no, yes))


def _reduce(op: str) -> Lower:
    def lower(out: Lowering, n: Node) -> Any:
        axes = n.ints(1, "axes")
        if axes is None and n.attrs.get("noop_with_empty_axes", 0):
            return n.args[0]
        return out.reduce(op, n.args[0], axes, bool(n.attrs.get("keepdims", 1)))

    return lower


def _softmax(out: Lowering, n: Node) -> Any:
    rank = _rank(out, n.args[0])
    axis = wrap(n.attrs.get("axis", -1 if n.opset >= 13 else 1), rank)
    if n.opset < 13 and axis != rank - 1:
        raise LyngorError("softmax over several axes, as before opset 13; export with 13 or later")
    return out.emit("softmax", n.args[0], dim=axis)


def _layer_norm(out: Lowering, n: Node) -> Any:
    shape = out.shape(out.ref(n.args[0]))
    axis = wrap(n.attrs.get("axis", -1), len(shape))
    extra = [a for a in n.args[1:] if a is not None]
    eps = n.attrs.get("epsilon", 1e-5)
    return out.emit("layer_norm", n.args[0], *extra, shape=list(shape[axis:]), eps=eps, affine=True)


def _resize(out: Lowering, n: Node) -> Any:
    x = out.ref(n.args[0])
    sizes = n.ints(3, "sizes")
    if not sizes:
        scales = n.arg(2)
        if not isinstance(scales, Tensor):
            raise LyngorError("scales that are not known at build time")
        sizes = [int(s * f) for s, f in zip(out.shape(x), scales.tolist(), strict=True)]
    mode, place = n.text("mode", "nearest"), n.text("coordinate_transformation_mode", "half_pixel")
    if mode == "nearest" and not (
        place == "asymmetric" and n.text("nearest_mode", "round_prefer_floor") == "floor"
    ):
        raise LyngorError(f"nearest with {place}; allowed: asymmetric with floor, as torch exports")
    if mode == "linear" and place not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        raise LyngorError(f"linear with {place}; allowed: half_pixel, align_corners")
    if mode not in ("nearest", "linear") or len(sizes) != 4:
        raise LyngorError(
            f"{mode} of rank {len(sizes)}; allowed: nearest and linear of [N, C, H, W]"
        )
    kind = "nearest" if mode == "nearest" else "bilinear"
    return out.emit("upsample", x, size=sizes[2:], mode=kind, align=place == "align_corners")


def _leaky_relu(out: Lowering, n: Node) -> Any:
    slope = out.binary("mul", n.args[0], float(n.attrs.get("alpha", 0.01)))
    return out.emit("where", out.binary("ge", n.args[0], 0.0), n.args[0], slope)


def _dropout(out: Lowering, n: Node) -> Any:
    return [n.args[0]]


LOWERINGS: dict[str, Lower] = {
    "Identity": lambda out, n: n.args[0],
    "Add": _binary("add"),
    "Sub": _binary("sub"),
    "Mul": _binary("mul"),
    "Div": _binary("div"),
    "Pow": _binary("pow"),
    "Max": _several("maximum"),
    "Min": _several("minimum"),
    "Sum": _several("add"),
    "Equal": _binary("eq"),
    "Less": _binary("lt"),
    "LessOrEqual": _binary("le"),
    "Greater": _binary("gt"),
    "GreaterOrEqual": _binary("ge"),
    "And": _binary("logical_and"),
    "Or": _binary("logical_or"),
    "Xor": _binary("logical_xor"),
    "Not": _unary("logical_not"),
    "Neg": _unary("neg"),
    "Abs": _unary("abs"),
    "Relu": _unary("relu"),
    "Sqrt": _unary("sqrt"),
    "Exp": _unary("exp"),
    "Log": _unary("log"),
    "Tanh": _unary("tanh"),
    "Sigmoid": _unary("sigmoid"),
    "Round": _unary("round"),
    "Floor": _unary("floor"),
    "Ceil": _unary("ceil"),
    "Reciprocal": lambda out, n: out.binary("div", 1.0, n.args[0]),
    "LeakyRelu": _leaky_relu,
    "Clip": _clip,
    "Where": _where,
    "Cast": _cast,
    "Dropout": _dropout,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _batch_norm,
    "MaxPool": _pool("max_pool"),
    "AveragePool": _pool("avg_pool"),
    "GlobalAveragePool": _global_pool("mean"),
    "GlobalMaxPool": _global_pool("amax"),
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Squeeze": lambda out, n: out.squeeze(n.args[0], n.ints(1, "axes")),
    "Slice": _slice,
    "Gather": _gather,
    "GatherElements": lambda out, n: out.emit(
        "gather", n.args[0], n.args[1], dim=wrap(n.attrs.get("axis", 0), _rank(out, n.args[0]))
    ),
    "Split": _split,
    "Concat": lambda out, n: out.cat(n.args, n.attrs["axis"]),
    "Expand": _expand,
    "Tile": lambda out, n: out.emit("tile", n.args[0], repeats=n.ints(1, "repeats")),
    "Pad": _pad,
    "ReduceMean": _reduce("mean"),
    "ReduceSum": _reduce("sum"),
    "ReduceMax": _reduce("amax"),
    "ReduceMin": _reduce("amin"),
    "Softmax": _softmax,
    "LayerNormalization": _layer_norm,
    "Resize": _resize,
}
