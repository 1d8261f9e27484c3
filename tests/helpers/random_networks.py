"""Random networks for hypothesis: topology, neurons, shapes and time steps; they shrink to small ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from networks import rand
from torch import nn

from spikeport.converters import neurons as declared
from spikeport.converters.neurons import Neuron, Node, Readout
from spikeport.converters.sources.nir.layers import Cell

#: Settings of every test of them: the same networks each time.
RANDOM = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

_PARTS = (
    *("conv", "conv+norm", "norm", "pool", "average", "neuron", "residual", "cat", "relu"),
    *("gate", "group", "stride", "loop"),
)
#: Parts in a row without a neuron after which sums on a grid need more digits than float32 has.
_MOST_LINEAR = 2
_SILENT = ("pool", "relu", "neuron", "loop")  # parts that need no further digits


def sequence(x: torch.Tensor, steps: int) -> torch.Tensor:
    """[N, ...] at each of T steps."""
    return x.unsqueeze(0).repeat(steps, *[1] * x.dim())


def settled(net: nn.Module, seed: int = 0) -> nn.Module:
    """With batch norms that do something."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-1, 1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                with torch.no_grad():
                    module.weight.uniform_(0.5, 3, generator=generator)
                    module.bias.uniform_(-0.5, 1, generator=generator)
    return net.eval()


def on_grid(net: nn.Module, seed: int = 0) -> nn.Module:
    """With weights and batch norms whose sums and folds are exact in float32, in any order."""
    generator = torch.Generator().manual_seed(seed)

    def choose(like: torch.Tensor, *values: float) -> torch.Tensor:
        index = torch.randint(0, len(values), like.shape, generator=generator)
        return torch.tensor(values)[index]

    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eps = 0.125  # not all releases of torch take 0
                module.running_mean.copy_(choose(module.running_mean, -0.5, 0.0, 0.5))
                module.running_var.copy_(choose(module.running_var, 0.125, 0.875, 3.875))
                module.weight.copy_(choose(module.weight, 0.5, 1.0, 2.0))
                module.bias.copy_(choose(module.bias, -0.5, 0.0, 1.0))
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.copy_(choose(module.weight, -0.5, 0.0, 0.0, 0.5, 1.0))
                if module.bias is not None:
                    module.bias.copy_(choose(module.bias, -0.5, 0.0, 0.5))
    return net.eval()


