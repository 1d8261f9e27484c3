"""Inputs on which a neuron's details show: membranes that just reach the threshold, or just do not."""

from __future__ import annotations

import torch

from .neurons import Neuron

#: How many neighbours of a computed input, on either side, are tried for an exact hit.
_NEIGHBOURS = 4


def probe_inputs(
    neuron: Neuron, T: int, features: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Inputs [T, 1, *features] where >= and > differ, and one v_0 or v_reset from another.

    Each element of each step is one of three at random: the input that takes the membrane to the
    threshold exactly, wherever rounding lets one do so; the one that leaves it right below; or a
    number of eighths of the threshold, whose sums hit it by themselves. The last element is silent.
    """
    generator = torch.Generator().manual_seed(0)
    grid = torch.randint(-8, 17, (T, 1, *features), generator=generator) / 8
    kind = torch.randint(0, 3, grid.shape, generator=generator)
    threshold = torch.as_tensor(neuron.v_threshold, dtype=dtype).detach()
    x = grid.to(dtype) * threshold
    state = None
    with torch.no_grad():
        for t in range(T):
            at, below = _critical(neuron, state, x[t], threshold)
            x[t] = torch.where(kind[t] == 0, at, torch.where(kind[t] == 1, below, x[t]))
            x[t].reshape(-1)[-1] = 0.0
            state = neuron.trace(x[t : t + 1], state)[2]
    return x


def _critical(
    neuron: Neuron,
    state: tuple[torch.Tensor, ...] | None,
    like: torch.Tensor,
    threshold: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [1, ...] that charge the membrane from a state to the threshold, and right below it."""

    def charged(x: torch.Tensor) -> torch.Tensor:
        return neuron.trace(x.unsqueeze(0), state)[1][0]

    silent = charged(torch.zeros_like(like))
    solved = (threshold - silent) / (charged(torch.ones_like(like)) - silent)
    # Where the charge does not grow with its input there is nothing to solve.
    solved = torch.where(torch.isfinite(solved), solved, like)
    at = below = solved
    nearest = torch.full_like(like, float("inf"))
    highest = -nearest
    step = torch.finfo(like.dtype).eps * solved.abs()
    for k in range(-_NEIGHBOURS, _NEIGHBOURS + 1):
        candidate = solved + k * step
        h = charged(candidate)
        away = (h - threshold).abs()
        at, nearest = torch.where(away < nearest, candidate, at), torch.minimum(away, nearest)
        under = (h < threshold) & (h > highest)
        below, highest = torch.where(under, candidate, below), torch.where(under, h, highest)
    return at, below
