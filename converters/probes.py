"""Inputs on which a neuron's details show: membranes that reach the threshold and no further."""

from __future__ import annotations

import torch

from .neurons import Neuron

#: How many neighbours of a computed input, on either side, are tried for an exact hit.
_NEIGHBOURS = 4


def probe_inputs(
    neuron: Neuron, T: int, features: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Inputs [T, 1, *features] where >= and > differ, and v_0 and v_reset from 0.

    Every other element is given, step by step, the input that takes its membrane to the threshold
    exactly, wherever rounding lets one do so. The rest lies on a grid of eighths of the threshold, so
    that sums, and halves of sums, hit it by themselves, and the last element is silent.
    """
    generator = torch.Generator().manual_seed(0)
    grid = torch.randint(-8, 17, (T, 1, *features), generator=generator) / 8
    threshold = torch.as_tensor(neuron.v_threshold, dtype=dtype).detach()
    x = grid.to(dtype) * threshold
    numbers = torch.arange(grid[0].numel()).reshape(1, *features)
    exact = (numbers % 2 == 0) & (
        (numbers // 2) % T <= torch.arange(T).reshape(T, 1, *[1] * len(features))
    )
    v = None
    with torch.no_grad():
        for t in range(T):
            x[t] = torch.where(exact[t], _critical(neuron, v, x[t], threshold), x[t])
            x[t].reshape(-1)[-1] = 0.0
            v = neuron.trace(x[t : t + 1], v)[2]
    return x


def _critical(
    neuron: Neuron, v: torch.Tensor | None, like: torch.Tensor, threshold: torch.Tensor
) -> torch.Tensor:
    """The input [1, ...] that charges the membrane from v to the threshold, or as near as it gets."""

    def charged(x: torch.Tensor) -> torch.Tensor:
        return neuron.trace(x.unsqueeze(0), v)[1][0]

    silent = charged(torch.zeros_like(like))
    slope = charged(torch.ones_like(like)) - silent
    solved = (threshold - silent) / slope
    # Where the charge does not grow with its input there is nothing to solve.
    solved = torch.where(torch.isfinite(solved), solved, like)
    best, distance = solved, torch.full_like(like, float("inf"))
    tiny = torch.finfo(like.dtype).eps * solved.abs()
    for k in range(-_NEIGHBOURS, _NEIGHBOURS + 1):
        candidate = solved + k * tiny
        away = (charged(candidate) - threshold).abs()
        best = torch.where(away < distance, candidate, best)
        distance = torch.minimum(away, distance)
    return best
