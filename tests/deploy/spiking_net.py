"""Networks that tests name by their file."""

from __future__ import annotations

import torch
from torch import nn

from spikeport.targets import cuda


class Spiking(nn.Module):
    """Images [N, 1, 28, 28] -> spikes [T, N, 10]."""

    def __init__(self, T: int = 4) -> None:
        super().__init__()
        self.T = T
        self.layers = cuda.LayerByLayer(
            nn.Flatten(), nn.Linear(784, 10), cuda.LIFNode(v_reset=None)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(2 * x.unsqueeze(0).repeat(self.T, 1, 1, 1, 1))
        return out


class Kept(Spiking):
    """The same with neurons that go on from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[2] = cuda.LIFNode(keep_state=True)


class KeptAndAsking(Kept):
    """That, and a forward that looks at a value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * x.max().item())
