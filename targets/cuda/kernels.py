"""From a declaration and a tensor's layout to launched kernels."""

from __future__ import annotations

import hashlib
import linecache
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal

import torch

from ...converters.errors import DeviceError, TargetUnavailableError
from ...converters.neurons import Neuron
from .codegen import NORM, Backward, Forward, Spec, backward_source, forward_source
from .text import RECIPROCAL, RECIPROCAL_INTERPRETED

#: Most time steps of a chunk. Measured on an H200: a chunk's states live in registers, and every further
#: chunk costs a state that is kept in memory.
CHUNK = 16
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Layers and inputs whose arrangement is remembered.
_CALLS = 4096
#: Most registers of a thread that works on 16-bit numbers in the backward pass's loop over chunks: so 16
#: warps find room.
_REGISTERS = 128
#: A compiler that knows of so many chunks makes code that needs more registers, and takes up to 1.26 times
#: as long as for a number that it does not know (H200); of one chunk, three and more it makes the best.
_UNROLLED = 2
#: Most states of a window's neurons in one chunk: those of 2 x 2 over 16 steps.
_MOST_STATES = 4 * CHUNK


def chunk(T: int) -> int:
    """Time steps of a chunk."""
    return min(max(T, 1), CHUNK)


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
def compiled(source: str, name: str) -> Any:
    """The kernel of this source, which may call ``reciprocal``, see ``text``."""
    package = triton()
    import triton.language as tl

    scope = {"tl": tl, "__name__": __name__}
    for text, function in (
        (RECIPROCAL_INTERPRETED if interpreted() else RECIPROCAL, "reciprocal"),
        (source, name),
    ):
        file = f"<spikeport {function} {hashlib.sha256(text.encode()).hexdigest()[:12]}>"
        # Triton reads the source of a function through linecache, and so do tracebacks.
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        exec(compile(text, file, "exec"), scope)
        scope[function] = package.jit(scope[function])
    return scope[name]


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

    def windows(self, window: tuple[int, int]) -> Layout:
        """The layout of what max pooling over windows [height, width] of x [T, ..., H, W] makes."""
        if window == (1, 1):
            return self
        *outer, H, W = self.shape
        shape = torch.Size((*outer, H // window[0], W // window[1]))
        return Layout(shape, _dense(shape, self.order), self.order, None)

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
    """An uninitialised tensor."""
    with memory_for(shape, dtype, like.device):
        return torch.empty_strided(shape, strides, dtype=dtype, device=like.device)


@contextmanager
def memory_for(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Where a tensor of this shape and dtype is made.

    Raises:
        DeviceError: The device has not the memory; the error names the size.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        size = math.prod(shape) * dtype.itemsize / 2**30
        raise DeviceError(
            f"a neuron layer of {list(shape)} in {dtype} needs {size:.2f} GiB more than "
            f"{device} has free; take a smaller batch or fewer time steps"
        ) from error


def layout(x: torch.Tensor) -> tuple[torch.Tensor, Layout]:
    """x [T, ...] as the kernels read it, a copy only if nothing else will do, and its layout."""
    traced = any(isinstance(n, torch.SymInt) for n in (*x.shape, *x.stride()))
    lay = (_layout.__wrapped__ if traced else _layout)(x.shape, x.stride())
    if lay is not None:
        return x, lay
    repeated = x.shape[0] > 1 and x.stride(0) == 0  # a static drive is copied once, not T times
    source = x[0] if repeated else x
    with memory_for(source.shape, x.dtype, x.device):
        copy = source.contiguous()
    return layout(copy.expand_as(x))


@lru_cache(_CALLS)
def _layout(shape: torch.Size, stride: tuple[int, ...]) -> Layout | None:
    """The layout of such a tensor; None if a kernel cannot read it."""
    order = sorted((d for d in range(1, len(shape)) if shape[d] > 1), key=lambda d: (-stride[d], d))
    strides = _dense(shape, order)
    size = strides[0]
    parts: list[list[int]] = []  # [size, stride] of x[t], outermost first, merged where they may be
    for d in order:
        if parts and parts[-1][1] == stride[d] * shape[d]:
            parts[-1] = [parts[-1][0] * shape[d], stride[d]]
        else:
            parts.append([shape[d], stride[d]])
    dense = not parts or (len(parts) == 1 and parts[0][1] == 1)
    apart = shape[0] > 1 and stride[0] != size
    strided = None
    if dense and apart:
        strided = (stride[0], max(size, 1), 0)
    elif not dense and len(parts) == 2 and parts[1][1] == 1:
        strided = (stride[0], parts[1][0], parts[0][1])
    elif not dense:
        return None
    return Layout(shape, strides, tuple(order), strided)


def _dense(shape: torch.Size, order: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense [T, ...] whose other dimensions lie in ``order``, outermost first."""
    strides, size = [1] * len(shape), 1
    for d in reversed(order):
        strides[d] = size
        size *= shape[d]
    for d in range(1, len(shape)):
        if shape[d] <= 1:
            strides[d] = max(1, size if not order or d < min(order) else 1)
    strides[0] = size
    return tuple(strides)


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
        columns = min(power_of_two(C), 128)
        rows, per = lay.N // C, max(block // columns, 1)
        grid = (-(-rows // per), -(-C // columns))
        return Tile("rows", grid, (rows, C, 1), (per, columns), bool(rows % per or C % columns))
    columns = min(power_of_two(inner), block)
    rows, per = lay.N // (C * inner), max(block // columns, 1)
    grid = (-(-rows // per) * -(-inner // columns), C)
    masked = bool(rows % per or inner % columns)
    return Tile("planes", grid, (rows, C, inner), (per, columns), masked)


def power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class Reads:
    """How one parameter is read, see ``codegen.Spec``.

    Attributes:
        kind: As there.
        inner: As there.
        size: As there.
        kept: The dimensions of x[t] along which it varies, in the order in which the kernel takes them;
            None if it is written out for every neuron.
    """

    kind: Literal["scalar", "element", "channel"]
    inner: int = 0
    size: int = 0
    kept: tuple[int, ...] | None = ()

    def tensor(self, lay: Layout, parameter: torch.Tensor) -> torch.Tensor:
        """The parameter as the kernel reads it."""
        parameter = parameter.detach()
        if self.kind == "scalar" or (parameter.dim() == 1 and parameter.is_contiguous()):
            return parameter
        wide = parameter.expand(lay.shape[1:])
        if self.kept is None:
            whole = allocate(wide.shape, wide, wide.dtype, lay.strides[1:])
            return whole.copy_(wide)
        index = tuple(slice(None) if d in self.kept else 0 for d in range(wide.dim()))
        small = sorted(self.kept)
        return wide[index].permute(*(small.index(d) for d in self.kept)).contiguous()


def pools(x: torch.Tensor, window: tuple[int, int], params: Sequence[torch.Tensor]) -> bool:
    """Whether a max pooling after the neuron can be part of its kernels, for x [T, ..., H, W].

    Windows must tile x[t], in whose memory W is right inside H, and share the neuron's parameters; the
    states of a window's neurons over a chunk must find room in registers.
    """
    if x.dim() < 4 or 0 in x.shape or math.prod(window) * chunk(x.shape[0]) > _MOST_STATES:
        return False
    if x.shape[-2] % window[0] or x.shape[-1] % window[1]:
        return False
    order, H = layout(x)[1].order, x.dim() - 2
    return (
        H in order
        and order[order.index(H) + 1 :][:1] == (H + 1,)
        and all(p.numel() == 1 or (p.dim() >= 2 and p.shape[-2:] == (1, 1)) for p in params)
    )


def _reads(lay: Layout, tile: Tile, shape: tuple[int, ...]) -> Reads:
    """How a parameter of a shape that broadcasts against x[t] is read."""
    if math.prod(shape) == 1:
        return Reads("scalar")
    wide = (1,) * (len(lay.shape) - 1 - len(shape)) + shape
    varies = [d for d in lay.order if wide[d - 1] > 1]
    middle = lay.order[lay.order.index(varies[0]) : lay.order.index(varies[-1]) + 1]
    if list(middle) != varies:
        return Reads("element", 1, lay.N, None)
    inner, size = lay.strides[varies[-1]], math.prod(lay.shape[d] for d in middle)
    kept = tuple(d - 1 for d in middle)
    if tile.kind != "flat" and (inner, size) == (lay.strides[2], lay.shape[2]):
        return Reads("channel", kept=kept)
    return Reads("element", inner, size, kept)


@dataclass(frozen=True)
class Plan:
    """What does not depend on a call's values.

    Attributes:
        out: The layout of the spikes, which is x's unless a max pooling follows.
        tile: The tile of the spikes.
        spec: What the kernels' source is written from.
        names: Names of the parameters.
        reads: How they are read.
        launch: What Triton is told besides: warps of a program, registers of a thread.
    """

    out: Layout
    tile: Tile
    spec: Spec
    names: tuple[str, ...]
    reads: tuple[Reads, ...]
    launch: Mapping[str, int]


@lru_cache(_CALLS)
def _plan(
    lay: Layout,
    norm: bool,
    params: tuple[torch.Size, ...],
    neuron: str,
    surrogate: str,
    detach_reset: bool,
    window: tuple[int, int],
    backward: bool,
    half: bool,
) -> Plan:
    out = lay.windows(window)
    steps = chunk(lay.T)
    loop = steps < lay.T
    crowded = loop and backward and half
    members = math.prod(window)
    declared = Neuron.from_json(neuron, [torch.empty(())] * len(params))
    warps, per_thread = _program(steps, members, len(declared.starts), backward)
    block = 32 * warps * per_thread
    launch = {"num_warps": warps}
    # The interpreter compiles nothing, and loops over no number that is not known (Triton 3.6, NumPy 2.4).
    counted = not crowded or lay.T // steps != _UNROLLED or interpreted()
    if crowded:
        launch["maxnreg"] = _REGISTERS
    tile = channel_tile(out, block) if norm else flat_tile(out, block)
    channel = (lay.shape[2], *(1,) * (len(lay.shape) - 3)) if norm else ()
    shapes = dict.fromkeys(NORM, channel) if norm else {}
    shapes |= dict(zip(declared.tensors(), params, strict=True))
    reads = tuple(_reads(lay, tile, shape) for shape in shapes.values())
    spec = Spec(
        neuron,
        tuple(zip(shapes, (r.kind for r in reads), strict=True)),
        surrogate,
        detach_reset,
        steps,
        lay.T % steps if loop else 0,
        loop,
        counted,
        tile.kind,
        tile.masked,
        lay.N + block * members >= 2**31,
        lay.strided is not None,
        norm,
        window,
    )
    return Plan(out, tile, spec, tuple(shapes), reads, launch)


@dataclass(frozen=True)
class Call:
    """One neuron layer's kernels on one x, ready to be launched.

    Attributes:
        x: The input as it is read.
        lay: Its layout.
        plan: What its layout and the declaration decide.
        params: The parameters as they are read.
    """

    x: torch.Tensor
    lay: Layout
    plan: Plan
    params: tuple[torch.Tensor, ...]

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        norm: Sequence[torch.Tensor],
        params: Sequence[torch.Tensor],
        neuron: str,
        surrogate: str,
        detach_reset: bool,
        window: tuple[int, int] = (1, 1),
        backward: bool = False,
    ) -> Call:
        """The call for x [T, N, ...]; ``norm`` is empty, or mean, scale and shift, [C] each."""
        x, lay = layout(x)
        shapes = tuple(p.shape for p in params)
        how = (neuron, surrogate, detach_reset, window, backward, x.itemsize == 2)
        plan = _plan(lay, bool(norm), shapes, *how)
        tensors = zip(plan.reads, (*norm, *params), strict=True)
        return cls(x, lay, plan, tuple(read.tensor(lay, tensor) for read, tensor in tensors))

    @property
    def out(self) -> Layout:
        """The layout of the spikes."""
        return self.plan.out

    @property
    def spec(self) -> Spec:
        """What the source is written from."""
        return self.plan.spec

    def launch(self, source: str, name: str, tensors: Sequence[torch.Tensor]) -> None:
        """Run a kernel of :mod:`.codegen` on its tensors."""
        out, tile = self.out, self.plan.tile
        sizes: list[int] = [out.N]
        for r in self.plan.reads:
            sizes += [r.inner, r.size] if r.kind == "element" else []
        sizes += self.lay.strided or ()
        sizes += tile.sizes
        if self.spec.window != (1, 1):
            sizes += [out.shape[-1], self.lay.strides[-1]]
        chunks = self.lay.T // self.spec.steps
        arguments = [*tensors, *self.params, *sizes, chunks, *tile.blocks]
        elsewhere = self.x.is_cuda and self.x.device.index != torch.cuda.current_device()
        with torch.cuda.device(self.x.device) if elsewhere else nullcontext():
            # Products and sums are rounded one by one, as torch rounds them: spikes are the same.
            kernel = compiled(source, name)
            kernel[tile.grid](*arguments, enable_fp_fusion=False, **self.plan.launch)


def _program(steps: int, members: int, states: int, backward: bool) -> tuple[int, int]:
    """Warps of a program, and neurons, or windows of ``members`` neurons, of each of its threads.

    Measured on an H200: several a thread make wide loads, until their states fill its registers, which
    are those of all steps in the backward pass and of one in the forward pass.
    """
    if members > 1:
        return 8, 2 if steps * members <= CHUNK else 1
    if steps <= CHUNK // 2 or not backward:
        return 8, 4
    return 4, 4 if states == 1 else 2


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
