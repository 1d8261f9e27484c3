"""Losses of classifiers that answer with spikes: spikes [T, N, C] and classes [N] to one number.

A firing rate [N, C], which a network has averaged over time itself, is taken where the loss is one of
rates. All is static shapes and differentiable operations, so that a compiler which traces and
differentiates a forward takes them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F

from .errors import UsageError

Loss: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def ce_count(spikes: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the spike counts, Eshraghian et al. 2023, arXiv:2109.12894."""
    return F.cross_entropy(_in_time("ce_count", spikes).sum(0), label)


def ce_rate(spikes: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Mean over time of the cross-entropy of each step's spikes, ibid."""
    steps = _in_time("ce_rate", spikes).unbind()
    return torch.stack([F.cross_entropy(s, label) for s in steps]).mean()


def ce_temporal(spikes: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the negative times of first spikes, ibid.

    A neuron that stays silent counts as firing at the last step. The time falls by 1 with the spike at
    that time, whose derivative is so taken to be -1.
    """
    spikes = _in_time("ce_temporal", spikes)
    T = spikes.shape[0]
    fixed = spikes.detach()
    time = (fixed.cumsum(0) == 0).to(spikes.dtype).sum(0).clamp(max=T - 1)
    steps = torch.arange(T, device=spikes.device).reshape(T, 1, 1).to(spikes.dtype)
    there = (steps == time).to(spikes.dtype)
    time = time - ((spikes - fixed) * there).sum(0)
    return F.cross_entropy(-time, label)


def mse_count(spikes: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the spike counts, T for the class and 0 for others, over T, ibid."""
    spikes = _in_time("mse_count", spikes)
    T = spikes.shape[0]
    return F.mse_loss(spikes.sum(0), T * _one_hot(label, spikes)) / T


def mse(spikes: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the firing rates, 1 for the class and 0 for others."""
    rate = rates(spikes)
    return F.mse_loss(rate, _one_hot(label, rate))


LOSSES: dict[str, Loss] = {f.__name__: f for f in (ce_count, ce_rate, ce_temporal, mse_count, mse)}


def named(name: str) -> Loss:
    """The loss of this name.

    Raises:
        UsageError: There is none; the error names those there are.
    """
    if name not in LOSSES:
        near = difflib.get_close_matches(str(name), LOSSES, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"no loss {name!r}; there are {', '.join(LOSSES)}{hint}")
    return LOSSES[name]


def rates(spikes: torch.Tensor) -> torch.Tensor:
    """Firing rates [N, C] of spikes [T, N, C], or of firing rates."""
    return spikes if spikes.dim() == 2 else spikes.mean(0)


def _in_time(loss: str, spikes: torch.Tensor) -> torch.Tensor:
    if spikes.dim() != 3:
        raise UsageError(
            f"{loss} takes spikes [T, N, C], and the network gives {list(spikes.shape)}; return every "
            "step's spikes, or take mse, which is of firing rates [N, C]"
        )
    return spikes


def _one_hot(label: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[N, C] of ``like``'s dtype, without a look at the labels' values."""
    classes = torch.arange(like.shape[-1], device=label.device)
    return (label.unsqueeze(1) == classes).to(like.dtype)
