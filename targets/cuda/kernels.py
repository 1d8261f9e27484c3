"""From a declaration and a tensor's layout to launched kernels."""

from __future__ import annotations

import hashlib
import linecache
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

from ...converters.errors import DeviceError, TargetUnavailableError
from ...converters.neurons import Neuron
from .codegen import NORM, Backward, Forward, Spec, backward_source, forward_source

#: Time steps of a chunk, and the most that are taken as one chunk. Measured on an H200: a chunk's
#: states live in registers, and every further chunk costs a state that is kept in memory.
CHUNK, WHOLE = 8, 16
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WARPS = 8


def interpreted() -> bool:
    """Whether Triton interprets its kernels, which it does on a CPU (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton() -> Any:
    """Triton.

    Raises:
        TargetUnavailableError: It is not installed.
    """
    try:
        import triton
    except ImportError as error:
        raise TargetUnavailableError(
            "Triton is not installed; it comes with PyTorch's CUDA builds, or: pip install triton. "
            "a layer with backend='torch' needs none"
        ) from error
    return triton


@cache
def _compiled(source: str, name: str) -> Any:
    """The kernel of this source."""
    package = triton()
    import triton.language as tl

    file = f"<spikeport {name} {hashlib.sha256(source.encode()).hexdigest()[:12]}>"
    # Triton reads the source of a function through linecache, and so do tracebacks.
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope = {"tl": tl, "__name__": __name__}
    exec(compile(source, file, "exec"), scope)
    return package.jit(scope[name])


@dataclass(frozen=True)
class Layout:
    """How x [T, ...] lies in memory, and how the spikes will.

    Attributes:
        shape: The shape of x.
        strides: Strides of a dense tensor with the dimensions of x[t] in the order in which x has them.
        order: The dimensions of x[t] with more than one element, outermost first.
        strided: (stride of time, inner, outer) where x[t] is not dense, see ``codegen.Spec``.
    """

    shape: torch.Size
    strides: tuple[int, ...]
    order: tuple[int, ...]
    strided: tuple[int, int, int] | None

    @property
    def T(self) -> int:  # noqa: N802 -- the field's name
        """Time steps."""
        return self.shape[0]

    @property
    def N(self) -> int:  # noqa: N802
        """Neurons."""
        return math.prod(self.shape[1:])

    def empty(self, like: torch.Tensor) -> torch.Tensor:
        """A tensor of x's shape."""
        return allocate(self.shape, like, like.dtype, self.strides)

    def align(self, y: torch.Tensor) -> torch.Tensor:
        """A tensor of x's shape as the kernels read it."""
        if y.stride() == self.strides:
            return y
        return self.empty(y).copy_(y)

    def align_state(self, y: torch.Tensor) -> torch.Tensor:
        """A state [states, N, ...] in float32 as the kernels read it."""
        strides = (self.N, *self.strides[1:])
        if y.stride() == strides and y.dtype == torch.float32:
            return y
        return allocate(y.shape, y, torch.float32, strides).copy_(y)

    def state(self, like: torch.Tensor, states: int) -> torch.Tensor:
        """A tensor for a state [states, N, ...], float32."""
        shape = torch.Size((states, *self.shape[1:]))
        return allocate(shape, like, torch.float32, (self.N, *self.strides[1:]))


def allocate(
    shape: torch.Size, like: torch.Tensor, dtype: torch.dtype, strides: tuple[int, ...]
) -> torch.Tensor:
    """An uninitialised tensor.

    Raises:
        DeviceError: The device has not the memory; the error names the size.
    """
    try:
        return torch.empty_strided(shape, strides, dtype=dtype, device=like.device)
    except torch.OutOfMemoryError as error:
        size = math.prod(shape) * dtype.itemsize / 2**30
        raise DeviceError(
            f"a neuron layer of {list(shape)} in {dtype} needs {size:.2f} GiB more than "
            f"{like.device} has free; take a smaller batch or fewer time steps"
        ) from error