@st.composite
def stacks(draw: st.DrawFn, exact: bool = False) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A small network of layers, neurons, sums, gates and loops, and its input.

    ``exact``: its weights and input are such that every drive is exact in float32.
    """
    steps, batch = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    static = draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 2**16)))
    channels, size, parts, linear = 2, 8, [], 0
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(_PARTS)) if linear < _MOST_LINEAR else "neuron"
        if size < 4 and kind in ("pool", "average", "stride"):
            continue
        part, out = draw(_part(kind, channels))
        size //= 2 if kind in ("pool", "average", "stride") else 1
        linear = linear + (kind not in _SILENT) if kind not in ("neuron", "loop") else 0
        parts.append((kind, part))
        channels = out
    parts.append(("neuron", draw(neurons(channels))))
    if draw(st.booleans()):
        parts.append(("flatten", nn.Linear(channels * size * size, 3)))
        parts.append(("neuron", draw(neurons(3, spatial=False))))
    if draw(st.integers(0, 3)) == 3:
        parts.append(("neuron", Readout(declared.LIF, tau=2.0, v_rest=0.0)))
    shape = (batch, 2, 8, 8) if static else (steps, batch, 2, 8, 8)
    ending = draw(st.sampled_from(["sequence", "mean", "both"]))
    net = Stack(parts, steps if static else 0, ending)
    x = rand(*shape)
    return (on_grid(net), ((2 * x).round() / 2,)) if exact else (settled(net), (x,))


@st.composite
def _part(draw: st.DrawFn, kind: str, channels: int) -> tuple[nn.Module, int]:
    """A part of a network for [T, N, channels, H, W], and the channels that it gives."""
    if kind in ("conv", "conv+norm", "stride"):
        out = draw(st.integers(1, 4))
        wide = draw(st.sampled_from([1, 3]))
        stride = 2 if kind == "stride" else 1
        bias = draw(st.booleans())
        part: nn.Module = nn.Conv2d(channels, out, wide, stride, padding=wide // 2, bias=bias)
        return (nn.Sequential(part, nn.BatchNorm2d(out)) if kind == "conv+norm" else part), out
    if kind == "group":
        return nn.Conv2d(channels, channels, 3, padding=1, groups=channels), channels
    if kind in ("residual", "gate"):
        return nn.Conv2d(channels, channels, 1), channels
    if kind == "cat":
        return nn.Conv2d(channels, channels, 1), 2 * channels
    if kind == "loop":
        return Loop(channels, draw(populations(channels))), channels
    if kind == "neuron":
        return draw(neurons(channels)), channels
    simple: dict[str, Callable[[], nn.Module]] = {
        "norm": lambda: nn.BatchNorm2d(channels),
        "pool": lambda: nn.MaxPool2d(2),
        "average": lambda: nn.AvgPool2d(2),
        "relu": nn.ReLU,
    }
    return simple[kind](), channels


@st.composite
def neurons(draw: st.DrawFn, channels: int, spatial: bool = True) -> nn.Module:
    """A layer of neurons of some kind."""
    return Node.of(draw(populations(channels, spatial)))


@st.composite
def populations(draw: st.DrawFn, channels: int, spatial: bool = True) -> Neuron:
    """A declaration: kind, parameters for all or for each channel, reset, comparison, v_0."""

    def value(low: float, high: float) -> Any:
        if not draw(st.booleans()):
            return low
        return torch.linspace(low, high, channels).reshape(channels, *[1, 1] * spatial)

    kind = draw(
        st.sampled_from(["IF", "LIF", "ParametricLIF", "Leaky", "Lapicque", "Synaptic", "CubaLIF"])
    )
    params: dict[str, Any] = {}
    if kind == "LIF":
        params = {"tau": value(2.0, 5.0), "v_rest": 0.0, "decay_input": draw(st.booleans())}
    elif kind == "ParametricLIF":
        params = {"w": torch.tensor(0.4), "v_rest": 0.1, "decay_input": draw(st.booleans())}
    elif kind == "Leaky":
        params = {"beta": value(0.9, 0.3)}
    elif kind == "Lapicque":
        params = {"R": 2.0, "C": 3.0, "dt": 1.0}
    elif kind == "Synaptic":
        params = {"alpha": value(0.5, 0.9), "beta": 0.75}
    elif kind == "CubaLIF":
        params = {"tau_syn": 2.0, "tau_mem": value(3.0, 4.0), "r": 2.0, "v_rest": 0.0}
    reset, at = draw(
        st.sampled_from(
            [
                *(("hard", at) for at in ("now", "next", "before")),
                *(("soft", at) for at in ("now", "next", "before", "ahead")),
                ("none", "now"),
            ]
        )
    )
    return Neuron(
        getattr(declared, kind),
        params,
        v_threshold=value(1.0, 0.5),
        v_reset=draw(st.sampled_from([0.0, -0.25, 0.1])),
        reset=reset,
        reset_at=at,
        fires=draw(st.sampled_from([">=", ">"])),
        v_0=draw(st.sampled_from([0.0, 0.125])),
    )


class Loop(nn.Module):
    """Neurons whose input depends on their own last spikes, [T, N, C, H, W]."""

    def __init__(self, channels: int, neuron: Neuron) -> None:
        super().__init__()
        self.cell, self.back = Cell(neuron, fires=True), nn.Conv2d(channels, channels, 1)

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        self.cell.reset()
        spikes = [torch.zeros_like(x_seq[0])]
        for x in x_seq:
            spikes.append(self.cell(x + self.back(spikes[-1])))
        return torch.stack(spikes[1:])


class Stack(nn.Module):
    """Parts, one after the other; a static image is repeated over time first."""

    def __init__(self, parts: list[tuple[str, nn.Module]], repeat: int, ending: str) -> None:
        super().__init__()
        self.kinds = [kind for kind, _ in parts]
        self.layers = nn.ModuleList(part for _, part in parts)
        self.repeat, self.ending = repeat, ending

    def forward(self, x: torch.Tensor) -> Any:
        if self.repeat:
            x = sequence(x, self.repeat)
        for kind, part in zip(self.kinds, self.layers, strict=True):
            if kind in ("neuron", "loop"):
                x = part(x)
            elif kind == "flatten":
                x = part(x.flatten(2))
            else:
                y = part(x.flatten(0, 1)).unflatten(0, x.shape[:2])
                joined = {
                    "residual": lambda x=x, y=y: x + y,
                    "gate": lambda x=x, y=y: x * y,
                    "cat": lambda x=x, y=y: torch.cat([x, y], 2),
                }
                x = joined[kind]() if kind in joined else y
        if self.ending == "both":
            return {"spikes": x, "rate": x.mean(0)}
        return x.mean(0) if self.ending == "mean" else x

    def extra_repr(self) -> str:
        return f"{' '.join(self.kinds)}, repeat={self.repeat}, ending={self.ending}"
