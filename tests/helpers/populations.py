"""Populations of every reset and comparison, and what drives them."""

from __future__ import annotations

import itertools
from typing import Any

import torch

SHAPE = (7, 2, 3, 4)


def drive(seed: int = 0, grid: bool = False) -> torch.Tensor:
    """Inputs [T, N, C, L]; on the grid, sums and halves of sums hit the threshold exactly."""
    generator = torch.Generator().manual_seed(seed)
    if grid:
        return torch.randint(-8, 25, SHAPE, generator=generator) / 8
    return torch.randn(SHAPE, generator=generator) * 2 + 0.5


POPULATIONS = [
    {"reset": reset, "reset_at": at, "fires": fires, "v_reset": v_reset, "v_0": v_0}
    for reset, at, fires, v_reset, v_0 in itertools.product(
        ("hard", "soft", "none"), ("now", "next"), (">=", ">"), (0.0, -0.25), (0.0, 0.5)
    )
]


def name_of(population: dict[str, Any]) -> str:
    return " ".join(str(v) for v in population.values())
