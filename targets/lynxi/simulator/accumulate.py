"""Reductions whose every product and partial sum is rounded to float16, one after the other.

The order is that of the reduction's index: (c_in, k_h, k_w) for a convolution, the inner index
for dense and matmul, row-major for sums and pooling windows. A bias comes last.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import OPS, Attrs, Run, windows


def _sum(terms: Iterable[Tensor]) -> Tensor:
    total: Tensor | None = None
    for term in terms:
        half = term.half()
        total = half if total is None else total + half
    assert total is not None
    return total


def _dot(x: Tensor, w: Tensor) -> Tensor:
    """[..., M, K] times [..., K, O] in float16, K in order."""
    return _sum(x[..., :, k, None] * w[..., k, None, :] for k in range(x.shape[-1]))


def _dense(x: Sequence[Tensor], a: Attrs) -> Tensor:
    product = _dot(x[0], x[1].t()) if x[0].dim() > 1 else _dot(x[0][None], x[1].t())[0]
    return product + x[2] if len(x) > 2 else product


def _matmul(x: Sequence[Tensor], a: Attrs) -> Tensor:
    left = x[0] if x[0].dim() > 1 else x[0][None]
    right = x[1] if x[1].dim() > 1 else x[1][:, None]
    product = _dot(left, right)
    if x[1].dim() == 1:
        product = product.squeeze(-1)
    return product.squeeze(-2 if x[1].dim() > 1 else -1) if x[0].dim() == 1 else product


def _conv(x: Sequence[Tensor], a: Attrs) -> Tensor:
    signal, kernel = x[0], x[1]
    stride, padding, dilation = a["stride"], a["padding"], a["dilation"]
    flat = signal.dim() == 3
    if flat:
        signal, kernel = signal.unsqueeze(2), kernel.unsqueeze(2)
        stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
    N = signal.shape[0]
    C_out, per_group, kh, kw = kernel.shape
    padded = F.pad(signal, [padding[1], padding[1], padding[0], padding[0]])
    views = windows(
        padded, {"kernel": [kh, kw], "stride": list(stride), "dilation": list(dilation)}
    )
    size = views[0].shape[-2:]
    taps = torch.stack([v.reshape(N, a["groups"], per_group, *size) for v in views], 3)
    weight = kernel.reshape(a["groups"], C_out // a["groups"], per_group, kh * kw)
    out = _sum(
        taps[:, :, None, c, k] * weight[None, :, :, c, k, None, None]
        for c in range(per_group)
        for k in range(kh * kw)
    ).reshape(N, C_out, *size)
    if len(x) > 2:
        out = out + x[2][:, None, None]
    return out.squeeze(2) if flat else out


def _total(x: Sequence[Tensor], a: Attrs) -> Tensor:
    rest = [d for d in range(x[0].dim()) if d not in a["dims"]]
    moved = x[0].permute(*a["dims"], *rest)
    flat = moved.reshape(-1, *(x[0].shape[d] for d in rest))
    total = _sum(flat.unbind(0))
    for d in sorted(a["dims"]) if a["keep"] else ():
        total = total.unsqueeze(d)
    return total


def _mean(x: Sequence[Tensor], a: Attrs) -> Tensor:
    count = torch.Size(x[0].shape[d] for d in a["dims"]).numel()
    return _total(x, a) / count


def _avg_pool(x: Sequence[Tensor], a: Attrs) -> Tensor:
    top, left = a["padding"]
    padded = F.pad(x[0], [left, left, top, top])
    total = _sum(windows(padded, {**a, "dilation": [1, 1]}))
    count = a["kernel"][0] * a["kernel"][1]
    if not a["count_pad"]:
        inside = F.pad(torch.ones_like(x[0]), [left, left, top, top])
        counts = torch.stack(windows(inside, {**a, "dilation": [1, 1]})).sum(0)
        return total / (a["divisor"] or counts)
    divided: Tensor = total / (a["divisor"] or count)
    return divided


_RUNS: dict[str, Run] = {
    "dense": _dense,
    "matmul": _matmul,
    "conv": _conv,
    "sum": _total,
    "mean": _mean,
    "avg_pool": _avg_pool,
}


def run(op: str, x: Sequence[Tensor], attrs: Attrs) -> Tensor:
    """A reduction with a float16 accumulator.

    Args:
        op: Its name in ``OPS``.
        x: Inputs; floating ones are rounded to float16.
        attrs: Its attributes.

    Returns:
        A float32 tensor of float16 values, or integers as they are.
    """
    if not x[0].is_floating_point():
        return OPS[op].run(x, attrs)
    return _RUNS[op]([v.half() for v in x], attrs).half().float()
