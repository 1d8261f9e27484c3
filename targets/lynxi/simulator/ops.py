"""The primitives: what each computes, and what the chip takes.

One table, :data:`OPS`. ``run`` is the definition: given float32 tensors it computes in float32,
and the engine rounds the result once. On tensors of the ``meta`` device it gives the shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Attrs = dict[str, Any]
Run = Callable[[Sequence[Tensor], Attrs], Tensor]


@dataclass(frozen=True)
class Op:
    """One primitive.

    Attributes:
        run: Its definition.
        exact: Whether torch's float16 kernel gives the float32 result rounded once (sums,
            differences, products and quotients of two float16 numbers do; so does whatever
            only moves or compares numbers).
        mask: Whether a truth value may come in as 0 and 1 of the storage type.
        apu: Whether the chip has it; if not, it runs in the CPU part of a hybrid build.
        rank5: Whether SDK 1.17 and later take it with five dimensions.
        reduces: Whether it sums, so that the accumulator's type matters.
    """

    run: Run
    exact: bool = False
    mask: bool = False
    apu: bool = True
    rank5: bool = False
    reduces: bool = False


def _unary(function: Callable[[Tensor], Tensor]) -> Run:
    return lambda x, a: function(x[0])


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Run:
    return lambda x, a: function(x[0], x[1])


def _sliced(x: Tensor, a: Attrs) -> Tensor:
    index = [slice(None)] * x.dim()
    index[a["dim"]] = slice(a["start"], a["stop"], a["step"])
    return x[tuple(index)]


def positive_zero(x: Tensor) -> Tensor:
    """Give zeros the plus sign, in place: which zero is the larger is not defined."""
    return x.add_(0) if x.is_floating_point() else x


def _maximum(x: Sequence[Tensor], a: Attrs) -> Tensor:
    return positive_zero(torch.maximum(x[0], x[1]))


def _minimum(x: Sequence[Tensor], a: Attrs) -> Tensor:
    return positive_zero(torch.minimum(x[0], x[1]))


def _clamp(x: Sequence[Tensor], a: Attrs) -> Tensor:
    result = x[0]
    if a["low"]:
        result = torch.maximum(result, x[1])
    if a["high"]:
        result = torch.minimum(result, x[-1])
    return positive_zero(result.clone() if result is x[0] else result)


def _cast(x: Sequence[Tensor], a: Attrs) -> Tensor:
    if a["dtype"] == "float":
        return x[0] if x[0].is_floating_point() else x[0].to(torch.float32)
    dtype = getattr(torch, a["dtype"])
    assert isinstance(dtype, torch.dtype)
    return x[0].to(dtype)


def _where(x: Sequence[Tensor], a: Attrs) -> Tensor:
    return torch.where(x[0].bool(), x[1], x[2])


def _pad(x: Sequence[Tensor], a: Attrs) -> Tensor:
    mode = a["mode"]
    return F.pad(x[0], a["pads"], mode, a["value"] if mode == "constant" else None)


# Convolution runs in pieces of the batch whose float32 result stays in cache: a fresh block of
# memory for the whole result costs more than the arithmetic.
_CONV_BYTES = 8 << 20


def conv_pieces(shape: Sequence[int]) -> int:
    """Samples that a convolution with this result computes at a time."""
    sample = 4 * max(1, torch.Size(shape[1:]).numel())
    return max(1, min(shape[0], _CONV_BYTES // sample))


def conv_shape(x: Tensor, w: Tensor, a: Attrs) -> list[int]:
    """Shape of a convolution's result, [N, C_out, ...]."""
    out = [x.shape[0], w.shape[0]]
    for i, size in enumerate(x.shape[2:]):
        span = a["dilation"][i] * (w.shape[2 + i] - 1) + 1
        out.append((size + 2 * a["padding"][i] - span) // a["stride"][i] + 1)
    return out


def channels_last(x: Tensor) -> Tensor:
    """A float32 [N, C, H, W] with channels innermost in memory: the layout that convolves fast."""
    C, H, W = x.shape[1:]
    if C == 1 or H * W == 1:  # both layouts at once: only the strides tell which one is meant
        dense = x.to(torch.float32).contiguous()
        return dense.as_strided(x.shape, (C * H * W, 1, W * C, C))
    return x.to(torch.float32, memory_format=torch.channels_last)


def conv_into(out: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, a: Attrs) -> Tensor:
    """Convolve [N, C, H, W] in float32 and store into ``out``, whose type rounds once.

    Args:
        out: [N, C_out, H', W'], any layout.
        x: The input, of any floating type.
        w: Float32 weight with channels innermost.
        bias: Float32 [C_out], added in the accumulator.
        a: Attributes of the convolution.
    """
    step = conv_pieces(out.shape)
    for n in range(0, out.shape[0], step):
        piece = F.conv2d(
            channels_last(x[n : n + step]),
            w,
            bias,
            a["stride"],
            a["padding"],
            a["dilation"],
            a["groups"],
        )
        out[n : n + step].copy_(piece)
    return out


def torch_conv(x: Sequence[Tensor], a: Attrs) -> Tensor:
    """A convolution as torch computes it by itself, with channels outermost."""
    convolve = F.conv1d if x[0].dim() == 3 else F.conv2d
    signal, weight, bias = x[0].contiguous(), x[1], x[2] if len(x) > 2 else None
    return convolve(signal, weight, bias, a["stride"], a["padding"], a["dilation"], a["groups"])


def _conv(x: Sequence[Tensor], a: Attrs) -> Tensor:
    if x[0].is_meta or x[0].dim() != 4:
        return torch_conv(x, a)
    bias = x[2] if len(x) > 2 else None
    out = torch.empty(conv_shape(x[0], x[1], a), memory_format=torch.channels_last)
    return conv_into(out, x[0], channels_last(x[1]), bias, a)


def _conv_transpose(x: Sequence[Tensor], a: Attrs) -> Tensor:
    return F.conv_transpose2d(
        x[0],
        x[1],
        x[2] if len(x) > 2 else None,
        a["stride"],
        a["padding"],
        a["output_padding"],
        a["groups"],
        a["dilation"],
    )


def _dense(x: Sequence[Tensor], a: Attrs) -> Tensor:
    return F.linear(x[0], x[1], x[2] if len(x) > 2 else None)


def windows(x: Tensor, a: Attrs) -> list[Tensor]:
    """The views of [..., H, W] whose elements at one place are one pooling window."""
    views = []
    spans = [
        (x.shape[-2 + i] - a["dilation"][i] * (a["kernel"][i] - 1) - 1) // a["stride"][i] + 1
        for i in (0, 1)
    ]
    for i in range(a["kernel"][0]):
        for j in range(a["kernel"][1]):
            top, left = i * a["dilation"][0], j * a["dilation"][1]
            rows = slice(top, top + (spans[0] - 1) * a["stride"][0] + 1, a["stride"][0])
            columns = slice(left, left + (spans[1] - 1) * a["stride"][1] + 1, a["stride"][1])
            views.append(x[..., rows, columns])
    return views


def _max_pool(x: Sequence[Tensor], a: Attrs) -> Tensor:
    if a["padding"] == [0, 0] and not a["ceil"]:
        first, *others = windows(x[0], a)
        result = first.clone() if not others else first
        for view in others:
            result = torch.maximum(result, view)
        return positive_zero(result)
    args = (a["kernel"], a["stride"], a["padding"], a["dilation"], a["ceil"])
    return positive_zero(F.max_pool2d(x[0], *args))


def _avg_pool(x: Sequence[Tensor], a: Attrs) -> Tensor:
    return F.avg_pool2d(
        x[0], a["kernel"], a["stride"], a["padding"], a["ceil"], a["count_pad"], a["divisor"]
    )


def _take(x: Sequence[Tensor], a: Attrs) -> Tensor:
    table, index = x
    if index.is_meta:
        shape = list(table.shape)
        shape[a["dim"] : a["dim"] + 1] = list(index.shape)
        return table.new_empty(shape)
    picked = table.index_select(a["dim"], index.reshape(-1))
    return picked.reshape(*table.shape[: a["dim"]], *index.shape, *table.shape[a["dim"] + 1 :])


def _layer_norm(x: Sequence[Tensor], a: Attrs) -> Tensor:
    weight = x[1] if a["affine"] else None
    bias = x[2] if len(x) > 2 else None
    return F.layer_norm(x[0], a["shape"], weight, bias, a["eps"])


def _batch_norm(x: Sequence[Tensor], a: Attrs) -> Tensor:
    signal, mean, variance, weight, bias = x
    return F.batch_norm(signal, mean, variance, weight, bias, eps=a["eps"])


def _upsample(x: Sequence[Tensor], a: Attrs) -> Tensor:
    if a["mode"] == "nearest":
        return F.interpolate(x[0], a["size"], mode="nearest")
    return F.interpolate(x[0], a["size"], mode="bilinear", align_corners=a["align"])


def _full(x: Sequence[Tensor], a: Attrs) -> Tensor:
    return x[0].expand(a["shape"])


def _reduced(function: Callable[..., Tensor]) -> Run:
    return lambda x, a: function(x[0], a["dims"], a["keep"])


def _dense_inputs(run: Run) -> Run:
    """The same on inputs in one layout: torch's order of summation depends on it."""
    return lambda x, a: run([v.contiguous() for v in x], a)


def _extreme(function: Callable[..., Tensor]) -> Run:
    return lambda x, a: positive_zero(function(x[0], a["dims"], a["keep"]))


def _wide(run: Run, *, apu: bool = True, rank5: bool = False, reduces: bool = False) -> Op:
    return Op(_dense_inputs(run), apu=apu, rank5=rank5, reduces=reduces)


def _move(run: Run, *, rank5: bool = False) -> Op:
    return Op(run, exact=True, mask=True, rank5=rank5)


def _compare(function: Callable[[Tensor, Tensor], Tensor]) -> Op:
    return Op(_binary(function), exact=True, mask=True)


OPS: dict[str, Op] = {
    # Moving numbers.
    "reshape": _move(lambda x, a: x[0].reshape(a["shape"]), rank5=True),
    "permute": _move(lambda x, a: x[0].permute(a["dims"])),
    "slice": _move(lambda x, a: _sliced(x[0], a), rank5=True),
    "select": _move(lambda x, a: x[0].select(a["dim"], a["index"]), rank5=True),
    "expand": _move(lambda x, a: x[0].expand(a["shape"])),
    "full": _move(_full),
    "tile": _move(lambda x, a: x[0].repeat(a["repeats"])),
    "cat": _move(lambda x, a: torch.cat(list(x), a["dim"]), rank5=True),
    "pad": Op(_pad, exact=True),
    "take": Op(_take, exact=True, rank5=True),
    "gather": Op(lambda x, a: x[0].gather(a["dim"], x[1]), exact=True),
    # Element by element, exactly rounded.
    "add": Op(_binary(torch.add), exact=True, mask=True),
    "sub": Op(_binary(torch.sub), exact=True, mask=True),
    "mul": Op(_binary(torch.mul), exact=True, mask=True),
    "div": Op(_binary(torch.div), exact=True, mask=True),
    "maximum": Op(_maximum, exact=True),
    "minimum": Op(_minimum, exact=True),
    "clamp": Op(_clamp, exact=True),
    "neg": Op(_unary(torch.neg), exact=True),
    "abs": Op(_unary(torch.abs), exact=True),
    "relu": Op(_unary(torch.relu), exact=True),
    "eq": _compare(torch.eq),
    "ne": _compare(torch.ne),
    "lt": _compare(torch.lt),
    "le": _compare(torch.le),
    "gt": _compare(torch.gt),
    "ge": _compare(torch.ge),
    "logical_and": Op(_binary(torch.logical_and)),
    "logical_or": Op(_binary(torch.logical_or)),
    "logical_xor": Op(_binary(torch.logical_xor)),
    "logical_not": Op(_unary(torch.logical_not)),
    "where": Op(_where, exact=True, mask=True),
    "cast": Op(_cast, exact=True, mask=True),
    # Element by element, computed in float32 and rounded once.
    "pow": _wide(_binary(torch.pow)),
    "sqrt": _wide(_unary(torch.sqrt)),
    "rsqrt": _wide(_unary(torch.rsqrt)),
    "exp": _wide(_unary(torch.exp)),
    "log": _wide(_unary(torch.log)),
    "tanh": _wide(_unary(torch.tanh)),
    "sigmoid": _wide(_unary(torch.sigmoid)),
    "round": _wide(_unary(torch.round)),
    "floor": _wide(_unary(torch.floor)),
    "ceil": _wide(_unary(torch.ceil)),
    # Sums and normalisations.
    "conv": Op(_conv, reduces=True),
    "conv_transpose": _wide(_conv_transpose, apu=False),
    "dense": _wide(_dense, reduces=True),
    "matmul": _wide(_binary(torch.matmul), reduces=True),
    "max_pool": Op(_max_pool, exact=True),
    "avg_pool": _wide(_avg_pool, reduces=True),
    "mean": _wide(_reduced(torch.mean), rank5=True, reduces=True),
    "sum": _wide(_reduced(torch.sum), reduces=True),
    "amax": Op(_extreme(torch.amax), exact=True),
    "amin": Op(_extreme(torch.amin), exact=True),
    "softmax": _wide(lambda x, a: x[0].softmax(a["dim"])),
    "batch_norm": _wide(_batch_norm),
    "layer_norm": _wide(_layer_norm),
    "upsample": _wide(_upsample),
}
