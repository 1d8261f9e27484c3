"""The inputs and outputs of a compiled graph, in the user's shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..converters.program import TensorSpec


@dataclass(frozen=True)
class Port:
    """An input or output of the compiled graph.

    Attributes:
        spec: As the user sees it.
        batch_dim: Which of the user's dimensions is the batch; None if there is none, or if it
            cannot be told from the time steps because there are as many.
        graph_dtype: Its dtype on the device.
    """

    spec: TensorSpec
    batch_dim: int | None
    graph_dtype: torch.dtype

    @classmethod
    def of(cls, spec: TensorSpec, node: fx.Node, batch_dim: int | None) -> Port:
        """The port of one of a program's placeholders or results."""
        return cls(spec, batch_dim, node.meta["val"].dtype)

    def to_dict(self) -> dict[str, Any]:
        """The port as plain data."""
        spec = self.spec
        return {
            "name": spec.name,
            "shape": list(spec.shape),
            "dtype": dtype_name(spec.dtype),
            "folded": spec.folded,
            "parts": spec.parts,
            "rank": spec.rank,
            "batch_dim": self.batch_dim,
            "graph_dtype": dtype_name(self.graph_dtype),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Port:
        """The inverse of :meth:`to_dict`."""
        spec = TensorSpec(
            data["name"],
            tuple(data["shape"]),
            dtype_named(data["dtype"]),
            bool(data["folded"]),
            # Artifacts written before have neither.
            int(data.get("parts", 1)),
            data.get("rank"),
        )
        return cls(spec, data["batch_dim"], dtype_named(data["graph_dtype"]))

    def with_batch(self, n: str) -> str:
        """The spec in words, with ``n`` as its batch."""
        shape = [str(size) for size in self.spec.shape]
        if self.batch_dim is not None:
            shape[self.batch_dim] = n
        return f"{self.spec.name} {dtype_name(self.spec.dtype)}[{', '.join(shape)}]"

    def takes(self, x: torch.Tensor, n: int) -> bool:
        """Whether x is of its shape with n samples, and of a type that can become its own."""
        shape = list(self.spec.shape)
        if self.batch_dim is not None:
            shape[self.batch_dim] = n
        wanted = self.spec.dtype
        same = x.is_floating_point() if wanted.is_floating_point else x.dtype == wanted
        return same and list(x.shape) == shape


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """The inverse of :func:`dtype_name`; a ValueError if there is none."""
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} is no dtype")
    return dtype


def in_call(dim: int, time: int | None) -> int:
    """Which dimension of a call one of a step is, where ``time`` is the call's for time, if it has one."""
    return dim + (time is not None and time <= dim)


def pad(x: torch.Tensor, dim: int | None, batch: int) -> torch.Tensor:
    """x with its last sample repeated, so that the padding is as harmless as the data."""
    if dim is None or x.shape[dim] == batch:
        return x
    last = x.narrow(dim, x.shape[dim] - 1, 1)
    times = [batch - x.shape[dim] if d == dim else 1 for d in range(x.dim())]
    return torch.cat([x, last.repeat(times)], dim)
