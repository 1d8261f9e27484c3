"""Operations of a framework as primitives: what both front ends share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .graph import GraphWriter, LyngorError, Ref, torch_type


def pair(value: Any, n: int = 2) -> list[int]:
    """A number or a list as a list of ``n`` integers."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return [int(v) for v in (values * n if len(values) == 1 else values)]


def wrap(dim: int, rank: int) -> int:
    """A dimension counted from the front.

    Raises:
        LyngorError: There is no such dimension.
    """
    if not -max(rank, 1) <= dim < max(rank, 1):
        raise LyngorError(f"dimension {dim} of a tensor of rank {rank}")
    return dim % max(rank, 1)


class Lowering(GraphWriter):
    """A graph writer that knows how the larger operations come apart."""

    def typed(self, value: Any, kind: str) -> Any:
        """The value as a type of the graph."""
        ref = self.ref(value)
        return ref if self.dtype(ref) == kind else self.emit("cast", ref, dtype=kind)

    def scalar_like(self, value: Any, other: Any) -> Any:
        """A number in the type that arithmetic with ``other`` takes."""
        if isinstance(value, Tensor) and value.dim() == 0:
            value = value.item()
        if isinstance(value, (bool, int, float)) and isinstance(other, Ref):
            kind = self.dtype(other)
            if kind == "float" or isinstance(value, float):
                return torch.tensor(float(value))
            return torch.tensor(value, dtype=torch_type(kind) if kind != "bool" else None)
        return value

    def binary(self, op: str, a: Any, b: Any) -> Ref:
        """An elementwise operation of two values, one of which may be a number."""
        return self.emit(op, self.scalar_like(a, b), self.scalar_like(b, a))

    def scaled(self, value: Any, factor: Any) -> Any:
        """``factor * value``, or the value itself for 1."""
        return value if factor == 1 else self.binary("mul", value, factor)

    def reshape(self, x: Any, shape: Sequence[int]) -> Ref:
        """A reshape; one size may be -1."""
        ref = self.ref(x)
        sizes = [int(s) for s in shape]
        if -1 in sizes:
            rest = 1
            for s in sizes:
                rest *= s if s != -1 else 1
            total = torch.Size(self.shape(ref)).numel()
            sizes[sizes.index(-1)] = total // rest if rest else 0
        return self.emit("reshape", ref, shape=sizes)

    def slice(self, x: Any, dim: int, start: int | None, stop: int | None, step: int = 1) -> Ref:
        """A slice as Python's ``x[start:stop:step]`` along one dimension."""
        ref = self.ref(x)
        dim = wrap(dim, len(self.shape(ref)))
        if step < 1:
            raise LyngorError(f"a slice with step {step}")
        first, last, _ = slice(start, stop).indices(self.shape(ref)[dim])
        return self.emit("slice", ref, dim=dim, start=first, stop=max(first, last), step=step)

    def select(self, x: Any, dim: int, index: int) -> Ref:
        """One place along a dimension, which goes away."""
        ref = self.ref(x)
        dim = wrap(dim, len(self.shape(ref)))
        return self.emit("select", ref, dim=dim, index=wrap(index, self.shape(ref)[dim]))

    def split(self, x: Any, sizes: Sequence[int], dim: int) -> list[Ref]:
        """Consecutive pieces of the given sizes along a dimension."""
        parts, at = [], 0
        for size in sizes:
            parts.append(self.slice(x, dim, at, at + size))
            at += size
        return parts

    def unbind(self, x: Any, dim: int) -> list[Ref]:
        """Every place along a dimension."""
        ref = self.ref(x)
        size = self.shape(ref)[wrap(dim, len(self.shape(ref)))]
        return [self.select(ref, dim, i) for i in range(size)]

    def unsqueeze(self, x: Any, dim: int) -> Ref:
        """A new dimension of size 1."""
        shape = list(self.shape(self.ref(x)))
        shape.insert(wrap(dim, len(shape) + 1), 1)
        return self.reshape(x, shape)

    def squeeze(self, x: Any, dims: Sequence[int] | None) -> Ref:
        """Without the dimensions of size 1 (of those named)."""
        shape = self.shape(self.ref(x))
        gone = {wrap(d, len(shape)) for d in (range(len(shape)) if dims is None else dims)}
        return self.reshape(x, [s for i, s in enumerate(shape) if s != 1 or i not in gone])

    def flatten(self, x: Any, first: int, last: int) -> Ref:
        """Dimensions ``first`` to ``last`` as one."""
        shape = list(self.shape(self.ref(x)))
        if not shape:
            return self.reshape(x, [1])
        first, last = wrap(first, len(shape)), wrap(last, len(shape))
        return self.reshape(x, [*shape[:first], -1, *shape[last + 1 :]])

    def cat(self, parts: Sequence[Any], dim: int) -> Ref:
        """Values one after the other along a dimension."""
        refs = [self.ref(p) for p in parts]
        kinds = {self.dtype(r) for r in refs}
        if len(kinds) > 1 and "float" in kinds:
            refs = [self.typed(r, "float") for r in refs]
        return self.emit("cat", *refs, dim=wrap(dim, len(self.shape(refs[0]))))

    def stack(self, parts: Sequence[Any], dim: int) -> Ref:
        """Values along a new dimension."""
        dim = wrap(dim, len(self.shape(self.ref(parts[0]))) + 1)
        return self.cat([self.unsqueeze(p, dim) for p in parts], dim)

    def full(self, shape: Sequence[int], value: Any, kind: str) -> Ref:
        """A tensor of one number."""
        number = torch.tensor(value, dtype=torch_type(kind))
        return self.emit("full", number, shape=[int(s) for s in shape])

    def conv(
        self,
        x: Any,
        weight: Any,
        bias: Any,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
    ) -> Ref:
        """A 1-D or 2-D convolution of [N, C, ...]; without N, one sample."""
        w = self.ref(weight)
        n = len(self.shape(w)) - 2
        if n not in (1, 2):
            raise LyngorError(f"a {n}-dimensional convolution; allowed: conv1d and conv2d")
        ref = self.ref(x)
        single = len(self.shape(ref)) == n + 1
        if single:
            ref = self.unsqueeze(ref, 0)
        out = self.emit(
            "conv",
            ref,
            w,
            *([] if bias is None else [bias]),
            stride=pair(stride, n),
            padding=pair(padding, n),
            dilation=pair(dilation, n),
            groups=int(groups),
        )
        return self.squeeze(out, [0]) if single else out

    def batch_norm(
        self, x: Any, weight: Any, bias: Any, mean: Any, variance: Any, eps: float
    ) -> Ref:
        """A batch normalisation of [N, C, ...] by known statistics."""
        if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
            raise LyngorError("a batch normalisation without fixed statistics; call net.eval()")
        weight = weight if isinstance(weight, Tensor) else torch.ones_like(mean)
        bias = bias if isinstance(bias, Tensor) else torch.zeros_like(mean)
        return self.emit("batch_norm", x, mean, variance, weight, bias, eps=eps)

    def dense(self, x: Any, weight: Any, bias: Any) -> Ref:
        """``x @ weight.T + bias``."""
        return self.emit("dense", x, weight, *([] if bias is None else [bias]))

    def pool(
        self,
        op: str,
        x: Any,
        kernel: Any,
        stride: Any,
        padding: Any,
        dilation: Any = 1,
        ceil: bool = False,
        count_pad: bool = True,
        divisor: int | None = None,
    ) -> Ref:
        """A 2-D pooling of [N, C, H, W]."""
        attrs: dict[str, Any] = {
            "kernel": pair(kernel),
            "stride": pair(stride) if stride else pair(kernel),
            "padding": pair(padding),
            "ceil": bool(ceil),
        }
        if op == "max_pool":
            return self.emit(op, x, dilation=pair(dilation), **attrs)
        return self.emit(op, x, count_pad=bool(count_pad), divisor=divisor, **attrs)

    def adaptive_pool(self, op: str, x: Any, size: Any) -> Ref:
        """A 2-D pooling to [N, C, *size]; the size must divide the input's."""
        shape = self.shape(self.ref(x))
        sizes = pair([s if s is not None else shape[-2 + i] for i, s in enumerate(pair_of(size))])
        if any(h % s for h, s in zip(shape[-2:], sizes, strict=True)):
            raise LyngorError(
                f"an adaptive pooling of {list(shape[-2:])} to {sizes}; allowed: sizes that divide"
            )
        kernel = [h // s for h, s in zip(shape[-2:], sizes, strict=True)]
        return self.pool(op, x, kernel, kernel, 0)

    def reduce(self, op: str, x: Any, dims: Any, keep: bool) -> Ref:
        """A mean, sum, maximum or minimum over dimensions; None or [] are all of them."""
        ref = self.ref(x)
        if op in ("mean", "sum") and self.dtype(ref) == "bool":
            ref = self.typed(ref, "int64")
        rank = len(self.shape(ref))
        chosen = [dims] if isinstance(dims, int) else list(dims or range(rank))
        return self.emit(op, ref, dims=[wrap(d, rank) for d in chosen], keep=bool(keep))


def pair_of(value: Any) -> list[Any]:
    """A number, None or a list of two as a list of two."""
    return list(value) if isinstance(value, (list, tuple)) else [value, value]
