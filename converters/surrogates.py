"""Surrogate gradients: what stands in for the derivative of the spike's step, in training only.

Each is declared once, as the derivative of its primitive at ``u = h - v_threshold``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Surrogate:
    """A surrogate gradient.

    Attributes:
        name: Its name in the field.
        alpha: Its sharpness.
        derivative: ``derivative(u, alpha)`` for ``u`` of any shape.
    """

    name: str
    alpha: float
    derivative: Callable[[torch.Tensor, float], torch.Tensor]

    def __repr__(self) -> str:
        return f"{self.name}(alpha={self.alpha})"


def ATan(alpha: float = 2.0) -> Surrogate:  # noqa: N802 -- a kind of object, named as in the field
    """``alpha / 2 / (1 + (pi / 2 alpha u)^2)``, Fang et al. 2021, arXiv:2007.05785."""
    return Surrogate("ATan", alpha, lambda u, a: a / 2 / (1 + (math.pi / 2 * a * u).square()))


def Sigmoid(alpha: float = 4.0) -> Surrogate:  # noqa: N802
    """``alpha sigmoid(alpha u) (1 - sigmoid(alpha u))``."""

    def derivative(u: torch.Tensor, a: float) -> torch.Tensor:
        s = torch.sigmoid(a * u)
        return a * s * (1 - s)

    return Surrogate("Sigmoid", alpha, derivative)


class _Fire(torch.autograd.Function):
    """Forward: the spikes as given. Backward: the surrogate's derivative at u."""

    @staticmethod
    def forward(ctx: Any, u: torch.Tensor, fired: torch.Tensor, surrogate: Surrogate) -> Any:
        ctx.save_for_backward(u)
        ctx.surrogate = surrogate
        return fired.to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (u,) = ctx.saved_tensors
        surrogate = ctx.surrogate
        return grads[0] * surrogate.derivative(u, surrogate.alpha), None, None


def fire(u: torch.Tensor, fired: torch.Tensor, surrogate: Surrogate) -> torch.Tensor:
    """Spikes of u's dtype where ``fired``, differentiable in ``u`` through the surrogate."""
    apply: Any = _Fire.apply
    spikes: torch.Tensor = apply(u, fired, surrogate)
    return spikes