def layout(x: torch.Tensor) -> tuple[torch.Tensor, Layout]:
    """x [T, ...] as the kernels read it, a copy only if nothing else will do, and its layout."""
    order = sorted(
        (d for d in range(1, x.dim()) if x.shape[d] > 1), key=lambda d: (-x.stride()[d], d)
    )
    strides, size = [1] * x.dim(), 1
    for d in reversed(order):
        strides[d] = size
        size *= x.shape[d]
    for d in range(1, x.dim()):
        if x.shape[d] <= 1:
            strides[d] = max(1, size if not order or d < min(order) else 1)
    strides[0] = size
    parts: list[list[int]] = []  # [size, stride] of x[t], outermost first, merged where they may be
    for d in order:
        if parts and parts[-1][1] == x.stride(d) * x.shape[d]:
            parts[-1] = [parts[-1][0] * x.shape[d], x.stride(d)]
        else:
            parts.append([x.shape[d], x.stride(d)])
    dense = not parts or (len(parts) == 1 and parts[0][1] == 1)
    apart = x.shape[0] > 1 and x.stride(0) != size
    strided = None
    if dense and apart:
        strided = (x.stride(0), max(size, 1), 0)
    elif not dense and len(parts) == 2 and parts[1][1] == 1:
        strided = (x.stride(0), parts[1][0], parts[0][1])
    elif not dense:
        repeated = x.shape[0] > 1 and x.stride(0) == 0  # a static drive is copied once, not T times
        return layout(x[0].contiguous().expand_as(x) if repeated else x.contiguous())
    return x, Layout(x.shape, tuple(strides), tuple(order), strided)


@dataclass(frozen=True)
class Tile:
    """How the neurons are split into programs.

    Attributes:
        kind: See ``codegen.Spec``.
        grid: Programs.
        sizes: rows, C, inner; none for a flat tile.
        blocks: Its block sizes.
        masked: Whether programs reach beyond the neurons.
    """

    kind: Literal["flat", "rows", "planes"]
    grid: tuple[int, ...]
    sizes: tuple[int, ...]
    blocks: tuple[int, ...]
    masked: bool


