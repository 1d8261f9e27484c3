"""Networks, inputs and comparisons that tests of conversions share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from spikeport.converters import sources
from spikeport.converters.capture import capture
from spikeport.converters.errors import CaptureError


class Net(nn.Module):
    """A network whose forward is a function of it and its inputs."""

    def __init__(self, run: Callable[..., Any], **children: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)


class SideBySide(nn.Module):
    """Networks with an input and an output each, by name: one conversion converts them all."""

    def __init__(self, nets: dict[str, nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleDict(nets)

    def forward(self, *inputs: torch.Tensor) -> dict[str, Any]:
        return {name: net(x) for (name, net), x in zip(self.nets.items(), inputs, strict=True)}


def groups(names: Iterable[str], size: int) -> list[Any]:
    """So many cases at a time, as parameters of a test that puts them side by side."""
    names = [*names]
    parts = [names[at : at + size] for at in range(0, len(names), size)]
    return [pytest.param(part, id=f"{part[0]} to {part[-1]}") for part in parts]


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    """Inputs whose spread reaches thresholds from both sides."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


def grid(*shape: int, seed: int = 0) -> torch.Tensor:
    """Multiples of an eighth: sums, and halves of sums, hit the threshold exactly."""
    return torch.randint(-8, 25, shape, generator=torch.Generator().manual_seed(seed)) / 8


def reference(net: nn.Module, *inputs: torch.Tensor) -> Any:
    """What the network itself gives, from v_0."""
    work = copy.deepcopy(net).eval()
    sources.reset(work)
    with torch.no_grad():
        return work(*inputs)


def different(a: Any, b: Any) -> list[str]:
    """Where outputs are not equal bit for bit, or not nested alike."""
    (left, structure), (right, other) = map(pytree.tree_flatten_with_path, (a, b))
    if structure != other:
        return [f"{structure} is not {other}"]
    return [
        pytree.keystr(path)
        for (path, x), (_, y) in zip(left, right, strict=True)
        if x.dtype != y.dtype or not torch.equal(x, y)
    ]


def equal(a: Any, b: Any) -> bool:
    """Whether outputs are equal bit for bit, and nested alike."""
    return not different(a, b)


def refused(net: nn.Module, *inputs: torch.Tensor) -> list[tuple[str, str]]:
    """(rule, module's path) of what keeps the network from being captured."""
    with pytest.raises(CaptureError) as caught:
        capture(net, inputs)
    return [(f.rule, f.where) for f in caught.value.findings]
