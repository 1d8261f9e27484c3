"""Convolution, pooling and resampling over volumes, x [N, C, D, H, W], as those over images.

A convolution finds the D of a window as further channels, kernel [K, C, d, h, w] as [K, C d, h, w];
the others take H and W first, then D. Around each stand tensors of rank 5, on which
``merge_dimensions`` has no operator left to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from ..ops import Node, aten, shape


class Writer(Protocol):
    """What writes them into a graph."""

    def given(self, n: Node) -> list[Any]:
        """A node's arguments in the new graph, as its schema has them."""

    def emit(self, target: Any, *args: Any) -> Node:
        """A call of an operator."""

    def reshape(self, x: Node, *size: int) -> Node:
        """A value in another shape."""

    def filled(self, size: Sequence[int], value: float, dtype: torch.dtype) -> Node:
        """A constant of equal elements."""


#: Of three sizes those that an image has, and the other.
_IMAGE, _DEPTH = slice(1, 3), slice(0, 1)


def conv(w: Writer, n: Node) -> Node | None:
    """``conv3d`` of a batch, of any stride, padding, dilation and groups."""
    x, weight, bias, stride, padding, dilation, groups = w.given(n)
    if len(shape(x)) != 5:
        return None
    kernel = shape(weight)[2:]
    N, C, D, *image = shape(x)
    if {*kernel, *stride} == {1} and not any(padding):
        rows = w.reshape(x, N, C, D, -1)
        point = w.reshape(weight, *shape(weight)[:2], 1, 1)
        made = w.emit(aten.conv2d.default, rows, point, bias, [1, 1], [0, 0], [1, 1], groups)
        return w.reshape(made, *shape(n))
    depth = shape(n)[2]
    slices = _depth_first(w, x, [N, C, D, -1])
    if padding[0]:
        rows = w.reshape(slices, N, D, -1)
        zeros = w.filled((N, padding[0], shape(rows)[2]), 0.0, x.meta["val"].dtype)
        slices = w.emit(aten.cat.default, [zeros, rows, zeros], 1)
    slices = w.reshape(slices, N, D + 2 * padding[0], -1)
    # Of each output's window the d-th slice, side by side for every channel.
    span = stride[0] * (depth - 1) + 1
    starts = [d * dilation[0] for d in range(kernel[0])]
    windows = [
        w.reshape(
            w.emit(aten.slice.Tensor, slices, 1, start, start + span, stride[0]),
            *(N * depth * C, 1, math.prod(image)),
        )
        for start in starts
    ]
    stacked = windows[0] if len(windows) == 1 else w.emit(aten.cat.default, windows, 1)
    images = w.reshape(stacked, N * depth, C * kernel[0], *image)
    flat = w.reshape(weight, shape(weight)[0], -1, *kernel[1:])
    spans = stride[1:], padding[1:], dilation[1:], groups
    made = w.emit(aten.conv2d.default, images, flat, bias, *spans)
    return w.reshape(_depth_first(w, made, [N, depth, shape(n)[1], -1]), *shape(n))


def _depth_first(w: Writer, x: Node, size: list[int]) -> Node:
    """A tensor as [N, C, D, rest] turned to [N, D, C, rest], or back."""
    return w.emit(aten.permute.default, w.reshape(x, *size), [0, 2, 1, 3])


def max_pool(w: Writer, n: Node) -> Node:
    """``max_pool3d``, with a batch or without."""
    x, kernel, stride, padding, dilation, ceil = w.given(n)
    windows = [(kernel, 1), (stride or kernel, 1), (padding, 0), (dilation, 1)]

    def pool(rows: Node, at: slice) -> Node:
        return w.emit(aten.max_pool2d.default, rows, *_spans(windows, at), ceil)

    return _separately(w, x, pool, shape(n))


def average_pool(w: Writer, n: Node) -> Node:
    """``avg_pool3d``: the number that a window is divided by is the product of those of both."""
    x, kernel, stride, padding, ceil, counted, divisor = w.given(n)
    windows = [(kernel, 1), (stride or kernel, 1), (padding, 0)]

    def pool(rows: Node, at: slice) -> Node:
        own = divisor if divisor is None or at is _IMAGE else 1
        return w.emit(aten.avg_pool2d.default, rows, *_spans(windows, at), ceil, counted, own)

    return _separately(w, x, pool, shape(n))


def adaptive_average(w: Writer, n: Node) -> Node:
    """``adaptive_avg_pool3d``, with a batch or without."""
    x, wanted = w.given(n)
    if set(wanted) == {1}:
        rows = w.reshape(x, -1, math.prod(shape(x)[-3:]))
        return w.reshape(w.emit(aten.mean.dim, rows, [1]), *shape(n))

    def pool(rows: Node, at: slice) -> Node:
        sizes = wanted[at] if at is _IMAGE else [*wanted[at], shape(rows)[-1]]
        return w.emit(aten.adaptive_avg_pool2d.default, rows, sizes)

    return _separately(w, x, pool, shape(n))


_NEAREST = {
    aten.upsample_nearest1d.vec: aten.upsample_nearest2d.vec,
    aten.upsample_nearest3d.vec: aten.upsample_nearest2d.vec,
    aten._upsample_nearest_exact1d.vec: aten._upsample_nearest_exact2d.vec,
    aten._upsample_nearest_exact3d.vec: aten._upsample_nearest_exact2d.vec,
}


def upsample(w: Writer, n: Node) -> Node:
    """``upsample`` to the nearest or linear, of volumes and of lines, to a size or by factors."""
    x, size, *corners, factors = w.given(n)
    target = aten.upsample_bilinear2d.vec if corners else _NEAREST[n.target]

    def resample(rows: Node, height: slice, same: bool) -> Node:
        to = None if size is None else [*size[height], *[shape(rows)[-1]] * same]
        by = None if factors is None else [*factors[height], *[1.0] * same]
        return w.emit(target, rows, to, *corners, by)

    if len(shape(x)) == 3:
        columns = w.reshape(x, *shape(x), 1)
        return w.reshape(resample(columns, slice(0, 1), same=True), *shape(n))
    return _separately(w, x, lambda rows, at: resample(rows, at, at is _DEPTH), shape(n))


def _spans(windows: Sequence[tuple[Any, int]], at: slice) -> list[list[int]]:
    """Kernel, stride, ... of an image; of one column, the neutral number as its width."""
    each = (([sizes] if isinstance(sizes, int) else [*sizes], other) for sizes, other in windows)
    return [[*(sizes * 3 if len(sizes) == 1 else sizes)[at], other][:2] for sizes, other in each]


def _separately(
    w: Writer, x: Node, pool: Callable[[Node, slice], Node], size: tuple[int, ...]
) -> Node:
    """Pooling over the images first, then over what is left of their D, as the height of an image."""
    D, H, W = shape(x)[-3:]
    images = pool(w.reshape(x, -1, D, H, W), _IMAGE)
    columns = w.reshape(images, -1, 1, D, math.prod(shape(images)[-2:]))
    return w.reshape(pool(columns, _DEPTH), *size)