def flat_tile(lay: Layout, block: int) -> Tile:
    """Consecutive neurons."""
    return Tile("flat", (-(-lay.N // block),), (), (block,), lay.N % block != 0)


def channel_tile(lay: Layout, block: int) -> Tile:
    """Neurons by channel, the channel being dimension 2 of x [T, N, C, ...]."""
    C = lay.shape[2]
    inner = lay.strides[2] if C > 1 else math.prod(lay.shape[3:])
    if inner == 1:
        columns = min(_power_of_two(C), 128)
        rows, per = lay.N // C, max(block // columns, 1)
        grid = (-(-rows // per), -(-C // columns))
        return Tile("rows", grid, (rows, C, 1), (per, columns), bool(rows % per or C % columns))
    columns = min(_power_of_two(inner), block)
    rows, per = lay.N // (C * inner), max(block // columns, 1)
    grid = (-(-rows // per) * -(-inner // columns), C)
    masked = bool(rows % per or inner % columns)
    return Tile("planes", grid, (rows, C, inner), (per, columns), masked)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class Reads:
    """How one parameter is read, see ``codegen.Spec``, and its tensor as it is read."""

    kind: Literal["scalar", "element", "channel"]
    tensor: torch.Tensor
    inner: int = 0
    size: int = 0


def reads(lay: Layout, tile: Tile, tensor: torch.Tensor) -> Reads:
    """How a parameter that broadcasts against x[t] is read."""
    if tensor.numel() == 1:
        return Reads("scalar", tensor.detach())
    wide = tensor.detach().expand(lay.shape[1:])
    varies = [d for d in lay.order if wide.stride(d - 1) != 0]
    middle = (
        lay.order[lay.order.index(varies[0]) : lay.order.index(varies[-1]) + 1] if varies else ()
    )
    inner = lay.strides[varies[-1]] if varies else 1
    size = math.prod(lay.shape[d] for d in middle)
    small = [d - 1 for d in middle]
    if list(middle) == varies:
        index = tuple(slice(None) if d in small else 0 for d in range(wide.dim()))
        kept = wide[index].permute(*(sorted(small).index(d) for d in small)).contiguous()
        if tile.kind != "flat" and (inner, size) == (tile.sizes[2], tile.sizes[1]):
            return Reads("channel", kept)
        return Reads("element", kept, inner, size)
    whole = torch.empty_strided(
        wide.shape, lay.strides[1:], dtype=wide.dtype, device=wide.device
    ).copy_(wide)
    return Reads("element", whole, 1, lay.N)


@dataclass(frozen=True)
class Call:
    """One neuron layer's kernels on one x, ready to be launched.

    Attributes:
        x: The input as it is read.
        lay: Its layout.
        tile: Its tile.
        spec: What its source is written from.
        names: Names of the parameters.
        params: How they are read.
    """

    x: torch.Tensor
    lay: Layout
    tile: Tile
    spec: Spec
    names: tuple[str, ...]
    params: tuple[Reads, ...]

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        norm: Sequence[torch.Tensor],
        params: Sequence[torch.Tensor],
        neuron: str,
        surrogate: str,
        detach_reset: bool,
    ) -> Call:
        """The call for x [T, N, ...]; ``norm`` is empty, or mean, scale and shift, [C] each."""
        x, lay = layout(x)
        loop = lay.T > WHOLE
        steps = CHUNK if loop else lay.T
        block = 32 * _WARPS * (4 if steps <= CHUNK else 2)
        tile = channel_tile(lay, block) if norm else flat_tile(lay, block)
        channel = (-1,) + (1,) * (x.dim() - 3)
        tensors = {n: t.reshape(channel) for n, t in zip(NORM, norm, strict=bool(norm))}
        own = [*Neuron.from_json(neuron, params).tensors()]
        tensors |= dict(zip(own, params, strict=True))
        read = tuple(reads(lay, tile, t) for t in tensors.values())
        spec = Spec(
            neuron,
            tuple(zip(tensors, (r.kind for r in read), strict=True)),
            surrogate,
            detach_reset,
            steps,
            lay.T % CHUNK if loop else 0,
            loop,
            tile.kind,
            tile.masked,
            lay.N + block >= 2**31,
            lay.strided is not None,
            bool(norm),
        )
        return cls(x, lay, tile, spec, tuple(tensors), read)

    @property
    def chunks(self) -> int:
        """How many chunks, the tail included."""
        return -(-self.lay.T // CHUNK) if self.spec.loop else 1

    def launch(self, source: str, name: str, tensors: Sequence[torch.Tensor]) -> None:
        """Run a kernel of :mod:`.codegen` on its tensors."""
        sizes: list[int] = [self.lay.N]
        for r in self.params:
            sizes += [r.inner, r.size] if r.kind == "element" else []
        sizes += self.lay.strided or ()
        arguments = [*tensors, *(r.tensor for r in self.params), *sizes, *self.tile.sizes]
        kernel = _compiled(source, name)
        # Products and sums are rounded one by one, as torch rounds them, so that spikes are the same.
        kernel[self.tile.grid](
            *arguments,
            self.lay.T // CHUNK,
            *self.tile.blocks,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )


def forward(call: Call, asked: Forward, tensors: Sequence[torch.Tensor]) -> None:
    """Run the forward kernel on what ``codegen.forward_source`` names between x and the parameters."""
    source = _forward_source(call.spec, asked)
    call.launch(source, "forward", [call.x, *tensors])


def backward(call: Call, asked: Backward, tensors: Sequence[torch.Tensor]) -> None:
    """Run the backward kernel likewise, see ``codegen.backward_source``."""
    source = _backward_source(call.spec, asked)
    call.launch(source, "backward", [call.x, *tensors])


_forward_source = cache(forward_source)
_backward_source = cache(backward_source)
