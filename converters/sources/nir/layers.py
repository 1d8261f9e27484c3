"""The nodes of a NIR graph as modules; they take and give one step of a signal, [N, ...]."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ...neurons import Neuron, Node, Readout
from ..base import Reading
from .graph import NEURONS, UnbuildableError, Unit, numbers, sequence, whole_steps
from .neurons import Discrete, discrete


class Scale(nn.Module):
    """Multiplies by a constant, element by element."""

    scale: torch.Tensor

    def __init__(self, scale: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, ...] -> [N, ...]."""
        return x * self.scale


class SumPool2d(nn.Module):
    """Sums of windows [h, w], as the convolution of each channel with ones, which is exact."""

    ones: torch.Tensor

    def __init__(self, size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("ones", torch.ones(1, 1, *size))
        self._stride, self._padding = tuple(stride), tuple(padding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, C, H', W']."""
        channels = x.shape[1]
        ones = self.ones.expand(channels, -1, -1, -1)
        return F.conv2d(x, ones, None, self._stride, self._padding, 1, channels)


class Delay(nn.Module):
    """What went in some time steps before, 0 at first; for each element its own number of steps."""

    def __init__(self, steps: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        super().__init__()
        self._lags = sorted({int(lag) for lag in steps.flat})
        for lag in self._lags[1:]:
            self.register_buffer(f"lag_{lag}", torch.from_numpy(steps == lag))

    @property
    def longest(self) -> int:
        """Time steps of the longest delay."""
        return self._lags[-1]

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        """[T, N, ...] -> [T, N, ...]."""
        return torch.stack([self.at(x_seq.unbind(), t) for t in range(len(x_seq))])

    def at(self, inputs: Sequence[torch.Tensor], t: int, like: torch.Tensor | None = None) -> Any:
        """Its output [N, ...] at step t; ``like`` gives the shape where there are no inputs yet."""
        zeros = torch.zeros_like(inputs[0] if like is None else like)
        first, *others = (inputs[t - lag] if t >= lag else zeros for lag in self._lags)
        for lag, late in zip(self._lags[1:], others, strict=True):
            first = torch.where(getattr(self, f"lag_{lag}"), late, first)
        return first


class Cell(nn.Module):
    """Neurons inside a loop of the graph, single-step: their state stays here between the steps."""

    def __init__(self, neuron: Neuron, fires: bool) -> None:
        super().__init__()
        self.neuron, self._fires = neuron, fires
        for name, tensor in neuron.tensors().items():
            self.register_buffer(name, tensor)
        self.reset()

    def reset(self) -> None:
        """Back to the state before the first step."""
        self._state: tuple[torch.Tensor, ...] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, ...] -> spikes [N, ...], or membrane potentials of neurons that do not fire."""
        first = self._state is None
        state = self.neuron.initial(x) if self._state is None else self._state
        spikes, self._state = self.neuron.single_step(x, state, 0 if first else 1)
        return spikes if self._fires else self._state[0]

    @property
    def reading(self) -> Reading:
        """What the capture is told."""
        return Reading(self.neuron, "s", readout=None if self._fires else _membrane)


def _membrane(v: torch.Tensor) -> torch.Tensor:
    return v


class Neurons(nn.Module):
    """A population with the gain of its input, over all steps or, in a loop, step by step."""

    gain: torch.Tensor

    def __init__(self, kind: Discrete, stepwise: bool) -> None:
        super().__init__()
        tensor = isinstance(kind.gain, torch.Tensor)
        self._gain = None if tensor else float(kind.gain)
        self.register_buffer("gain", kind.gain if tensor else None)
        self.neuron = neuron = kind.neuron
        self.layer: Cell | Node | Readout
        if stepwise:
            self.layer = Cell(neuron, kind.fires)
        elif kind.fires:
            self.layer = Node.of(neuron)
        else:
            self.layer = Readout(neuron.dynamics, v_0=neuron.v_0, **neuron.params)

    def reset(self) -> None:
        """As its cell's."""
        assert isinstance(self.layer, Cell)
        self.layer.reset()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, N, ...] -> [T, N, ...], or a step of it in a loop."""
        gain = self.gain if self._gain is None else self._gain
        y: torch.Tensor = self.layer(x if self._gain == 1.0 else x * gain)
        return y


def build(unit: Unit, dt: float, stepwise: bool) -> nn.Module:
    """The module of a node.

    Args:
        unit: The node.
        dt: Time step.
        stepwise: Whether it lies in a loop, so that neurons keep their state between calls.

    Raises:
        UnbuildableError: The node cannot be computed at this time step or at all.
    """
    if unit.kind in NEURONS or unit.kind == "Threshold":
        least = {n: np.min(v) for n, v in unit.fields.items() if n.startswith("tau")}
        short = [f"{n} of {v:g}" for n, v in least.items() if v < dt]
        if short:
            raise UnbuildableError(
                f"its {' and '.join(short)} is shorter than the time step of {dt:g}",
                "time constants of one time step or more",
                "take a shorter dt",
            )
        return Neurons(discrete(unit, dt), stepwise)
    if unit.kind == "Delay":
        steps = whole_steps(unit.fields["delay"], dt)
        if steps is None:
            raise UnbuildableError(
                f"its delay is no multiple of the time step of {dt:g}",
                "delays of whole time steps",
                "take a dt that divides it, or round the delay",
            )
        return Delay(steps)
    return _STATELESS[unit.kind](unit.fields)


def _float(value: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(value, dtype=np.float32))


def _filled(module: nn.Module, weight: Any, bias: Any = None) -> nn.Module:
    for name, value in (("weight", weight), ("bias", bias)):
        tensor = None if value is None else nn.Parameter(_float(value), requires_grad=False)
        setattr(module, name, tensor)
    return module


def _misshapen(name: str, value: Any, allowed: str) -> UnbuildableError:
    return UnbuildableError(
        f"its {name} is of shape {list(np.shape(value))}", allowed, f"mend the {name}"
    )


def _linear(f: Any) -> nn.Module:
    weight = f["weight"]
    if np.ndim(weight) != 2:
        raise _misshapen("weight", weight, "[out, in]")
    rows, columns = np.shape(weight)
    if "bias" in f and np.shape(f["bias"]) != (rows,):
        raise _misshapen("bias", f["bias"], f"[{rows}], one number for each row of its weight")
    empty = nn.Linear(columns, rows, bias=False, device="meta")
    return _filled(empty, weight, f.get("bias"))


def _conv(f: Any, dimensions: int) -> nn.Module:
    weight = f["weight"]
    if np.ndim(weight) != 2 + dimensions:
        sizes = ("X",) if dimensions == 1 else ("Y", "X")
        raise _misshapen("weight", weight, f"[out, in / groups, {', '.join(sizes)}]")
    kernel = np.shape(weight)[2:]
    stride, dilation = (_sizes(f[n], dimensions) for n in ("stride", "dilation"))
    weight, groups = _in_groups(np.asarray(weight), numbers(f["groups"])[0])
    pads, even = _padding(f["padding"], kernel, stride, dilation)
    kind: Callable[..., nn.Module] = nn.Conv1d if dimensions == 1 else nn.Conv2d
    channels = np.shape(weight)[1] * groups, np.shape(weight)[0]
    shape = (kernel, stride, even, dilation, groups)
    conv = _filled(kind(*channels, *shape, bias=False, device="meta"), weight, f["bias"])
    return conv if pads is None else nn.Sequential(nn.ConstantPad2d(pads, 0.0), conv)


def _in_groups(weight: Any, groups: int) -> tuple[Any, int]:
    """A dense weight that is 0 outside of blocks along its diagonal, as that of so many groups."""
    rows, columns = weight.shape[:2]
    if groups != 1 or not weight.size or weight[0, -1].any():
        return weight, groups
    for g in range(math.gcd(rows, columns), 1, -1):
        if rows % g or columns % g:
            continue
        owner = np.arange(rows)[:, None] * g // rows == np.arange(columns) * g // columns
        if not weight[~owner].any():
            inner = columns // g
            parts = [weight[r, (r * g // rows) * inner :][:inner] for r in range(rows)]
            return np.stack(parts), g
    return weight, 1


def _sizes(value: Any, dimensions: int) -> list[int]:
    return numbers(value)[:1] if dimensions == 1 else list(sequence(value))


def _padding(
    value: Any, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int, int, int] | None, list[int]]:
    """Zeros to put around an input first, or None, and those that a convolution adds itself."""
    nothing = [0] * len(kernel)
    if not isinstance(value, str):
        return None, _sizes(value, len(kernel))
    if value == "valid":
        return None, nothing
    if {*stride} != {1}:
        raise UnbuildableError(
            f"padding 'same' with a stride of {list(stride)}",
            "such padding with a stride of 1",
            "write the padding as numbers",
        )
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if not any(n % 2 for n in total):
        return None, [n // 2 for n in total]
    around = [side for n in reversed(total) for side in (n // 2, n - n // 2)]
    left, right, top, bottom = [*around, 0, 0][:4]
    return (left, right, top, bottom), nothing


def _pool(f: Any) -> list[Sequence[int]]:
    return [sequence(f[name]) for name in ("kernel_size", "stride", "padding")]


def _flatten(f: Any) -> nn.Module:
    start, end = (numbers(f[n])[0] for n in ("start_dim", "end_dim"))
    return nn.Flatten(*(n if n < 0 else n + 1 for n in (start, end)))


#: The modules of the nodes that compute every step alone; NIR's dimensions do not count the batch.
_STATELESS: dict[str, Callable[[Any], nn.Module]] = {
    "Input": lambda f: nn.Identity(),
    "Output": lambda f: nn.Identity(),
    "Affine": _linear,
    "Linear": _linear,
    "Scale": lambda f: Scale(_float(f["scale"])),
    "Conv1d": lambda f: _conv(f, 1),
    "Conv2d": lambda f: _conv(f, 2),
    "AvgPool2d": lambda f: nn.AvgPool2d(*_pool(f)),  # type: ignore[arg-type]
    "SumPool2d": lambda f: SumPool2d(*_pool(f)),
    "Flatten": _flatten,
}
