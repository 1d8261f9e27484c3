"""Neurons of the real snnTorch in a loop over time, and what drives them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

snn = pytest.importorskip("snntorch")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.3


class Loop(nn.Module):
    """Every neuron on the same drive, its state handed on or kept on the module; all is recorded."""

    def __init__(self, *neurons: Any) -> None:
        super().__init__()
        self.neurons = nn.ModuleList(neurons)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        results = []
        for neuron in self.neurons:
            state = () if neuron.init_hidden else neuron.reset_mem()
            state = state if isinstance(state, tuple) else (state,)
            steps = []
            for t in range(x.shape[0]):
                out = neuron(x[t], *state)
                if not neuron.init_hidden:
                    state = out[0 if isinstance(neuron, (snn.RLeaky, snn.RSynaptic)) else 1 :]
                steps.append(out if isinstance(out, tuple) else (out,))
            results += [torch.stack(part) for part in zip(*steps, strict=True)]
        return results


def beta(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(7)) * 1.2
