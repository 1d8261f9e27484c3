"""ATen operations as primitives: one line each, arguments in the order of the ATen schema."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .graph import LyngorError, Ref, kind_of
from .lowering import Lowering, pair, wrap

Args = list[Any]
Lower = Callable[[Lowering, Args], Any]

RANDOM = frozenset(
    ("rand", "randn", "randint", "rand_like", "randn_like", "bernoulli", "normal", "randperm")
)

# ``torch.dtype`` as TorchScript numbers it.
_TYPES = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    11: torch.bool,
    15: torch.bfloat16,
}


def _kind(number: Any) -> str:
    if isinstance(number, torch.dtype):
        return kind_of(number)
    if number not in _TYPES:
        raise LyngorError(f"type number {number}; allowed: real numbers, integers, bool")
    return kind_of(_TYPES[number])


def _binary(op: str) -> Lower:
    return lambda out, a: out.binary(op, a[0], a[1])


def _unary(op: str) -> Lower:
    return lambda out, a: out.emit(op, _floating(out, a[0]))


def _plain(op: str) -> Lower:
    return lambda out, a: out.emit(op, a[0])


def _floating(out: Lowering, value: Any) -> Any:
    return out.typed(value, "float")


def _same(out: Lowering, a: Args) -> Any:
    return a[0]


def _add(out: Lowering, a: Args) -> Any:
    return out.binary("add", a[0], out.scaled(a[1], a[2] if len(a) > 2 else 1))


def _sub(out: Lowering, a: Args) -> Any:
    return out.binary("sub", a[0], out.scaled(a[1], a[2] if len(a) > 2 else 1))


def _rsub(out: Lowering, a: Args) -> Any:
    return out.binary("sub", a[1], out.scaled(a[0], a[2] if len(a) > 2 else 1))


def _addmm(out: Lowering, a: Args) -> Any:
    bias, x, w, beta, alpha = a
    product = out.scaled(out.emit("matmul", x, w), alpha)
    return out.binary("add", product, out.scaled(bias, beta))


def _addcmul(out: Lowering, a: Args) -> Any:
    return out.binary("add", a[0], out.scaled(out.binary("mul", a[1], a[2]), a[3]))


def _lerp(out: Lowering, a: Args) -> Any:
    return out.binary("add", a[0], out.binary("mul", a[2], out.binary("sub", a[1], a[0])))


def _div(out: Lowering, a: Args) -> Any:
    mode = a[2] if len(a) > 2 else None
    if mode is None:
        return out.binary("div", a[0], a[1])
    if mode == "floor":
        return out.emit("floor", out.binary("div", a[0], a[1]))
    raise LyngorError(f"div with rounding_mode={mode!r}; allowed: None and 'floor'")


def _clamp(out: Lowering, a: Args) -> Any:
    low, high = a[1], (a[2] if len(a) > 2 else None)
    bounds = [out.scalar_like(b, a[0]) for b in (low, high) if b is not None]
    return out.emit("clamp", a[0], *bounds, low=low is not None, high=high is not None)


def _to(out: Lowering, a: Args) -> Any:
    if isinstance(a[1], (Ref, Tensor)):
        kind = out.dtype(a[1]) if isinstance(a[1], Ref) else kind_of(a[1].dtype)
        return out.typed(a[0], kind)
    # aten::to(x, dtype, ...) or aten::to(x, device, dtype, ...); None keeps the type. A device
    # arrives as torch.device or as text.
    number = a[1] if isinstance(a[1], int) and not isinstance(a[1], bool) else a[2]
    is_number = isinstance(number, int) and not isinstance(number, bool)
    return out.typed(a[0], _kind(number)) if is_number else a[0]


def _index(out: Lowering, a: Args) -> Any:
    places = [(d, i) for d, i in enumerate(a[1]) if i is not None]
    if len(places) != 1:
        raise LyngorError(f"indexing with {len(places)} index tensors; allowed: one")
    dim, index = places[0]
    kind = out.dtype(index) if isinstance(index, Ref) else kind_of(index.dtype)
    if kind in ("bool", "uint8"):
        raise LyngorError("indexing with a mask: the result's shape depends on data")
    return out.emit("take", a[0], index, dim=dim)


def _norm_index(out: Lowering, x: Any, index: Any, dim: int) -> Any:
    """Negative constant indices counted from the front."""
    if isinstance(index, Tensor) and bool((index < 0).any()):
        size = out.shape(out.ref(x))[dim]
        return torch.where(index < 0, index + size, index)
    return index


def _take(out: Lowering, x: Any, dim: int, index: Any) -> Any:
    dim = wrap(dim, len(out.shape(out.ref(x))))
    return out.emit("take", x, _norm_index(out, x, index, dim), dim=dim)


def _filled(number: int, shape: int | None, dtype: int) -> Lower:
    """A tensor of one number.

    Args:
        number: The number.
        shape: Place of the shape among the arguments; None: the shape of the first.
        dtype: Place of the type; where it is None, the type of the first, else floating.
    """

    def lower(out: Lowering, a: Args) -> Any:
        like = a[0] if isinstance(a[0], Ref) else None
        sizes = out.shape(a[0]) if shape is None else a[shape]
        if len(a) > dtype and a[dtype] is not None:
            kind = _kind(a[dtype])
        else:
            kind = "float" if like is None else out.dtype(like)
        return out.full(sizes, number, kind)

    return lower


def _full(out: Lowering, a: Args) -> Any:
    kind = _kind(a[2]) if a[2] is not None else kind_of(torch.tensor(a[1]).dtype)
    return out.full(a[0], _item(a[1]), kind)


def _new_full(out: Lowering, a: Args) -> Any:
    return out.full(a[1], _item(a[2]), _kind(a[3]) if a[3] is not None else out.dtype(a[0]))


def _full_like(out: Lowering, a: Args) -> Any:
    kind = _kind(a[2]) if a[2] is not None else out.dtype(a[0])
    return out.full(out.shape(a[0]), _item(a[1]), kind)


def _item(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _expand(out: Lowering, a: Args) -> Any:
    ref = out.ref(a[0])
    shape = out.shape(ref)
    lead = len(a[1]) - len(shape)
    sizes = [shape[i - lead] if s == -1 else int(s) for i, s in enumerate(a[1])]
    return out.emit("expand", ref, shape=sizes)


def _transpose(out: Lowering, a: Args) -> Any:
    dims = list(range(len(out.shape(out.ref(a[0])))))
    if len(a) > 1:
        i, j = wrap(a[1], len(dims)), wrap(a[2], len(dims))
    else:
        i, j = (0, 1) if len(dims) > 1 else (0, 0)
    dims[i], dims[j] = dims[j], dims[i]
    return out.emit("permute", a[0], dims=dims)


def _permute(out: Lowering, a: Args) -> Any:
    return out.emit("permute", a[0], dims=[wrap(d, len(a[1])) for d in a[1]])


def _chunk(out: Lowering, a: Args) -> Any:
    size = out.shape(a[0])[wrap(a[2], len(out.shape(a[0])))]
    return _pieces(out, a[0], -(-size // a[1]), a[2])


def _pieces(out: Lowering, x: Any, piece: int, dim: int) -> Any:
    size = out.shape(x)[wrap(dim, len(out.shape(x)))]
    return out.split(x, [min(piece, size - i) for i in range(0, size, piece)], dim)


def _split(out: Lowering, a: Args) -> Any:
    return _pieces(out, a[0], a[1], a[2]) if isinstance(a[1], int) else out.split(*a[:3])


def _convolution(out: Lowering, a: Args) -> Any:
    x, w, bias, stride, padding, dilation, transposed, output_padding, groups = a[:9]
    if not transposed:
        return out.conv(x, w, bias, stride, padding, dilation, groups)
    if len(out.shape(out.ref(w))) != 4:
        raise LyngorError("a transposed convolution that is not 2-D")
    return out.emit(
        "conv_transpose",
        x,
        w,
        *([] if bias is None else [bias]),
        stride=pair(stride),
        padding=pair(padding),
        output_padding=pair(output_padding),
        dilation=pair(dilation),
        groups=groups,
    )


def _convolution_mode(out: Lowering, a: Args) -> Any:
    x, w, bias, stride, mode, dilation, groups = a
    kernel = out.shape(out.ref(w))[2:]
    spans = [d * (k - 1) for d, k in zip(pair(dilation, len(kernel)), kernel, strict=True)]
    if mode == "same" and any(s % 2 for s in spans):
        pads = [p for s in reversed(spans) for p in (s // 2, s - s // 2)]
        x = out.emit("pad", x, pads=pads, mode="constant", value=0.0)
        mode = "valid"
    padding = [s // 2 if mode == "same" else 0 for s in spans]
    return out.conv(x, w, bias, stride, padding, dilation, groups)


def _batch_norm(out: Lowering, a: Args) -> Any:
    x, weight, bias, mean, variance, training, _, eps = a[:8]
    if training:
        raise LyngorError("a batch normalisation in training mode; call net.eval()")
    return out.batch_norm(x, weight, bias, mean, variance, eps)


def _dropout(out: Lowering, a: Args) -> Any:
    if a[2] and a[1]:
        raise LyngorError("a dropout in training mode; call net.eval()")
    return a[0]


def _max_pool(out: Lowering, a: Args) -> Any:
    return out.pool("max_pool", *a[:6])


def _avg_pool(out: Lowering, a: Args) -> Any:
    x, kernel, stride, padding, ceil, count, divisor = a
    return out.pool("avg_pool", x, kernel, stride, padding, 1, ceil, count, divisor)


def _layer_norm(out: Lowering, a: Args) -> Any:
    x, shape, weight, bias, eps = a[:5]
    extra = [v for v in (weight, bias) if v is not None]
    return out.emit("layer_norm", x, *extra, shape=shape, eps=eps, affine=weight is not None)


def _embedding(out: Lowering, a: Args) -> Any:
    return out.emit("take", a[0], a[1], dim=0)


def _upsample(mode: str) -> Lower:
    def lower(out: Lowering, a: Args) -> Any:
        x, size = a[0], a[1]
        align = bool(a[2]) if mode == "bilinear" else False
        if size is None:
            factors = next(v for v in reversed(a) if isinstance(v, list))
            size = [int(s * f) for s, f in zip(out.shape(x)[-2:], factors, strict=True)]
        return out.emit("upsample", x, size=[int(s) for s in size], mode=mode, align=align)

    return lower


def _pad(out: Lowering, a: Args) -> Any:
    mode = a[2] if len(a) > 2 and isinstance(a[2], str) else "constant"
    value = a[-1] if isinstance(a[-1], (int, float)) and mode == "constant" else 0.0
    return out.emit("pad", a[0], pads=[int(p) for p in a[1]], mode=mode, value=float(value))


def _reduce(op: str) -> Lower:
    def lower(out: Lowering, a: Args) -> Any:
        dims = a[1] if len(a) > 2 else None
        keep = a[2] if len(a) > 2 and isinstance(a[2], bool) else False
        return out.reduce(op, a[0], dims, keep)

    return lower


def _masked_fill(out: Lowering, a: Args) -> Any:
    return _where(out, [a[1], a[2], a[0]])


def _where(out: Lowering, a: Args) -> Any:
    if len(a) != 3:
        raise LyngorError("where with a condition alone: the result's shape depends on data")
    yes, no = out.scalar_like(_number(a[1]), a[2]), out.scalar_like(_number(a[2]), a[1])
    if not isinstance(yes, Ref) and not isinstance(no, Ref):
        yes, no = torch.as_tensor(yes), torch.as_tensor(no)
    return out.emit("where", out.typed(a[0], "bool"), yes, no)


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.dim() == 0 else value


def _unflatten(out: Lowering, a: Args) -> Any:
    shape = list(out.shape(a[0]))
    dim = wrap(a[1], len(shape))
    sizes = [int(s) for s in a[2]]
    if -1 in sizes:
        known = torch.Size(s for s in sizes if s != -1).numel()
        sizes[sizes.index(-1)] = shape[dim] // known
    return out.reshape(a[0], [*shape[:dim], *sizes, *shape[dim + 1 :]])


def _squeeze(out: Lowering, a: Args) -> Any:
    dims = None if len(a) < 2 else ([a[1]] if isinstance(a[1], int) else a[1])
    return out.squeeze(a[0], dims)


def _silu(out: Lowering, a: Args) -> Any:
    return out.binary("mul", a[0], out.emit("sigmoid", a[0]))


def _leaky_relu(out: Lowering, a: Args) -> Any:
    slope = out.binary("mul", a[0], float(a[1] if len(a) > 1 else 0.01))
    return out.emit("where", out.binary("ge", a[0], 0.0), a[0], slope)


def _hardtanh(out: Lowering, a: Args) -> Any:
    return _clamp(out, [a[0], float(a[1]), float(a[2])])


LOWERINGS: dict[str, Lower] = {
    **{n: _binary(n) for n in ("mul", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge")},
    **{n: _binary(n) for n in ("logical_and", "logical_or", "logical_xor", "pow")},
    **{n: _unary(n) for n in ("sqrt", "rsqrt", "exp", "log", "tanh", "sigmoid")},
    **{n: _plain(n) for n in ("neg", "abs", "relu", "round", "floor", "ceil", "logical_not")},
    **dict.fromkeys(("contiguous", "detach", "clone", "alias", "lift_fresh"), _same),
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout"), _dropout),
    **{n: _reduce(n) for n in ("mean", "sum", "amax", "amin")},
    "add": _add,
    "sub": _sub,
    "rsub": _rsub,
    "div": _div,
    "true_divide": _div,
    "multiply": _binary("mul"),
    "greater_equal": _binary("ge"),
    "greater": _binary("gt"),
    "less": _binary("lt"),
    "less_equal": _binary("le"),
    "square": lambda out, a: out.emit("mul", a[0], a[0]),
    "reciprocal": lambda out, a: out.binary("div", 1.0, a[0]),
    "addmm": _addmm,
    "addcmul": _addcmul,
    "lerp": _lerp,
    "silu": _silu,
    "leaky_relu": _leaky_relu,
    "hardtanh": _hardtanh,
    "relu6": lambda out, a: _clamp(out, [a[0], 0.0, 6.0]),
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": lambda out, a: _clamp(out, [a[0], a[1], None]),
    "clamp_max": lambda out, a: _clamp(out, [a[0], None, a[1]]),
    "bitwise_and": lambda out, a: _logical(out, "logical_and", a),
    "bitwise_or": lambda out, a: _logical(out, "logical_or", a),
    "bitwise_xor": lambda out, a: _logical(out, "logical_xor", a),
    "bitwise_not": lambda out, a: _logical(out, "logical_not", a),
    "__and__": lambda out, a: _logical(out, "logical_and", a),
    "__or__": lambda out, a: _logical(out, "logical_or", a),
    "where": _where,
    "masked_fill": _masked_fill,
    "to": _to,
    "type_as": _to,
    "view": lambda out, a: out.reshape(a[0], a[1]),
    "reshape": lambda out, a: out.reshape(a[0], a[1]),
    "_unsafe_view": lambda out, a: out.reshape(a[0], a[1]),
    "view_as": lambda out, a: out.reshape(a[0], out.shape(out.ref(a[1]))),
    "reshape_as": lambda out, a: out.reshape(a[0], out.shape(out.ref(a[1]))),
    "flatten": lambda out, a: out.flatten(a[0], a[1], a[2]),
    "unflatten": _unflatten,
    "squeeze": _squeeze,
    "unsqueeze": lambda out, a: out.unsqueeze(a[0], a[1]),
    "permute": _permute,
    "transpose": _transpose,
    "swapaxes": _transpose,
    "t": _transpose,
    "numpy_T": _transpose,
    "expand": _expand,
    "expand_as": lambda out, a: _expand(out, [a[0], out.shape(out.ref(a[1]))]),
    "repeat": lambda out, a: out.emit("tile", a[0], repeats=[int(r) for r in a[1]]),
    "slice": lambda out, a: out.slice(a[0], a[1], a[2], a[3], a[4]),
    "narrow": lambda out, a: out.slice(a[0], a[1], _item(a[2]), _item(a[2]) + a[3]),
    "select": lambda out, a: out.select(a[0], a[1], a[2]),
    "index": _index,
    "index_select": lambda out, a: _take(out, a[0], a[1], a[2]),
    "gather": lambda out, a: out.emit(
        "gather", a[0], a[2], dim=wrap(a[1], len(out.shape(out.ref(a[0]))))
    ),
    "embedding": _embedding,
    "cat": lambda out, a: out.cat(a[0], a[1]),
    "stack": lambda out, a: out.stack(a[0], a[1]),
    "chunk": _chunk,
    "split": _split,
    "split_with_sizes": lambda out, a: out.split(a[0], a[1], a[2]),
    "unbind": lambda out, a: out.unbind(a[0], a[1]),
    "pad": _pad,
    "constant_pad_nd": _pad,
    "zeros_like": _filled(0, None, 1),
    "ones_like": _filled(1, None, 1),
    "empty_like": _filled(0, None, 1),
    "new_zeros": _filled(0, 1, 2),
    "new_ones": _filled(1, 1, 2),
    "new_empty": _filled(0, 1, 2),
    "zeros": _filled(0, 0, 1),
    "ones": _filled(1, 0, 1),
    "empty": _filled(0, 0, 1),
    "full": _full,
    "new_full": _new_full,
    "full_like": _full_like,
    "_convolution": _convolution,
    "_convolution_mode": _convolution_mode,
    "conv1d": lambda out, a: out.conv(*a[:7]),
    "conv2d": lambda out, a: out.conv(*a[:7]),
    "batch_norm": _batch_norm,
    "linear": lambda out, a: out.dense(a[0], a[1], a[2]),
    "matmul": lambda out, a: out.emit("matmul", a[0], a[1]),
    "mm": lambda out, a: out.emit("matmul", a[0], a[1]),
    "bmm": lambda out, a: out.emit("matmul", a[0], a[1]),
    "max_pool2d": _max_pool,
    "avg_pool2d": _avg_pool,
    "adaptive_avg_pool2d": lambda out, a: out.adaptive_pool("avg_pool", a[0], a[1]),
    "softmax": lambda out, a: out.emit(
        "softmax", a[0], dim=wrap(a[1], len(out.shape(out.ref(a[0]))))
    ),
    "layer_norm": _layer_norm,
    "upsample_nearest2d": _upsample("nearest"),
    "upsample_bilinear2d": _upsample("bilinear"),
}


def _logical(out: Lowering, op: str, a: Args) -> Any:
    operands = a[: 1 if op == "logical_not" else 2]
    if any(isinstance(v, Ref) and out.dtype(v) != "bool" for v in operands):
        raise LyngorError("a bitwise operation on numbers; allowed: on truth values")
    return out.emit(op, *operands)


# What is known of a tensor without its data.
SHAPES: dict[str, Lower] = {
    "size": lambda out, a: (
        list(out.shape(a[0])) if len(a) == 1 else out.shape(a[0])[wrap(a[1], len(out.shape(a[0])))]
    ),
    "dim": lambda out, a: len(out.shape(a[0])),
    "numel": lambda out, a: torch.Size(out.shape(a[0])).numel(),
    "len": lambda out, a: out.shape(a[0])[0],
    "is_floating_point": lambda out, a: out.dtype(a[0]) == "float",
}
