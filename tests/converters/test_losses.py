"""Losses of spikes against snnTorch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spikeport.converters import losses
from spikeport.converters.errors import UsageError

T, N, C = 7, 4, 3


@pytest.mark.snntorch
@pytest.mark.parametrize("name", ["ce_count", "ce_rate", "ce_temporal", "mse_count"])
def test_losses_are_snntorchs(name: str) -> None:
    functional = pytest.importorskip("snntorch.functional")
    generator = torch.Generator().manual_seed(0)
    spikes = (torch.rand(T, N, C, generator=generator) > 0.7).float()
    spikes[:, 0, 1] = 0.0  # one stays silent
    label = torch.randint(C, (N,), generator=generator)
    found = []
    for function in (losses.named(name), getattr(functional, f"{name}_loss")()):
        leaf = spikes.clone().requires_grad_()
        loss: Any = function(leaf, label)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        found.append((loss.detach().reshape(()), grad))
    torch.testing.assert_close(*(loss for loss, _ in found))
    torch.testing.assert_close(*(grad for _, grad in found))


def test_mse_is_of_firing_rates() -> None:
    spikes = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]]])  # [T = 2, N = 1, C = 2]
    label = torch.tensor([0])
    assert losses.mse(spikes, label) == pytest.approx((0.5**2 + 0.0) / 2)
    assert losses.mse(spikes.mean(0), label) == losses.mse(spikes, label)


def test_losses_in_time_refuse_rates() -> None:
    for name in losses.LOSSES.keys() - {"mse"}:
        with pytest.raises(UsageError, match=rf"{name} takes spikes \[T, N, C\]"):
            losses.named(name)(torch.ones(N, C), torch.zeros(N, dtype=torch.int64))
