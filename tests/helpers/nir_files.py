"""Networks written as NIR's files, and what they are run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from spikeport import deploy

DT = 0.25
T, N = 12, 3
GENERATOR = torch.Generator().manual_seed(0)
#: On a grid that hits thresholds, with negative stretches and silence.
GRID = torch.randint(-6, 9, (T, N, 5), generator=GENERATOR) / 8


def exact() -> nn.Linear:
    """A layer that changes nothing."""
    layer = nn.Linear(5, 5, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(5))
    return layer


def compiled(net: nn.Module, inputs: Any, path: Path, **options: Any) -> Path:
    program = deploy.convert(net, inputs, target="nir", verify=False)
    return deploy.compile(program, path / "nir", cache=False, **options).path


def file(artifact: Path) -> Path:
    return artifact / "device" / "model.nir"
